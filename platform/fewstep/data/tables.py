"""Reading tables of captions (JSON, CSV, Parquet, plain text), with the place in the file of each row."""

from __future__ import annotations

import gzip
import json
import zlib
from collections.abc import Callable, Collection, Iterator, Sequence
from contextlib import suppress
from dataclasses import asdict, dataclass
from pathlib import PurePosixPath
from typing import TYPE_CHECKING, Any

from fewstep.data.delimited import SEPARATORS, DelimitedText, column_key
from fewstep.data.seeds import stable_hash
from fewstep.errors import UserError
from fewstep.storage import Storage
from fewstep.text import decode, decode_utf8, each_line, trouble

if TYPE_CHECKING:
    import pyarrow as pa

# Names of the columns for an image's file and for its caption, whatever their capitals; the first one that is filled
# counts.
FILE_COLUMNS = ("file", "file_name", "image")
CAPTION_COLUMNS = ("caption", "text", "prompt")
REFERENCE_COLUMNS = ("reference", "references")
"""Names of the columns for the files of reference images; a cell may hold a list of them."""

PARQUET_ROWS = 4096
"""Rows of a Parquet file that are read at a time."""


@dataclass(frozen=True)
class Columns:
    """Which columns hold images' files and captions.

    Attributes:
        files: names, of which the first one that is filled counts.
        captions: likewise; with `choose`, all that are filled count, and one is chosen at random for each row.
        choose: whether the columns of captions were named by the user: then each has to be there, and one with a dot
            may be a field of a structure, such as `captions.short`.
        seed: of the choice.
    """

    files: tuple[str, ...] = FILE_COLUMNS
    captions: tuple[str, ...] = CAPTION_COLUMNS
    choose: bool = False
    seed: int = 0

    @classmethod
    def named(cls, captions: Sequence[str] = (), image: str | None = None, seed: int = 0) -> Columns:
        """The columns that the user named; the usual ones where none is."""
        files = (column_key(image),) if image else FILE_COLUMNS
        if not captions:
            return cls(files, seed=seed)
        return cls(files, tuple(map(column_key, captions)), choose=True, seed=seed)

    @property
    def caption_groups(self) -> list[tuple[str, ...]]:
        """Groups of columns of captions, as `table_rows` needs them: of each group, one has to be there."""
        return [(name,) for name in self.captions] if self.choose else [self.captions]


@dataclass(frozen=True)
class Rejection:
    """A row that can't be used."""

    where: str
    """Its place in a file, or its key."""
    reason: str
    """Kind of problem; rejected rows are counted by it."""
    detail: str = ""
    """What exactly is wrong."""

    def as_dict(self) -> dict[str, str]:
        """The rejection as a line of `rejected.jsonl` has it."""
        return asdict(self)


class RowError(ValueError):
    """A row can't be used; `reason` and `detail` as a Rejection has them."""

    def __init__(self, reason: str, detail: str) -> None:
        super().__init__(f"{reason}: {detail}")
        self.reason, self.detail = reason, detail

    def at(self, where: str) -> Rejection:
        """The rejection of the row at a place."""
        return Rejection(where, self.reason, self.detail)


@dataclass(frozen=True)
class Row:
    """A row of a table.

    Attributes:
        where: its place, such as `metadata.csv:7`, or `metadata.parquet row 7`.
        values: by the column's name in small letters.
        fault: why the row couldn't be read; empty if it could.
    """

    where: str
    values: dict[str, Any]
    fault: str = ""

    def _filled(self) -> list[str]:
        """Names of the columns that hold something."""
        return [name for name, value in self.values.items() if value not in (None, "")]

    def caption(self, columns: Columns, name: str | None = None) -> str:
        """The row's caption. Where it has several, in a list or in several columns, one of them, chosen at random.

        Args:
            columns: where captions are.
            name: of the row, on which the choice depends with the seed; None makes it depend on the captions.

        Raises:
            RowError: as `text`.
        """
        if self.fault:
            raise RowError("unreadable row", self.fault)
        found: list[str] = []
        for column in columns.captions:
            value = self._value(column)
            several = value if isinstance(value, list | tuple) else [value]
            found += [text for entry in several if (text := _text(entry, column, "caption")) is not None]
            if found and not columns.choose:
                break
        if not found:
            raise self._none_filled(columns.captions, "caption")
        if len(found) == 1:
            return found[0]
        return found[
            stable_hash(columns.seed, f"caption/{chr(10).join(found) if name is None else name}") % len(found)
        ]

    def references(self) -> list[str]:
        """The files of the row's reference images, in order; none where it has no such column or an empty one.

        Raises:
            RowError: what is there is no text.
        """
        found = []
        for column in REFERENCE_COLUMNS:
            value = self.values.get(column)
            several = value if isinstance(value, list | tuple) else [value]
            found += [name for entry in several if (name := _text(entry, column, "reference")) is not None]
        return found

    def _value(self, column: str) -> Any:
        """A column's value; where there is no such column, the field of a structure that its name with dots means."""
        value: Any = self.values.get(column)
        if value is None and "." in column:
            value = self.values
            for name in column.split("."):
                value = (
                    next((v for k, v in value.items() if column_key(k) == name), None)
                    if isinstance(value, dict)
                    else None
                )
        return value

    def text(self, columns: Sequence[str], what: str) -> str:
        """The first of some columns that is filled, without blanks around it; an integer counts as its digits.

        Args:
            columns: names in small letters.
            what: is wanted, for the message: "file" or "caption".

        Raises:
            RowError: the row couldn't be read, none is filled, or what is there is no text.
        """
        if self.fault:
            raise RowError("unreadable row", self.fault)
        for name in columns:
            if (value := _text(self.values.get(name), name, what)) is not None:
                return value
        raise self._none_filled(columns, what)

    def _none_filled(self, columns: Sequence[str], what: str) -> RowError:
        """The error of a row that has none of some columns."""
        return RowError(
            f"no {what}",
            f"none of the columns {', '.join(columns)} is filled; the row has {listed(self._filled())}",
        )


def _text(value: Any, name: str, what: str) -> str | None:
    """A cell's text without blanks around it; None if it is empty. An integer counts as its digits.

    Raises:
        RowError: what is there is no text.
    """
    if type(value) is int:  # a class of `labels:1000`; a bool is none
        return str(value)
    if isinstance(value, str):
        # Files that were joined have a byte-order mark in their middle.
        if not (value := value.strip().removeprefix("\ufeff").strip()):
            return None
        if fault := trouble(value):
            raise RowError("unreadable row", f"the column {name} {fault}")
        return value
    if value is not None and value == value:  # not NaN, with which pandas writes an empty cell
        raise RowError(f"no {what}", f"the column {name} holds a {_kind(value)}, not text")
    return None


def table_rows(
    path: str,
    *,
    name: str | None = None,
    needed: Sequence[Sequence[str]] | None = None,
    columns: Columns | None = None,
    tell: Callable[[str], None] = lambda note: None,
) -> Iterator[Row]:
    """The rows of a table, in order, also those that can't be read.

    Args:
        path: of the table, local or s3://.
        name: what the table is called in places and messages; None takes the last part of the path.
        needed: of each of these groups of columns, the table must have one; None takes those for captions.
        columns: which ones hold images' files and captions; None takes the usual ones.
        tell: is called with what the user should know about how the table was read.

    Raises:
        UserError: the file doesn't exist, is of no kind that is read, is not readable as a whole, or lacks a column.
    """
    name = name or path.rpartition("/")[2]
    read, zipped = _reader(path, name)
    content = _content(path)
    if zipped:
        try:
            content = gzip.decompress(content)
        except (OSError, EOFError, zlib.error) as error:
            raise UserError(f"{name} is not a whole gzip file ({error}): compress it again.") from error
    columns = columns or Columns()
    reading = _TableReading(name, columns.caption_groups if needed is None else needed, columns, tell)
    for place, record in read(content, reading):
        if isinstance(record, str):
            yield Row(f"{name}{place}", {}, fault=record)
        else:
            values: dict[str, Any] = {}
            for column, value in record.items():
                # Of columns that differ in capitals alone, the first one that is filled.
                if values.get(key := column_key(column)) in (None, ""):
                    values[key] = value
            yield Row(f"{name}{place}", values)


@dataclass(frozen=True)
class _TableReading:
    """What a reader has to know besides the content.

    Attributes:
        name: of the table, for messages.
        needed: of each of these groups of columns, the table must have one.
        columns: those for images' files and for captions.
        tell: is called with what the user should know.
    """

    name: str
    needed: Sequence[Sequence[str]]
    columns: Columns
    tell: Callable[[str], None]

    @property
    def known(self) -> set[str]:
        """All names of columns that matter; of a field of a structure, also the structure's."""
        names = {column for group in self.needed for column in group}
        return names | {name.partition(".")[0] for name in names} | {*REFERENCE_COLUMNS}

    def check(self, columns: Collection[str], remedy: str = "rename the one that is meant") -> None:
        """Refuse a table whose columns can't do; `remedy` ends the message.

        Raises:
            UserError: of one of the needed groups, none is there.
        """
        found = {column_key(column) for column in columns}
        for group in self.needed:
            if not found.intersection([*group, *(name.partition(".")[0] for name in group)]):
                raise UserError(
                    f"{self.name} has the columns {listed(columns)}, and none of {', '.join(group)}: "
                    f"{remedy}."
                )


Records = Iterator[tuple[str, dict[str, Any] | str]]
"""Pairs of a row's place in its file and the row, or the place and what is wrong with the row."""


def _json_lines(content: bytes, reading: _TableReading) -> Records:
    """Rows of JSON lines; a line that is a string is a caption. A whole JSON list is read as one."""
    text = decode(content)
    if text.lstrip().startswith("["):
        with suppress(ValueError, RecursionError):
            yield from _entries(json.loads(text), reading)
            return
    for number, line in enumerate(each_line(text), 1):
        if not (line := line.strip().removeprefix("\ufeff")):
            continue
        try:
            yield f":{number}", _json_record(json.loads(line))
        except (ValueError, RecursionError) as error:
            yield f":{number}", f"not JSON: {trouble(line) or error}"


def _json_document(content: bytes, reading: _TableReading) -> Records:
    """Rows of a JSON list; or, where the file has JSON lines in it, of those."""
    text = decode(content)
    try:
        document = json.loads(text)
    except (ValueError, RecursionError) as error:
        if text.lstrip().startswith("["):
            raise UserError(f"{reading.name} is not JSON ({error}): mend it, or write JSON lines.") from error
        yield from _json_lines(content, reading)
        return
    yield from _entries(document, reading)


def _entries(document: Any, reading: _TableReading) -> Records:
    """Rows of a parsed JSON document: a list of them, or a single one.

    Raises:
        UserError: it is one object, and no row.
    """
    if isinstance(document, dict) and not reading.known.intersection(map(column_key, document)):
        raise UserError(
            f"{reading.name} holds one JSON object with the keys {listed(document)}: write a list of objects, each "
            "with its file and caption, or one of them in each line."
        )
    for number, entry in enumerate(document if isinstance(document, list) else [document], 1):
        yield f" row {number}", _json_record(entry)


def _json_record(entry: Any) -> dict[str, Any] | str:
    """An entry of a JSON file as a row: a string is a caption."""
    if isinstance(entry, str):
        return {"caption": entry}
    return entry if isinstance(entry, dict) else f"a JSON {_kind(entry)}, not an object"


def _delimited(usual: str) -> Callable[[bytes, _TableReading], Records]:
    """Reader of files whose cells are separated by `usual` or another of the common separators."""

    def read(content: bytes, reading: _TableReading) -> Records:
        table = DelimitedText(decode(content), reading.name, known=reading.known, usual=usual)
        reading.check(
            table.columns,
            "its first line has to name the columns, so rename the one that is meant, or add a line",
        )
        if table.separator != usual:
            reading.tell(
                f"{reading.name}: read as cells between {SEPARATORS.get(table.separator, table.separator)}"
            )
        keys = [column_key(column) for column in table.columns]
        caption = next((keys.index(column) for column in reading.columns.captions if column in keys), None)
        for number, cells in table.records(caption):
            if isinstance(cells, str):
                yield f":{number}", cells
                continue
            record: dict[str, Any] = {}
            for key, cell in zip(keys, cells, strict=True):
                # Of columns of one name, the first one that is filled.
                record[key] = record.get(key) or cell
            yield f":{number}", record

    return read


def _parquet_rows(content: bytes, reading: _TableReading) -> Records:
    """Rows of a Parquet file, only with columns for files and captions."""
    import pyarrow as pa
    import pyarrow.parquet as pq

    try:
        file = pq.ParquetFile(pa.BufferReader(content))
        schema = file.schema_arrow
        reading.check(schema.names)
        _check_pictures(schema, reading)
        names = [name for name in schema.names if column_key(name) in reading.known]
        if twice := next((name for name in names if names.count(name) > 1), None):
            raise UserError(f"{reading.name} has two columns {twice}: leave one of them out.")
        number = 0
        for batch in file.iter_batches(PARQUET_ROWS, columns=names):
            for values in zip(*(cell_values(batch.column(name)) for name in names), strict=True):
                number += 1
                yield f" row {number}", dict(zip(names, values, strict=True))
    except (pa.ArrowException, OSError) as error:
        raise UserError(f"{reading.name} is not a readable Parquet file: write it again.") from error


def _check_pictures(schema: pa.Schema, reading: _TableReading) -> None:
    """Refuse a Parquet file that holds pictures instead of naming their files.

    Raises:
        UserError: it does.
    """
    import pyarrow.types as types

    if reading.columns.files not in reading.needed:
        return
    files = [column for column in schema if column_key(column.name) in reading.columns.files]
    pictures = [
        column
        for column in files
        if types.is_nested(column.type) or types.is_binary(column.type) or types.is_large_binary(column.type)
    ]
    if pictures == files:
        column = files[0]
        raise UserError(
            f"the column {column.name} of {reading.name} holds pictures ({column.type}), and fewstep reads them from "
            "files: save them beside the table and name the files in a column file_name."
        )


def is_text(kind: pa.DataType) -> bool:
    """Whether an Arrow column holds texts."""
    import pyarrow.types as types

    if types.is_dictionary(kind):
        kind = kind.value_type
    return types.is_string(kind) or types.is_large_string(kind) or types.is_string_view(kind)


def cell_values(column: pa.Array) -> list[Any]:
    """A column's values as Python has them; texts are decoded one by one, since Parquet doesn't vouch for them."""
    import pyarrow as pa
    import pyarrow.types as types

    if types.is_dictionary(column.type):
        column = column.cast(column.type.value_type)
    if is_text(column.type):
        column = column.cast(pa.large_binary())
    if types.is_binary(column.type) or types.is_large_binary(column.type):
        return [None if value is None else decode_utf8(value) for value in column.to_pylist()]
    return column.to_pylist()


def _text_lines(content: bytes, reading: _TableReading) -> Records:
    """Lines of a text file that are not empty, each a caption."""
    for number, line in enumerate(each_line(decode(content)), 1):
        if line.strip():
            yield f":{number}", {"caption": line}


_READERS = {
    ".jsonl": _json_lines,
    ".ndjson": _json_lines,
    ".json": _json_document,
    ".csv": _delimited(","),
    ".tsv": _delimited("\t"),
    ".parquet": _parquet_rows,
    ".txt": _text_lines,
}
TABLE_SUFFIXES = tuple(suffix for suffix in _READERS if suffix != ".txt")
"""Ends of the names of tables that can have several columns; each may be followed by .gz."""


def _reader(path: str, name: str) -> tuple[Callable[[bytes, _TableReading], Records], bool]:
    """The reader of a file by its suffix, and whether the file is compressed.

    Raises:
        UserError: the suffix is none that is read.
    """
    suffixes = [suffix.lower() for suffix in PurePosixPath(path).suffixes]
    zipped = suffixes[-1:] == [".gz"]
    suffix = next(reversed(suffixes[:-1] if zipped else suffixes), "")
    if suffix not in _READERS:
        raise UserError(
            f"{name} has {f'the suffix {suffix}' if suffix else 'no suffix'}, by which tables are told apart: "
            f"fewstep reads {', '.join(_READERS)}, each also with .gz after it."
        )
    return _READERS[suffix], zipped


def _content(path: str) -> bytes:
    """The bytes of a file.

    Raises:
        UserError: it doesn't exist, or its storage can't be reached.
    """
    storage, name = Storage.of_file(path)
    content = storage.read(name)
    if content is None:
        raise UserError(f"the file {path} doesn't exist: check the path.")
    return content


def _kind(value: Any) -> str:
    """A value's kind in words that need no Python."""
    kinds = {list: "list", dict: "structure", bytes: "binary value", bool: "truth value", float: "number"}
    return kinds.get(type(value), "null" if value is None else type(value).__name__)


def listed(columns: Collection[str]) -> str:
    """Names of columns for a message, the first ten."""
    names = [repr(str(name)[:40])[1:-1] for name in columns]
    return ", ".join(names[:10]) + (f" and {len(names) - 10} more" if len(names) > 10 else "") or "none"
