"""Addresses are read in one way, and objects are written whole or not at all."""

from __future__ import annotations

import os
import pickle
import threading
from collections.abc import Callable, Iterator
from contextlib import suppress
from pathlib import Path

import boto3
import pyarrow as pa
import pytest

from fewstep.data.tables import table_rows
from fewstep.errors import UserError
from fewstep.storage import Storage

MB = 2**20


def keys(bucket: str) -> set[str]:
    """Every key of a bucket, as boto3 lists them."""
    client = boto3.client("s3", endpoint_url=os.environ["AWS_ENDPOINT_URL"], region_name="us-east-1")
    found = client.list_objects_v2(Bucket=bucket.removeprefix("s3://"))
    return {entry["Key"] for entry in found.get("Contents", [])}


@pytest.mark.parametrize(
    "prefix", ["my runs", "my%20runs", "a+b", "what?x=1", "no#1", "é/ü", "100%", "a&b='c'", "back\\slash"]
)
def test_an_s3_address_is_the_key_as_it_is_written(prefix: str, s3_bucket: str) -> None:
    for slashes in ("", "/", "//"):
        storage = Storage.at(f"{s3_bucket}/{prefix}{slashes}")
        assert storage.root == f"{s3_bucket}/{prefix}"
        storage.write("o.txt", b"caption\n")
        assert keys(s3_bucket) == {f"{prefix}/o.txt"}
    assert Storage.at(f"{s3_bucket}//").list() == {f"{prefix}/o.txt": 8}
    assert [row.values for row in table_rows(f"{s3_bucket}/{prefix}/o.txt")] == [{"caption": "caption"}]


@pytest.mark.parametrize("address", ["s3://", "s3:///a", "s3://b//a", "s3://b/./a", "s3://b/../a"])
def test_an_s3_address_that_pyarrow_or_ray_would_read_otherwise_is_refused(address: str) -> None:
    with pytest.raises(UserError, match="has to name a bucket, and no part") as caught:
        Storage.at(address)
    assert address in str(caught.value)


@pytest.mark.parametrize(
    ("address", "hint"),
    [
        ("s3:/b/x", r"did you mean s3://b/x\?"),
        ("s3:b/x", r"did you mean s3://b/x\?"),
        ("S3:/b/x", r"did you mean s3://b/x\?"),
        ("gs:/b/x", "use a local folder"),
        ("https:/host/x", "use a local folder"),
        ("models:/name@champion", "use a local folder"),
        ("C:\\data", "path of Windows"),
        ("d:/data", "path of Windows"),
        ("\\\\host\\share", "path of Windows"),
    ],
)
def test_what_is_nearly_an_address_does_not_become_a_folder(address: str, hint: str) -> None:
    for opened in (Storage.at, Storage.of_file):
        with pytest.raises(UserError, match=hint) as caught:
            opened(address)
        assert f"the address {address} can't be opened" in str(caught.value)


@pytest.mark.parametrize("name", ["a:b", "run:1/x", "./s3:/b", "./C:\\data", "C", "s3", "a/b:/c"])
def test_a_folder_s_name_may_have_a_colon(name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    Storage.at(name).write("o.txt", b"caption")
    assert (tmp_path / name / "o.txt").read_bytes() == b"caption"


@pytest.mark.parametrize("name", ["plain", "my runs", "my%20runs", "a+b", "what?x=1", "no#1", "é"])
def test_a_file_address_names_the_folder_s_own_storage(name: str, tmp_path: Path) -> None:
    (folder := tmp_path / name).mkdir()
    (folder / "t.txt").write_text("caption")
    assert Storage.at(f"{folder}/").root == str(folder), "a path is no address: nothing in it is decoded"
    for uri in (folder.as_uri(), f"{folder.as_uri()}/", folder.as_uri().replace("file://", "file:")):
        assert Storage.at(uri).root == str(folder)
        assert Storage.at(uri.replace("file:///", "file://localhost/")).root == str(folder)
        written = uri.rstrip("/") + "/t.txt"
        assert [row.values for row in table_rows(written)] == [{"caption": "caption"}]


@pytest.mark.parametrize("address", ["file://elsewhere/data", "file:data", "file://", "file:"])
def test_a_file_address_without_an_absolute_path_of_this_machine_is_refused(address: str) -> None:
    with pytest.raises(UserError, match="write an absolute path of this machine"):
        Storage.at(address)


def test_a_link_is_written_through_and_stays(tmp_path: Path) -> None:
    (tmp_path / "there").mkdir()
    (tmp_path / "link.json").symlink_to("there/real.json")
    for content in (b"1", b"2"):
        Storage.at(tmp_path).write("link.json", content)
        assert (tmp_path / "link.json").is_symlink()
        assert (tmp_path / "there" / "real.json").read_bytes() == content
    assert sorted(os.listdir(tmp_path / "there")) == ["real.json"], "nothing is left beside it"


class FlakyS3:
    """An S3 server in front of moto's that answers the requests that `refuses` picks with an error.

    Attributes:
        requests: (method, query) of all.
    """

    def __init__(self) -> None:
        from moto.server import DomainDispatcherApplication, create_backend_app
        from werkzeug.serving import WSGIRequestHandler, make_server

        class Silent(WSGIRequestHandler):
            def log(self, *_: object) -> None:
                pass

        self.refuses: Callable[[str, str], bool] = lambda method, query: False
        self.requests: list[tuple[str, str]] = []
        self._moto = DomainDispatcherApplication(create_backend_app)
        self._server = make_server("127.0.0.1", 0, self._answer, threaded=True, request_handler=Silent)
        threading.Thread(target=self._server.serve_forever, daemon=True).start()
        self.url = f"http://127.0.0.1:{self._server.server_port}"

    def _answer(self, request, start):
        method, query = request["REQUEST_METHOD"], request.get("QUERY_STRING", "")
        self.requests.append((method, query))
        if self.refuses(method, query):
            start("403 Forbidden", [("Content-Type", "application/xml")])
            return [b"<Error><Code>AccessDenied</Code><Message>no</Message></Error>"]
        return self._moto(request, start)

    def stop(self) -> None:
        self._server.shutdown()


@pytest.fixture
def flaky_s3(s3_bucket: str, monkeypatch: pytest.MonkeyPatch) -> Iterator[FlakyS3]:
    server = FlakyS3()  # moto's buckets are the process's
    monkeypatch.setenv("AWS_ENDPOINT_URL", server.url)
    yield server
    server.stop()


def test_small_objects_are_one_request_that_leaves_nothing_behind(flaky_s3: FlakyS3, s3_bucket: str) -> None:
    ours = Storage.at(s3_bucket)
    for storage in (ours, pickle.loads(pickle.dumps(ours))):
        flaky_s3.requests.clear()
        storage.write("object", bytes(MB))
        assert flaky_s3.requests == [("PUT", "")], "no upload is begun that a killed writer could leave open"


@pytest.mark.parametrize("size", [MB, 25 * MB])
def test_an_upload_that_fails_publishes_nothing(flaky_s3: FlakyS3, s3_bucket: str, size: int) -> None:
    storage = Storage.at(s3_bucket)
    flaky_s3.refuses = lambda method, query: method == "PUT" and (size == MB or "partNumber=2" in query)
    with pytest.raises(UserError, match=r"can't be reached or used \(.*AccessDenied|ACCESS_DENIED"):
        storage.write("object", bytes(size))
    assert keys(s3_bucket) == set()
    flaky_s3.refuses = lambda method, query: False
    storage.write("object", bytes(size))
    assert storage.list() == {"object": size}


def test_pyarrow_publishes_what_a_stream_held_when_an_exception_left_it(s3_bucket: str) -> None:
    # Why `Storage.write` takes the whole content: when this fails, pyarrow has learned to abort.
    storage = Storage.at(s3_bucket)
    with (
        suppress(pa.ArrowInvalid),
        storage.filesystem.open_output_stream(storage.path("o")) as stream,
    ):
        stream.write(b"the first half")
        raise pa.ArrowInvalid("the second half could not be made")
    assert storage.read("o") == b"the first half"
