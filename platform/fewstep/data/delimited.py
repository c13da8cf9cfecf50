"""Reading CSV and TSV files as people write them: any common separator, and rows that are rejected one by one.

Python's `csv` does the parsing, in its strict mode. What it does not do is here: to find the separator, and to go on
with the very next line where a row can't be read, so that an unclosed quotation mark costs its own row and no other;
and to take no line for what it may not be where both readings are possible.
"""

from __future__ import annotations

import csv
import itertools
import re
import sys
from collections.abc import Collection, Iterable, Iterator
from contextlib import contextmanager

from fewstep.errors import UserError
from fewstep.text import lines_of, trouble

SEPARATORS = {",": "commas", ";": "semicolons", "\t": "tabs", "|": "vertical bars"}
"""Separators of cells that are recognised, and their names."""

UNCLOSED = "a quotation mark is not closed, or stands inside a quoted cell"

Record = tuple[int, list[str] | str]
"""Line number of a record's beginning, and its cells or what is wrong with it."""


class DelimitedText:
    """A text of cells, whose first line has the columns' names.

    Args:
        text: the file's content.
        name: of the file, for messages.
        known: names of columns that matter, by which the separator is recognised; compared without regard to capitals.
        usual: the separator to prefer where several would do.

    Attributes:
        separator: one of `SEPARATORS`.
        columns: names as they are written, without blanks around them.

    Raises:
        UserError: the text is empty, or its first line is no text.
    """

    def __init__(self, text: str, name: str, *, known: Collection[str], usual: str) -> None:
        self._lines = lines_of(text)
        # Spreadsheets may put a line before the header that says which separator follows, PowerShell one with a type.
        said = re.fullmatch(r'"?sep=(.)"?[,;]*', self._lines[0].strip(" "), re.IGNORECASE)
        self._first = 1 if said or self._lines[0].startswith("#TYPE ") else 0
        while self._first < len(self._lines) and not self._lines[self._first].strip():
            self._first += 1
        if self._first == len(self._lines):
            raise UserError(f"the table {name} is empty: write the columns' names into its first line.")
        header = self._lines[self._first].removeprefix("\ufeff")
        if fault := trouble(header):
            raise UserError(f"the first line of {name} {fault}.")

        def fitness(separator: str) -> tuple[int, int, bool]:
            cells = _cells(header, separator)
            return sum(column_key(c) in known for c in cells), len(cells), separator == usual

        self.separator = said[1] if said else max(SEPARATORS, key=fitness)
        self.columns = [cell.strip() for cell in _cells(header, self.separator)]
        while self.columns and not self.columns[-1]:  # a separator at the end of every line
            self.columns.pop()

    def records(self, caption: int | None) -> Iterator[Record]:
        """All records below the header.

        A record has as many cells as there are columns; missing ones at its end are empty.

        Args:
            caption: index of the column whose cells may have line breaks; None if there is no such column.
        """
        records = self._read(caption)
        while True:
            # The limit on cells is set back before anything else runs.
            with _long_cells():
                some = list(itertools.islice(records, 1024))
            if not some:
                return
            yield from some

    def _read(self, caption: int | None) -> Iterator[Record]:
        lines = _Lines(self._lines, self._first + 1)
        reader = self._reader(lines)
        while True:
            start = lines.position
            try:
                cells = next(reader)
            except StopIteration:
                return
            except csv.Error:
                yield start + 1, self._mended(start) or UNCLOSED
                # The lines that were read along with this one may be good rows.
                lines.position = start + 1
                reader = self._reader(lines)
                continue
            if lines.position - start == 1:
                if self._lines[start].strip():
                    yield start + 1, self._checked(cells)
            elif self._doubtful(start, lines.position, cells, caption):
                # A cell with line breaks, or rows behind a quotation mark that was forgotten: none of the lines is
                # taken for what it may not be.
                for number in range(start, lines.position):
                    yield (
                        number + 1,
                        f"line {start + 1} to {lines.position} may be one row or several: {UNCLOSED}",
                    )
            else:
                yield start + 1, self._checked(cells)

    def _checked(self, cells: list[str]) -> list[str] | str:
        """The cells of a record, as many as there are columns; or what is wrong with them."""
        width = len(self.columns)
        if any(extra.strip() for extra in cells[width:]):
            return (
                f"{len(cells)} cells, but {width} columns: "
                "a cell with the separator in it needs quotation marks around it"
            )
        if len(cells) == 1 < width and any(
            other in cells[0] for other in SEPARATORS if other != self.separator
        ):
            return f"1 cell, but {width} columns, which the first line separates by {SEPARATORS.get(self.separator)}"
        return (cells + [""] * width)[:width]

    def _mended(self, number: int) -> list[str] | str | None:
        """The cells of a line with blanks between a closing quotation mark and the separator; None if it is no such."""
        line = re.sub(rf'"[ \t]+(?={re.escape(self.separator)}|$)', '"', self._lines[number])
        try:
            return self._checked(next(self._reader([line])))
        except csv.Error:
            return None

    def _reader(self, lines: Iterable[str]) -> Iterator[list[str]]:
        """A parser of the lines from the present position on; new after every fault, which leaves one inside a cell."""
        return csv.reader(lines, delimiter=self.separator, strict=True, skipinitialspace=True)

    def _doubtful(self, start: int, end: int, record: list[str], caption: int | None) -> bool:
        """Whether a record of several lines, `start` to `end`, may be several rows.

        It may, if it has too few or too many cells; or if one of its lines looks like a row by itself. The record's own
        cells stand before the caption in its first line, and behind it in its last, and count there for nothing.
        """
        if len(record) != len(self.columns):
            return True
        before = range(0 if caption is None else caption)
        behind = range(0 if caption is None else caption + 1, len(self.columns))
        for number in range(start, end):
            telling = [*(before if number > start else ()), *(behind if number < end - 1 else ())]
            line = _cells(self._lines[number].replace('"', ""), self.separator)
            if telling and len(line) > max(telling) and all(_alike(line[i], record[i]) for i in telling):
                return True
        return False


def column_key(name: str) -> str:
    """The form of a column's name by which it is looked up: without blanks around it, and in small letters."""
    return name.strip().casefold()


class _Lines:
    """Iterator over lines whose position can be set back."""

    def __init__(self, lines: list[str], position: int) -> None:
        self.lines, self.position = lines, position

    def __iter__(self) -> _Lines:
        return self

    def __next__(self) -> str:
        if self.position >= len(self.lines):
            raise StopIteration
        self.position += 1
        return self.lines[self.position - 1] + "\n"


@contextmanager
def _long_cells() -> Iterator[None]:
    """A context in which csv reads cells of any length; its limit belongs to the whole process and is put back."""
    before = csv.field_size_limit(sys.maxsize)
    try:
        yield
    finally:
        csv.field_size_limit(before)


def _cells(line: str, separator: str) -> list[str]:
    """The cells of a line by itself, however its quotation marks stand."""
    with _long_cells():
        return next(csv.reader([line], delimiter=separator, skipinitialspace=True), [])


def _alike(cell: str, own: str) -> bool:
    """Whether a cell may stand in the column in which `own` stands, in another row."""
    kinds = _kind(cell), _kind(own)
    return kinds[0] == kinds[1] or (kinds[1] not in ("file", "text") and kinds[0] not in ("file", "text"))


def _kind(cell: str) -> str:
    """A coarse kind of a cell, by which rows are told from the lines of a caption."""
    cell = cell.strip()
    if not cell:
        return "empty"
    if re.fullmatch(r"[+-]?\d+([.,]\d+)?", cell):
        return "number"
    if re.search(r"\S\.\w{2,9}$", cell):
        return "file"
    return "text" if " " in cell else "word"
