"""Storage of datasets and checkpoints: a local folder, `s3://bucket/prefix`, or another address that pyarrow.fs takes.

Addresses are read in one way everywhere. An s3:// address is the key as it is written, as the aws command and boto3
read it: blanks, `+`, `%20`, `?` and `#` are characters of the key, and nothing is decoded. A file: address is a URI, in
which `%20` is a blank; it names the same storage as the folder's own path. Slashes at the end mean nothing. Ray Train
is given our file system and path, so that it does not read addresses itself.

For S3, endpoint and credentials come from the usual environment variables: `AWS_ENDPOINT_URL_S3` or `AWS_ENDPOINT_URL`
(http:// or https://), `AWS_REGION` or `AWS_DEFAULT_REGION`, `AWS_ACCESS_KEY_ID`, `AWS_SECRET_ACCESS_KEY`,
`AWS_SESSION_TOKEN`; without a pair of keys, from AWS's own chain (profile, instance role). Time limits are short, so
that an unreachable endpoint is reported within seconds.

Objects are written whole or not at all, also when power is cut: locally to a hidden file that is renamed when its
content is on the disk, on S3 by one upload, which becomes visible when it is complete. A writer that is killed leaves
a hidden local file, which `Storage.sweep` deletes, or, of an object of more than about 10 MB, the uploaded parts on S3:
no listing shows those, only a lifecycle rule of the bucket deletes them (docs/tutorials/own_cluster.md).
"""

from __future__ import annotations

import os
import re
import time
import uuid
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager, nullcontext, suppress
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any, TypeVar
from urllib.parse import unquote, urlsplit

from pyarrow import fs

from fewstep.assets import expanded
from fewstep.errors import UnreachableError, UserError, one_line
from fewstep.passwords import has_password, without_password

Result = TypeVar("Result")

# Time limits and attempts of S3's requests
CONNECT_SECONDS = 4
REQUEST_SECONDS = 20
ATTEMPTS = 2
OUTAGE_SECONDS = 600.0
"""How long a run waits for its storage when that can't be reached any more."""
LONGEST_PAUSE_SECONDS = 15.0
"""Between two attempts to reach it."""
PARTIAL_SUFFIX = ".partial"
"""End of the names of local files that are being written."""
S3 = "s3://"
"""Beginning of the addresses of S3."""


@dataclass(frozen=True)
class Storage:
    """A root address with its file system. It can be pickled, so that workers have the S3 settings of their driver.

    Attributes:
        root: the address as users write it; absolute for local folders.
        filesystem: pyarrow's file system for it.
        base: the path of `root` in the file system.
    """

    root: str
    filesystem: fs.FileSystem
    base: str

    @classmethod
    def at(cls, root: str | os.PathLike[str]) -> Storage:
        """The storage at an address; no connection is made yet.

        Raises:
            UserError: the address is of a kind that can't be opened.
        """
        address = str(root)
        _refuse_unclear(address)
        if address.startswith(S3):
            return cls._on_s3(address)
        if address.startswith("file:"):
            address = _local_path(address)
        elif "://" in address:
            address = address.rstrip("/")
            try:
                filesystem, base = fs.FileSystem.from_uri(address)
            except Exception as error:  # pyarrow's own errors, OSError or ValueError, depending on the scheme
                raise UserError(
                    f"the address {address} can't be opened ({one_line(error)}): use a local folder or s3://bucket/prefix."
                ) from error
            return cls(address, filesystem, base)
        local = str(expanded(address).absolute())
        return cls(local, fs.LocalFileSystem(), local)

    @classmethod
    def of_file(cls, address: str | os.PathLike[str]) -> tuple[Storage, str]:
        """The storage of the folder that a file lies in, and the file's name there.

        Args:
            address: of a file, of any kind that `at` takes.

        Raises:
            UserError: as for `at`.
        """
        text = str(address)
        _refuse_unclear(text)
        if text.startswith("file:"):
            text = _local_path(text)
        folder, slash, name = text.rpartition("/")
        return cls.at(folder + slash if slash else "."), name

    @classmethod
    def _on_s3(cls, address: str) -> Storage:
        base = address.removeprefix(S3).rstrip("/")
        # pyarrow takes no keys with empty parts, and Ray Train would leave out a part that is a dot.
        if {"", ".", ".."} & set(base.split("/")):
            raise UserError(
                f"the address {address} can't be opened: it has to name a bucket, and no part between slashes may be "
                "empty, '.' or '..', as in s3://bucket/prefix."
            )
        return cls(S3 + base, _s3(), base)

    def path(self, relative: str) -> str:
        """The path in the file system of an object, given relative to the root."""
        return f"{self.base}/{relative}"

    def read(self, relative: str, start: int = 0, count: int | None = None) -> bytes | None:
        """The content of an object, given relative to the root, or `count` bytes of it; None if it does not exist."""
        with self.reachable():
            try:
                if count is not None:
                    with self.filesystem.open_input_file(self.path(relative)) as file:
                        return file.read_at(count, start)
                # As it is stored: pyarrow would unzip by the suffix.
                with self.filesystem.open_input_stream(self.path(relative), compression=None) as stream:
                    return stream.read()
            except FileNotFoundError:
                return None

    def size(self, relative: str) -> int:
        """Size in bytes of an object, given relative to the root.

        Raises:
            FileNotFoundError: it does not exist.
        """
        with self.reachable():
            size = self.filesystem.get_file_info(self.path(relative)).size
        if size is None:
            raise FileNotFoundError(f"{self.root} has no {relative}")
        return size

    def list(self, below: str = "") -> dict[str, int]:
        """Relative path → size in bytes of every object below the root, without unfinished local files.

        Args:
            below: a folder, relative to the root, to list alone; paths are relative to the root nevertheless.
        """
        folder = self.path(below) if below else self.base
        with self.reachable():
            found = self.filesystem.get_file_info(
                fs.FileSelector(folder, allow_not_found=True, recursive=True)
            )
        return {
            info.path.removeprefix(self.base).lstrip("/"): info.size
            for info in found
            # Other processes may be writing at this moment.
            if info.type == fs.FileType.File and not info.path.endswith(PARTIAL_SUFFIX)
        }

    def write(self, relative: str, content: bytes | memoryview) -> None:
        """Write an object, whole or not at all; replaces one of the same name, or the target of a local link."""
        target = self.path(relative)
        with self.reachable():
            if not isinstance(self.filesystem, fs.LocalFileSystem):
                with self.filesystem.open_output_stream(target) as stream:
                    # In one call: after an exception between two, pyarrow would publish the first part as the object.
                    stream.write(content)
                return
            final = os.path.realpath(target)
            # The last of several writers wins.
            self.filesystem.move(self._write_partial(final, content), final)
            _to_disk(os.path.dirname(final))

    def create(self, relative: str, content: bytes) -> bool:
        """Write an object unless there is one of its name, whole or not at all; of several writers at once, one does.

        Where an answer of S3 is lost, the one that did is told False like the others.

        Returns:
            Whether it was written.

        Raises:
            UserError: the storage is neither a local folder nor on S3.
        """
        self.require_create()
        target = self.path(relative)
        with self.reachable():
            if self.root.startswith(S3):
                return _create_on_s3(target, content)
            partial = self._write_partial(target, content)
            try:
                os.link(partial, target)  # which, unlike a rename, replaces nothing
            except FileExistsError:
                return False
            finally:
                os.unlink(partial)
            _to_disk(os.path.dirname(target))
            return True

    def require_create(self) -> None:
        """Check that `create` can be used, before it is needed.

        Raises:
            UserError: the storage is neither a local folder nor on S3.
        """
        if not (self.root.startswith(S3) or isinstance(self.filesystem, fs.LocalFileSystem)):
            raise UserError(
                f"the address {self.root} can't be used here, as it has no writing that replaces nothing: use a local "
                "folder or s3://bucket/prefix."
            )

    def _write_partial(self, target: str, content: bytes | memoryview) -> str:
        """Write the hidden local file that is to become `target`; its path. It is on the disk then."""
        folder, name = os.path.split(target)
        self.filesystem.create_dir(folder)
        # A random name, so that two writers of one object don't disturb each other.
        partial = f"{folder}/.{name}.{uuid.uuid4().hex[:8]}{PARTIAL_SUFFIX}"
        with self.filesystem.open_output_stream(partial) as stream:
            stream.write(content)
        # Before it gets its name, which would stand for an empty file after a power cut otherwise.
        _to_disk(partial)
        return partial

    def delete(self, relatives: Iterable[str]) -> None:
        """Delete objects, given relative to the root."""
        with self.reachable():
            for relative in relatives:
                self.filesystem.delete_file(self.path(relative))

    def copy_to(self, folder: Path, below: str = "") -> bool:
        """Copy every object below the root, or below a folder there, to a folder of this machine.

        Args:
            folder: of this machine; made where it is missing.
            below: a folder, relative to the root.

        Returns:
            Whether there was any.
        """
        paths = self.list(below)
        for path in paths:
            file = folder / path.removeprefix(f"{below}/" if below else "")
            file.parent.mkdir(parents=True, exist_ok=True)
            file.write_bytes(self.read(path) or b"")
        return bool(paths)

    def settle(self, relatives: Iterable[str]) -> None:
        """Wait until objects that others wrote here are on the disk; on S3 they are when they can be seen."""
        if isinstance(self.filesystem, fs.LocalFileSystem):
            paths = [self.path(relative) for relative in relatives]
            with self.reachable():
                for path in (*paths, *{os.path.dirname(path) for path in paths}, self.base):
                    _to_disk(path)

    def sweep(self) -> None:
        """Delete unfinished local files of writers that were killed.

        S3's unfinished uploads pyarrow can neither list nor abort: they are left to the bucket's lifecycle rule.
        """
        if isinstance(self.filesystem, fs.LocalFileSystem):
            for leftover in Path(self.base).rglob(f".*{PARTIAL_SUFFIX}"):
                leftover.unlink()

    @contextmanager
    def reachable(self) -> Iterator[None]:
        """A context in which errors of the storage (no connection, no bucket, no permission) become UserErrors.

        Raises:
            UnreachableError: in place of an error of the file system; FileNotFoundError is raised as it is.
        """
        try:
            yield
        except (FileNotFoundError, UserError):
            raise
        except OSError as error:
            raise self._unreachable(error) from error
        except Exception as error:
            # File systems of fsspec let errors of their HTTP libraries through, which are no OSErrors.
            if isinstance(self.filesystem, fs.PyFileSystem):
                raise self._unreachable(error) from error
            raise

    def _unreachable(self, error: Exception) -> UnreachableError:
        if self.root.startswith(S3):
            remedy = (
                f"check that the bucket exists, AWS_ENDPOINT_URL (now {_endpoint() or 'unset: AWS itself'}), "
                "the region and the credentials"
            )
        elif isinstance(self.filesystem, fs.LocalFileSystem):
            remedy = "check that the folder exists, is writable and the disk isn't full"
        else:
            remedy = "check the address, the network and your right to read it"
        return UnreachableError(f"{self.root} can't be reached or used ({one_line(error)}): {remedy}.")


def through_outages(attempt: Callable[[], Result], what: str, seconds: float = OUTAGE_SECONDS) -> Result:
    """What an attempt returns, which is repeated while the storage can't be reached: for runs that are under way.

    Args:
        attempt: may be begun again at any time.
        what: does it, for the line that is printed when it has to wait.
        seconds: for how long it is repeated.

    Raises:
        OSError: what the last attempt raised, where it used the file system itself.
        UnreachableError: likewise, where it used a `Storage`.
    """
    until, pause = time.monotonic() + seconds, 0.5
    while True:
        try:
            return attempt()
        except (OSError, UnreachableError) as error:
            # A file that isn't there is no outage.
            if isinstance(error, FileNotFoundError) or time.monotonic() + pause > until:
                raise
            if pause == 0.5:
                print(
                    f"{what} waits for the storage, up to {seconds / 60:g} minutes: {one_line(error)}",
                    flush=True,
                )
            time.sleep(pause)
            pause = min(2 * pause, LONGEST_PAUSE_SECONDS)


def _endpoint() -> str | None:
    """S3's endpoint from the environment; None for AWS's own."""
    return os.environ.get("AWS_ENDPOINT_URL_S3") or os.environ.get("AWS_ENDPOINT_URL")


def _region() -> str | None:
    """S3's region from the environment; None for AWS's own to be looked up."""
    # Other providers ignore the region, but requests are signed with one.
    region = os.environ.get("AWS_REGION") or os.environ.get("AWS_DEFAULT_REGION")
    return region or ("us-east-1" if _endpoint() else None)


def _s3() -> fs.S3FileSystem:
    """pyarrow's S3 file system with the environment's settings."""
    endpoint = _endpoint()
    options: dict[str, str] = {}
    if endpoint:
        parts = urlsplit(endpoint if "://" in endpoint else f"https://{endpoint}")
        options = {"endpoint_override": parts.netloc, "scheme": parts.scheme}
    if key := os.environ.get("AWS_ACCESS_KEY_ID"):
        options |= {"access_key": key, "secret_key": os.environ.get("AWS_SECRET_ACCESS_KEY", "")}
        if token := os.environ.get("AWS_SESSION_TOKEN"):
            options["session_token"] = token
    return fs.S3FileSystem(
        **options,
        region=_region(),
        connect_timeout=CONNECT_SECONDS,
        request_timeout=REQUEST_SECONDS,
        retry_strategy=fs.AwsStandardS3RetryStrategy(max_attempts=ATTEMPTS),
        # Objects of one part (10 MB) go in one request, of which nothing is left when the writer is killed.
        allow_delayed_open=True,
    )


@cache
def _s3_client(endpoint: str | None, region: str | None) -> Any:
    """boto3's client, for what pyarrow's file system can't do; with the same settings."""
    import boto3
    from botocore.config import Config as BotoConfig

    limits = BotoConfig(
        connect_timeout=CONNECT_SECONDS, read_timeout=REQUEST_SECONDS, retries={"total_max_attempts": ATTEMPTS}
    )  # fmt: skip
    return boto3.client("s3", endpoint_url=endpoint, region_name=region, config=limits)


def _create_on_s3(path: str, content: bytes) -> bool:
    """Write an object, given as `bucket/key`, unless there is one; whether it was written.

    Raises:
        OSError: it could not be.
    """
    from botocore.exceptions import BotoCoreError, ClientError

    endpoint = _endpoint()
    if endpoint and "://" not in endpoint:
        endpoint = f"https://{endpoint}"
    bucket, _, key = path.partition("/")
    try:
        _s3_client(endpoint, _region()).put_object(Bucket=bucket, Key=key, Body=content, IfNoneMatch="*")
    except ClientError as error:
        if error.response["Error"]["Code"] == "PreconditionFailed":
            return False
        raise OSError(one_line(error)) from error
    except BotoCoreError as error:
        raise OSError(one_line(error)) from error
    return True


def _refuse_unclear(address: str) -> None:
    """Refuse what is meant as an address or a path of Windows, and would be taken for a folder of this machine.

    Raises:
        UserError: it is such.
    """
    if re.match(r"[A-Za-z]:[\\/](?!/)|\\\\", address):
        raise UserError(
            f"the address {address} can't be opened: it is a path of Windows; use a folder of this machine "
            "(on WSL, C:\\data is /mnt/c/data) or s3://bucket/prefix."
        )
    if has_password(address):
        raise UserError(
            f"the address {without_password(address)} holds a password, and addresses are written to recipes, runs and "
            "logs: leave it out, and set AWS_ACCESS_KEY_ID and AWS_SECRET_ACCESS_KEY in the environment."
        )
    local = f"if it is a folder of this machine, write ./{address}"
    if match := re.match(r"s3:/?(?!/)", address, re.IGNORECASE):
        raise UserError(
            f"the address {address} can't be opened: did you mean {S3}{address[match.end() :]}? ({local})"
        )
    if re.match(r"(?!file:)[a-z][\w+.-]+:/(?!/)", address, re.IGNORECASE):
        raise UserError(
            f"the address {address} can't be opened: use a local folder ({local}) or s3://bucket/prefix."
        )


def _local_path(address: str) -> str:
    """The path that a file: address means, with its percent-encoded characters decoded.

    Raises:
        UserError: it names another machine, or no absolute path.
    """
    # Of RFC 8089's forms file:/path, file:///path and file://localhost/path. `?` and `#` are taken as characters of the
    # path, as a folder has no query and no fragment.
    path = address.removeprefix("file:")
    if path.startswith("//"):
        host, slash, rest = path.removeprefix("//").partition("/")
        path = slash + rest if host in ("", "localhost") else ""
    if not path.startswith("/"):
        raise UserError(
            f"the address {address} can't be opened: write an absolute path of this machine, as in file:///data/set, "
            "or the path alone."
        )
    return unquote(path)


def _to_disk(path: str) -> None:
    """Wait until a local file or folder is on the disk."""
    # Some network file systems can't do it for folders, and need not.
    with suppress(OSError) if os.path.isdir(path) else nullcontext():
        descriptor = os.open(path, os.O_RDONLY)
        try:
            os.fsync(descriptor)
        finally:
            os.close(descriptor)
