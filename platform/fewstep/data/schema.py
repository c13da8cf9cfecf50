"""Version 1 of fewstep's dataset: what lies on disk, and the door where it is checked.

Layout below one root, a local folder or `s3://bucket/prefix`:

    plan.json                               settings and row digest; written first, guards re-runs
    <split>/<C>x<H>x<W>/part-00000.parquet  shards; one latent shape a folder; each is a random sample
    rejected.jsonl                          broken images and rows, one JSON object each; may be absent
    dataset.json                            the manifest, written last: a folder without it is unfinished

Columns of a shard, one row an example:

    key          string          unique in the dataset
    caption      string
    tokens       list<float16>   token states of the text encoder, (L, D) flattened; L differs by row
    token_count  int32           L
    latent       list<float32>   (C, H, W) flattened; null where the dataset holds prompts alone
    channels, height, width      int32: C, H, W; for prompts alone, the latent shape to generate
    split        string          "train" or "held_out"
    pooled       list<float32>   the text encoder's vector of the whole caption, (P,); null where it has none;
                                 shards written before it existed lack the column

The Parquet metadata carries a JSON object under `fewstep`: version, token_dim, text_encoder, autoencoder, and
`rejected`, the rows of this shard that could not be encoded.
"""

from __future__ import annotations

import json
import os
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field
from typing import Any

import numpy as np
import pyarrow as pa

from fewstep.data.storage import Storage
from fewstep.errors import UserError

SCHEMA_VERSION = 1
MANIFEST = "dataset.json"
METADATA_KEY = b"fewstep"

MAX_TOKENS = 64
"""Default limit on a caption's length, in tokens with the encoder's start and end marks."""

SCHEMA = pa.schema(
    [
        pa.field("key", pa.string(), nullable=False),
        pa.field("caption", pa.string(), nullable=False),
        pa.field("tokens", pa.list_(pa.float16()), nullable=False),
        pa.field("token_count", pa.int32(), nullable=False),
        pa.field("latent", pa.list_(pa.float32())),
        pa.field("channels", pa.int32(), nullable=False),
        pa.field("height", pa.int32(), nullable=False),
        pa.field("width", pa.int32(), nullable=False),
        pa.field("split", pa.string(), nullable=False),
        pa.field("pooled", pa.list_(pa.float32())),
    ]
)

Shape = tuple[int, int, int]
"""Latent shape (C, H, W)."""


@dataclass(frozen=True)
class Encoding:
    """How captions and images became numbers; part of every shard's metadata and of the manifest."""

    text_encoder: str
    token_dim: int
    autoencoder: str
    pooled_dim: int | None = None
    max_tokens: int = MAX_TOKENS
    """Longest caption; generating takes captions as long."""

    def metadata(self, rejected: Sequence[Mapping[str, str]] = ()) -> dict[bytes, bytes]:
        content = {"version": SCHEMA_VERSION, **asdict(self), "rejected": list(rejected)}
        return {METADATA_KEY: json.dumps(content).encode()}


@dataclass(frozen=True)
class Shard:
    """One Parquet file: `path` is relative to the dataset's root."""

    path: str
    split: str
    shape: Shape
    rows: int


@dataclass(frozen=True)
class DatasetInfo:
    """A finished dataset: the checked content of its manifest, and where it lies."""

    storage: Storage
    encoding: Encoding
    source: str
    has_latents: bool
    shards: tuple[Shard, ...]
    rejected: dict[str, int] = field(default_factory=dict)
    """Rejected rows by reason."""

    attribution: str = ""

    @property
    def root(self) -> str:
        return self.storage.root

    @property
    def splits(self) -> tuple[str, ...]:
        return tuple(dict.fromkeys(shard.split for shard in self.shards))

    def rows(self, split: str) -> int:
        return sum(shard.rows for shard in self.shards if shard.split == split)

    def buckets(self, split: str) -> dict[Shape, tuple[Shard, ...]]:
        """The shards of a split by latent shape, in a fixed order.

        Raises:
            UserError: the split has no rows.
        """
        shards = [shard for shard in self.shards if shard.split == split]
        if not shards:
            raise UserError(
                f"the dataset {self.root} has no rows in its split {split!r} "
                f"(it has {', '.join(self.splits)}): name one of those, or prepare "
                "it again with a larger --held-out."
            )
        shapes = sorted({shard.shape for shard in shards})
        return {
            shape: tuple(sorted((s for s in shards if s.shape == shape), key=lambda s: s.path))
            for shape in shapes
        }

    def check_world(self, split: str, world_size: int) -> None:
        """Refuse more workers than a bucket of the split has shards: each reads its own.

        Raises:
            UserError: some worker would have nothing to read.
        """
        for shape, shards in self.buckets(split).items():
            if len(shards) < world_size:
                rows = sum(shard.rows for shard in shards)
                raise UserError(
                    f"{self.root} has {len(shards)} shards of shape {'x'.join(map(str, shape))} in its split "
                    f"{split!r} for {world_size} workers: use at most {len(shards)}, or prepare the data "
                    f"again with --shard-rows {max(1, rows // (2 * world_size))}."
                )

    @classmethod
    def open(cls, root: str | os.PathLike[str]) -> DatasetInfo:
        """Read and check a dataset's manifest.

        Raises:
            UserError: nothing is there, storage is away, preparation didn't finish, the schema version
                differs, there are no rows, or shards are missing.
        """
        storage = Storage.at(root)
        content = storage.read(MANIFEST)
        if content is None:
            raise UserError(_no_manifest(storage))
        try:
            manifest: dict[str, Any] = json.loads(content)
        except ValueError as error:
            raise UserError(f"{storage.root}/{MANIFEST} is not JSON: prepare the dataset again.") from error
        check_version(manifest.get("version"), storage.root)
        info = cls(
            storage,
            Encoding(**manifest["encoding"]),
            manifest["source"],
            manifest["has_latents"],
            tuple(Shard(s["path"], s["split"], tuple(s["shape"]), s["rows"]) for s in manifest["shards"]),
            manifest["rejected"],
            manifest["attribution"],
        )
        if not any(shard.rows for shard in info.shards):
            raise UserError(f"the dataset {info.root} is empty: give jobs/prepare_data.py images or prompts.")
        present = storage.list()
        if missing := [shard.path for shard in info.shards if shard.path not in present]:
            raise UserError(
                f"the dataset {info.root} lacks {len(missing)} of its {len(info.shards)} shards "
                f"(first: {missing[0]}): run the same jobs/prepare_data.py command again to make those."
            )
        for split in info.splits:
            for shards in info.buckets(split).values():
                check_version(
                    shard_metadata(storage, shards[0].path)["version"], f"{info.root}/{shards[0].path}"
                )
        return info

    def save(self) -> None:
        """Write the manifest; the last act of preparing a dataset."""
        manifest = {
            "version": SCHEMA_VERSION,
            "source": self.source,
            "encoding": asdict(self.encoding),
            "has_latents": self.has_latents,
            "rows": {split: self.rows(split) for split in self.splits},
            "rejected": self.rejected,
            "attribution": self.attribution,
            "shards": [asdict(shard) for shard in self.shards],
        }
        self.storage.write(MANIFEST, json.dumps(manifest, indent=1).encode())


def check_version(version: object, where: str) -> None:
    """Refuse another schema version.

    Raises:
        UserError: `version` isn't this code's.
    """
    if version != SCHEMA_VERSION:
        raise UserError(
            f"{where} has schema version {version}, this fewstep reads version {SCHEMA_VERSION}: "
            "prepare the data again with this version's jobs/prepare_data.py."
        )


def bucket_folder(split: str, shape: Shape) -> str:
    """`train/3x16x16`, relative to the root."""
    return f"{split}/{'x'.join(map(str, shape))}"


def encode_table(
    rows: pa.Table,
    tokens: Sequence[np.ndarray],
    latents: np.ndarray | None,
    shape: Shape,
    split: str,
    pooled: np.ndarray | None = None,
) -> pa.Table:
    """Assemble a shard's table.

    Args:
        rows: columns `key` and `caption`, N rows.
        tokens: N arrays (L_i, D) float16.
        latents: (N, C, H, W) float32, or None for prompts alone.
        pooled: (N, P) float32, or None where the text encoder has no vectors of whole captions.
    """
    count = len(tokens)
    flat = np.concatenate([t.reshape(-1) for t in tokens]) if count else np.empty(0, np.float16)
    constant = {
        name: pa.array([value] * count, pa.int32()) for name, value in zip(_SIZES, shape, strict=True)
    }
    columns = {
        "key": rows["key"],
        "caption": rows["caption"],
        "tokens": _lists(flat, [t.size for t in tokens]),
        "token_count": pa.array([len(t) for t in tokens], pa.int32()),
        "latent": _arrays(latents, count),
        **constant,
        "split": pa.array([split] * count, pa.string()),
        "pooled": _arrays(pooled, count),
    }
    return pa.table(columns, schema=SCHEMA)


def shard_metadata(storage: Storage, path: str) -> dict[str, Any]:
    """The JSON object in a shard's footer, with its number of rows as `rows`.

    Raises:
        UserError: the file isn't one of ours, or storage is away.
    """
    import pyarrow.parquet as pq

    with storage.reachable():
        try:
            footer = pq.read_metadata(storage.path(path), filesystem=storage.filesystem)
        except (pa.ArrowInvalid, FileNotFoundError) as error:
            raise UserError(
                f"{storage.root}/{path} is not a readable Parquet file: delete it and prepare again."
            ) from error
    metadata = json.loads((footer.metadata or {}).get(METADATA_KEY, b'{"version": "none"}'))
    return {**metadata, "rows": footer.num_rows}


def read_shard(storage: Storage, path: str, columns: Sequence[str] | None = None) -> pa.Table:
    """A whole shard, or some columns of it, in SCHEMA's types.

    Raises:
        UserError: as `shard_metadata`; another schema version.
    """
    import pyarrow.parquet as pq

    with storage.reachable():
        try:
            table = pq.read_table(
                storage.path(path), filesystem=storage.filesystem, partitioning=None, columns=columns
            )
        except (pa.ArrowInvalid, FileNotFoundError) as error:
            raise UserError(
                f"{storage.root}/{path} is not a readable Parquet file: delete it and prepare again."
            ) from error
    metadata = (table.schema.metadata or {}).get(METADATA_KEY, b'{"version": "none"}')
    check_version(json.loads(metadata)["version"], f"{storage.root}/{path}")
    if "pooled" not in (columns or table.column_names):
        table = table.append_column(SCHEMA.field("pooled"), _arrays(None, len(table)))
    return table.replace_schema_metadata(None)


_SIZES = ("channels", "height", "width")


def _arrays(arrays: np.ndarray | None, count: int) -> pa.Array:
    """(N, …) float32 as N flat lists; `count` nulls for None."""
    if arrays is None:
        return pa.nulls(count, pa.list_(pa.float32()))
    return _lists(arrays.reshape(-1), [arrays[0].size] * count if count else [])


def _lists(flat: np.ndarray, sizes: Sequence[int]) -> pa.Array:
    offsets = np.concatenate([[0], np.cumsum(sizes, dtype=np.int64)])
    if offsets[-1] > (most := np.iinfo(np.int32).max):
        fitting = int(len(sizes) * most // offsets[-1])
        raise UserError(
            f"a shard of {len(sizes)} rows of this encoder holds more numbers than Parquet's lists can count: prepare "
            f"the data with --shard-rows {fitting} or less."
        )
    return pa.ListArray.from_arrays(pa.array(offsets.astype(np.int32)), pa.array(flat))


def _no_manifest(storage: Storage) -> str:
    if not storage.list():
        return (
            f"there is no dataset at {storage.root}: make one with jobs/prepare_data.py --out {storage.root}."
        )
    return (
        f"{storage.root} holds no {MANIFEST}, its preparation did not finish: run the same "
        "jobs/prepare_data.py command again, it goes on where it stopped."
    )
