"""The order of a stream: which shards and rows make up its batch n; and the task that reads shards.

Apart from `stream`, so that processes that only read shards need not import torch.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import numpy as np
import pyarrow as pa

from fewstep.config import Shape
from fewstep.data.schema import Shard, read_shard
from fewstep.data.seeds import generator
from fewstep.storage import Storage

DRAWS_PER_CHUNK = 4096
"""Batches whose buckets are drawn together, from a seed of their own: so a resumed stream finds its place quickly."""


@dataclass(frozen=True)
class WorkItem:
    """A shard to read in one epoch, and how many of its permuted rows to skip, as they were consumed before."""

    bucket: int
    epoch: int
    shard: Shard
    skip: int = 0

    @property
    def nbytes(self) -> int:
        """Estimate of the shard's size in memory: float32 latents, and 16 KiB of token states per row."""
        return self.shard.rows * (4 * math.prod(self.shard.shape) + 2**14)

    def as_dict(self) -> dict[str, Any]:
        """The item as plain values, which a row of Ray Data consists of."""
        return {"bucket": self.bucket, "epoch": self.epoch, "path": self.shard.path, "skip": self.skip}


class ShardOrder:
    """Decides which shards and rows make up batch n of a rank's stream, as a pure function of its arguments.

    Args:
        buckets: shards by latent shape.
        batch_size: rows of a batch of this rank.
        seed: of all permutations and draws.
        rank, world_size: the rank whose stream it is, and the number of ranks.
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
        # float64: `choice` wants probabilities that sum to 1 up to its rounding.
        rows = np.array([sum(shard.rows for shard in shards) for shards in self.buckets], dtype=np.float64)
        self.weights = rows / rows.sum()

    def bucket_draws(self, start: int) -> Iterator[int]:
        """Indices of the buckets of batch `start`, `start + 1`, …; the same on all ranks."""
        for chunk in itertools.count(start // DRAWS_PER_CHUNK):
            yield from self._draws(chunk)[max(0, start - chunk * DRAWS_PER_CHUNK) :].tolist()

    def batches_before(self, start: int) -> np.ndarray:
        """How many of the first `start` batches are of each bucket, (buckets,)."""
        chunk, rest = divmod(start, DRAWS_PER_CHUNK)
        counts = np.zeros(len(self.buckets), dtype=np.int64)
        for index in range(chunk):
            counts += np.bincount(self._draws(index), minlength=len(counts))
        return counts + np.bincount(self._draws(chunk)[:rest], minlength=len(counts))

    def items(self, start: int) -> Iterator[WorkItem]:
        """Work items in the order in which batches `start`, `start + 1`, … need them; endless."""
        # Each bucket is skipped by the rows of its own batches before `start`.
        shares = [
            self._share(bucket, int(batches) * self.batch_size)
            for bucket, batches in enumerate(self.batches_before(start))
        ]
        ready = [0] * len(shares)  # rows of each bucket that are read and not yet in a batch
        for bucket in self.bucket_draws(start):
            while ready[bucket] < self.batch_size:
                item = next(shares[bucket])
                ready[bucket] += item.shard.rows - item.skip
                yield item
            ready[bucket] -= self.batch_size

    def _draws(self, chunk: int) -> np.ndarray:
        """Buckets of the batches of one chunk, (DRAWS_PER_CHUNK,), at random, weighted by rows."""
        return generator(self.seed, "buckets", chunk).choice(
            len(self.weights), DRAWS_PER_CHUNK, p=self.weights
        )

    def _share(self, bucket: int, skip: int) -> Iterator[WorkItem]:
        """This rank's shards of a bucket over all epochs, without the first `skip` rows."""
        shards = self.buckets[bucket]
        for epoch in itertools.count():
            # The same permutation on all ranks, of which each takes every world_size-th shard.
            order = generator(self.seed, "shards", bucket, epoch).permutation(len(shards))
            for index in order[self.rank :: self.world_size]:
                if skip < shards[index].rows:
                    yield WorkItem(bucket, epoch, shards[index], skip)
                skip = max(0, skip - shards[index].rows)


def grouped(items: Iterator[WorkItem], size: int, most: int) -> Iterator[list[WorkItem]]:
    """Consecutive work items in groups that end at `most` items or `size` bytes, whichever comes first."""
    group: list[WorkItem] = []
    for item in items:
        group.append(item)
        if len(group) == most or sum(member.nbytes for member in group) >= size:
            yield group
            group = []


def read_permuted(tasks: pa.Table, *, storage: Storage, seed: int) -> Iterator[pa.Table]:
    """Ray Data task: gives the rows of its work items, permuted for their epochs, with a column `bucket`."""
    for item in itertools.chain(*tasks["items"].to_pylist()):
        rows = read_shard(storage, item["path"])
        # The permutation depends on epoch and shard alone, so a resumed stream skips the very rows it had consumed.
        order = generator(seed, "rows", item["epoch"], item["path"]).permutation(len(rows))[item["skip"] :]
        yield rows.take(order).append_column("bucket", pa.array([item["bucket"]] * len(order), pa.int32()))
