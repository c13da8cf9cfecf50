"""Where the image of a raw row lies, and reading it: a file, some bytes of a tar file, or a cell of a Parquet file.

A row's `part` is null for a whole file; `bytes:START:COUNT` for a member of a tar file; `cell:GROUP:ROW:COLUMN` for
the cell of a Parquet file in this row group, at this row of the group and in this column.
"""

from __future__ import annotations

import itertools
from collections.abc import Iterator, Mapping
from contextlib import nullcontext
from dataclasses import dataclass
from typing import Any

import pyarrow as pa
from pyarrow import fs

from fewstep.storage import Storage

ROWS_TOGETHER = 64
"""Rows of a Parquet file that stay together in a shard: to read one of them is to read its row group up to there."""


@dataclass(frozen=True)
class MixedStorage:
    """Storages of several sources: a file's name begins with the name of its source."""

    storages: Mapping[str, ImageStorage]

    def locate(self, file: str) -> tuple[Storage, str]:
        """The storage of a file and its name there."""
        name, _, rest = file.partition("/")
        return located(self.storages[name], rest)


ImageStorage = Storage | MixedStorage
"""What holds the files of a source."""


def located(storage: ImageStorage, file: str) -> tuple[Storage, str]:
    """The storage of a row's file and its name there."""
    return storage.locate(file) if isinstance(storage, MixedStorage) else (storage, file)


def addresses(storage: ImageStorage) -> str | dict[str, Any]:
    """Address of a storage, or those of several by name, as JSON can hold them."""
    if isinstance(storage, MixedStorage):
        return {name: addresses(one) for name, one in storage.storages.items()}
    return storage.root


def at_addresses(found: str | Mapping[str, Any]) -> ImageStorage:
    """The inverse of `addresses`."""
    if isinstance(found, str):
        return Storage.at(found)
    return MixedStorage({name: at_addresses(one) for name, one in found.items()})


def tar_part(start: int, count: int) -> str:
    """`part` of a member of a tar file, whose content begins at byte `start`."""
    return f"bytes:{start}:{count}"


def cell_part(group: int, row: int, column: str) -> str:
    """`part` of a cell of a Parquet file; `column` as Parquet writes it, such as `image.bytes`."""
    return f"cell:{group}:{row}:{column}"


def reading_unit(file: str, part: str) -> str | None:
    """The name of the rows that are read together with this one; None for rows that are read by themselves."""
    kind, _, rest = part.partition(":")
    if kind != "cell":
        return None
    group, row, _ = rest.split(":", 2)
    return f"{file}:{group}:{int(row) // ROWS_TOGETHER}"


def rows_with_cells(rows: pa.Table, images: ImageStorage | None) -> Iterator[dict[str, Any]]:
    """The rows of an index as Python values, in order; the images of those in Parquet files are read into `image`.

    Rows that are read together come one after the other, so that their file is read once. A row whose file can't be
    read has the reason in `trouble`.
    """

    def unit(row: dict[str, Any]) -> str | None:
        return None if row["part"] is None else reading_unit(row["file"], row["part"])

    python = (row for batch in rows.to_batches(max_chunksize=ROWS_TOGETHER) for row in batch.to_pylist())
    for name, together in itertools.groupby(python, unit):
        if name is None:
            yield from together
            continue
        assert images is not None, "rows that name files come with the storage they lie in"
        several = list(together)
        try:
            cells = _cells(several, images)
        except (pa.ArrowException, OSError, KeyError) as error:
            yield from ({**row, "trouble": f"not a readable Parquet file ({error})"} for row in several)
            continue
        for row in several:
            yield {**row, "image": cells.get(row["part"]), "trouble": "the cell is empty"}


def _cells(rows: list[dict[str, Any]], images: ImageStorage) -> dict[str, bytes]:
    """Images of rows of one reading unit, by their part."""
    import pyarrow.parquet as pq

    _, group, _, column = rows[0]["part"].split(":", 3)
    places = {int(row["part"].split(":", 3)[2]): row["part"] for row in rows}
    start, found = 0, {}
    storage, name = located(images, rows[0]["file"])
    # On a disk, an error is one of the file's content.
    local = isinstance(storage.filesystem, fs.LocalFileSystem)
    guard = nullcontext() if local else storage.reachable()
    with (
        guard,
        storage.filesystem.open_input_file(storage.path(name)) as opened,
    ):
        # Buffered: a row group may be larger than memory.
        file = pq.ParquetFile(opened, buffer_size=1 << 20)
        for batch in file.iter_batches(ROWS_TOGETHER, row_groups=[int(group)], columns=[column]):
            if wanted := [row for row in places if start <= row < start + len(batch)]:
                values = batch.column(0)
                for nested in column.split(".")[1:]:
                    values = values.field(nested) if pa.types.is_struct(values.type) else values
                for row in wanted:
                    if (value := values[row - start].as_py()) is not None:
                        found[places[row]] = value
            start += len(batch)
            if start > max(places):
                break
    return found


def image_bytes(row: Mapping[str, Any], images: ImageStorage | None) -> bytes:
    """The bytes of a row's image file, of a row as `rows_with_cells` gives it.

    Raises:
        ValueError: the file does not exist any more, is shorter than it was, or can't be read.
    """
    if row["image"] is not None:
        return row["image"]
    if trouble := row.get("trouble"):
        raise ValueError(trouble)
    assert images is not None, "rows that name files come with the storage they lie in"
    storage, name = located(images, row["file"])
    if row["part"] is None:
        content = storage.read(name)
    else:
        start, count = map(int, row["part"].split(":")[1:])
        content = storage.read(name, start, count)
        if content is not None and len(content) < count:
            raise ValueError("the file has become shorter")
    if content is None:
        raise ValueError("the file has gone")
    return content
