"""Random numbers of batches of samples, drawn from one generator, or from one of each sample."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import overload

import torch
from torch import Tensor

Generators = torch.Generator | Sequence[torch.Generator] | None
"""One generator for a batch, one per sample, or None for torch's own."""


class SampleGenerators(Sequence[torch.Generator]):
    """Generators of samples of a training batch: what a sample draws follows from (seed, batch, its index) alone.

    So the number of workers that share a batch, and the parts that they compute it in, change nothing.

    Args:
        seed: of the run.
        batch: number of the batch.
        indices: of the samples in the batch.
        total: number of samples of the batch, of all workers.
    """

    def __init__(self, seed: int, batch: int, indices: range, total: int) -> None:
        self.indices, self.total = indices, total
        self._seed, self._batch = seed, batch
        self._generators = [
            torch.Generator().manual_seed(mixed_seed(seed, batch, index)) for index in indices
        ]

    def __len__(self) -> int:
        return len(self._generators)

    @overload
    def __getitem__(self, index: int) -> torch.Generator: ...
    @overload
    def __getitem__(self, index: slice) -> list[torch.Generator]: ...
    def __getitem__(self, index: int | slice) -> torch.Generator | list[torch.Generator]:
        return self._generators[index]

    def permuted(self) -> Tensor:
        """Places of these samples in a random permutation of the whole batch, (len,) int64."""
        # Of an index that no sample has
        whole = torch.Generator().manual_seed(mixed_seed(self._seed, self._batch, -1))
        return torch.randperm(self.total, generator=whole)[self.indices.start : self.indices.stop]


def mixed_seed(*numbers: int) -> int:
    """A seed of 63 bits from some integers."""
    # For integers, Python's hash is the same in every process.
    return hash(numbers) & (2**63 - 1)


def gaussian_noise(
    shape: Sequence[int], generator: Generators = None, device: torch.device | str = "cpu"
) -> Tensor:
    """Standard normal noise of shape (B, …), drawn on the generators' device and moved to `device`.

    With a sequence of B generators, each sample's noise comes from its own, whatever batch it is in.
    """
    return _drawn(torch.randn, shape, generator, device)


def uniform(shape: Sequence[int], generator: Generators = None, device: torch.device | str = "cpu") -> Tensor:
    """Numbers of U[0, 1) of shape (B, …), drawn as those of `gaussian_noise`."""
    return _drawn(torch.rand, shape, generator, device)


def _drawn(
    draw: Callable[..., Tensor], shape: Sequence[int], generator: Generators, device: torch.device | str
) -> Tensor:
    if isinstance(generator, Sequence):
        # Sample by sample: one call for all would mix their streams.
        return torch.stack([draw(shape[1:], generator=g, device=g.device).to(device) for g in generator])
    # A generator draws on its own device alone. One on the CPU gives the same numbers whatever `device` is.
    source = device if generator is None else generator.device
    return draw(tuple(shape), generator=generator, device=source).to(device)
