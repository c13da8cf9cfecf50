"""What every loss returns."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor


@dataclass(frozen=True)
class LossResult:
    """A loss, and where on the time axis it comes from.

    Attributes:
        loss: scalar with gradient, the mean of `per_sample`; in a walk, times the segment's size.
        per_sample: (B,), detached.
        raw_t: raw time of each sample, (B,), in (0, 1].
    """

    loss: Tensor
    per_sample: Tensor
    raw_t: Tensor


def draw_times(batch: int, generator: torch.Generator) -> Tensor:
    """Raw times τ ~ U(0, 1], (batch,) float32, on the generator's device.

    Stratified: one time falls in each of `batch` equal slices of (0, 1], slices dealt out at random. Each
    sample's time is still uniform, so the expected loss is that of independent draws, at lower variance.
    """
    device = generator.device
    slices = torch.randperm(batch, generator=generator, device=device)
    within = torch.rand(batch, generator=generator, device=device)
    return 1 - (slices + within) / batch


def draw_noise(x_0: Tensor, generator: torch.Generator) -> Tensor:
    """ε ~ N(0, 1) shaped like `x_0`, drawn on the generator's device."""
    return torch.randn(x_0.shape, generator=generator, device=generator.device).to(x_0)
