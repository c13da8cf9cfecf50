"""Which shards and rows make up a stream's batch n: the pure part, and the task that reads a shard.

Kept apart from `stream`, as tasks that only read shards need not import torch.
"""

from __future__ import annotations

import itertools
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import numpy as np
import pyarrow as pa

from fewstep.data.schema import Shape, Shard, read_shard
from fewstep.data.seeds import generator
from fewstep.data.storage import Storage

DRAWS_PER_CHUNK = 4096


@dataclass(frozen=True)
class WorkItem:
    """A shard to read in one epoch, and how many of its permuted rows were consumed before."""

    bucket: int
    epoch: int
    shard: Shard
    skip: int = 0


class Order:
    """The pure part of the stream: which shards and rows make up batch n.

    Args:
        buckets: shards by latent shape.
        rank, world_size: which of the ranks' shares this is.
    """

    def __init__(
        self,
        buckets: dict[Shape, tuple[Shard, ...]],
        *,
        batch_size: int,
        seed: int,
        rank: int,
        world_size: int,
    ) -> None:
        self.buckets = list(buckets.values())
        self.batch_size, self.seed, self.rank, self.world_size = batch_size, seed, rank, world_size
        rows = np.array([sum(shard.rows for shard in shards) for shards in self.buckets], dtype=np.float64)
        self.weights = rows / rows.sum()

    def bucket_draws(self, start: int) -> Iterator[int]:
        """The bucket of batch `start`, `start + 1`, …; the same on all ranks."""
        for chunk in itertools.count(start // DRAWS_PER_CHUNK):
            yield from self._draws(chunk)[max(0, start - chunk * DRAWS_PER_CHUNK) :].tolist()

    def batches_before(self, start: int) -> np.ndarray:
        """(buckets,) how many of the first `start` batches are of each bucket."""
        chunk, rest = divmod(start, DRAWS_PER_CHUNK)
        counts = np.zeros(len(self.buckets), dtype=np.int64)
        for index in range(chunk):
            counts += np.bincount(self._draws(index), minlength=len(counts))
        return counts + np.bincount(self._draws(chunk)[:rest], minlength=len(counts))

    def items(self, start: int) -> Iterator[WorkItem]:
        """Work items in the order in which batches `start`, `start + 1`, … need them."""
        shares = [
            self._share(bucket, int(batches) * self.batch_size)
            for bucket, batches in enumerate(self.batches_before(start))
        ]
        ready = [0] * len(shares)
        for bucket in self.bucket_draws(start):
            while ready[bucket] < self.batch_size:
                item = next(shares[bucket])
                ready[bucket] += item.shard.rows - item.skip
                yield item
            ready[bucket] -= self.batch_size

    def _draws(self, chunk: int) -> np.ndarray:
        return generator(self.seed, "buckets", chunk).choice(
            len(self.weights), DRAWS_PER_CHUNK, p=self.weights
        )

    def _share(self, bucket: int, skip: int) -> Iterator[WorkItem]:
        """This rank's shards of a bucket over all epochs, without the first `skip` rows."""
        shards = self.buckets[bucket]
        for epoch in itertools.count():
            order = generator(self.seed, "shards", bucket, epoch).permutation(len(shards))
            for index in order[self.rank :: self.world_size]:
                if skip < shards[index].rows:
                    yield WorkItem(bucket, epoch, shards[index], skip)
                skip = max(0, skip - shards[index].rows)


def read_permuted(item: pa.Table, *, storage: Storage, seed: int) -> pa.Table:
    """Ray Data task: the rows of one work item, permuted for their epoch, with their `bucket`."""
    work: dict[str, Any] = item.to_pylist()[0]
    rows = read_shard(storage, work["path"])
    order = generator(seed, "rows", work["epoch"], work["path"]).permutation(len(rows))[work["skip"] :]
    return rows.take(order).append_column("bucket", pa.array([work["bucket"]] * len(order), pa.int32()))
