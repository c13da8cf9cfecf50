"""The order of a stream: which shards and rows make up its global batch n; and the task that reads shards.

Apart from `stream`, so that processes that only read shards need not import torch.
"""

from __future__ import annotations

import heapq
import itertools
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any, Protocol

import numpy as np
import pyarrow as pa

from fewstep.config import Shape
from fewstep.data.schema import NUMBERS, Shard, read_shard
from fewstep.data.seeds import generator
from fewstep.data.stream_config import OPEN_SHARDS
from fewstep.storage import Storage, through_outages

DRAWS_PER_CHUNK = 4096
"""Batches whose buckets are drawn together, from a seed of their own: so a resumed stream finds its place quickly."""


@dataclass(frozen=True)
class WorkItem:
    """Rows of a shard to read in one epoch: places `first` to `last` of the epoch's permutation of it."""

    lane: int
    epoch: int
    shard: Shard
    first: int
    last: int

    def as_dict(self) -> dict[str, Any]:
        """The item as plain values, which a row of Ray Data consists of."""
        return {
            "lane": self.lane,
            "epoch": self.epoch,
            "path": self.shard.path,
            "rows": self.shard.rows,
            "first": self.first,
            "last": self.last,
        }


@dataclass(frozen=True)
class ShardLane:
    """A fixed part of every global batch of a bucket, filled with the rows of one shard after another.

    Attributes:
        number: different for all lanes of all buckets.
        indices: of the samples in the global batch that are its part.
    """

    number: int
    indices: range

    @property
    def rows(self) -> int:
        """Rows that it gives each batch."""
        return len(self.indices)


class ShardOrder:
    """Decides which shards and rows make up global batch n, as a pure function of its arguments.

    The number of workers is none of them: each reads those lanes that its own part of the batch lies in. In each epoch
    of a bucket (the shards of one latent shape), all its shards are permuted; the lane that has run out of rows first
    takes the next one of them, and of the next epoch's when there is none left. So in each epoch each row is used
    exactly once, and an epoch's last rows may come in batches with the next one's first.

    Args:
        buckets: shards by latent shape.
        batch_size: rows of a global batch.
        seed: of all permutations and draws.
        open_shards: lanes of a bucket, if it has as many shards and the batch as many rows.
        piece: most rows of a work item; None for whole shards. It changes no batch.
    """

    def __init__(
        self,
        buckets: dict[Shape, tuple[Shard, ...]],
        *,
        batch_size: int,
        seed: int,
        open_shards: int = OPEN_SHARDS,
        piece: int | None = None,
    ) -> None:
        self.buckets = list(buckets.values())
        self.batch_size, self.seed, self.piece = batch_size, seed, piece
        # float64: `choice` wants probabilities that sum to 1 up to its rounding.
        rows = np.array([sum(shard.rows for shard in shards) for shards in self.buckets], dtype=np.float64)
        self.weights = rows / rows.sum()
        self.lanes = [
            _lanes(bucket * open_shards, min(open_shards, len(shards), batch_size), batch_size)
            for bucket, shards in enumerate(self.buckets)
        ]

    def bucket_draws(self, start: int) -> Iterator[int]:
        """Indices of the buckets of batch `start`, `start + 1`, …"""
        for chunk in itertools.count(start // DRAWS_PER_CHUNK):
            yield from self._draws(chunk)[max(0, start - chunk * DRAWS_PER_CHUNK) :].tolist()

    def batches_before(self, start: int) -> np.ndarray:
        """How many of the first `start` batches are of each bucket, (buckets,)."""
        chunk, rest = divmod(start, DRAWS_PER_CHUNK)
        counts = np.zeros(len(self.buckets), dtype=np.int64)
        for index in range(chunk):
            counts += np.bincount(self._draws(index), minlength=len(counts))
        return counts + np.bincount(self._draws(chunk)[:rest], minlength=len(counts))

    def lanes_of(self, bucket: int, part: range) -> list[ShardLane]:
        """The lanes that the samples of a part of the global batch are in."""
        return [
            lane
            for lane in self.lanes[bucket]
            if lane.indices.start < part.stop and part.start < lane.indices.stop
        ]

    def items(self, start: int, part: range) -> Iterator[WorkItem]:
        """Work items in the order in which a part of batches `start`, `start + 1`, … needs them; endless.

        Args:
            start: number of a global batch.
            part: indices of samples in it.
        """
        numbers = self.batches_before(start).tolist()  # of the next batch of each bucket, among its own
        fillings = [_Filling(self, bucket, first, part) for bucket, first in enumerate(numbers)]
        for bucket in self.bucket_draws(start):
            yield from fillings[bucket].items_for(numbers[bucket])
            numbers[bucket] += 1

    def shards(self, bucket: int) -> Iterator[tuple[int, Shard]]:
        """(epoch, shard) of a bucket over all epochs, in the order in which lanes take them."""
        shards = self.buckets[bucket]
        for epoch in itertools.count():
            for index in generator(self.seed, "shards", bucket, epoch).permutation(len(shards)):
                yield epoch, shards[index]

    def _draws(self, chunk: int) -> np.ndarray:
        """Buckets of the batches of one chunk, (DRAWS_PER_CHUNK,), at random, weighted by rows."""
        return generator(self.seed, "buckets", chunk).choice(
            len(self.weights), DRAWS_PER_CHUNK, p=self.weights
        )


class _Filling:
    """Which shards the lanes of a bucket take, batch after batch; simulated from the first batch on.

    Args:
        order: has the lanes and the shards.
        bucket: index of the bucket.
        first: the batch, among those of the bucket, from which rows are wanted.
        part: only the lanes that this part of the batch lies in.
    """

    def __init__(self, order: ShardOrder, bucket: int, first: int, part: range) -> None:
        self._shards, self._first, self._piece = order.shards(bucket), first, order.piece
        self._lanes = order.lanes[bucket]
        # Of the shard that a lane has begun: its epoch, the shard, and how many of its rows the lane has got
        self._open: list[tuple[int, Shard, int]] = [(0, _NONE, 0)] * len(self._lanes)
        self._wanted = set(order.lanes_of(bucket, part))
        # (batch that needs rows which the lane has not got yet, place of the lane, rows that it has got so far)
        self._needs = [(0, place, 0) for place in range(len(self._lanes))]

    def items_for(self, batch: int) -> Iterator[WorkItem]:
        """What lanes take for batches up to this one, and still has rows of the first or a later one."""
        while self._needs[0][0] <= batch:
            _, place, got = self._needs[0]
            lane, (epoch, shard, begun) = self._lanes[place], self._open[place]
            if begun == shard.rows:
                (epoch, shard), begun = next(self._shards), 0
            end = shard.rows if self._piece is None else min(begun + self._piece, shard.rows)
            self._open[place] = epoch, shard, end
            rows = got + end - begun
            heapq.heapreplace(self._needs, (rows // lane.rows, place, rows))
            first = begun + max(0, self._first * lane.rows - got)
            if first < end and lane in self._wanted:
                yield WorkItem(lane.number, epoch, shard, first, end)


_NONE = Shard("", "", (0, 0, 0), 0)
"""Stands for the shard of a lane that has none yet."""


def _lanes(first: int, count: int, batch_size: int) -> list[ShardLane]:
    """A batch in `count` parts of about equal size, numbered from `first`."""
    cuts = [batch_size * place // count for place in range(count + 1)]
    return [ShardLane(first + place, range(cuts[place], cuts[place + 1])) for place in range(count)]


def grouped(
    items: Iterator[WorkItem], row_bytes: Mapping[Shape, float], size: int, most: int
) -> Iterator[list[WorkItem]]:
    """Consecutive work items in groups that end at `most` items or `size` bytes, whichever comes first.

    Args:
        items: work items.
        row_bytes: size of a row, by latent shape.
        size, most: limits of a group.
    """
    group: list[WorkItem] = []
    read = 0.0
    for item in items:
        group.append(item)
        read += (item.last - item.first) * row_bytes[item.shard.shape]
        if len(group) == most or read >= size:
            yield group
            group, read = [], 0.0


def read_permuted(
    items: Sequence[dict[str, Any]], *, storage: Storage, seed: int, reader: ShardReader
) -> Iterator[pa.Table]:
    """The rows of work items, permuted for their epochs, with a column `lane`; one table for each."""
    wanted = [
        # The permutation depends on epoch and shard alone, so a resumed stream skips the very rows it had consumed.
        (item["path"], _permutation(seed, item)[item["first"] : item["last"]])
        for item in items
    ]
    for item, rows in zip(items, reader.tables(storage, wanted), strict=True):
        yield rows.append_column("lane", pa.array([item["lane"]] * len(rows), pa.int32()))


def read_block(block: pa.Table, *, storage: Storage, seed: int, reader: ShardReader) -> Iterator[pa.Table]:
    """Ray Data task: `read_permuted`, of the work items in a block's column `items`."""
    items = list(itertools.chain(*block["items"].to_pylist()))
    yield from read_permuted(items, storage=storage, seed=seed, reader=reader)


def _permutation(seed: int, item: dict[str, Any]) -> np.ndarray:
    return generator(seed, "rows", item["epoch"], item["path"]).permutation(item["rows"])


class ShardReader(Protocol):
    """Reads rows of shards in SCHEMA's columns. It is sent to the tasks that read."""

    def tables(self, storage: Storage, wanted: Sequence[tuple[str, np.ndarray]]) -> Iterator[pa.Table]:
        """For each path of a shard and indices of rows, a table of these rows, in their order."""
        ...


class EncodedShards:
    """Reads shards that were encoded when the dataset was prepared."""

    def tables(self, storage: Storage, wanted: Sequence[tuple[str, np.ndarray]]) -> Iterator[pa.Table]:
        """See `ShardReader`."""
        for path, rows in wanted:
            shard = through_outages(partial(read_shard, storage, path), f"reading {path}")
            yield permuted(shard, rows)


def permuted(table: pa.Table, rows: np.ndarray) -> pa.Table:
    """Rows of an encoded shard in another order.

    The order of tensors is that of small numbers: each column of tensors comes as a dictionary of the table's own
    memory, so that they are copied only where batches are made of them.
    """
    if 2 * len(rows) < len(table):  # the memory of all of them would be sent on
        table, rows = table.take(rows), np.arange(len(rows))
    tensors = {
        name: pa.DictionaryArray.from_arrays(pa.array(rows, pa.int32()), table[name].combine_chunks())
        for name in NUMBERS
        if not table[name].null_count
    }
    table = table.drop_columns(list(tensors)).take(rows)
    for name, column in tensors.items():
        table = table.append_column(name, column)
    return table
