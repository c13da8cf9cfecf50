"""Raw rows → Parquet shards: a Ray Data pipeline with the text encoder and the autoencoder in actor pools.

A shard is the unit of work. Which rows it holds is decided beforehand from keys alone (a seeded hash),
so each is a random sample of its bucket, and a run that is stopped and repeated makes the same shards. A
shard is written whole or not at all; one that exists is finished and is skipped.
"""

from __future__ import annotations

import functools
import json
import os
import time
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import asdict, dataclass, replace
from typing import Any

import numpy as np
import pyarrow as pa

from fewstep.data.autoencoder import GREY, PIXEL, load_autoencoder
from fewstep.data.encoder import MAX_TOKENS, MINILM, CaptionEncoder, encoder_widths, load_encoder
from fewstep.data.execution import configured, user_errors
from fewstep.data.schema import (
    SCHEMA,
    SCHEMA_VERSION,
    DatasetInfo,
    Encoding,
    Shape,
    Shard,
    bucket_folder,
    encode_table,
    shard_metadata,
)
from fewstep.data.seeds import stable_hash
from fewstep.data.sources import Rejection, Size, Source, fit, measure, open_image
from fewstep.data.storage import Storage
from fewstep.errors import UserError

PLAN = "plan.json"
REJECTED = "rejected.jsonl"

IMAGES_PER_PASS = 16
DECODING_THREADS = 4
ROWS_PER_MEASURE = 512
STAGE_CPUS = 0.1
"""CPU slots of an actor or task: a fraction, as training workers may hold nearly all of a small cluster."""


@dataclass(frozen=True)
class Settings:
    """What decides a dataset's content, beside its source; a re-run into the same folder must repeat it."""

    sizes: tuple[Size, ...]
    """Image buckets in pixels; an image goes to the one of nearest aspect ratio."""

    text_encoder: str = MINILM
    autoencoder: str = PIXEL
    max_tokens: int = MAX_TOKENS
    shard_rows: int = 256
    """Most rows a shard holds; a split's bucket is cut into equal shards."""

    seed: int = 0
    """Of the shuffle that assigns rows to shards."""

    def as_dict(self) -> dict[str, Any]:
        return asdict(replace(self, sizes=())) | {"sizes": [str(size) for size in self.sizes]}


EMOJI = Settings(sizes=(Size(16, 16),))
"""How the bundled emoji set is prepared, and anything else whose preparation says nothing more."""

FASHION = Settings(
    sizes=(Size(28, 28),), text_encoder="labels:fashion-mnist", autoencoder=GREY, shard_rows=1024
)
"""How Fashion-MNIST is prepared: its own pixels, one channel, classes as conditioning."""


@dataclass(frozen=True)
class ShardPlan:
    """One shard to be: where it goes and the raw rows (INDEX) it is made of."""

    path: str
    split: str
    size: Size
    shape: Shape
    rows: pa.Table

    def as_item(self) -> dict[str, Any]:
        """The plan as a row of the pipeline's dataset."""
        size = {"width": self.size.width, "height": self.size.height, "shape": list(self.shape)}
        return {"path": self.path, "split": self.split, **size, "rows": _pack(self.rows)}


def prepare(
    source: Source,
    out: str | os.PathLike[str],
    settings: Settings,
    *,
    encoders: int = 1,
    gpus: float = 0.0,
    report: Callable[[str], None] = print,
) -> DatasetInfo:
    """Encode a source into a dataset, or finish one that was begun; returns the finished dataset.

    Args:
        encoders: actors of each kind (text encoder, autoencoder).
        gpus: GPUs of each actor; a fraction shares one.
        report: gets a line of progress now and then.

    Raises:
        UserError: `out` holds a dataset of other settings or source, a model can't be loaded, storage is
            away, or no row is left.
    """
    storage = Storage.at(out)
    dim, pooled = encoder_widths(settings.text_encoder)
    claim(storage, source, settings)
    plans, rejected = plan(source, settings)
    present = storage.list()
    missing = [shard for shard in plans if shard.path not in present]
    if len(missing) < len(plans):
        report(f"{len(plans) - len(missing)} of {len(plans)} shards are finished already and are skipped")
    encoding = Encoding(settings.text_encoder, dim, settings.autoencoder, pooled, settings.max_tokens)
    _encode(missing, source, storage, settings, encoding, encoders=encoders, gpus=gpus, report=report)
    return _finish(storage, source, plans, rejected, encoding, report)


def claim(storage: Storage, source: Source, settings: Settings) -> None:
    """Mark a folder as this source's with these settings.

    Raises:
        UserError: it is another's.
    """
    ours = {"version": SCHEMA_VERSION, "source": source.name, **settings.as_dict(), "rows": source.digest()}
    content = storage.read(PLAN)
    if content is None:
        storage.write(PLAN, json.dumps(ours, indent=1).encode())
        return
    theirs = json.loads(content)
    differing = [name for name in ours if theirs.get(name) != ours[name]]
    if differing:
        name = differing[0]
        what = "other rows" if name == "rows" else f"{name} {theirs.get(name)}, not {ours[name]}"
        raise UserError(
            f"{storage.root} was prepared with {what}: choose another --out, or delete that folder "
            "to start anew."
        )


def plan(source: Source, settings: Settings) -> tuple[list[ShardPlan], list[Rejection]]:
    """Assign rows to shards; a pure function of the source and the settings.

    Also returns the rows rejected so far: those the source rejected and, with several sizes, images whose
    size can't be read.
    """
    autoencoder = load_autoencoder(settings.autoencoder)
    shapes = {size: autoencoder.latent_shape(size.height, size.width) for size in settings.sizes}
    sizes, broken = _choose_sizes(source, settings)
    keys, splits = source.rows["key"].to_pylist(), source.rows["split"].to_pylist()
    groups: dict[tuple[str, Size], list[int]] = {}
    for index in sorted(range(len(keys)), key=lambda i: stable_hash(settings.seed, keys[i])):
        if (size := sizes[index]) is not None:
            groups.setdefault((splits[index], size), []).append(index)
    plans = []
    for (split, size), indices in sorted(groups.items(), key=lambda item: (item[0][0], str(item[0][1]))):
        for number, part in enumerate(np.array_split(indices, -(-len(indices) // settings.shard_rows))):
            path = f"{bucket_folder(split, shapes[size])}/part-{number:05d}.parquet"
            plans.append(ShardPlan(path, split, size, shapes[size], source.rows.take(part)))
    return plans, [*source.rejected, *broken]


class EncodeText:
    """Actor: captions of a shard → token states."""

    def __init__(self, settings: Settings) -> None:
        self.settings = settings

    @functools.cached_property
    def encoder(self) -> CaptionEncoder:
        # Loaded on first use: an error in an actor's constructor reaches the user as a dead actor only.
        return load_encoder(self.settings.text_encoder, max_tokens=self.settings.max_tokens, device=_device())

    def __call__(self, item: dict[str, Any]) -> dict[str, Any]:
        rows = _unpack(item["rows"])
        refusals = self.encoder.refusals(rows["caption"].to_pylist())
        rejected = [
            Rejection(key, *refusal).as_dict()
            for key, refusal in zip(rows["key"].to_pylist(), refusals, strict=True)
            if refusal is not None
        ]
        rows = rows.filter(pa.array([refusal is None for refusal in refusals], pa.bool_()))
        captions = rows["caption"].to_pylist()
        states = [s.numpy().astype(np.float16) for s in self.encoder.encode(captions)]
        rows = rows.append_column("tokens", pa.array([s.tobytes() for s in states], pa.large_binary()))
        if (pooled := self.encoder.pooled(captions)) is not None:
            rows = rows.append_column("pooled", pa.array([vector.tolist() for vector in pooled]))
        return {**item, "rows": _pack(rows), "rejected": json.dumps(rejected)}


class EncodeImages:
    """Actor: images of a shard → latents, and the finished shard → storage."""

    def __init__(
        self, settings: Settings, encoding: Encoding, images: Storage | None, out: Storage, has_images: bool
    ) -> None:
        self.settings, self.encoding, self.images, self.out = settings, encoding, images, out
        self.has_images = has_images
        self.threads = ThreadPoolExecutor(DECODING_THREADS)

    @functools.cached_property
    def autoencoder(self) -> Any:
        return load_autoencoder(self.settings.autoencoder, device=_device())

    def __call__(self, item: dict[str, Any]) -> dict[str, Any]:
        rows, rejected = _unpack(item["rows"]), json.loads(item["rejected"])
        count, latents = len(rows) + len(rejected), None
        if self.has_images:
            rows, latents, broken = self._latents(rows, Size(item["width"], item["height"]))
            rejected += [rejection.as_dict() for rejection in broken]
        dim = self.encoding.token_dim
        tokens = [np.frombuffer(state, np.float16).reshape(-1, dim) for state in rows["tokens"].to_pylist()]
        pooled = None
        if self.encoding.pooled_dim is not None:
            pooled = np.array(rows["pooled"].to_pylist(), np.float32)
        table = encode_table(rows, tokens, latents, tuple(item["shape"]), item["split"], pooled)
        self.out.write(
            item["path"], _parquet(table.replace_schema_metadata(self.encoding.metadata(rejected)))
        )
        return {"rows": count}

    def _latents(self, rows: pa.Table, size: Size) -> tuple[pa.Table, np.ndarray, list[Rejection]]:
        """Rows with a usable image, their latents (N, C, H, W), and the others."""
        import torch

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
                latents.append(
                    self.autoencoder.encode(torch.from_numpy(np.stack([x for _, x in good]))).numpy()
                )
        shape = self.autoencoder.latent_shape(size.height, size.width)
        stacked = np.concatenate(latents) if latents else np.empty((0, *shape), np.float32)
        return rows.take(pa.array(usable, pa.int64())), stacked, broken

    def _decoded(self, rows: pa.Table, size: Size) -> Iterator[tuple[range, list[np.ndarray | Rejection]]]:
        """Images in passes; the next pass is decoded while the caller encodes this one."""
        ahead: tuple[range, list[Future[np.ndarray | Rejection]]] | None = None
        for start in range(0, len(rows), IMAGES_PER_PASS):
            indices = range(start, min(start + IMAGES_PER_PASS, len(rows)))
            futures = [
                self.threads.submit(_load, row, self.images, size)
                for row in rows.slice(start, len(indices)).to_pylist()
            ]
            if ahead is not None:
                yield ahead[0], [future.result() for future in ahead[1]]
            ahead = (indices, futures)
        if ahead is not None:
            yield ahead[0], [future.result() for future in ahead[1]]


def _choose_sizes(source: Source, settings: Settings) -> tuple[list[Size | None], list[Rejection]]:
    """The bucket of each row, None where its image's size can't be read."""
    rows = source.rows
    if len(settings.sizes) == 1:
        return [settings.sizes[0]] * len(rows), []
    if source.storage is None:
        # Prompts alone have no aspect ratio of their own: they are spread evenly.
        return [
            settings.sizes[stable_hash(0, f"size/{key}") % len(settings.sizes)]
            for key in rows["key"].to_pylist()
        ], []
    import ray.data

    index = rows.select(["key", "file", "image"])
    blocks = [index.slice(start, ROWS_PER_MEASURE) for start in range(0, len(index), ROWS_PER_MEASURE)]
    measured = ray.data.from_arrow(blocks).map_batches(
        _measure,
        fn_kwargs={"images": source.storage},
        batch_size=None,
        batch_format="pyarrow",
        num_cpus=STAGE_CPUS,
    )
    with user_errors():
        found = {row["key"]: row for row in configured(measured).iter_rows()}
    sizes: list[Size | None] = []
    rejected = []
    for key in rows["key"].to_pylist():
        row = found[key]
        if row["trouble"]:
            rejected.append(Rejection(key, "broken image", row["trouble"]))
        sizes.append(None if row["trouble"] else Size.nearest(settings.sizes, row["width"], row["height"]))
    return sizes, rejected


def _measure(rows: pa.Table, images: Storage) -> pa.Table:
    measured = []
    for row in rows.to_pylist():
        try:
            width, height = measure(_content(row, images))
            measured.append({"key": row["key"], "width": width, "height": height, "trouble": ""})
        except ValueError as error:
            measured.append({"key": row["key"], "width": 0, "height": 0, "trouble": str(error)})
    return pa.Table.from_pylist(measured)


def _load(row: dict[str, Any], images: Storage | None, size: Size) -> np.ndarray | Rejection:
    try:
        return fit(open_image(_content(row, images)), size)
    except ValueError as error:
        return Rejection(row["key"], "broken image", str(error))


def _content(row: dict[str, Any], images: Storage | None) -> bytes:
    if row["image"] is not None:
        return row["image"]
    assert images is not None, "rows that name files come with the storage they lie in"
    content = images.read(row["file"])
    if content is None:
        raise ValueError(f"{row['file']} has gone")
    return content


def _encode(
    plans: Sequence[ShardPlan],
    source: Source,
    out: Storage,
    settings: Settings,
    encoding: Encoding,
    *,
    encoders: int,
    gpus: float,
    report: Callable[[str], None],
) -> None:
    if not plans:
        return
    import ray.data

    items = [shard.as_item() for shard in plans]
    pool: dict[str, Any] = {
        "compute": ray.data.ActorPoolStrategy(size=encoders),
        "num_cpus": STAGE_CPUS,
        "num_gpus": gpus,
    }
    has_images = source.name != "prompts"
    pipeline = (
        ray.data.from_items(items, override_num_blocks=len(items))
        .map(EncodeText, fn_constructor_kwargs={"settings": settings}, **pool)
        .map(EncodeImages, fn_constructor_args=(settings, encoding, source.storage, out, has_images), **pool)
    )
    total, done, warm = sum(len(p.rows) for p in plans), 0, 0
    started = reported = time.monotonic()
    report(f"encoding {total} rows into {len(plans)} shards; the encoders are starting")
    with user_errors():
        for number, item in enumerate(configured(pipeline).iter_rows(), 1):
            done, now = done + item["rows"], time.monotonic()
            if number == 1:
                # The rate is of the encoders at work; their start is not in it.
                started, warm = now, done
                report(f"{done}/{total} rows, 1/{len(plans)} shards")
            elif now - reported >= 2 or number == len(plans):
                rate = (done - warm) / (now - started)
                left = f"{(total - done) / rate:.0f} s left"
                report(f"{done}/{total} rows, {number}/{len(plans)} shards, {rate:.0f} rows/s, {left}")
                reported = now


def _finish(
    storage: Storage,
    source: Source,
    plans: Sequence[ShardPlan],
    rejected: list[Rejection],
    encoding: Encoding,
    report: Callable[[str], None],
) -> DatasetInfo:
    """Gather what the shards say of themselves, write the list of rejected rows and the manifest."""
    with ThreadPoolExecutor(16) as threads:
        footers = list(threads.map(lambda p: shard_metadata(storage, p.path), plans))
    refused = [r.as_dict() for r in rejected] + [r for footer in footers for r in footer["rejected"]]
    shards = tuple(
        Shard(p.path, p.split, p.shape, footer["rows"])
        for p, footer in zip(plans, footers, strict=True)
        if footer["rows"]
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
        storage, encoding, source.name, source.name != "prompts", shards, reasons, source.attribution
    )
    info.save()
    if refused:
        report(f"rejected {len(refused)} rows ({_summary(reasons)}); {storage.root}/{REJECTED} lists them")
    splits = ", ".join(f"{info.rows(split)} {split}" for split in info.splits)
    report(f"{storage.root} is ready: {splits} rows in {len(shards)} shards")
    return info


def _summary(reasons: dict[str, int]) -> str:
    return ", ".join(f"{count} {reason}" for reason, count in reasons.items())


def _device() -> str:
    import torch

    return "cuda" if torch.cuda.is_available() else "cpu"


def _pack(table: pa.Table) -> bytes:
    """A table as Arrow IPC bytes: one cell of a Ray Data row, so that a shard stays one unit of work."""
    sink = pa.BufferOutputStream()
    with pa.ipc.new_stream(sink, table.schema) as writer:
        writer.write_table(table)
    return sink.getvalue().to_pybytes()


def _unpack(content: bytes) -> pa.Table:
    return pa.ipc.open_stream(content).read_all()


def _parquet(table: pa.Table) -> memoryview:
    import pyarrow.parquet as pq

    assert table.schema.equals(SCHEMA)
    sink = pa.BufferOutputStream()
    pq.write_table(table, sink, compression="zstd")
    return memoryview(sink.getvalue())
