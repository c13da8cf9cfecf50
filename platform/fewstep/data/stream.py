"""What a training worker iterates: an endless, seeded, exactly seekable stream of batches through Ray Data.

The order is a pure function of (dataset, seed, batch size, rank, world size, number of the batch), so that a
resumed worker continues with the very batch it would have seen. How it is made:

* Each epoch of a bucket (the shards of one latent shape) permutes the shards; rank r of w takes every w-th
  of them, so that in each epoch the ranks together see each row exactly once. Rows are permuted within their
  shard, anew in each epoch.
* Batch n is of the bucket that a draw for n, weighted by rows and the same on all ranks, names. Rows carry
  over from shard to shard and epoch to epoch of their bucket: none is dropped, every batch is full.
* The shards needed, in order of need and over all coming epochs, are work items. Ray Data reads them ahead, some
  at a time, whatever the epochs' borders: no epoch begins with a pause, and a resume begins at the right item.
"""

from __future__ import annotations

import itertools
import os
import queue
import threading
import time
from collections.abc import Iterator
from dataclasses import dataclass
from functools import partial
from typing import TYPE_CHECKING

import pyarrow as pa
import pyarrow.compute as pc
import torch
from torch import Tensor

from fewstep.data.execution import configured, user_errors
from fewstep.data.order import Order, WorkItem, grouped, read_permuted
from fewstep.data.schema import DatasetInfo, Shape, read_shard
from fewstep.data.seeds import stable_hash
from fewstep.data.storage import Storage
from fewstep.errors import UserError
from fewstep.models.conditioning import TextConditioning

if TYPE_CHECKING:
    from ray.data import Dataset

SEGMENT_TASKS = 4
"""Reading tasks of one Ray Data execution. Its scheduler runs in the training process and, until all its tasks
have finished, spins: it must be able to finish, and soon, whatever the training does. (1,024 tasks, or a
limit on the object store that holds tasks back, cost 80 % of a core.) So executions are short, without such a
limit, and bounded by their number of tasks; the queue bridges the start of the next one."""

TASK_BYTES, TASK_ITEMS = 16 * 2**20, 16
"""What one task reads: one large shard, or several small ones."""

QUEUED_BATCHES = 8
"""Batches made ahead of the training."""

CLOSE_SECONDS = 10
"""Longest wait for reading to end when an iterator is closed; it ends after the block being read."""

READ_TASKS = 2
"""Tasks of one worker's stream that run at the same time."""


@dataclass(frozen=True)
class Batch:
    """Examples of one latent shape.

    Attributes:
        latent: (B, C, H, W) float32; None where the dataset holds prompts alone.
        conditioning: token states of the captions, padded to the batch's longest, and their pooled vectors, if any.
        shape: (C, H, W) of the latents, present or to be generated.
    """

    latent: Tensor | None
    conditioning: TextConditioning
    captions: list[str]
    keys: list[str]
    shape: Shape

    def __len__(self) -> int:
        return len(self.keys)

    @classmethod
    def of(cls, rows: pa.Table, token_dim: int) -> Batch:
        """Rows of one bucket, in SCHEMA's columns, as tensors."""
        rows = rows.combine_chunks()
        shape: Shape = tuple(rows[name][0].as_py() for name in ("channels", "height", "width"))
        flat = torch.from_numpy(
            rows["tokens"].combine_chunks().flatten().to_numpy(zero_copy_only=False).copy()
        )
        states = flat.view(-1, token_dim).split(rows["token_count"].to_pylist())
        latent, pooled = _floats(rows["latent"]), _floats(rows["pooled"])
        return cls(
            None if latent is None else latent.view(len(rows), *shape),
            TextConditioning.collate(states, pooled),
            rows["caption"].to_pylist(),
            rows["key"].to_pylist(),
            shape,
        )


def _floats(lists: pa.ChunkedArray) -> Tensor | None:
    """A column of equally long lists as (N, ·) float32; None where they are null."""
    if lists.null_count:
        return None
    return torch.from_numpy(lists.combine_chunks().flatten().to_numpy().copy()).view(len(lists), -1)


class ShardStream:
    """An endless stream of a split's batches for one rank; iterate it inside a process that Ray knows.

    Each `iter()` begins at `start_batch`. Reading runs ahead in the background until the iterator is closed.

    Args:
        root: the dataset, a local folder or `s3://…`.
        start_batch: batches this rank has consumed already.

    Attributes:
        seconds_waited: how long the consumer has waited for batches; set it to 0.0 to count anew.

    Raises:
        UserError: see `DatasetInfo.open`; or a bucket has fewer shards than there are ranks.
    """

    def __init__(
        self,
        root: str | os.PathLike[str],
        split: str,
        *,
        batch_size: int,
        seed: int,
        rank: int = 0,
        world_size: int = 1,
        start_batch: int = 0,
    ) -> None:
        self.info = DatasetInfo.open(root)
        self.info.check_world(split, world_size)
        buckets = self.info.buckets(split)
        self.start_batch = start_batch
        self.seconds_waited = 0.0
        self._order = Order(buckets, batch_size=batch_size, seed=seed, rank=rank, world_size=world_size)

    def __iter__(self) -> Iterator[Batch]:
        batches: queue.Queue[Batch | BaseException] = queue.Queue(QUEUED_BATCHES)
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
        try:
            made: Iterator[Batch | BaseException] = self._batches()
            for batch in made:
                if not _put(batches, batch, stop):
                    return
        except BaseException as error:  # crosses to the consumer's thread and is raised there
            _put(batches, error, stop)

    def _batches(self) -> Iterator[Batch]:
        pending: dict[int, pa.Table] = {}
        blocks = self._blocks()
        for bucket in self._order.bucket_draws(self.start_batch):
            while len(pending.get(bucket, ())) < self._order.batch_size:
                # One task's shards may come in one block, whatever their buckets.
                block = next(blocks)
                for index in block["bucket"].unique().to_pylist():
                    part = block.filter(pc.equal(block["bucket"], index))
                    pending[index] = pa.concat_tables([pending[index], part]) if index in pending else part
            rows = pending[bucket]
            yield Batch.of(rows.slice(0, self._order.batch_size), self.info.encoding.token_dim)
            pending[bucket] = rows.slice(self._order.batch_size)

    def _blocks(self) -> Iterator[pa.Table]:
        tasks = grouped(self._order.items(self.start_batch), TASK_BYTES, TASK_ITEMS)
        while True:
            segment = list(itertools.islice(tasks, SEGMENT_TASKS))
            pipeline = _pipeline(self.info.storage, segment, self._order.seed)
            with user_errors():
                yield from pipeline.iter_batches(
                    batch_size=None, batch_format="pyarrow", prefetch_batches=READ_TASKS
                )


def read_split(
    root: str | os.PathLike[str], split: str, limit: int | None = None, *, shape: Shape | None = None
) -> Batch:
    """A split at once, for evaluation, ordered by key; with `limit`, a fixed fair sample of that many rows.

    Raises:
        UserError: see `DatasetInfo.open`; or the split has several shapes and none of them is named.
    """
    info = DatasetInfo.open(root)
    buckets = info.buckets(split)
    if shape is None and len(buckets) > 1:
        raise UserError(
            f"the split {split!r} of {info.root} has the shapes {', '.join(map(str, buckets))}: name one."
        )
    # Keys alone first: with the token states of a large encoder a split need not fit into memory.
    places = [
        (key, shard.path, row)
        for shard in buckets[shape or next(iter(buckets))]
        for row, key in enumerate(read_shard(info.storage, shard.path, ["key"])["key"].to_pylist())
    ]
    chosen = sorted(places, key=lambda place: stable_hash(0, place[0]))[:limit]
    rows_of: dict[str, list[int]] = {}
    for _, path, row in chosen:
        rows_of.setdefault(path, []).append(row)
    rows = pa.concat_tables(read_shard(info.storage, path).take(rows) for path, rows in rows_of.items())
    return Batch.of(rows.sort_by("key"), info.encoding.token_dim)


def _pipeline(storage: Storage, tasks: list[list[WorkItem]], seed: int) -> Dataset:
    import ray.data

    rows = [{"items": [item.as_dict() for item in task]} for task in tasks]
    # Reading takes no CPU slot: a cluster whose CPUs are all held by training workers still feeds them.
    pipeline = ray.data.from_items(rows, override_num_blocks=len(rows)).map_batches(
        partial(read_permuted, storage=storage, seed=seed),
        batch_size=None,
        batch_format="pyarrow",
        num_cpus=0,
        compute=ray.data.TaskPoolStrategy(READ_TASKS),
    )
    return configured(pipeline, in_order=True)


def _put(
    batches: queue.Queue[Batch | BaseException], batch: Batch | BaseException, stop: threading.Event
) -> bool:
    """Queue a batch unless the consumer has gone."""
    while not stop.is_set():
        try:
            batches.put(batch, timeout=0.2)
            return True
        except queue.Full:
            continue
    return False
