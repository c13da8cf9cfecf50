"""The result of every loss, and the random numbers that all losses draw."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from fewstep.draws import SampleGenerators, gaussian_noise, uniform


@dataclass(frozen=True)
class LossResult:
    """A loss, and the raw times of its samples, for plots of the loss over time.

    Attributes:
        loss: scalar with gradient: the mean of `per_sample`, in a walk multiplied by the segment's size.
        per_sample: loss of each sample, (B,), detached.
        raw_t: raw time of each sample, (B,), in (0, 1].
        state_rms: root mean square of the last state that each sample's rollout reached, (B,); None where there are no
            rollouts.
    """

    loss: Tensor
    per_sample: Tensor
    raw_t: Tensor
    state_rms: Tensor | None = None


def sample_rms(x: Tensor) -> Tensor:
    """Root mean square of each sample of a batch (B, …), as (B,), without gradient."""
    return torch.linalg.vector_norm(x.detach().float().flatten(1), dim=1) / x[0].numel() ** 0.5


BatchGenerators = torch.Generator | SampleGenerators
"""Source of the random numbers of a training batch."""


def draw_times(batch: int, generator: BatchGenerators) -> Tensor:
    """Raw times τ ~ U(0, 1], (batch,) float32, on the generator's device.

    Stratified: one time falls in each of `total` equal slices of (0, 1], and samples get slices at random; `total` is
    the number of samples, of all workers where each sample has its own generator. The time of each sample is still
    uniform, so the expected loss is that of independent draws, with a lower variance.
    """
    if isinstance(generator, SampleGenerators):
        slices, total = generator.permuted(), generator.total
    else:
        slices, total = torch.randperm(batch, generator=generator, device=generator.device), batch
    within = uniform((batch,), generator, slices.device)
    return 1 - (slices + within) / total  # in [0, 1) before: 1 − … excludes 0, where nothing is left to do


def draw_noise(x_0: Tensor, generator: BatchGenerators) -> Tensor:
    """ε ~ N(0, 1), with shape, type and device of `x_0`, drawn on the generator's device."""
    return gaussian_noise(x_0.shape, generator, x_0.device).to(x_0)
