"""Raw rows of a source: their index, and the collecting of it column by column."""

from __future__ import annotations

import hashlib
import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from fewstep.data.members import ImageStorage
from fewstep.data.seeds import stable_hash
from fewstep.data.tables import Rejection
from fewstep.errors import UserError

REFERENCE = pa.struct([("file", pa.large_string()), ("image", pa.large_binary())])
"""A reference image, for editing: bytes, or a file in the source's storage."""

INDEX = pa.schema(
    [
        pa.field("key", pa.string(), nullable=False),
        pa.field("caption", pa.string(), nullable=False),
        pa.field("split", pa.string(), nullable=False),
        pa.field("file", pa.string()),
        pa.field("image", pa.large_binary()),
        pa.field("where", pa.string(), nullable=False),
        pa.field("part", pa.string()),
        pa.field("references", pa.list_(REFERENCE)),
    ]
)
"""Columns of raw rows. A row's image is the bytes in `image`, or the `file` in the source's storage or the `part` of it
that `members` explains, or there is none; `where` is the row's place in its table, for messages. `references` are the
row's reference images; null where a source has none."""

LEAST_ROWS = 4
"""Rows of each split of a small set, if it has twice as many: an evaluation needs 3, and one may be broken."""

# Names of folders (and of files, as they are published) that say which split they are of, in small letters
SPLIT_FOLDERS = dict.fromkeys(("train", "training"), "train") | dict.fromkeys(
    ("validation", "valid", "val", "test", "testing", "dev", "eval", "held_out"), "held_out"
)
_SPLIT_WORD = re.compile(rf"(?<![a-z])({'|'.join(SPLIT_FOLDERS)})(?![a-z])")

CHUNK = 8192
"""Rows that are Python objects at a time."""


@dataclass(frozen=True)
class Source:
    """Raw rows to prepare.

    Attributes:
        name: kind of source; stored in the manifest.
        rows: index with INDEX's columns; keys are unique.
        rejected: rows that could not be used.
        storage: what holds the rows' files; None where rows name no files.
        attribution: licences and attributions, stored with the data.
        notes: what the user should know about how the source was read, a line each.
    """

    name: str
    rows: pa.Table
    rejected: tuple[Rejection, ...] = ()
    storage: ImageStorage | None = None
    attribution: str = ""
    notes: tuple[str, ...] = ()

    @property
    def references(self) -> int:
        """Reference images of each row."""
        column = self.rows["references"]
        return 0 if column.null_count else int(pc.list_value_length(column)[0].as_py())

    def digest(self) -> str:
        """SHA-256 over all rows of the index, by which the same source is recognised when preparing again."""
        digest = hashlib.sha256(self.name.encode())
        # Without the place in the table: the same rows in another table are the same rows. Without parts and references
        # where there are none: so it was before fewstep had them.
        columns = self.rows.drop_columns("where")
        for later in ("part", "references"):
            if columns[later].null_count == len(columns):
                columns = columns.drop_columns(later)
        for batch in columns.to_batches(max_chunksize=CHUNK):
            for row in zip(*(column.to_pylist() for column in batch.columns), strict=True):
                digest.update(repr(row).encode())
        return digest.hexdigest()


def index_table(columns: Mapping[str, Any], rows: int) -> pa.Table:
    """A table of INDEX's columns, from some of them; the others are null.

    Args:
        columns: lists or Arrow arrays, by name.
        rows: how many each has.
    """
    return pa.table(
        {
            field.name: columns[field.name] if field.name in columns else pa.nulls(rows, field.type)
            for field in INDEX
        },
        schema=INDEX,
    )


def told_split(path: str) -> str | None:
    """The split that a file's name or one of its folders tells, as in `data/train-00000-of-00002.parquet`."""
    for component in path.casefold().split("/"):
        if word := _SPLIT_WORD.search(component):
            return SPLIT_FOLDERS[word[1]]
    return None


class Collected:
    """Rows that have been read so far, and what there is to say of them.

    Rows are kept as Arrow columns; only the last few thousand are Python objects.
    """

    _columns = ("key", "caption", "file", "where", "part", "split", "references")

    def __init__(self, notes: list[str] | None = None) -> None:
        self.notes: list[str] = [] if notes is None else notes
        self._rejected: list[tuple[int, Rejection]] = []
        self._chunks: list[pa.Table] = []
        self._count = 0
        self._fresh()

    def _fresh(self) -> None:
        self._lists: dict[str, list[Any]] = {name: [] for name in self._columns}

    def __len__(self) -> int:
        return self._count

    def add(
        self,
        key: str,
        caption: str,
        where: str,
        *,
        file: str | None = None,
        told: str | None = None,
        references: Sequence[str] = (),
    ) -> None:
        """Add a row; `told` is the split that its folder tells, if any, and `references` are files."""
        images = [{"file": name} for name in references] or None
        for name, value in zip(self._columns, (key, caption, file, where, None, told, images), strict=True):
            self._lists[name].append(value)
        self._count += 1
        if len(self._lists["key"]) == CHUNK:
            self._flush()

    def extend(self, rows: pa.Table) -> None:
        """Add rows that are columns already: key, caption, file, where, part and split (null where it isn't told)."""
        self._flush()
        none = pa.nulls(len(rows), _COLLECTED.field("references").type)
        complete = rows.append_column("references", none)
        self._chunks.append(complete.select(self._columns).cast(_COLLECTED))
        self._count += len(rows)

    def reject(self, rejection: Rejection) -> None:
        """Add a row that can't be used."""
        self._rejected.append((self._count, rejection))

    def _flush(self) -> None:
        if self._lists["key"]:
            self._chunks.append(pa.table(self._lists, schema=_COLLECTED))
            self._fresh()

    def _table(self) -> pa.Table:
        self._flush()
        return pa.concat_tables(self._chunks) if self._chunks else _COLLECTED.empty_table()

    def refuse_repeated(self, reason: str, detail: Callable[[str, str], str]) -> None:
        """Reject rows whose key an earlier row has; `detail` is called with the caption and the earlier row's place."""
        table = self._table()
        codes, first = _codes(table["key"])
        repeated = np.flatnonzero(first[codes] != np.arange(len(codes)))
        if not len(repeated):
            return
        places = table["where"].take(pa.array(first[codes[repeated]])).to_pylist()
        again = table.take(pa.array(repeated))
        found = [
            (int(position), Rejection(where, reason, detail(caption, place)))
            for position, where, caption, place in zip(
                repeated, again["where"].to_pylist(), again["caption"].to_pylist(), places, strict=True
            )
        ]
        # In the order of reading: what is in the list at a position was read before the row of that position.
        self._rejected = sorted([*self._rejected, *found], key=lambda entry: entry[0])
        kept = np.ones(len(codes), bool)
        kept[repeated] = False
        self._chunks, self._count = [table.filter(pa.array(kept))], int(kept.sum())

    def number_repeated(self) -> None:
        """Make keys unique, where they are names of files of which some have several rows: `a.png`, `a.png#2`, …"""
        table = self._table()
        codes, first = _codes(table["key"])
        if len(first) == len(codes):
            return
        # Rows that can't clash with any other keep their key, and needn't be looked at.
        involved = (np.bincount(codes)[codes] > 1) | pc.match_substring(table["key"], "#").to_numpy()
        places = np.flatnonzero(involved)
        taken: set[str] = set()
        keys = []
        numbers: dict[str, int] = {}
        for file in table["key"].filter(pa.array(involved)).to_pylist():
            key, number = file, numbers.get(file, 1)
            while key in taken:
                number += 1
                key = f"{file}#{number}"
            numbers[file] = number
            taken.add(key)
            keys.append(key)
        mask = np.zeros(len(codes), bool)
        mask[places] = True
        replaced = pc.replace_with_mask(
            table["key"].combine_chunks(), pa.array(mask), pa.array(keys, pa.string())
        )
        self._chunks = [table.set_column(0, _COLLECTED.field("key"), replaced)]

    def files(self) -> pa.Array:
        """The different files of the rows, reference images included."""
        table = self._table()
        references = pc.struct_field(pc.list_flatten(table["references"]), "file").cast(pa.string())
        return pc.unique(pa.chunked_array([*table["file"].chunks, *references.chunks], pa.string()))

    def source(self, name: str, where: str, held_out: float, storage: ImageStorage | None = None) -> Source:
        """The source of these rows.

        Args:
            name: kind of source.
            where: its address, for the message.
            held_out: share to hold out of rows whose split isn't told. Where some rows' folders tell that they are for
                training and others' that they are for validation or test, all folders decide.
            storage: of the rows' files.

        Raises:
            UserError: there is no row.
        """
        self._refuse_other_references()
        table, rejected = self._table(), tuple(entry[-1] for entry in self._rejected)
        if not len(table):
            first = rejected[0] if rejected else None
            example = f"; the first: {first.where}, {first.reason}, {first.detail}" if first else ""
            raise UserError(
                f"{where} has no usable row ({len(rejected)} rejected{example}): nothing can be prepared."
            )
        told = table["split"]
        if {"train", "held_out"} <= set(pc.unique(told).to_pylist()):
            others = ", and what is in no such folder is for training" if told.null_count else ""
            self.notes.append(f"folders named after splits decide what is held out, not --held-out{others}")
            splits = pc.fill_null(told, "train")
        else:
            # By an image's file, so that it is in one split whatever captions it has; parts of files by their keys.
            whole = pc.if_else(pc.is_null(table["part"]), table["file"], pa.scalar(None, pa.string()))
            splits = self._split(pc.coalesce(whole, table["key"]), held_out)
        columns = {column: table[column] for column in self._columns} | {"split": splits}
        return Source(name, index_table(columns, len(table)), rejected, storage, notes=tuple(self.notes))

    def _refuse_other_references(self) -> None:
        """Reject rows that have another number of reference images than most."""
        table = self._table()
        counts = pc.fill_null(pc.list_value_length(table["references"]), 0).to_numpy()
        usual = int(np.bincount(counts).argmax()) if len(counts) else 0
        if (counts == usual).all():
            return
        for row in np.flatnonzero(counts != usual):
            detail = f"{counts[row]}, and most rows have {usual}"
            self.reject(Rejection(table["where"][row].as_py(), "other number of references", detail))
        kept = counts == usual
        self._chunks, self._count = [table.filter(pa.array(kept))], int(kept.sum())

    def _split(self, names: pa.ChunkedArray, held_out: float) -> pa.Array:
        """The split of each name: by a hash of the name, so that it is the same whatever other rows there are.

        Of a small set, chance may hold out too little for an evaluation, or leave nothing to learn from. Then the names
        that come next go there, up to half of all.
        """
        codes, first = _codes(names)
        places = hashes(0, (f"split/{name}" for name in texts(names.take(pa.array(first)))), len(first))
        order = np.argsort(places, kind="stable")
        wanted = int((places.astype(np.float64) / 2**64 < held_out).sum())
        count = wanted
        if 0 < held_out < 1:
            least = min(LEAST_ROWS, len(order) // 2)
            count = min(max(wanted, least), len(order) - least)
        if count != wanted:
            self.notes.append(
                f"--held-out {held_out:g} of {len(order)} would hold out {wanted}: {count} are held out instead"
            )
        chosen = np.zeros(len(order), bool)
        chosen[order[:count]] = True
        return pc.if_else(pa.array(chosen[codes]), "held_out", "train")


_COLLECTED = pa.schema(
    [(name, pa.list_(REFERENCE) if name == "references" else pa.string()) for name in Collected._columns]
)


def texts(column: pa.ChunkedArray) -> Iterator[str]:
    """The values of a column of texts; a few thousand are Python objects at a time."""
    for chunk in column.chunks:
        for start in range(0, len(chunk), CHUNK):
            yield from chunk.slice(start, CHUNK).to_pylist()


def hashes(seed: int, names: Iterator[str], count: int) -> np.ndarray:
    """`stable_hash` of each of `count` names, (count,) uint64."""
    return np.fromiter((stable_hash(seed, name) for name in names), np.uint64, count)


def _codes(column: pa.ChunkedArray) -> tuple[np.ndarray, np.ndarray]:
    """A number for each value, equal for equal values, and the first row of each number; both int64."""
    encoded = (
        column.combine_chunks().dictionary_encode() if column.num_chunks else pa.array([]).dictionary_encode()
    )
    codes = encoded.indices.to_numpy().astype(np.int64)
    # Numbers are given in the order in which values appear.
    first = np.full(len(encoded.dictionary), -1, np.int64)
    first[codes[::-1]] = np.arange(len(codes))[::-1]
    return codes, first
