"""The stream of batches that a training worker iterates: endless, seeded, exactly seekable.

Global batch n is a pure function of (dataset, seed, batch size, open shards, n), whatever the number of workers, so
that a resumed run continues with the batch that it would have got without the interruption. The order is made so:

* The bucket (the shards of one latent shape) of batch n is drawn at random, weighted by rows.
* A batch takes its rows from several shards at a time, a fixed number of each: `order.ShardOrder` says which. In each
  epoch of a bucket each row is used once. Rows are permuted within their shard, differently in each epoch.
* A worker computes a part of each batch, and reads the shards that this part comes from. No row is dropped, and every
  batch is full.
* The shards of all coming epochs are work items, in the order in which they are needed. Ray Data, or threads of the
  process itself, read some of them ahead, whatever the epoch: no epoch begins with a pause, and a resumed stream begins
  at the right item.
"""

from __future__ import annotations

import itertools
import os
import queue
import threading
import time
from collections import deque
from collections.abc import Generator, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, replace
from functools import partial
from typing import TYPE_CHECKING, cast

import numpy as np
import pyarrow as pa
import torch
from torch import Tensor

from fewstep.config import Shape
from fewstep.data.columns import conditioning_of, latents_of
from fewstep.data.encode import EncoderPool, RowEncoder
from fewstep.data.execution import configured, user_errors
from fewstep.data.order import (
    EncodedShards,
    ShardOrder,
    ShardReader,
    WorkItem,
    grouped,
    read_block,
    read_permuted,
)
from fewstep.data.schema import DatasetInfo, Encoding, read_raw, read_shard
from fewstep.data.seeds import stable_hash
from fewstep.data.stream_config import OPEN_SHARDS, Reading
from fewstep.errors import UserError
from fewstep.models.conditioning import Conditioning, TextConditioning
from fewstep.storage import Storage

if TYPE_CHECKING:
    from ray.data import Dataset

SEGMENT_TASKS = 4
"""Reading tasks of one Ray Data execution. Ray Data's scheduler runs in the training process, and keeps a core busy
until all tasks of its execution have finished. So it must be able to finish soon, whatever the training does:
executions have few tasks, and no limit on the object store, which would hold tasks back. (1,024 tasks, or such a limit,
cost 80 % of a core.) The queue of batches bridges the start of the next execution."""

TASK_BYTES, TASK_ITEMS = 16 * 2**20, 16
"""Limits of what one task reads: one large shard, or several small ones."""

TASK_PIECES = 4
"""Limit of what one task has encoded: its rows come when all of them are."""

QUEUED_BATCHES, QUEUED_BYTES = 8, 2**24
"""Limits of what is made ahead of the training: so many batches, fewer if they are large, but always two."""

CLOSE_SECONDS = 10
"""Longest wait, when an iterator is closed, for its reading thread; the thread ends after the block it is reading."""

READ_TASKS = 2
"""Tasks or threads of one worker's stream that read at the same time."""


@dataclass(frozen=True)
class Batch:
    """B examples of one latent shape.

    Attributes:
        latent: (B, C, H, W), float32 unless it was asked for as it is stored; None in datasets of prompts alone.
        conditioning: texts, padded to the longest of the batch, also with reference images; or classes.
        captions: B captions.
        keys: B keys of rows.
        shape: (C, H, W) of the latents or, for prompts without images, of those to generate.
    """

    latent: Tensor | None
    conditioning: Conditioning
    captions: list[str]
    keys: list[str]
    shape: Shape

    def __len__(self) -> int:
        return len(self.keys)

    @classmethod
    def of(cls, rows: pa.Table, encoding: Encoding, *, stored: bool = False) -> Batch:
        """A batch of rows of one bucket, which have SCHEMA's columns.

        Args:
            rows, encoding: of a dataset.
            stored: whether latents and token states keep the types that they are stored in; `to` changes that.
        """
        shape: Shape = tuple(rows[name][0].as_py() for name in ("channels", "height", "width"))
        latent = latents_of(rows, encoding, stored=stored)
        conditioning = conditioning_of(rows, encoding, stored=stored)
        references = latents_of(rows, encoding, stored=stored, name="references")
        if references is not None:
            images = references.view(len(rows), encoding.references, *shape).unbind(1)
            conditioning = replace(cast(TextConditioning, conditioning), references=images)
        return cls(
            None if latent is None else latent.view(len(rows), *shape),
            conditioning,
            rows["caption"].to_pylist(),
            rows["key"].to_pylist(),
            shape,
        )

    def head(self, count: int) -> Batch:
        """The first examples."""
        latent = None if self.latent is None else self.latent[:count]
        conditioning = self.conditioning[slice(count)]
        return replace(
            self,
            latent=latent,
            conditioning=conditioning,
            captions=self.captions[:count],
            keys=self.keys[:count],
        )

    def to(self, device: torch.device) -> Batch:
        """The batch with its tensors on a device, without waiting for the copies, and its numbers in float32 there."""
        latent = None if self.latent is None else self.latent.to(device, non_blocking=True).float()
        conditioning = self.conditioning.to(device).to(device, torch.float32)
        return replace(self, latent=latent, conditioning=conditioning)


class ShardStream:
    """An endless stream of a worker's parts of a split's batches; iterate it in a process that is connected to Ray.

    Each `iter()` begins at `start_batch`. A thread reads ahead until the iterator is closed.

    Args:
        root: the dataset, a local folder or `s3://…`.
        split: name of the split.
        batch_size: examples of a global batch, of all workers.
        seed: of the order.
        parts: indices, in the global batch, of the examples of each batch that is yielded for it; by default one batch
            of all of them. Together they are one range.
        open_shards: see `ShardOrder`.
        reading: who reads encoded shards: Ray Data's tasks, or threads of this process, which then needs no Ray. Raw
            rows are read by tasks.
        start_batch: number of the global batch to begin with.
        reader: for a dataset of raw rows, what encodes them.
        stored: see `Batch.of`.

    Attributes:
        seconds_waited: seconds that the consumer has waited for batches; set it to 0.0 to count from there.

    Raises:
        UserError: see `DatasetInfo.open`.
    """

    def __init__(
        self,
        root: str | os.PathLike[str],
        split: str,
        *,
        batch_size: int,
        seed: int,
        parts: Sequence[range] | None = None,
        open_shards: int = OPEN_SHARDS,
        reading: Reading = "tasks",
        start_batch: int = 0,
        reader: EncoderPool | None = None,
        stored: bool = False,
    ) -> None:
        self.info = DatasetInfo.open(root)
        assert reader or self.info.raw is None, "raw shards are read by those who can encode them"
        self._reader: ShardReader = reader or EncodedShards()
        self._stored = stored
        self._reading: Reading = "tasks" if reader else reading
        self.start_batch = start_batch
        self.seconds_waited = 0.0
        self._parts = parts or [range(batch_size)]
        self._share = range(self._parts[0].start, self._parts[-1].stop)
        self._task_items = TASK_ITEMS if reader is None else TASK_PIECES
        self._row_bytes = {
            shape: self.info.storage.size(shards[0].path) / shards[0].rows
            for shape, shards in self.info.buckets(split).items()
        }
        # All of the order is decided there, from numbers alone; what follows only reads.
        self._order = ShardOrder(
            self.info.buckets(split),
            batch_size=batch_size,
            seed=seed,
            open_shards=open_shards,
            piece=None if reader is None else reader.piece,
        )

    def __iter__(self) -> Generator[Batch]:
        # Bounded: the thread stops reading ahead when the queue is full.
        large = max(self._row_bytes.values()) * len(self._parts[0])
        most = min(QUEUED_BATCHES, max(2, int(QUEUED_BYTES // large)))
        batches: queue.Queue[Batch | BaseException] = queue.Queue(most)
        stop = threading.Event()
        reader = threading.Thread(target=self._fill, args=(batches, stop), name="shard-stream", daemon=True)
        reader.start()
        try:
            while True:
                started = time.perf_counter()
                batch = batches.get()
                self.seconds_waited += time.perf_counter() - started
                if isinstance(batch, BaseException):
                    raise batch
                yield batch
        finally:
            stop.set()
            reader.join(CLOSE_SECONDS)

    def _fill(self, batches: queue.Queue[Batch | BaseException], stop: threading.Event) -> None:
        """Body of the reading thread: queue batches, or the error that ended reading, until `stop` is set."""
        try:
            made: Iterator[Batch | BaseException] = self._batches()
            for batch in made:
                if not _put(batches, batch, stop):
                    return
        except BaseException as error:  # is raised in the consumer's thread
            _put(batches, error, stop)

    def _batches(self) -> Iterator[Batch]:
        """All batches from `start_batch` on."""
        pending: dict[int, pa.Table] = {}
        items = self._order.items(self.start_batch, self._share)
        tasks = grouped(items, self._row_bytes, TASK_BYTES, self._task_items)
        blocks = self._read_by_tasks(tasks) if self._reading == "tasks" else self._read_by_threads(tasks)
        for bucket in self._order.bucket_draws(self.start_batch):
            rows = []
            for lane in self._order.lanes_of(bucket, self._share):
                while len(pending.get(lane.number, ())) < lane.rows:
                    # A block may hold rows of several shards, and so of several lanes.
                    block = next(blocks)
                    for number, more in _by_lane(block):
                        pending[number] = (
                            pa.concat_tables([pending[number], more]) if number in pending else more
                        )
                ready = pending[lane.number]
                # A lane may be in the parts of two workers, of which each takes its own rows.
                own = range(
                    max(lane.indices.start, self._share.start), min(lane.indices.stop, self._share.stop)
                )
                rows.append(ready.slice(own.start - lane.indices.start, len(own)))
                pending[lane.number] = ready.slice(lane.rows)  # kept for the bucket's next batch
            share = pa.concat_tables(rows)
            for part in self._parts:
                rows_of_part = share.slice(part.start - self._share.start, len(part))
                yield Batch.of(rows_of_part, self.info.encoding, stored=self._stored)

    def _read_by_tasks(self, tasks: Iterator[list[WorkItem]]) -> Iterator[pa.Table]:
        """Blocks of permuted rows, in the order of their work items, from many short Ray Data executions."""

        def begin() -> tuple[pa.Table, Iterator[pa.Table]]:
            segment = list(itertools.islice(tasks, SEGMENT_TASKS))
            pipeline = _pipeline(self.info.storage, segment, self._order.seed, self._reader)
            blocks = iter(
                pipeline.iter_batches(batch_size=None, batch_format="pyarrow", prefetch_batches=READ_TASKS)
            )
            return next(blocks), blocks

        # The next execution begins while this one's blocks are taken: otherwise its start, a tenth of a second, would
        # take as long as reading large shards.
        with ThreadPoolExecutor(1, "next-segment") as thread, user_errors():
            coming = thread.submit(begin)
            while True:
                first, others = coming.result()
                coming = thread.submit(begin)
                yield first
                yield from others

    def _read_by_threads(self, tasks: Iterator[list[WorkItem]]) -> Iterator[pa.Table]:
        """Blocks of permuted rows, in the order of their work items, read by threads of this process."""

        def read(task: list[WorkItem]) -> list[pa.Table]:
            items = [item.as_dict() for item in task]
            return list(
                read_permuted(items, storage=self.info.storage, seed=self._order.seed, reader=self._reader)
            )

        with ThreadPoolExecutor(READ_TASKS, "read-shards") as threads:
            coming = deque(threads.submit(read, task) for task in itertools.islice(tasks, READ_TASKS))
            while True:
                blocks = coming.popleft().result()
                coming.append(threads.submit(read, next(tasks)))
                yield from blocks


def read_split(
    root: str | os.PathLike[str], split: str, limit: int | None = None, *, shape: Shape | None = None
) -> Batch:
    """Read a split as one batch, ordered by key, for evaluation.

    Args:
        root: the dataset, a local folder or `s3://…`.
        split: name of the split.
        limit: number of rows to read at most: a fixed random sample. None reads all.
        shape: latent shape to read, for splits that have several.

    Raises:
        UserError: see `DatasetInfo.open`; or the split has several shapes and `shape` is None.
    """
    info = DatasetInfo.open(root)
    buckets = info.buckets(split)
    if shape is None and len(buckets) > 1:
        raise UserError(
            f"the split {split!r} of {info.root} has the shapes {', '.join(map(str, buckets))}: name one."
        )
    # First only keys, to choose rows: with the token states of a large encoder, a split may not fit into memory.
    places = [
        (key, shard.path, row)
        for shard in buckets[shape or next(iter(buckets))]
        for row, key in enumerate(read_shard(info.storage, shard.path, ["key"])["key"].to_pylist())
    ]
    # By a hash of their keys: the sample of fewer rows is a part of the sample of more.
    chosen = sorted(places, key=lambda place: stable_hash(0, place[0]))[:limit]
    rows_of: dict[str, list[int]] = {}
    for _, path, row in chosen:
        rows_of.setdefault(path, []).append(row)
    if info.raw is None:
        parts = [read_shard(info.storage, path).take(rows) for path, rows in rows_of.items()]
    else:
        encoder = RowEncoder(info)
        parts = [
            encoder.encode(path, read_raw(info.storage, path).take(rows)) for path, rows in rows_of.items()
        ]
    return Batch.of(pa.concat_tables(parts).sort_by("key"), info.encoding)


def _pipeline(storage: Storage, tasks: list[list[WorkItem]], seed: int, reader: ShardReader) -> Dataset:
    """The Ray Data pipeline that reads `tasks`, lists of work items, in order."""
    import ray.data

    rows = [{"items": [item.as_dict() for item in task]} for task in tasks]
    # Reading takes no CPU slot, so that it also works where training workers hold all CPUs of a cluster.
    pipeline = ray.data.from_items(rows, override_num_blocks=len(rows)).map_batches(
        partial(read_block, storage=storage, seed=seed, reader=reader),
        batch_size=None,
        batch_format="pyarrow",
        num_cpus=0,
        compute=ray.data.TaskPoolStrategy(READ_TASKS),
    )
    return configured(pipeline, in_order=True)


def _by_lane(block: pa.Table) -> Iterator[tuple[int, pa.Table]]:
    """(lane, its rows) for each run of rows of one lane, without copying any."""
    lanes = block["lane"].to_numpy()
    if not len(lanes):
        return
    starts = [0, *(np.flatnonzero(np.diff(lanes)) + 1).tolist()]
    for start, end in zip(starts, [*starts[1:], len(lanes)], strict=True):
        yield int(lanes[start]), block.slice(start, end - start)


def _put(
    batches: queue.Queue[Batch | BaseException], batch: Batch | BaseException, stop: threading.Event
) -> bool:
    """Queue a batch, unless the consumer has stopped; returns whether it was queued."""
    # With a time limit, to notice while the queue is full that the consumer has stopped.
    while not stop.is_set():
        try:
            batches.put(batch, timeout=0.2)
            return True
        except queue.Full:
            continue
    return False
