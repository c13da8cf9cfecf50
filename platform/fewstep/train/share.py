"""A worker's share of every global batch."""

from __future__ import annotations

from dataclasses import dataclass
from itertools import pairwise

from fewstep.errors import UserError


@dataclass(frozen=True)
class BatchShare:
    """The samples of every global batch that one worker computes, and in which micro-batches.

    Attributes:
        total: samples of a global batch, of all workers.
        world_size: number of workers.
        parts: indices in the global batch of each of this worker's micro-batches, in order. All workers have the same
            number of them, as they exchange gradients or weights in each.
    """

    total: int
    world_size: int
    parts: tuple[range, ...]

    @classmethod
    def of(cls, total: int, largest: int, rank: int, world_size: int) -> BatchShare:
        """The share of a worker.

        Args:
            total: samples of a global batch.
            largest: most samples of a micro-batch.
            rank, world_size: the worker, and the number of workers.

        Raises:
            UserError: some worker would have a micro-batch without any sample.
        """
        shares = _cut(range(total), world_size)
        micro_batches = -(-max(map(len, shares)) // largest)
        if min(map(len, shares)) < micro_batches:
            raise UserError(
                f"data.batch_size={total} is too small for {world_size} workers with {micro_batches} micro-batches "
                f"each: set it to {world_size * micro_batches} or more, or train.accumulate=1."
            )
        return cls(total, world_size, tuple(_cut(shares[rank], micro_batches)))

    @property
    def largest(self) -> int:
        """Samples of the largest micro-batch."""
        return max(map(len, self.parts))

    def weight(self, part: range) -> float:
        """Factor of a micro-batch's mean loss in a worker's sum, of which the mean over workers is the step's loss."""
        return len(part) * self.world_size / self.total


def _cut(whole: range, count: int) -> list[range]:
    """A range in `count` parts of about equal size."""
    cuts = [len(whole) * place // count for place in range(count + 1)]
    return [whole[first:last] for first, last in pairwise(cuts)]
