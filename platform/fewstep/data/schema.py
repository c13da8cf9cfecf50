"""Version 2 of the format of fewstep's datasets, and the checks on opening one.

Files below one root, a local folder or `s3://bucket/prefix`:

    plan.json                               settings and digest of the rows; written first, compared when run again
    <split>/<C>x<H>x<W>/part-00000.parquet  shards, a folder (bucket) for each latent shape; each is a random sample
    rejected.jsonl                          broken images and rows, one JSON object each; may be absent
    dataset.json                            the manifest; written last, so that a folder without it is unfinished

Columns of a shard; a row is an example:

    key          string          unique in the dataset
    caption      string
    tokens       bytes           token states of the text encoder, float16 (L, D); L differs by row; empty for classes
    token_count  int32           L
    latent       bytes           (C, H, W) numbers of the manifest's latent_type; null in datasets of prompts without
                                 images
    channels, height, width      int32: C, H, W; for prompts without images, the latent shape to generate
    split        string          "train" or "held_out"
    pooled       list<float32>   the text encoder's vector of the whole caption, (P,); null where it has none
    label        int32           class index; null for texts
    token_scale  float32         factor of `tokens`, a power of two, where states exceed float16's range; null for none
    references   bytes           of datasets for editing: (N, C, H, W) numbers, latents of the row's N reference images;
                                 null in others
    (`pooled`, `label`, `token_scale` and `references` were added later: older shards lack them, and hold a class as its
    only token state. In version 1, `tokens` and `latent` are lists of float16 and float32, which take much longer to
    read; such shards are still read.)

The Parquet metadata carries a JSON object under `fewstep`: version, token_dim, text_encoder, autoencoder, and
`rejected`, the rows of this shard that could not be encoded.
"""

from __future__ import annotations

import json
import os
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field
from typing import Any, Literal

import numpy as np
import pyarrow as pa

from fewstep.config import MAX_TOKENS, Shape
from fewstep.errors import UserError
from fewstep.storage import Storage

SCHEMA_VERSION = 2
READABLE = (1, 2)
"""Versions that are read."""
MANIFEST = "dataset.json"
PLAN = "plan.json"
METADATA_KEY = b"fewstep"

SCHEMA = pa.schema(
    [
        pa.field("key", pa.string(), nullable=False),
        pa.field("caption", pa.string(), nullable=False),
        pa.field("tokens", pa.large_binary(), nullable=False),
        pa.field("token_count", pa.int32(), nullable=False),
        pa.field("latent", pa.large_binary()),
        pa.field("channels", pa.int32(), nullable=False),
        pa.field("height", pa.int32(), nullable=False),
        pa.field("width", pa.int32(), nullable=False),
        pa.field("split", pa.string(), nullable=False),
        pa.field("pooled", pa.list_(pa.float32())),
        pa.field("label", pa.int32()),
        pa.field("token_scale", pa.float32()),
        pa.field("references", pa.large_binary()),
    ]
)

NumberType = Literal["float32", "bfloat16", "float16"]
"""How a number is stored."""

CONDITION_COLUMNS = ("tokens", "token_count", "pooled", "label", "token_scale")
"""Columns that `columns.condition_columns` makes of conditions."""


NUMBERS = ("tokens", "latent", "references")
"""Columns of bytes of numbers."""

LATER_COLUMNS = ("pooled", "label", "token_scale", "references")
"""Columns that older shards lack; null where they do."""


@dataclass(frozen=True)
class Encoding:
    """The encoders that a dataset was prepared with; part of every shard's metadata and of the manifest."""

    text_encoder: str
    token_dim: int
    """D of the token states; 0 for classes (1 in manifests from before fewstep 0.2)."""
    autoencoder: str
    pooled_dim: int | None = None
    max_tokens: int = MAX_TOKENS
    """Longest caption in tokens; students take prompts up to the same length."""
    latent_type: NumberType = "float32"
    """Type of the numbers of latents."""
    references: int = 0
    """Reference images of each row, for editing; they have the size of its image."""

    def metadata(self, rejected: Sequence[Mapping[str, str]] = ()) -> dict[bytes, bytes]:
        """A shard's Parquet metadata; `rejected` are the rows that were meant for it and could not be encoded."""
        # A shard's rejections are in the shard itself, so that preparing again needs no other record of them.
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
class RawRows:
    """What the manifest of a dataset that is encoded in the stream tells of its rows."""

    max_pixels: int
    """Images of more pixels are refused."""
    min_size: int
    """Images whose shorter side has fewer pixels are refused."""
    images: str | dict[str, Any] | None
    """Address of the storage that the rows' files lie in, or `members.addresses` of several; None where rows name no
    files."""
    sizes: dict[str, str]
    """Size in pixels (WIDTHxHEIGHT) of each bucket, by the bucket's name, such as 3x16x16."""


@dataclass(frozen=True)
class DatasetInfo:
    """A finished dataset: its storage, and the checked content of its manifest."""

    storage: Storage
    encoding: Encoding
    source: str
    has_latents: bool
    shards: tuple[Shard, ...]
    rejected: dict[str, int] = field(default_factory=dict)
    """Reason → number of rows rejected for it."""

    attribution: str = ""
    raw: RawRows | None = None
    """Of a dataset whose shards hold raw rows, to be encoded when they are read; None where they are encoded."""

    @property
    def root(self) -> str:
        """The dataset's address, as users write it."""
        return self.storage.root

    @property
    def splits(self) -> tuple[str, ...]:
        """Names of its splits, in the order of its shards."""
        return tuple(dict.fromkeys(shard.split for shard in self.shards))

    def rows(self, split: str) -> int:
        """Number of rows of a split; 0 if there is no such split."""
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
        # Sorted by shape and path: the stream's order is a function of this one.
        shapes = sorted({shard.shape for shard in shards})
        return {
            shape: tuple(sorted((s for s in shards if s.shape == shape), key=lambda s: s.path))
            for shape in shapes
        }

    @classmethod
    def open(cls, root: str | os.PathLike[str]) -> DatasetInfo:
        """Read and check a dataset's manifest.

        Raises:
            UserError: there is no dataset, storage can't be reached, preparation didn't finish, the schema version
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
            RawRows(**manifest["raw"]) if manifest.get("raw") else None,
        )
        if not any(shard.rows for shard in info.shards):
            raise UserError(f"the dataset {info.root} is empty: give fewstep prepare-data images or prompts.")
        # One listing instead of a request per shard.
        present = storage.list()
        if missing := [shard.path for shard in info.shards if shard.path not in present]:
            raise UserError(
                f"the dataset {info.root} lacks {len(missing)} of its {len(info.shards)} shards "
                f"(first: {missing[0]}): run the same fewstep prepare-data command again to make those."
            )
        # One footer per bucket: a large dataset has too many shards to look into each.
        for split in info.splits:
            for shards in info.buckets(split).values():
                check_version(
                    shard_metadata(storage, shards[0].path)["version"], f"{info.root}/{shards[0].path}"
                )
        return info

    def save(self) -> None:
        """Write the manifest; the last step of preparing a dataset."""
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
        if self.raw is not None:
            manifest["raw"] = asdict(self.raw)
        self.storage.write(MANIFEST, json.dumps(manifest, indent=1).encode())


def check_version(version: object, where: str) -> None:
    """Refuse files of another schema version.

    Args:
        version: of the file.
        where: address of the file, for the message.

    Raises:
        UserError: `version` is not the one that this code reads.
    """
    if version not in READABLE:
        raise UserError(
            f"{where} has schema version {version}, this fewstep reads versions {' and '.join(map(str, READABLE))}: "
            "prepare the data again with this version's fewstep prepare-data."
        )


def bucket_folder(split: str, shape: Shape) -> str:
    """Folder of a bucket relative to the dataset's root, such as `train/3x16x16`."""
    return f"{split}/{'x'.join(map(str, shape))}"


def bucket_of(path: str) -> tuple[str, Shape]:
    """Split and latent shape of a shard, by its path in the dataset."""
    split, bucket, _ = path.split("/")
    channels, height, width = map(int, bucket.split("x"))
    return split, (channels, height, width)


def encode_table(
    rows: pa.Table,
    latents: pa.Array | np.ndarray | None,
    shape: Shape,
    split: str,
    references: pa.Array | None = None,
) -> pa.Table:
    """Assemble a shard's table.

    Args:
        rows: columns `key`, `caption` and `CONDITION_COLUMNS`, N rows.
        latents: their column (`columns.latent_column`), or (N, C, H, W) float32; None for prompts without images.
        shape: (C, H, W) of the latents or, for prompts without images, of those to generate.
        split: "train" or "held_out".
        references: column of the latents of reference images; None where rows have none.
    """
    count = len(rows)
    # In every row, so that a row is complete by itself, whatever table it ends up in.
    constant = {
        name: pa.array([value] * count, pa.int32()) for name, value in zip(_SIZES, shape, strict=True)
    }
    # Put into SCHEMA's order and types at the end, whatever the order of `rows`.
    if latents is None:
        latents = pa.nulls(count, pa.large_binary())
    columns = {
        **{name: rows[name] for name in ("key", "caption", *CONDITION_COLUMNS)},
        "latent": bytes_column(list(latents)) if isinstance(latents, np.ndarray) else latents,
        "references": pa.nulls(count, pa.large_binary()) if references is None else references,
        **constant,
        "split": pa.array([split] * count, pa.string()),
    }
    return pa.table({name: columns[name] for name in SCHEMA.names}, schema=SCHEMA)


def shard_metadata(storage: Storage, path: str) -> dict[str, Any]:
    """The JSON object in a shard's metadata, with the shard's number of rows as `rows`.

    Raises:
        UserError: the file is no readable shard, or storage can't be reached.
    """
    import pyarrow.parquet as pq

    with storage.reachable():
        try:
            footer = pq.read_metadata(storage.path(path), filesystem=storage.filesystem)
        except (pa.ArrowInvalid, FileNotFoundError) as error:
            raise UserError(
                f"{storage.root}/{path} is not a readable Parquet file: delete it and prepare again."
            ) from error
    # A file without our metadata gets a version that `check_version` refuses.
    metadata = json.loads((footer.metadata or {}).get(METADATA_KEY, b'{"version": "none"}'))
    return {**metadata, "rows": footer.num_rows}


def read_shard(storage: Storage, path: str, columns: Sequence[str] | None = None) -> pa.Table:
    """Read a shard, or some of its columns, in SCHEMA's types.

    Raises:
        UserError: as `shard_metadata`; another schema version.
    """
    table = read_raw(storage, path, columns)
    for name in NUMBERS:
        if name in table.column_names and pa.types.is_list(table.schema.field(name).type):  # of version 1
            place = table.column_names.index(name)
            table = table.set_column(place, SCHEMA.field(name), _bytes_of_lists(table[name]))
    for name in LATER_COLUMNS:
        # Added where an older shard lacks it, unless the caller asked for other columns.
        if name not in table.column_names and (columns is None or name in columns):
            table = table.append_column(SCHEMA.field(name), pa.nulls(len(table), SCHEMA.field(name).type))
    # In one order, so that shards of all ages can be joined
    return table.select([name for name in SCHEMA.names if name in table.column_names])


def read_raw(storage: Storage, path: str, columns: Sequence[str] | None = None) -> pa.Table:
    """Read a shard, or some of its columns, as they are; for shards of raw rows.

    Raises:
        UserError: as `read_shard`.
    """
    import pyarrow.parquet as pq

    with storage.reachable():
        try:
            # partitioning=None: the names of folders would become columns otherwise.
            table = pq.read_table(
                storage.path(path), filesystem=storage.filesystem, partitioning=None, columns=columns
            )
        except (pa.ArrowInvalid, FileNotFoundError) as error:
            raise UserError(
                f"{storage.root}/{path} is not a readable Parquet file: delete it and prepare again."
            ) from error
    metadata = (table.schema.metadata or {}).get(METADATA_KEY, b'{"version": "none"}')
    check_version(json.loads(metadata)["version"], f"{storage.root}/{path}")
    return table.replace_schema_metadata(None)


def parquet_bytes(table: pa.Table) -> memoryview:
    """A shard's table as the bytes of a Parquet file."""
    import pyarrow.parquet as pq

    # Numbers of real latents and token states can't be compressed; lz4 passes them nearly at the speed of a copy, and
    # packs the white of pictures whose pixels are the latents.
    compression = {name: "lz4" if name in NUMBERS else "zstd" for name in table.column_names}
    plain = [name for name in table.column_names if name not in NUMBERS]
    sink = pa.BufferOutputStream()
    pq.write_table(table, sink, compression=compression, use_dictionary=plain)
    return memoryview(sink.getvalue())


_SIZES = ("channels", "height", "width")


def float_lists(vectors: np.ndarray | None, count: int) -> pa.Array:
    """Vectors (N, P) float32 as N lists; None as `count` nulls."""
    if vectors is None:
        return pa.nulls(count, pa.list_(pa.float32()))
    flat = vectors.reshape(count, -1)
    ends = flat.shape[1] * np.arange(count + 1, dtype=np.int32)
    return pa.ListArray.from_arrays(pa.array(ends), pa.array(flat.reshape(-1)))


def bytes_column(arrays: Sequence[np.ndarray]) -> pa.Array:
    """N arrays as N rows of bytes."""
    sizes = np.array([array.nbytes for array in arrays], dtype=np.int64)
    ends = np.concatenate([[0], np.cumsum(sizes)])
    content = np.concatenate([array.reshape(-1) for array in arrays]) if arrays else np.empty(0, np.uint8)
    return pa.LargeBinaryArray.from_buffers(
        pa.large_binary(), len(arrays), [None, pa.py_buffer(ends), pa.py_buffer(content)]
    )


def _bytes_of_lists(column: pa.ChunkedArray) -> pa.Array:
    """A column of lists of numbers, of version 1, as one of their bytes."""
    if column.null_count:  # of prompts without images all are null
        return pa.nulls(len(column), pa.large_binary())
    lists = column.combine_chunks()
    numbers = lists.flatten().to_numpy(zero_copy_only=False)
    ends = lists.offsets.to_numpy().astype(np.int64)
    return pa.LargeBinaryArray.from_buffers(
        pa.large_binary(),
        len(lists),
        [None, pa.py_buffer((ends - ends[0]) * numbers.itemsize), pa.py_buffer(numbers)],
    )


def _no_manifest(storage: Storage) -> str:
    """The message about a folder without a manifest: it is empty, another folder, or its preparation did not finish."""
    files = storage.list()
    if PLAN in files:
        return (
            f"{storage.root} holds no {MANIFEST}, its preparation did not finish: run the same "
            "fewstep prepare-data command again, it goes on where it stopped."
        )
    found = "no prepared dataset" if files else "nothing"
    return (
        f"there is no dataset at {storage.root}, which holds {found}: make one with fewstep prepare-data "
        "(--source folder for pictures, --source prompts for captions) and give the folder of its --out."
    )
