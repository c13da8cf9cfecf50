"""Sources of users' own data by their settings, and mixtures of several of them with weights."""

from __future__ import annotations

from pathlib import Path
from typing import Any, Literal

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
from pydantic import Field

from fewstep.config import Config, checked_settings
from fewstep.data.image_parquet import image_parquet
from fewstep.data.members import MixedStorage
from fewstep.data.rows import INDEX, Source, hashes, texts
from fewstep.data.sources import image_folder, prompts
from fewstep.data.tables import Columns, Rejection
from fewstep.data.webdataset import webdataset
from fewstep.errors import UserError
from fewstep.text import read_settings


class OwnSource(Config):
    """A source of a user's own data."""

    source: Literal["folder", "parquet", "webdataset", "prompts"]
    """Kind of source."""

    path: str | list[str]
    """Its folder, or files, or patterns."""

    captions: str | None = None
    """The table of captions of a folder, if it isn't in the folder."""

    caption_column: str | list[str] = Field(default_factory=list)
    """Columns of captions; of several, one is chosen at random for each row."""

    image_column: str | None = None
    """The column of images, or of the names of their files."""

    held_out: float | None = Field(None, ge=0, le=1)
    """Share of the rows that is held out; without it, what the command says."""

    weight: float = Field(1.0, gt=0)
    """How often each of its rows for training is in the dataset; of a fraction, a share of the rows is."""

    def read(self, held_out: float, seed: int = 0) -> Source:
        """Read its index.

        Args:
            held_out: share to hold out, where the settings don't say it.
            seed: of the choice among several captions.

        Raises:
            UserError: there is no such source, or it has no usable row.
        """
        paths = [self.path] if isinstance(self.path, str) else self.path
        named = [self.caption_column] if isinstance(self.caption_column, str) else self.caption_column
        share = held_out if self.held_out is None else self.held_out
        columns = Columns.named(named, self.image_column, seed)
        if self.source == "folder":
            if len(paths) != 1:
                raise UserError(
                    f"a source of the kind folder has one path, not {len(paths)}: write several sources."
                )
            return image_folder(paths[0], captions=self.captions, held_out=share, columns=columns)
        read = {"parquet": image_parquet, "webdataset": webdataset, "prompts": prompts}[self.source]
        return read(paths, held_out=share, columns=columns)


def mixture(file: str, *, held_out: float, seed: int = 0) -> Source:
    """Several sources as one, by a YAML file of their names and settings (`OwnSource`).

    A row's key begins with the name of its source. A source's weight is how often each of its rows for training is
    there: with 2 every row twice, with 0.5 a half of the rows, chosen by a hash of their keys.

    Args:
        file: local path of the YAML file.
        held_out: share of the rows of each source that is held out, where the file doesn't say it.
        seed: of all random choices.

    Raises:
        UserError: the file or one of the sources can't be used, or some have images and others none.
    """
    settings = _settings(file)
    sources = {name: one.read(held_out, seed) for name, one in settings.items()}
    pictured = {name: source.name != "prompts" for name, source in sources.items()}
    if len(set(pictured.values())) > 1:
        raise UserError(
            f"{file}: {next(n for n, has in pictured.items() if not has)} has prompts without images and "
            f"{next(n for n, has in pictured.items() if has)} has images: prepare them apart."
        )
    if (edits := next((name for name, source in sources.items() if source.references), None)) is not None:
        raise UserError(
            f"{file}: the rows of {edits} have reference images, which can't be mixed: prepare it apart."
        )
    tables, rejected, notes = [], [], []
    for name, source in sources.items():
        rows = _weighted(source.rows, settings[name].weight, seed)
        columns = {
            column: pc.binary_join_element_wise(name, rows[column], separator)
            for column, separator in (("key", "/"), ("file", "/"), ("where", ": "))
        }
        tables.append(
            pa.table({column: columns.get(column, rows[column]) for column in INDEX.names}, schema=INDEX)
        )
        rejected += [Rejection(f"{name}: {r.where}", r.reason, r.detail) for r in source.rejected]
        notes += [f"{name}: {note}" for note in source.notes]
        notes.append(
            f"{name}: {len(source.rows)} rows, {len(rows)} with its weight {settings[name].weight:g}"
        )
    storages = {name: source.storage for name, source in sources.items() if source.storage is not None}
    # Datasets of prompts alone are known by that name.
    kind = "mix" if any(pictured.values()) else "prompts"
    storage = MixedStorage(storages) if storages else None
    return Source(kind, pa.concat_tables(tables), tuple(rejected), storage, notes=tuple(notes))


def _settings(file: str) -> dict[str, OwnSource]:
    """The sources of a YAML file by their names.

    Raises:
        UserError: it can't be read, or says what is not allowed.
    """
    import yaml

    try:
        content: Any = yaml.safe_load(read_settings(Path(file), "--source mix"))
    except yaml.YAMLError as error:
        raise UserError(f"{file} is not YAML ({' '.join(str(error).split())[:200]}): mend it.") from error
    if not isinstance(content, dict) or not content:
        raise UserError(
            f"{file} holds no sources by name: write lines such as 'photos: {{source: folder, path: photos/}}'."
        )
    for name in content:
        if not isinstance(name, str) or "/" in name or not name:
            raise UserError(f"{file}: {name!r} can't be the name of a source: write a word without a slash.")
    return {
        name: checked_settings(OwnSource, tree, f"{file}, {name}", "fewstep prepare-data --help")
        for name, tree in content.items()
    }


def _weighted(rows: pa.Table, weight: float, seed: int) -> pa.Table:
    """Rows as often as their source's weight says; held-out rows once, and fewer with a weight below 1.

    A row's place is a hash of its key, so that a larger weight has all rows of a smaller one.
    """
    places = (
        hashes(seed, (f"weight/{key}" for key in texts(rows["key"])), len(rows)).astype(np.float64) / 2**64
    )
    whole = int(weight)
    copies = whole + (places < weight - whole)
    held_out = pc.equal(rows["split"], "held_out").to_numpy()
    copies = np.where(held_out, np.minimum(copies, 1), copies)
    taken = np.repeat(np.arange(len(rows)), copies)
    if not len(taken):
        return rows.slice(0, 0)
    number = np.arange(len(taken)) - np.repeat(np.cumsum(copies) - copies, copies)
    repeated = rows.take(pa.array(taken))
    again = pc.binary_join_element_wise(repeated["key"], pc.cast(pa.array(number + 1), pa.string()), "~")
    keys = pc.if_else(pa.array(number > 0), again, repeated["key"])
    return repeated.set_column(INDEX.get_field_index("key"), INDEX.field("key"), keys)
