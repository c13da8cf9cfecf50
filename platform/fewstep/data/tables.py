"""Reading tables of captions (JSON lines, CSV, Parquet, plain text), with the place in the file of each row."""

from __future__ import annotations

import csv
import io
import json
from collections.abc import Iterable, Iterator
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import pyarrow as pa

from fewstep.errors import UserError
from fewstep.storage import Storage

# Names of the columns for an image's file and for its caption; the first one that is filled counts.
FILE_COLUMNS = ("file", "file_name", "image")
CAPTION_COLUMNS = ("caption", "text", "prompt")


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


def table_rows(path: str) -> Iterator[tuple[str, dict[str, Any] | Rejection]]:
    """Places and rows of a table or text file; a row that can't be read is a Rejection.

    Raises:
        UserError: the file doesn't exist, or is not readable as a whole.
    """
    storage, name = Storage.of_file(path)
    content = storage.read(name)
    if content is None:
        raise UserError(f"the file {path} doesn't exist: check the path.")
    # By suffix; anything unknown is read as plain text.
    read = {".jsonl": _json_lines, ".csv": _csv_rows, ".parquet": _parquet_rows}.get(
        Path(name).suffix, _text_lines
    )
    for number, record in read(content, path):
        where = f"{name}:{number}"
        if isinstance(record, str):
            yield where, Rejection(where, "unreadable row", record)
        else:
            yield where, record


Numbered = Iterator[tuple[int, dict[str, Any] | str]]
"""Pairs of a row's number and the row, or the number and what is wrong with the row."""


def _json_lines(content: bytes, path: str) -> Numbered:
    """Rows of JSON lines; a line that is a string is a caption."""
    for number, line in enumerate(content.splitlines(), 1):
        if not line.strip():
            continue
        try:
            record = json.loads(line)
        except ValueError as error:
            yield number, f"not JSON: {error}"
            continue
        if isinstance(record, str):
            record = {"caption": record}
        yield number, record if isinstance(record, dict) else "not a JSON object"


def _csv_rows(content: bytes, path: str) -> Numbered:
    """Rows of a CSV file whose first line has the columns' names."""
    # utf-8-sig: some spreadsheets begin files with a byte order mark.
    reader = csv.DictReader(io.StringIO(content.decode("utf-8-sig", errors="replace"), newline=""))
    for record in reader:
        # Cells beyond the header's have no name, and are left out.
        yield reader.line_num, {name: value for name, value in record.items() if name}


def _parquet_rows(content: bytes, path: str) -> Numbered:
    """Rows of a Parquet file, only with columns for files and captions."""
    import pyarrow.parquet as pq

    try:
        table = pq.read_table(pa.BufferReader(content))
    except pa.ArrowInvalid as error:
        raise UserError(f"{path} is not a readable Parquet file: write it again.") from error
    columns = [name for name in (*FILE_COLUMNS, *CAPTION_COLUMNS) if name in table.column_names]
    yield from enumerate(table.select(columns).to_pylist(), 1)


def _text_lines(content: bytes, path: str) -> Numbered:
    """Lines of a text file that are not empty, each a caption."""
    for number, line in enumerate(content.splitlines(), 1):
        try:
            text = line.decode().strip()
        except UnicodeDecodeError:
            yield number, "not UTF-8 text"
            continue
        if text:
            yield number, {"caption": text}


def first_text(record: dict[str, Any], names: Iterable[str]) -> str | None:
    """The first of the columns `names` that holds a text; an integer counts as one (a class of `labels:1000`)."""
    values = (str(value) if type(value := record.get(name)) is int else value for name in names)
    return next((value.strip() for value in values if isinstance(value, str) and value.strip()), None)
