"""Addresses are read in one way, and objects are written whole or not at all."""

from __future__ import annotations

import os
import pickle
import socket
import threading
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from pathlib import Path

import boto3
import pyarrow as pa
import pytest

from fewstep.data.tables import table_rows
from fewstep.errors import UnreachableError, UserError
from fewstep.storage import Storage, through_outages

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


@pytest.mark.parametrize(
    "address", ["s3://AKIA:secret+/key@bucket/data", "s3://AKIA:secret@bucket", "gs://me:secret@bucket"]
)
def test_an_address_with_a_password_is_refused_and_the_password_not_repeated(address: str) -> None:
    with pytest.raises(UserError, match=r"holds a password.*set AWS_ACCESS_KEY_ID") as refused:
        Storage.at(address)
    assert "secret" not in str(refused.value)
    Storage.at("s3://bucket/a:b@c")  # a key may hold such characters


def test_a_folder_is_copied_to_this_machine_and_deleted(s3_bucket: str, tmp_path: Path) -> None:
    for number, root in enumerate((f"{s3_bucket}/run", str(tmp_path / "run"))):
        run, here = Storage.at(root), tmp_path / f"copy-{number}"
        for path in ("best-1/card.json", "best-1/sub/w", "best-10/card.json"):
            run.write(path, path.encode())
        assert run.copy_to(here, "best-1")
        assert (here / "card.json").read_bytes() == b"best-1/card.json"
        assert (here / "sub" / "w").read_bytes() == b"best-1/sub/w"
        assert len([*here.rglob("*")]) == 3
        run.delete(["best-1/card.json", "best-1/sub/w"])
        assert not run.copy_to(here, "best-1")
        assert [*run.list()] == ["best-10/card.json"]


def test_an_object_is_created_once_whoever_else_tries(s3_bucket: str, tmp_path: Path) -> None:
    for root in (f"{s3_bucket}/run", str(tmp_path / "run")):
        writers = [Storage.at(root) for _ in range(4)]
        with ThreadPoolExecutor(4) as threads:
            for turn in range(5):
                created = [
                    *threads.map(
                        lambda one, turn=turn, writers=writers: writers[one].create(
                            f"a/{turn}", bytes([one])
                        ),
                        range(4),
                    )
                ]
                assert sorted(created) == [False, False, False, True]
                assert writers[0].read(f"a/{turn}") == bytes([created.index(True)])
        assert writers[0].list("a") == {f"a/{turn}": 1 for turn in range(5)}
    assert not [*tmp_path.rglob("*.partial")]


def test_what_can_not_be_created_says_why(flaky_s3: FlakyS3, s3_bucket: str) -> None:
    flaky_s3.refuses = lambda method, query: method == "PUT"
    with pytest.raises(UnreachableError, match=r"can't be reached or used \(.*AccessDenied"):
        Storage.at(s3_bucket).create("o", b"1")
    with pytest.raises(UserError, match=r"mock://.* use a local folder or s3://"):
        Storage.at("mock://somewhere").create("o", b"1")


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


def test_a_run_waits_for_an_s3_that_is_away_and_says_so_once(s3_bucket, monkeypatch, capsys) -> None:
    from moto.server import ThreadedMotoServer

    Storage.at(f"{s3_bucket}/data").write("x", b"content")
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    monkeypatch.setenv("AWS_ENDPOINT_URL", f"http://127.0.0.1:{port}")  # where nobody listens yet
    storage = Storage.at(f"{s3_bucket}/data")
    with pytest.raises(UnreachableError, match="can't be reached"):
        through_outages(lambda: storage.read("x"), "reading x", seconds=0.1)
    server = ThreadedMotoServer(ip_address="127.0.0.1", port=port, verbose=False)  # with the same buckets
    threading.Timer(1.5, server.start).start()
    capsys.readouterr()
    assert through_outages(lambda: storage.read("x"), "reading x", seconds=120) == b"content"
    [line] = capsys.readouterr().out.splitlines()
    assert line.startswith("reading x waits for the storage, up to 2 minutes: s3://")
    server.stop()


def test_a_file_that_is_not_there_is_no_outage(tmp_path) -> None:
    attempts = []

    def attempt() -> None:
        attempts.append(1)
        raise FileNotFoundError("x")

    with pytest.raises(FileNotFoundError):
        through_outages(attempt, "reading x")
    assert len(attempts) == 1
