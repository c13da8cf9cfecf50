"""Preparation of raw rows to Parquet shards: a Ray Data pipeline with text encoder and autoencoder in actor pools.

A shard is the unit of work. Which rows it holds is decided beforehand, by a seeded hash of their keys: so each shard is
a random sample of its bucket, and a run that is stopped and repeated makes the same shards. A shard is written whole or
not at all, so one that exists is finished and is skipped.
"""

from __future__ import annotations

import functools
import itertools
import json
import os
import time
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import asdict, dataclass, replace
from typing import Any, cast

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import torch
from PIL.Image import Image

from fewstep.config import MAX_TOKENS, Shape
from fewstep.data.columns import condition_columns, latent_column
from fewstep.data.execution import configured, user_errors
from fewstep.data.members import ImageStorage, addresses, image_bytes, reading_unit, rows_with_cells
from fewstep.data.rows import INDEX, Source, hashes, texts
from fewstep.data.schema import (
    PLAN,
    READABLE,
    SCHEMA,
    SCHEMA_VERSION,
    DatasetInfo,
    Encoding,
    NumberType,
    RawRows,
    Shard,
    bucket_folder,
    encode_table,
    parquet_bytes,
    shard_metadata,
)
from fewstep.data.stream_config import STAGE_CPUS
from fewstep.data.tables import Rejection
from fewstep.encoders import (
    MINILM,
    PIXEL,
    Autoencoder,
    ConditionEncoder,
    encoder_widths,
    load_autoencoder,
    load_encoder,
)
from fewstep.encoders.labels import is_labels
from fewstep.errors import UserError
from fewstep.images import MAX_PIXELS, Size, fit, lift_limit, measure, open_image
from fewstep.storage import Storage

REJECTED = "rejected.jsonl"

BROKEN = "broken image"
"""Reason of rejections of images that can't be read."""

IMAGES_PER_PASS = 16
DECODING_THREADS = 4
ROWS_PER_MEASURE = 512


@dataclass(frozen=True)
class PreparationConfig:
    """The settings that, with the source, determine a dataset's content. To finish a dataset, repeat its settings."""

    sizes: tuple[Size, ...]
    """Sizes of the image buckets, in pixels; an image goes to the bucket of the nearest aspect ratio."""

    text_encoder: str = MINILM
    autoencoder: str = PIXEL
    max_tokens: int = MAX_TOKENS
    latent_type: NumberType = "float32"
    """How the numbers of latents are stored; bfloat16 is half as large, and what most autoencoders compute in."""
    shard_rows: int = 256
    """Most rows of a shard; each bucket of a split is divided into shards of equal size."""

    seed: int = 0
    """Seed of the shuffle that assigns rows to shards."""

    max_pixels: int = MAX_PIXELS
    """Images of more pixels are rejected: one needs 3 bytes per pixel of memory, several times over."""

    min_size: int = 0
    """Images whose shorter side has fewer pixels are rejected."""

    least_shards: int = 8
    """Shards of a bucket of the training split, at least, where it has as many rows: each training worker reads shards
    of its own."""

    def as_dict(self) -> dict[str, Any]:
        """The settings as `plan.json` has them, with sizes as `WIDTHxHEIGHT`."""
        return asdict(replace(self, sizes=())) | {"sizes": [str(size) for size in self.sizes]}


@dataclass(frozen=True)
class ShardPlan:
    """A shard that is to be written: its path, and the raw rows that it is made of.

    Attributes:
        source: rows of all shards.
        places: of this shard's rows among them.
    """

    path: str
    split: str
    size: Size
    shape: Shape
    source: pa.Table
    places: np.ndarray

    @property
    def rows(self) -> pa.Table:
        """A copy of its rows, with INDEX's columns; made at each call, so that the plans of all shards are small."""
        return self.source.take(pa.array(self.places)).cast(INDEX)

    def as_item(self) -> dict[str, Any]:
        """The plan as a row of the pipeline's dataset."""
        size = {"width": self.size.width, "height": self.size.height, "shape": list(self.shape)}
        return {"path": self.path, "split": self.split, **size, "rows": pack(self.rows)}


def prepare(
    source: Source,
    out: str | os.PathLike[str],
    config: PreparationConfig,
    *,
    encode: bool = True,
    encoders: int = 1,
    gpus: float = 0.0,
    report: Callable[[str], None] = print,
) -> DatasetInfo:
    """Encode a source to a dataset, or finish one that was begun; returns the finished dataset.

    Args:
        source: the raw rows.
        out: folder or `s3://…` of the dataset.
        config: the settings that determine its content.
        encode: whether its shards are encoded. Otherwise they hold raw rows, which are encoded in the stream.
        encoders: number of actors of each kind (text encoder, autoencoder).
        gpus: GPUs of each actor; with a fraction, actors share one.
        report: called with a line of progress from time to time.

    Raises:
        UserError: `out` holds a dataset of other settings or source, a model can't be loaded, storage can't be reached,
            or no row could be encoded.
    """
    storage = Storage.at(out)
    # Before anything is written: an encoder that can't be loaded is refused here.
    dim, pooled = encoder_widths(config.text_encoder)
    if source.references and is_labels(config.text_encoder):
        raise UserError(
            "--text-encoder: reference images go with texts, not with classes: choose an encoder of texts."
        )
    for note in source.notes:
        report(note)
    config = claim(storage, source, config, encode)
    plans, rejected = plan(source, config)
    present = storage.list()
    missing = [shard for shard in plans if shard.path not in present]
    if len(missing) < len(plans):
        report(f"{len(plans) - len(missing)} of {len(plans)} shards are finished already and are skipped")
    encoding = Encoding(
        config.text_encoder, dim, config.autoencoder, pooled, config.max_tokens, config.latent_type,
        source.references,
    )  # fmt: skip
    raw = None
    if encode:
        _encode(missing, source, storage, config, encoding, encoders=encoders, gpus=gpus, report=report)
    else:
        _write_raw(missing, storage, encoding)
        images = None if source.storage is None else addresses(source.storage)
        sizes = {"x".join(map(str, p.shape)): str(p.size) for p in plans}
        raw = RawRows(config.max_pixels, config.min_size, images, sizes)
    return _finish(storage, source, plans, rejected, encoding, raw, report)


def claim(
    storage: Storage, source: Source, config: PreparationConfig, encode: bool = True
) -> PreparationConfig:
    """Record in the folder which source and settings its dataset is made of, or compare with the record there.

    Returns:
        The settings to go on with: those given, and of a folder that an older version began, its division into shards.

    Raises:
        UserError: the folder's dataset is made of another source or other settings.
    """
    ours = {
        "version": SCHEMA_VERSION,
        "encode": "shards" if encode else "stream",
        "source": source.name,
        **config.as_dict(),
        "rows": source.digest(),
    }
    content = storage.read(PLAN)
    if content is None:
        storage.write(PLAN, json.dumps(ours, indent=1).encode())
        return config
    # Older versions didn't know these.
    before = {
        "max_pixels": MAX_PIXELS,
        "min_size": 0,
        "least_shards": 1,
        "encode": "shards",
        "latent_type": "float32",
    }
    theirs = before | json.loads(content)
    # The remaining shards may be of another version than those that are there.
    if theirs["version"] in READABLE:
        theirs["version"] = SCHEMA_VERSION
    differing = [name for name in ours if theirs.get(name) != ours[name] and name != "least_shards"]
    if differing:
        name = differing[0]
        what = "other rows" if name == "rows" else f"{name} {theirs.get(name)}, not {ours[name]}"
        raise UserError(
            f"{storage.root} was prepared with {what}: choose another --out, or delete that folder "
            "to start anew."
        )
    return replace(config, least_shards=theirs["least_shards"])


def plan(source: Source, config: PreparationConfig) -> tuple[list[ShardPlan], list[Rejection]]:
    """Assign rows to shards; a pure function of the source and the settings.

    Returns:
        The shards to be written, and the rows rejected so far: those that the source rejected and, with several sizes,
        images whose size can't be read.
    """
    autoencoder = load_autoencoder(config.autoencoder)
    shapes = {size: autoencoder.latent_shape(size.height, size.width) for size in config.sizes}
    sizes, broken = _choose_sizes(source, config)
    # In one piece each, with offsets of 64 bits: rows are taken from anywhere, and captions may exceed 2 GiB.
    rows = source.rows.cast(_LARGE_INDEX).combine_chunks()
    order = _shuffled(rows, config.seed)
    sizes, held_out = sizes[order], pc.equal(rows["split"], "held_out").to_numpy()[order]
    groups: list[tuple[str, str, Size, np.ndarray]] = []
    for number, size in enumerate(config.sizes):
        for split, mask in (("held_out", held_out), ("train", ~held_out)):
            if len(indices := order[mask & (sizes == number)]):
                groups.append((split, str(size), size, indices))
    plans = []
    # Sorted, so that shards have the same names in every run.
    for split, _, size, indices in sorted(groups, key=lambda group: group[:2]):
        least = min(config.least_shards, len(indices)) if split == "train" else 1
        count = max(least, -(-len(indices) // config.shard_rows))
        for number, part in enumerate(np.array_split(indices, count)):
            path = f"{bucket_folder(split, shapes[size])}/part-{number:05d}.parquet"
            plans.append(ShardPlan(path, split, size, shapes[size], rows, part))
    return plans, [*source.rejected, *broken]


_LARGE_INDEX = pa.schema([f.with_type(pa.large_string()) if f.type == pa.string() else f for f in INDEX])


def _shuffled(rows: pa.Table, seed: int) -> np.ndarray:
    """Numbers of the rows in the order of a hash, (rows,): any part of a group of them is a random sample of it.

    Rows that are read together, out of a Parquet file, stay one after the other.
    """
    names = texts(rows["key"])
    if rows["part"].null_count < len(rows):
        places = zip(names, texts(rows["file"]), texts(rows["part"]), strict=True)
        names = ((part and reading_unit(file, part)) or key for key, file, part in places)
    return np.argsort(hashes(seed, names, len(rows)), kind="stable")


class EncodeText:
    """Actor that encodes the captions of a shard, and adds the columns of their conditions."""

    def __init__(self, config: PreparationConfig) -> None:
        self.config = config

    @functools.cached_property
    def encoder(self) -> ConditionEncoder:
        """The encoder of captions, in this process."""
        # Loaded on first use: of an error in an actor's constructor, the user would learn only that the actor died.
        return load_encoder(self.config.text_encoder, max_tokens=self.config.max_tokens, device=_device())

    def __call__(self, item: dict[str, Any]) -> dict[str, Any]:
        rows = unpack(item["rows"])
        refusals = self.encoder.refusals(rows["caption"].to_pylist())
        rejected = [
            Rejection(where, *refusal).as_dict()
            for where, refusal in zip(rows["where"].to_pylist(), refusals, strict=True)
            if refusal is not None
        ]
        rows = rows.filter(pa.array([refusal is None for refusal in refusals], pa.bool_()))
        captions = rows["caption"].to_pylist()
        # Rejected rows are out by now, as `encode` refuses what `refusals` names.
        for name, column in condition_columns(self.encoder.encode(captions)).items():
            rows = rows.append_column(SCHEMA.field(name), column)
        return {**item, "rows": pack(rows), "rejected": json.dumps(rejected)}


class EncodeImages:
    """Actor that encodes the images of a shard to latents, and writes the finished shard to storage."""

    def __init__(
        self,
        config: PreparationConfig,
        encoding: Encoding,
        images: ImageStorage | None,
        out: Storage,
        has_images: bool,
    ) -> None:
        self.config, self.encoding, self.images, self.out = config, encoding, images, out
        self.has_images = has_images
        self.threads = ThreadPoolExecutor(DECODING_THREADS)
        lift_limit()

    @functools.cached_property
    def autoencoder(self) -> Autoencoder:
        """The encoder of images, in this process."""
        return load_autoencoder(self.config.autoencoder, device=_device())

    def __call__(self, item: dict[str, Any]) -> dict[str, Any]:
        table, rejected = self.table(item)
        metadata = self.encoding.metadata(rejected)
        self.out.write(item["path"], parquet_bytes(table.replace_schema_metadata(metadata)))
        return {"rows": len(table) + len(rejected)}

    def table(self, item: dict[str, Any]) -> tuple[pa.Table, list[dict[str, str]]]:
        """A shard whose captions are encoded as a table of SCHEMA, and the rows that could not be encoded."""
        rows, rejected = unpack(item["rows"]), json.loads(item["rejected"])
        column = references = None
        if self.has_images:
            rows, latents, broken = self._latents(rows, Size(item["width"], item["height"]))
            rejected += [rejection.as_dict() for rejection in broken]
            column = latent_column(torch.from_numpy(latents[:, 0]), self.encoding.latent_type)
            if self.encoding.references:
                references = latent_column(torch.from_numpy(latents[:, 1:]), self.encoding.latent_type)
        return encode_table(rows, column, tuple(item["shape"]), item["split"], references), rejected

    def _latents(self, rows: pa.Table, size: Size) -> tuple[pa.Table, np.ndarray, list[Rejection]]:
        """The rows with usable images, their latents, and the rejected other rows.

        Latents are (N, 1 + references, C, H, W): of each row's image, then of its reference images.
        """
        usable: list[int] = []
        broken: list[Rejection] = []
        latents: list[np.ndarray] = []
        for indices, images in self._decoded(rows, size):
            good = [
                (i, image) for i, image in zip(indices, images, strict=True) if isinstance(image, np.ndarray)
            ]
            broken += [image for image in images if isinstance(image, Rejection)]
            if good:
                usable += [i for i, _ in good]
                pixels = torch.from_numpy(np.concatenate([images for _, images in good]))
                latents.append(self.autoencoder.encode(pixels).numpy())
        shape = (1 + self.encoding.references, *self.autoencoder.latent_shape(size.height, size.width))
        # A shard without a usable image still has latents of the right shape.
        stacked = np.concatenate(latents) if latents else np.empty(0, np.float32)
        return rows.take(pa.array(usable, pa.int64())), stacked.reshape(-1, *shape), broken

    def _decoded(self, rows: pa.Table, size: Size) -> Iterator[tuple[range, list[np.ndarray | Rejection]]]:
        """Rows and decoded images, `IMAGES_PER_PASS` at a time; threads decode the next ones in the meantime."""
        ahead: tuple[range, list[Future[np.ndarray | Rejection]]] | None = None
        complete = rows_with_cells(rows, self.images)
        for start in range(0, len(rows), IMAGES_PER_PASS):
            indices = range(start, min(start + IMAGES_PER_PASS, len(rows)))
            futures = [
                self.threads.submit(_load, row, self.images, size, self.config)
                for row in itertools.islice(complete, len(indices))
            ]
            # Submitted before the pass ahead of it is given out, so that both go on side by side.
            if ahead is not None:
                yield ahead[0], [future.result() for future in ahead[1]]
            ahead = (indices, futures)
        if ahead is not None:
            yield ahead[0], [future.result() for future in ahead[1]]


def _choose_sizes(source: Source, config: PreparationConfig) -> tuple[np.ndarray, list[Rejection]]:
    """The bucket of each row as its number in `config.sizes`, (rows,), −1 where its image's size can't be read or is
    too small; and the rejections of those rows."""
    rows = source.rows
    if len(config.sizes) == 1:
        return np.zeros(len(rows), np.int64), []
    if source.storage is None:
        # Prompts without images have no aspect ratio: they are spread evenly over the buckets.
        places = hashes(0, (f"size/{key}" for key in texts(rows["key"])), len(rows))
        return (places % len(config.sizes)).astype(np.int64), []
    import ray.data

    index = rows.select(["key", "file", "image", "where", "part"])
    blocks = [index.slice(start, ROWS_PER_MEASURE) for start in range(0, len(index), ROWS_PER_MEASURE)]
    measured = ray.data.from_arrow(blocks).map_batches(
        cast(Any, _measure),  # Ray's annotations leave out fn_kwargs
        fn_kwargs={"images": source.storage, "config": config},
        batch_size=None,
        batch_format="pyarrow",
        num_cpus=STAGE_CPUS,
    )
    sizes: list[np.ndarray] = []
    rejected: list[Rejection] = []
    with user_errors():
        for batch in configured(measured, in_order=True).iter_batches(
            batch_size=None, batch_format="pyarrow"
        ):
            found = cast(pa.Table, batch)
            sizes.append(found["size"].to_numpy())
            refused = found.filter(pc.is_valid(found["reason"]))
            rejected += [Rejection(**row) for row in refused.drop_columns("size").to_pylist()]
    return np.concatenate(sizes), rejected


_MEASURED = pa.schema(
    [("size", pa.int64()), *((name, pa.string()) for name in ("where", "reason", "detail"))]
)


def _measure(rows: pa.Table, images: ImageStorage, config: PreparationConfig) -> pa.Table:
    """Ray Data task: number of the bucket of each row's image, or what is wrong with the image."""
    lift_limit()
    measured = []
    for row in rows_with_cells(rows, images):
        try:
            width, height = measure(image_bytes(row, images), config.max_pixels)
        except ValueError as error:
            measured.append({"size": -1, **Rejection(row["where"], BROKEN, _trouble(row, error)).as_dict()})
            continue
        if refusal := _too_small(row, width, height, config):
            measured.append({"size": -1, **refusal.as_dict()})
        else:
            measured.append({"size": config.sizes.index(Size.nearest(config.sizes, width, height))})
    return pa.Table.from_pylist(measured, schema=_MEASURED)


def _load(
    row: dict[str, Any], images: ImageStorage | None, size: Size, config: PreparationConfig
) -> np.ndarray | Rejection:
    """A row's image and its references at the bucket's size, (1 + references, height, width, 3) uint8; or the
    rejection of the row."""
    whole = {"image": None, "part": None}  # references are files or bytes
    opened: list[Image] = []
    for one in (row, *(whole | reference for reference in row.get("references") or ())):
        try:
            opened.append(open_image(image_bytes(one, images), config.max_pixels))
        except ValueError as error:
            return Rejection(row["where"], BROKEN, _trouble({"key": row["key"], **one}, error))
    return _too_small(row, *opened[0].size, config) or np.stack([fit(image, size) for image in opened])


def _too_small(row: dict[str, Any], width: int, height: int, config: PreparationConfig) -> Rejection | None:
    """The rejection of an image whose shorter side is below the least; None of others."""
    if min(width, height) >= config.min_size:
        return None
    detail = f"{row['file'] or row['key']}: {width}x{height} pixels, and --min-size is {config.min_size}"
    return Rejection(row["where"], "small image", detail)


def _trouble(row: dict[str, Any], error: ValueError) -> str:
    """What is wrong with a row's image, with the name of the image."""
    return f"{row['file'] or row['key']}: {error}"


def _encode(
    plans: Sequence[ShardPlan],
    source: Source,
    out: Storage,
    config: PreparationConfig,
    encoding: Encoding,
    *,
    encoders: int,
    gpus: float,
    report: Callable[[str], None],
) -> None:
    """Encode and write shards, with a line of progress every two seconds; arguments as for `prepare`."""
    if not plans:
        return
    import ray.data

    items = [shard.as_item() for shard in plans]
    # Typed Any: Ray's annotations know classes without constructor arguments alone.
    encode_text: Any = EncodeText
    encode_images: Any = EncodeImages
    pool: dict[str, Any] = {
        "compute": ray.data.ActorPoolStrategy(size=encoders),
        "num_cpus": STAGE_CPUS,
        "num_gpus": gpus,
    }
    has_images = source.name != "prompts"
    # Rows of Ray Data are whole shards, one per block, so that each is encoded and written by itself.
    pipeline = (
        ray.data.from_items(items, override_num_blocks=len(items))
        .map(encode_text, fn_constructor_kwargs={"config": config}, **pool)
        .map(encode_images, fn_constructor_args=(config, encoding, source.storage, out, has_images), **pool)
    )
    total, done, warm = sum(len(p.places) for p in plans), 0, 0
    started = reported = time.monotonic()
    report(f"encoding {total} rows into {len(plans)} shards; the encoders are starting")
    with user_errors():
        for number, item in enumerate(configured(pipeline).iter_rows(), 1):
            done, now = done + item["rows"], time.monotonic()
            if number == 1:
                # The rate counts from here: loading the encoders is not part of it.
                started, warm = now, done
                report(f"{done}/{total} rows, 1/{len(plans)} shards")
            elif now - reported >= 2 or number == len(plans):
                rate = (done - warm) / (now - started)
                left = f"{(total - done) / rate:.0f} s left"
                report(f"{done}/{total} rows, {number}/{len(plans)} shards, {rate:.0f} rows/s, {left}")
                reported = now


def _write_raw(plans: Sequence[ShardPlan], out: Storage, encoding: Encoding) -> None:
    """Write shards of raw rows."""
    metadata = encoding.metadata()
    with ThreadPoolExecutor(16) as threads:
        written = [
            threads.submit(
                lambda p: out.write(p.path, parquet_bytes(p.rows.replace_schema_metadata(metadata))), p
            )
            for p in plans
        ]
        for one in written:
            one.result()


def _finish(
    storage: Storage,
    source: Source,
    plans: Sequence[ShardPlan],
    rejected: list[Rejection],
    encoding: Encoding,
    raw: RawRows | None,
    report: Callable[[str], None],
) -> DatasetInfo:
    """Write the list of rejected rows, and the manifest, from the metadata of all shards."""
    # Also of shards that an earlier run wrote: their rejections are in their footers alone.
    with ThreadPoolExecutor(16) as threads:
        footers = list(threads.map(lambda p: shard_metadata(storage, p.path), plans))
    refused = [r.as_dict() for r in rejected] + [r for footer in footers for r in footer["rejected"]]
    shards = tuple(
        Shard(p.path, p.split, p.shape, footer["rows"])
        for p, footer in zip(plans, footers, strict=True)
        if footer["rows"]  # a shard of which every row was rejected is left out
    )
    if refused:
        storage.write(REJECTED, "".join(json.dumps(r, ensure_ascii=False) + "\n" for r in refused).encode())
    reasons = dict(sorted(Counter(r["reason"] for r in refused).items()))
    if not shards:
        raise UserError(
            f"not one row of the {source.name} source could be encoded ({_summary(reasons)}; "
            f"{storage.root}/{REJECTED} lists them): mend or replace the input."
        )
    storage.sweep()
    info = DatasetInfo(
        storage, encoding, source.name, source.name != "prompts", shards, reasons, source.attribution, raw
    )
    info.save()
    if refused:
        report(f"rejected {len(refused)} rows ({_summary(reasons)}); {storage.root}/{REJECTED} lists them")
    splits = ", ".join(f"{info.rows(split)} {split}" for split in info.splits)
    report(f"{storage.root} is ready: {splits} rows in {len(shards)} shards")
    return info


def _summary(reasons: dict[str, int]) -> str:
    """Numbers of rejected rows by reason, as text."""
    return ", ".join(f"{count} {reason}" for reason, count in reasons.items())


def _device() -> str:
    """The device of this actor; Ray shows it only the GPUs that it was given."""
    import torch

    return "cuda" if torch.cuda.is_available() else "cpu"


def pack(table: pa.Table) -> bytes:
    """A table as Arrow IPC bytes, so that a whole shard is a single row of Ray Data."""
    sink = pa.BufferOutputStream()
    with pa.ipc.new_stream(sink, table.schema) as writer:
        writer.write_table(table)
    return sink.getvalue().to_pybytes()


def unpack(content: bytes) -> pa.Table:
    """The inverse of `pack`."""
    return pa.ipc.open_stream(content).read_all()
