"""Where datasets lie: a local folder, or any address pyarrow.fs understands, `s3://bucket/prefix` above all.

S3 takes its endpoint and credentials from the usual variables: `AWS_ENDPOINT_URL_S3` or
`AWS_ENDPOINT_URL` (http:// or https://), `AWS_REGION` or `AWS_DEFAULT_REGION`, `AWS_ACCESS_KEY_ID`,
`AWS_SECRET_ACCESS_KEY`, `AWS_SESSION_TOKEN`; without a key pair, AWS's own chain (profile, instance role)
applies. Time limits are short, so that an unreachable endpoint is reported in seconds.

Objects are written whole or not at all: locally into a hidden file that is renamed, on S3 as one upload
that becomes visible when it is complete.
"""

from __future__ import annotations

import os
import uuid
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from urllib.parse import urlsplit

from pyarrow import fs

from fewstep.errors import UserError

CONNECT_SECONDS = 4
REQUEST_SECONDS = 20
ATTEMPTS = 2
PARTIAL_SUFFIX = ".partial"


@dataclass(frozen=True)
class Storage:
    """A root address with its file system; picklable, so that a driver's S3 settings travel to its workers.

    Attributes:
        root: the address as users write it; local folders are absolute.
        filesystem: the pyarrow file system that serves it.
        base: `root` as the file system spells it.
    """

    root: str
    filesystem: fs.FileSystem
    base: str

    @classmethod
    def at(cls, root: str | os.PathLike[str]) -> Storage:
        """Resolve an address; nothing is contacted yet.

        Raises:
            UserError: the scheme is unknown.
        """
        address = str(root).rstrip("/")
        if address.startswith("s3://"):
            return cls(address, _s3(), address.removeprefix("s3://"))
        if "://" in address:
            try:
                filesystem, base = fs.FileSystem.from_uri(address)
            except Exception as error:  # pyarrow raises its own, OSError or ValueError by scheme
                raise UserError(
                    f"the address {address} can't be opened ({_brief(error)}): use a local folder or s3://bucket/prefix."
                ) from error
            return cls(address, filesystem, base)
        local = str(Path(address or "/").expanduser().absolute())
        return cls(local, fs.LocalFileSystem(), local)

    def path(self, relative: str) -> str:
        """A path below the root, as the file system spells it."""
        return f"{self.base}/{relative}"

    def read(self, relative: str) -> bytes | None:
        """The whole object, or None where there is none."""
        with self.reachable():
            try:
                with self.filesystem.open_input_stream(self.path(relative)) as stream:
                    return stream.read()
            except FileNotFoundError:
                return None

    def list(self) -> dict[str, int]:
        """Relative path → size in bytes of everything below the root, hidden leftovers excluded."""
        with self.reachable():
            found = self.filesystem.get_file_info(
                fs.FileSelector(self.base, allow_not_found=True, recursive=True)
            )
        return {
            info.path.removeprefix(self.base).lstrip("/"): info.size
            for info in found
            if info.type == fs.FileType.File and not info.path.endswith(PARTIAL_SUFFIX)
        }

    def write(self, relative: str, content: bytes | memoryview) -> None:
        """Put an object, whole or not at all; replaces what was there."""
        target = self.path(relative)
        with self.reachable():
            if not isinstance(self.filesystem, fs.LocalFileSystem):
                with self.filesystem.open_output_stream(target) as stream:
                    stream.write(content)
                return
            folder, name = os.path.split(target)
            self.filesystem.create_dir(folder)
            partial = f"{folder}/.{name}.{uuid.uuid4().hex[:8]}{PARTIAL_SUFFIX}"
            with self.filesystem.open_output_stream(partial) as stream:
                stream.write(content)
            self.filesystem.move(partial, target)

    def sweep(self) -> None:
        """Delete the hidden leftovers of writers that were killed (there are none on S3)."""
        if isinstance(self.filesystem, fs.LocalFileSystem):
            for leftover in Path(self.base).rglob(f".*{PARTIAL_SUFFIX}"):
                leftover.unlink()

    @contextmanager
    def reachable(self) -> Iterator[None]:
        """Turn storage trouble (endpoint away, no bucket, no right) into one sentence.

        Raises:
            UserError: in place of an OSError of the file system; FileNotFoundError passes.
        """
        try:
            yield
        except FileNotFoundError:
            raise
        except OSError as error:
            remedy = (
                f"check that the bucket exists, AWS_ENDPOINT_URL (now {_endpoint() or 'unset: AWS itself'}), "
                "the region and the credentials"
                if self.root.startswith("s3://")
                else "check that the folder exists, is writable and the disk isn't full"
            )
            raise UserError(f"{self.root} can't be reached or used ({_brief(error)}): {remedy}.") from error


def _endpoint() -> str | None:
    return os.environ.get("AWS_ENDPOINT_URL_S3") or os.environ.get("AWS_ENDPOINT_URL")


def _s3() -> fs.S3FileSystem:
    endpoint = _endpoint()
    options: dict[str, str] = {}
    if endpoint:
        parts = urlsplit(endpoint if "://" in endpoint else f"https://{endpoint}")
        options = {"endpoint_override": parts.netloc, "scheme": parts.scheme}
    if key := os.environ.get("AWS_ACCESS_KEY_ID"):
        options |= {"access_key": key, "secret_key": os.environ.get("AWS_SECRET_ACCESS_KEY", "")}
        if token := os.environ.get("AWS_SESSION_TOKEN"):
            options["session_token"] = token
    region = (
        os.environ.get("AWS_REGION") or os.environ.get("AWS_DEFAULT_REGION") or (endpoint and "us-east-1")
    )
    return fs.S3FileSystem(
        **options,
        region=region or None,
        connect_timeout=CONNECT_SECONDS,
        request_timeout=REQUEST_SECONDS,
        retry_strategy=fs.AwsStandardS3RetryStrategy(max_attempts=ATTEMPTS),
    )


def _brief(error: Exception) -> str:
    return " ".join(str(error).split())[:200] or type(error).__name__
