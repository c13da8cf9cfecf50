"""Sources of examples: a folder of images with captions, or prompts without images. `datasets` has the bundled sets.

Every source is read into a `Source`: an index of raw rows (with the names of image files rather than pixels, except for
the small bundled sets), and the rows that were rejected.
"""

from __future__ import annotations

import hashlib
import posixpath
from collections.abc import Callable, Iterable, Sequence

from fewstep.data.file_names import FileNames
from fewstep.data.rows import INDEX, SPLIT_FOLDERS, Collected, Source
from fewstep.data.tables import TABLE_SUFFIXES, Columns, RowError, table_rows
from fewstep.errors import UserError
from fewstep.images import Size, fit, measure, open_image
from fewstep.storage import Storage

# The functions for images are found here too, by those who know them from before fewstep 0.2.
__all__ = ["INDEX", "Size", "Source", "fit", "image_folder", "measure", "open_image", "prompts"]

# Files that are looked for as the table of captions, in this order
TABLE_NAMES = tuple(
    f"{stem}{suffix}{zipped}"
    for stem in ("metadata", "captions")
    for suffix in TABLE_SUFFIXES
    for zipped in ("", ".gz")
)
# Ends of the names of pictures, for a note about those without a caption
PICTURE_SUFFIXES = (".png", ".jpg", ".jpeg", ".webp", ".tif", ".tiff", ".bmp", ".gif", ".avif", ".jp2")


def image_folder(
    folder: str, *, captions: str | None = None, held_out: float, columns: Columns | None = None
) -> Source:
    """The images of a folder, with a table of their captions.

    Args:
        folder: local, or s3://.
        captions: the table, of any kind that `table_rows` reads; None looks for metadata.* or captions.* in the folder
            or, where there is none, in the folders in it, however deep. Columns `file` (`file_name`, `image`),
            relative to the table's own folder or to `folder`, and `caption` (`text`, `prompt`); for editing also
            `reference` (`references`), a file or a list of files, as many in each row.
        held_out: share of the images, chosen by a hash of their names, that goes into the held-out split. Where some
            lie in a folder for training and some in one for validation or test, the folders decide.
        columns: where files and captions are; None looks for the usual names.

    Raises:
        UserError: there is no such folder or table, or no usable row in it.
    """
    storage = Storage.at(folder)
    files = storage.list()
    if not files:
        network = (
            " (or there is no network, or no right to read it)" if storage.root.startswith("hf:") else ""
        )
        raise UserError(f"there is no folder {storage.root}, or nothing in it{network}: check the path.")
    columns = columns or Columns()
    found, notes = FileNames(storage.root, files), list[str]()
    tables = [str(captions)] if captions is not None else _tables(storage, files, notes.append)
    collected = Collected(notes)
    for table in tables:
        name = table.removeprefix(f"{storage.root}/")
        own = posixpath.dirname(name) if name != table else ""
        rows = table_rows(
            table,
            name=name if own else None,
            needed=(columns.files, *columns.caption_groups),
            columns=columns,
            tell=collected.notes.append,
        )
        # Rows that can't be used are listed rather than fatal: large tables have some.
        for row in rows:
            try:
                written = row.text(columns.files, "file")
                caption = row.caption(columns, written)
                file = _file_named(written, own, found)
                references = [_file_named(name, own, found) for name in row.references()]
            except RowError as error:
                collected.reject(error.at(row.where))
                continue
            told = SPLIT_FOLDERS.get(file.partition("/")[0].casefold())
            collected.add(file, caption, row.where, file=file, told=told, references=references)
    # An image with several captions is several rows; keys have to be unique.
    collected.number_repeated()
    pictures = sum(file.lower().endswith(PICTURE_SUFFIXES) for file in files)
    used = collected.files()
    if idle := pictures - sum(name.lower().endswith(PICTURE_SUFFIXES) for name in used.to_pylist()):
        collected.notes.append(f"{idle} pictures in {storage.root} are in no usable row of the table")
    return collected.source("folder", ", ".join(tables), held_out, storage)


def _file_named(written: str, folder: str, files: FileNames) -> str:
    """The file that a table in a folder means.

    Raises:
        RowError: there is none.
    """
    if (file := files.find(written, folder)) is None:
        place = f"{files.root}{folder}".rstrip("/")
        raise RowError("missing file", f"there is no {written} in {place}{files.hint(written)}")
    return file


def prompts(paths: Sequence[str], *, held_out: float, columns: Columns | None = None) -> Source:
    """Prompts without images, for data-free distillation.

    A prompt's key is a hash of its text. Exact repetitions are rejected, so that no prompt is in both splits.

    Args:
        paths: text files with a prompt per line; or tables with a column `caption` (`text`, `prompt`), of any kind that
            `table_rows` reads.
        held_out: share of the prompts, chosen by a hash of their text, that goes into the held-out split.
        columns: where captions are; None looks for the usual names.

    Raises:
        UserError: a file doesn't exist, or there is no usable row in any.
    """
    collected, columns = Collected(), columns or Columns()
    names = [posixpath.basename(path) for path in paths]
    for path, name in zip(paths, names, strict=True):
        # Files of one name in several folders are told apart by their paths.
        for row in table_rows(
            path,
            name=path if names.count(name) > 1 else None,
            columns=columns,
            tell=collected.notes.append,
        ):
            try:
                caption = row.caption(columns)
            except RowError as error:
                collected.reject(error.at(row.where))
                continue
            collected.add(hashlib.sha256(caption.encode()).hexdigest()[:24], caption, row.where)
    collected.refuse_repeated(
        "repeated prompt", lambda caption, place: f"{caption[:80]} stands at {place} already"
    )
    return collected.source("prompts", ", ".join(paths), held_out)


def prompt_list(path: str, tell: Callable[[str], None] = lambda note: None) -> list[str]:
    """The prompts of a file, in order and with repetitions, for generating.

    Args:
        path: as of `prompts`.
        tell: is called with what the user should know, such as rows that can't be used.

    Raises:
        UserError: the file doesn't exist, or has no usable row.
    """
    found, faults = list[str](), list[str]()
    for row in table_rows(path, tell=tell):
        try:
            found.append(row.caption(Columns()))
        except RowError as error:
            rejection = error.at(row.where)
            faults.append(f"{rejection.where}: {rejection.detail}")
    if faults:
        tell(f"{len(faults)} rows can't be used and are left out, the first: {faults[0]}")
    if not found:
        raise UserError(f"there is no usable prompt in {path}: give a line, or a row, for each.")
    return found


def _tables(storage: Storage, files: Iterable[str], tell: Callable[[str], None]) -> list[str]:
    """Addresses of the tables of captions in a folder; where it has none itself, those of the folders in it.

    Raises:
        UserError: there is none.
    """
    by_folder: dict[str, dict[str, str]] = {}
    for file in files:
        folder, name = posixpath.split(file)
        # Not what programs leave, such as __MACOSX and .ipynb_checkpoints
        if not any(part.startswith((".", "__")) for part in folder.split("/")):
            by_folder.setdefault(folder, {})[name.lower()] = file
    tables: list[str] = []
    covered: set[str] = set()
    # Folders before those in them: what lies below a table is that table's.
    for folder, names in sorted(
        by_folder.items(), key=lambda item: (item[0].count("/") + bool(item[0]), item[0])
    ):
        parents = {"", *(folder[:at] for at, letter in enumerate(folder) if letter == "/")}
        if covered & parents:
            continue
        # The first of each folder
        present = [names[name] for name in TABLE_NAMES if name in names]
        if present:
            covered.add(folder)
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
