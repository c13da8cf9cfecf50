"""Parquet files with images in them as a source, as Hugging Face's datasets are published; cells are read in place."""

from __future__ import annotations

import functools
import itertools
import posixpath
from collections.abc import Iterable, Sequence
from typing import TYPE_CHECKING

import pyarrow as pa

from fewstep.data.addresses import find_files
from fewstep.data.delimited import column_key
from fewstep.data.file_names import FileNames
from fewstep.data.members import cell_part
from fewstep.data.rows import Source
from fewstep.data.scanning import Found, scan
from fewstep.data.tables import (
    CAPTION_COLUMNS,
    FILE_COLUMNS,
    PARQUET_ROWS,
    Columns,
    Row,
    RowError,
    cell_values,
    is_text,
    listed,
)
from fewstep.errors import UserError
from fewstep.storage import Storage

if TYPE_CHECKING:
    import pyarrow.parquet as pq

IMAGES = ("image", "img", "picture", "photo", "jpg", "jpeg", "png", "webp", "file", "file_name")
"""Names of the columns that hold images, or the names of their files, whatever their capitals."""

CAPTIONS = (*CAPTION_COLUMNS, "txt")
"""Names of the columns that hold captions."""


def image_parquet(paths: Sequence[str], *, held_out: float, columns: Columns | None = None) -> Source:
    """Parquet files with a column of images and one of captions.

    Images are structures of `bytes` and `path`, as the library datasets writes them, or plain bytes, or names of files
    beside the table. Nothing is copied: the index has the place of each image in its file.

    Args:
        paths: Parquet files, folders of them or patterns; local, s3:// or hf://datasets/ORGANISATION/NAME.
        held_out: share of the rows, chosen by a hash of their places, that goes into the held-out split. Where the
            names of some files or folders say train and others validation or test, the names decide.
        columns: where images and captions are; None looks for the usual names.

    Raises:
        UserError: there is no such file, it lacks a column, or there is no usable row.
    """
    storage, files = find_files(paths, ".parquet")
    columns = columns or Columns()
    if not columns.choose:
        columns = Columns(columns.files, CAPTIONS, seed=columns.seed)
    collected = scan(files, _scan_parquet, storage=storage, columns=columns)
    collected.number_repeated()
    return collected.source("parquet", ", ".join(paths), held_out, storage)


def _scan_parquet(files: pa.Table, storage: Storage, columns: Columns) -> pa.Table:
    """Ray Data task: the index of some Parquet files; images aren't read."""
    import pyarrow.parquet as pq

    found, scanner = Found(), _Scanner(storage, columns)
    for file in files["file"].to_pylist():
        try:
            with storage.reachable(), storage.filesystem.open_input_file(storage.path(file)) as opened:
                scanner.scan(pq.ParquetFile(opened), file, found)
        except pa.ArrowException as error:
            raise UserError(
                f"{storage.root}/{file} is not a readable Parquet file: write it again."
            ) from error
        except FileNotFoundError:
            raise UserError(f"the file {storage.root}/{file} doesn't exist: check the path.") from None
    return found.table()


class _Scanner:
    """Reads the index of Parquet files in one storage."""

    def __init__(self, storage: Storage, columns: Columns) -> None:
        self.storage, self.columns = storage, columns

    @functools.cached_property
    def names(self) -> FileNames:
        """The files beside the tables, for images that are named."""
        return FileNames(self.storage.root, self.storage.list())

    def scan(self, parquet: pq.ParquetFile, file: str, found: Found) -> None:
        """Add the rows of one file.

        Raises:
            UserError: it lacks a column.
        """
        schema, number = parquet.schema_arrow, 0
        image = _image_column(schema, self.columns, file)
        captions = _caption_columns(schema, self.columns, file, image.name)
        for group in range(parquet.num_row_groups):
            content, path = _leaves(parquet, group, image)
            start = number
            # Of images, only their paths are read, where they are needed.
            wanted = [*captions, *([path] if content is None and path else [])]
            for batch in parquet.iter_batches(PARQUET_ROWS, row_groups=[group], columns=wanted):
                cells = [cell_values(batch.column(name)) for name in captions]
                written = _texts_of(batch.column(image.name)) if content is None else itertools.repeat(None)
                for values, name in zip(zip(*cells, strict=True), written, strict=False):
                    number += 1
                    row = Row(
                        f"{file} row {number}",
                        dict(zip(map(column_key, captions), values, strict=True)),
                    )
                    try:
                        place: tuple[str, str, str | None]
                        if content is not None:
                            place = f"{file}#{number}", file, cell_part(group, number - start - 1, content)
                        else:
                            key = self._named(name, file)
                            place = key, key, None
                        key, lies_in, part = place
                        found.add(key, row.caption(self.columns, key), row.where, lies_in, part, file)
                    except RowError as error:
                        found.reject(row.where, error)

    def _named(self, written: str | None, table: str) -> str:
        """The file that a table names for an image.

        Raises:
            RowError: it names none, or there is no such file.
        """
        if not written:
            raise RowError("no file", "the image has neither bytes nor a path")
        folder = posixpath.dirname(table)
        if (file := self.names.find(written, folder)) is None:
            place = f"{self.storage.root}/{folder}".rstrip("/")
            raise RowError("missing file", f"there is no {written} in {place}{self.names.hint(written)}")
        return file


def _image_column(schema: pa.Schema, columns: Columns, file: str) -> pa.Field:
    """The column of images: the one that was named, or that has a usual name, or the only one of structures with bytes.

    Raises:
        UserError: there is none.
    """
    wanted = IMAGES if columns.files == FILE_COLUMNS else columns.files
    by_name = {column_key(column.name): column for column in reversed(schema)}
    for name in wanted:
        if name in by_name and (_has_bytes(by_name[name].type) or _is_name(by_name[name].type)):
            return by_name[name]
    structures = [c for c in schema if pa.types.is_struct(c.type) and _has_bytes(c.type)]
    if len(structures) == 1 and wanted is IMAGES:
        return structures[0]
    raise UserError(
        f"{file} has the columns {listed(schema.names)}, and none of {', '.join(wanted)} that holds images (structures "
        "with bytes, or bytes) or names of files: name it with --image-column."
    )


def _caption_columns(schema: pa.Schema, columns: Columns, file: str, image: str) -> list[str]:
    """Names of the columns that captions are in.

    Raises:
        UserError: one that is needed isn't there.
    """

    def heads(group: Iterable[str]) -> set[str]:
        return {head for name in group for head in (name, name.partition(".")[0])}

    names = [name for name in schema.names if name != image]
    for group in columns.caption_groups:
        if not heads(group) & set(map(column_key, names)):
            raise UserError(
                f"{file} has the columns {listed(schema.names)}, and none of {', '.join(group)}: name the one of the "
                "captions with --caption-column."
            )
    return [name for name in names if column_key(name) in heads(columns.captions)]


def _leaves(parquet: pq.ParquetFile, group: int, image: pa.Field) -> tuple[str | None, str | None]:
    """The leaf columns of a row group with images' bytes and with their paths; None where there is none.

    Structures whose bytes are all null have paths alone.
    """
    if not pa.types.is_struct(image.type):
        return (None, image.name) if _is_name(image.type) else (image.name, None)
    leaves = {f"{image.name}.{child.name}": child for child in image.type}
    path = f"{image.name}.path" if f"{image.name}.path" in leaves else None
    rows = parquet.metadata.row_group(group)
    for number in range(rows.num_columns):
        column = rows.column(number)
        if column.path_in_schema == f"{image.name}.bytes":
            statistics = column.statistics
            empty = statistics is not None and statistics.null_count == rows.num_rows
            return (None if empty and path else column.path_in_schema), path
    return None, path


def _texts_of(column: pa.Array) -> list[str | None]:
    """Names of files: of a column of them, or of structures."""
    return cell_values(column.field("path") if pa.types.is_struct(column.type) else column)


def _has_bytes(kind: pa.DataType) -> bool:
    """Whether cells of this kind hold the content of an image's file, or may."""
    if pa.types.is_struct(kind):
        return kind.get_field_index("bytes") >= 0 and _has_bytes(kind.field("bytes").type)
    return pa.types.is_binary(kind) or pa.types.is_large_binary(kind) or pa.types.is_binary_view(kind)


def _is_name(kind: pa.DataType) -> bool:
    """Whether cells of this kind are names of files."""
    if pa.types.is_struct(kind):
        return kind.get_field_index("path") >= 0
    return is_text(kind)
