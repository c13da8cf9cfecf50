"""WebDataset tars as a source: images with captions beside them, read by their place in the tar file."""

from __future__ import annotations

import io
import json
import posixpath
import tarfile
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import pyarrow as pa
from pyarrow import fs

from fewstep.data.addresses import find_files
from fewstep.data.delimited import column_key
from fewstep.data.members import tar_part
from fewstep.data.rows import Source
from fewstep.data.scanning import Found, scan
from fewstep.data.tables import FILE_COLUMNS, Columns, Row, RowError
from fewstep.errors import UserError
from fewstep.storage import Storage
from fewstep.text import decode

IMAGE_EXTENSIONS = ("jpg", "jpeg", "png", "webp", "tif", "tiff", "bmp", "gif", "avif", "jp2", "ppm", "pgm")
"""Ends of the names of members that are images."""

CAPTIONS = ("txt", "caption", "text", "prompt", "cls")
"""Ends of the names of members, or keys of a sample's JSON, that hold its caption or the number of its class."""

READ_AHEAD = 8 << 20
"""Bytes of a remote tar file that are read at a time: a request for each of its headers would take much longer."""


@dataclass
class TarSample:
    """Members of a tar file with one name in front of their extensions, one after the other."""

    name: str
    images: list[tuple[str, int, int]] = field(default_factory=list)
    """Extension, first byte and number of bytes of each image."""
    values: dict[str, Any] = field(default_factory=dict)
    """Captions by their extension, and what the sample's JSON holds."""
    fault: str = ""


def webdataset(paths: Sequence[str], *, held_out: float, columns: Columns | None = None) -> Source:
    """WebDataset tars: samples of an image and its caption, as .txt or in a .json.

    Nothing is unpacked or copied: the index has the place of each image in its tar file.

    Args:
        paths: tar files, folders of them or patterns, such as `s3://bucket/set/{000..012}.tar`.
        held_out: share of the samples, chosen by a hash of their keys, that goes into the held-out split. Where the
            names of some files or folders say train and others validation or test, the names decide.
        columns: which extensions or keys of the JSON hold captions, and which of several images is meant.

    Raises:
        UserError: there is no such file, or no usable sample.
    """
    storage, files = find_files(paths, ".tar")
    columns = columns or Columns()
    reading = columns if columns.choose else replace(columns, captions=CAPTIONS)
    image = None if columns.files == FILE_COLUMNS else columns.files[0]
    collected = scan(files, _scan_tars, storage=storage, columns=reading, image=image)
    collected.number_repeated()
    return collected.source("webdataset", ", ".join(paths), held_out, storage)


def _scan_tars(files: pa.Table, storage: Storage, columns: Columns, image: str | None) -> pa.Table:
    """Ray Data task: the index of some tar files."""
    found = Found()
    for file in files["file"].to_pylist():
        try:
            for sample in _samples(storage, file):
                where = key = f"{file}/{sample.name}"
                try:
                    row = Row(where, sample.values, sample.fault)
                    start, count = _image(sample, image)
                    found.add(key, row.caption(columns, key), where, file, tar_part(start, count), file)
                except RowError as error:
                    found.reject(where, error)
        except tarfile.TarError as error:
            # What comes before the fault is good.
            found.reject(file, RowError("broken archive", f"{file} is not a whole tar file ({error})"))
        except FileNotFoundError:
            raise UserError(f"the file {storage.root}/{file} doesn't exist: check the path.") from None
    return found.table()


def _image(sample: TarSample, wanted: str | None) -> tuple[int, int]:
    """First byte and number of bytes of a sample's image.

    Raises:
        RowError: it has none.
    """
    for extension, start, count in sample.images:
        if wanted in (None, extension):
            return start, count
    has = ", ".join([extension for extension, _, _ in sample.images] + list(sample.values)) or "nothing"
    raise RowError("no image", f"{sample.name} has no image{f' .{wanted}' if wanted else ''}; it has {has}")


def _samples(storage: Storage, file: str) -> Iterator[TarSample]:
    """Samples of a tar file, in order.

    Raises:
        tarfile.TarError: the file is no tar file, or not whole; raised behind the last whole sample.
        UserError: it is compressed, or storage can't be reached.
        FileNotFoundError: there is no such file.
    """
    with storage.reachable(), storage.filesystem.open_input_file(storage.path(file)) as opened:
        size = opened.size()
        local = isinstance(storage.filesystem, fs.LocalFileSystem)
        magic = opened.read(2)
        opened.seek(0)
        if magic == b"\x1f\x8b":
            raise UserError(
                f"{storage.root}/{file} is compressed, and images are read from the middle of tars: unzip it first."
            )
        stream = opened if local else io.BufferedReader(_Raw(opened), READ_AHEAD)
        sample: TarSample | None = None
        with tarfile.open(fileobj=stream, mode="r:") as tar:
            while (member := tar.next()) is not None:
                # Members are remembered otherwise, all of them.
                tar.members = []  # type: ignore[attr-defined]
                folder, base = posixpath.split(member.name.removeprefix("./"))
                stem, dot, extension = base.partition(".")
                if not member.isfile() or not dot or not stem:
                    continue
                name = posixpath.join(folder, stem)
                if sample is not None and sample.name != name:
                    yield sample
                    sample = None
                if member.offset_data + member.size > size:
                    raise tarfile.ReadError("unexpected end of data")
                sample = sample or TarSample(name)
                _add_member(sample, extension.lower(), member, tar)
        if sample is not None:
            yield sample


def _add_member(sample: TarSample, extension: str, member: tarfile.TarInfo, tar: tarfile.TarFile) -> None:
    """Add a member to its sample; only captions are read."""
    last = extension.rpartition(".")[2]
    if last in IMAGE_EXTENSIONS:
        sample.images.append((extension, member.offset_data, member.size))
        return
    if last != "json" and member.size > 1 << 20:
        return  # no caption
    content = tar.extractfile(member)
    assert content is not None, "members that are files have content"
    text = decode(content.read())
    if last != "json":
        # Numbers and arrays are of no use as captions, but may be named.
        sample.values.setdefault(extension, text)
        return
    try:
        document = json.loads(text)
    except (ValueError, RecursionError) as error:
        sample.fault = f"{member.name} is not JSON: {error}"
        return
    if isinstance(document, dict):
        for key, value in document.items():
            sample.values.setdefault(column_key(key), value)
    else:
        sample.values.setdefault(extension, document)


class _Raw(io.RawIOBase):
    """An Arrow file as Python's `io.BufferedReader` takes one."""

    def __init__(self, file: pa.NativeFile) -> None:
        self._file = file

    def readable(self) -> bool:
        return True

    def seekable(self) -> bool:
        return True

    def readinto(self, buffer: Any) -> int:
        content = self._file.read(len(buffer))
        buffer[: len(content)] = content
        return len(content)

    def seek(self, offset: int, whence: int = 0) -> int:
        return int(self._file.seek(offset, whence))

    def tell(self) -> int:
        return int(self._file.tell())
