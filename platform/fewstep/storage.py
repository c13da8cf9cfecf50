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
import uuid
from collections.abc import Iterable, Iterator
from contextlib import contextmanager, nullcontext, suppress
from dataclasses import dataclass
from pathlib import Path
from urllib.parse import unquote, urlsplit

from pyarrow import fs

from fewstep.assets import expanded
from fewstep.errors import UserError, one_line

# Time limits and attempts of S3's requests
CONNECT_SECONDS = 4
REQUEST_SECONDS = 20
ATTEMPTS = 2
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

    def list(self) -> dict[str, int]:
        """Relative path → size in bytes of every object below the root, without unfinished local files."""
        with self.reachable():
            found = self.filesystem.get_file_info(
                fs.FileSelector(self.base, allow_not_found=True, recursive=True)
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
            folder, name = os.path.split(os.path.realpath(target))
            self.filesystem.create_dir(folder)
            # A random name, so that two writers of one object don't disturb each other: the last to finish wins.
            partial = f"{folder}/.{name}.{uuid.uuid4().hex[:8]}{PARTIAL_SUFFIX}"
            with self.filesystem.open_output_stream(partial) as stream:
                stream.write(content)
            # Before it gets its name, which would stand for an empty file after a power cut otherwise.
            _to_disk(partial)
            self.filesystem.move(partial, f"{folder}/{name}")
            _to_disk(folder)

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
            UserError: in place of an error of the file system; FileNotFoundError is raised as it is.
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

    def _unreachable(self, error: Exception) -> UserError:
        if self.root.startswith(S3):
            remedy = (
                f"check that the bucket exists, AWS_ENDPOINT_URL (now {_endpoint() or 'unset: AWS itself'}), "
                "the region and the credentials"
            )
        elif isinstance(self.filesystem, fs.LocalFileSystem):
            remedy = "check that the folder exists, is writable and the disk isn't full"
        else:
            remedy = "check the address, the network and your right to read it"
        return UserError(f"{self.root} can't be reached or used ({one_line(error)}): {remedy}.")


def _endpoint() -> str | None:
    """S3's endpoint from the environment; None for AWS's own."""
    return os.environ.get("AWS_ENDPOINT_URL_S3") or os.environ.get("AWS_ENDPOINT_URL")


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
    # Other providers ignore the region, but requests are signed with one; AWS's own is looked up by pyarrow.
    region = (
        os.environ.get("AWS_REGION") or os.environ.get("AWS_DEFAULT_REGION") or (endpoint and "us-east-1")
    )
    return fs.S3FileSystem(
        **options,
        region=region or None,
        connect_timeout=CONNECT_SECONDS,
        request_timeout=REQUEST_SECONDS,
        retry_strategy=fs.AwsStandardS3RetryStrategy(max_attempts=ATTEMPTS),
        # Objects of one part (10 MB) go in one request, of which nothing is left when the writer is killed.
        allow_delayed_open=True,
    )


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
