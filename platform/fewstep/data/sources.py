"""Sources of examples: a folder of images with captions, or prompts without images. `datasets` has the bundled sets.

Every source is read into a `Source`: an index of raw rows (with the names of image files rather than pixels, except for
the small bundled sets), and the rows that were rejected.
"""

from __future__ import annotations

import hashlib
import posixpath
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field

import pyarrow as pa

from fewstep.data.file_names import FileNames
from fewstep.data.images import Size, fit, measure, open_image
from fewstep.data.seeds import fraction
from fewstep.data.tables import (
    CAPTION_COLUMNS,
    FILE_COLUMNS,
    TABLE_SUFFIXES,
    Rejection,
    RowError,
    table_rows,
)
from fewstep.errors import UserError
from fewstep.storage import Storage

# The functions for images are found here too, by those who know them from before fewstep 0.2.
__all__ = ["INDEX", "Size", "Source", "fit", "image_folder", "measure", "open_image", "prompts"]

INDEX = pa.schema(
    [
        pa.field("key", pa.string(), nullable=False),
        pa.field("caption", pa.string(), nullable=False),
        pa.field("split", pa.string(), nullable=False),
        pa.field("file", pa.string()),
        pa.field("image", pa.large_binary()),
        pa.field("where", pa.string(), nullable=False),
    ]
)
"""Columns of raw rows. A row's image is the bytes in `image`, or the `file` in the source's storage, or neither;
`where` is the row's place in its table, for messages."""

# Files that are looked for as the table of captions, in this order
TABLE_NAMES = tuple(
    f"{stem}{suffix}{zipped}"
    for stem in ("metadata", "captions")
    for suffix in TABLE_SUFFIXES
    for zipped in ("", ".gz")
)
# Ends of the names of pictures, for a note about those without a caption
PICTURE_SUFFIXES = (".png", ".jpg", ".jpeg", ".webp", ".tif", ".tiff", ".bmp", ".gif", ".avif", ".jp2")

LEAST_ROWS = 4
"""Rows of each split of a small set, if it has twice as many: an evaluation needs 3, and one may be broken."""

# Names of folders that say which split their pictures are of, in small letters
SPLIT_FOLDERS = dict.fromkeys(("train", "training"), "train") | dict.fromkeys(
    ("validation", "valid", "val", "test", "testing", "dev", "eval", "held_out"), "held_out"
)


@dataclass(frozen=True)
class Source:
    """Raw rows to prepare.

    Attributes:
        name: kind of source; stored in the manifest.
        rows: index with INDEX's columns; keys are unique.
        rejected: rows that could not be used.
        storage: the storage that holds the rows' files; None where rows name no files.
        attribution: licences and attributions, stored with the data.
        notes: what the user should know about how the source was read, a line each.
    """

    name: str
    rows: pa.Table
    rejected: tuple[Rejection, ...] = ()
    storage: Storage | None = None
    attribution: str = ""
    notes: tuple[str, ...] = ()

    def digest(self) -> str:
        """SHA-256 over all rows of the index, by which the same source is recognised when preparing again."""
        digest = hashlib.sha256(self.name.encode())
        # Without the place in the table: the same rows in another table are the same rows.
        for row in self.rows.drop_columns("where").to_pylist():
            digest.update(repr(tuple(row.values())).encode())
        return digest.hexdigest()


@dataclass
class _Collected:
    """Rows of tables that have been read so far, and what there is to say of them."""

    rows: list[dict[str, str]] = field(default_factory=list)
    """Key, caption, split, file and where of each; the split is chosen at the end where it isn't told."""
    rejected: list[Rejection] = field(default_factory=list)
    notes: list[str] = field(default_factory=list)

    def source(self, name: str, where: str, held_out: float, storage: Storage | None = None) -> Source:
        """The source of these rows.

        Args:
            name: kind of source.
            where: its address, for the message.
            held_out: share to hold out of rows whose split isn't told.
            storage: of the rows' files.

        Raises:
            UserError: there is no row.
        """
        if not self.rows:
            first = self.rejected[0] if self.rejected else None
            example = f"; the first: {first.where}, {first.reason}, {first.detail}" if first else ""
            raise UserError(
                f"{where} has no usable row ({len(self.rejected)} rejected{example}): nothing can be prepared."
            )
        untold = [row for row in self.rows if "split" not in row]
        # By an image's file, so that it is in one split whatever captions it has.
        splits = self._split({row.get("file", row["key"]) for row in untold}, held_out)
        for row in untold:
            row["split"] = splits[row.get("file", row["key"])]
        # By columns: pyarrow takes many times as long over a list of rows.
        columns = {
            column.name: pa.array([row.get(column.name) for row in self.rows], column.type)
            for column in INDEX
        }
        index = pa.table(columns, schema=INDEX)
        return Source(name, index, tuple(self.rejected), storage, notes=tuple(self.notes))

    def _split(self, names: Iterable[str], held_out: float) -> dict[str, str]:
        """The split of each name: by a hash of the name, so that it is the same whatever other rows there are.

        Of a small set, chance may hold out too little for an evaluation, or leave nothing to learn from. Then the names
        that come next go there, up to half of all.
        """
        places = {name: fraction(0, f"split/{name}") for name in names}
        order = sorted(places, key=places.__getitem__)
        wanted = sum(place < held_out for place in places.values())
        count = wanted
        if 0 < held_out < 1:
            least = min(LEAST_ROWS, len(order) // 2)
            count = min(max(wanted, least), len(order) - least)
        if count != wanted:
            self.notes.append(
                f"--held-out {held_out:g} of {len(order)} would hold out {wanted}: {count} are held out instead"
            )
        chosen = set(order[:count])
        splits = {name: "held_out" if name in chosen else "train" for name in order}
        return splits


def image_folder(folder: str, *, captions: str | None = None, held_out: float) -> Source:
    """The images of a folder, with a table of their captions.

    Args:
        folder: local, or s3://.
        captions: the table, of any kind that `table_rows` reads; None looks for metadata.* or captions.* in the folder
            or, where there is none, in the folders in it. Columns `file` (`file_name`, `image`), relative to the
            table's own folder or to `folder`, and `caption` (`text`, `prompt`).
        held_out: share of the images, chosen by a hash of their names, that goes into the held-out split. Where some
            lie in a folder for training and some in one for validation or test, the folders decide.

    Raises:
        UserError: there is no such folder or table, or no usable row in it.
    """
    storage = Storage.at(folder)
    files = storage.list()
    if not files:
        raise UserError(f"there is no folder {storage.root}, or nothing in it: check the path.")
    found, notes = FileNames(storage.root, files), list[str]()
    tables = [str(captions)] if captions is not None else _tables(storage, files, notes.append)
    collected, keys = _Collected(notes=notes), set[str]()
    for table in tables:
        name = table.removeprefix(f"{storage.root}/")
        own = posixpath.dirname(name) if name != table else ""
        rows = table_rows(
            table,
            name=name if own else None,
            needed=(FILE_COLUMNS, CAPTION_COLUMNS),
            tell=collected.notes.append,
        )
        # Rows that can't be used are listed rather than fatal: large tables have some.
        for row in rows:
            try:
                written = row.text(FILE_COLUMNS, "file")
                caption = row.text(CAPTION_COLUMNS, "caption")
                if (file := found.find(written, own)) is None:
                    place = f"{storage.root}/{own}".rstrip("/")
                    raise RowError("missing file", f"there is no {written} in {place}{found.hint(written)}")
            except RowError as error:
                collected.rejected.append(error.at(row.where))
                continue
            # An image with several captions is several rows; keys have to be unique.
            key, number = file, 1
            while key in keys:
                number += 1
                key = f"{file}#{number}"
            keys.add(key)
            collected.rows.append({"key": key, "caption": caption, "file": file, "where": row.where})
    _split_by_folder(collected)
    used = {row["file"] for row in collected.rows}
    if idle := sum(file not in used and file.lower().endswith(PICTURE_SUFFIXES) for file in files):
        collected.notes.append(f"{idle} pictures in {storage.root} are in no usable row of the table")
    return collected.source("folder", ", ".join(tables), held_out, storage)


def _split_by_folder(collected: _Collected) -> None:
    """Give rows the split that their files' first folders tell, if there are folders for both splits."""
    splits = [SPLIT_FOLDERS.get(row["file"].partition("/")[0].casefold()) for row in collected.rows]
    if not {"train", "held_out"} <= set(splits):
        return
    for row, split in zip(collected.rows, splits, strict=True):
        row["split"] = split or "train"
    others = ", and what is in no such folder is for training" if None in splits else ""
    collected.notes.append(f"folders named after splits decide what is held out, not --held-out{others}")


def prompts(paths: Sequence[str], *, held_out: float) -> Source:
    """Prompts without images, for data-free distillation.

    A prompt's key is a hash of its text. Exact repetitions are rejected, so that no prompt is in both splits.

    Args:
        paths: text files with a prompt per line; or tables with a column `caption` (`text`, `prompt`), of any kind that
            `table_rows` reads.
        held_out: share of the prompts, chosen by a hash of their text, that goes into the held-out split.

    Raises:
        UserError: a file doesn't exist, or there is no usable row in any.
    """
    collected, places = _Collected(), dict[str, str]()
    names = [posixpath.basename(path) for path in paths]
    for path, name in zip(paths, names, strict=True):
        # Files of one name in several folders are told apart by their paths.
        for row in table_rows(
            path, name=path if names.count(name) > 1 else None, tell=collected.notes.append
        ):
            try:
                caption = row.text(CAPTION_COLUMNS, "caption")
                key = hashlib.sha256(caption.encode()).hexdigest()[:24]
                if key in places:
                    raise RowError("repeated prompt", f"{caption[:80]} stands at {places[key]} already")
            except RowError as error:
                collected.rejected.append(error.at(row.where))
                continue
            places[key] = row.where
            collected.rows.append({"key": key, "caption": caption, "where": row.where})
    return collected.source("prompts", ", ".join(paths), held_out)


def _tables(storage: Storage, files: Iterable[str], tell: Callable[[str], None]) -> list[str]:
    """Addresses of the tables of captions in a folder; where it has none itself, one of each folder directly in it.

    Raises:
        UserError: there is none.
    """
    by_folder: dict[str, dict[str, str]] = {}
    for file in files:
        folder, name = posixpath.split(file)
        if not folder.startswith((".", "__")):  # what programs leave, such as __MACOSX and .ipynb_checkpoints
            by_folder.setdefault(folder, {})[name.lower()] = file
    here = by_folder.pop("", {})
    below = [names for folder, names in sorted(by_folder.items()) if "/" not in folder]
    tables = []
    for names in [here] if any(name in here for name in TABLE_NAMES) else below:
        # The first of each folder
        present = [names[name] for name in TABLE_NAMES if name in names]
        tables += [f"{storage.root}/{table}" for table in present[:1]]
        if present[1:]:
            tell(f"{present[0]} has the captions; not read: {', '.join(present[1:])}")
    if not tables:
        raise UserError(
            f"there is no table of captions in {storage.root} (looked for {TABLE_NAMES[0]} and the like, metadata or "
            f"captions with {', '.join(TABLE_SUFFIXES)}, there and in its folders): add one with the columns file and "
            "caption, or name it with --captions."
        )
    return tables
