"""Raw time, shifted time, and the segments that network evaluations cut raw time into."""

from __future__ import annotations

import math
from dataclasses import dataclass
from functools import cached_property

import torch
from torch import Tensor

from fewstep.policies.base import Time

BOUNDARY = 1e-6
"""A raw time this close above a boundary is that boundary, rounded."""


@dataclass(frozen=True)
class TimeShift:
    """The warp of raw time τ to σ = t (METHOD.md section 2); `m` > 1 spends more time at high noise."""

    m: float = 1.0

    def warp(self, raw: Time) -> Time:
        """σ = mτ / (1 + (m − 1)τ)."""
        return self.m * raw / (1 + (self.m - 1) * raw)

    def unwarp(self, sigma: Time) -> Time:
        """τ = σ / (m + (1 − m)σ)."""
        return sigma / (self.m + (1 - self.m) * sigma)

    @classmethod
    def for_sequence(cls, length: int) -> TimeShift:
        """Dynamic shift: log m is linear in the sequence length, through (256, 0.5) and (4096, 1.15)."""
        return cls(math.exp(0.5 + (length - 256) / (4096 - 256) * (1.15 - 0.5)))


NO_SHIFT = TimeShift(1.0)
TEXT_TO_IMAGE_SHIFT = TimeShift(3.2)
"""For images of one megapixel."""


@dataclass(frozen=True)
class Segments:
    """Raw time [0, 1] cut into `nfe` segments, the one nearest to the data scaled by `final_step_scale`."""

    nfe: int
    final_step_scale: float = 1.0

    @property
    def base_size(self) -> float:
        """Size of every segment but the last: 1 / (n − 1 + f)."""
        return 1 / (self.nfe - 1 + self.final_step_scale)

    @cached_property
    def boundaries(self) -> Tensor:
        """The segments' ends from noise to data, 1 to 0; (nfe + 1,) float64."""
        upper = 1 - self.base_size * torch.arange(self.nfe, dtype=torch.float64)
        return torch.cat([upper, upper.new_zeros(1)])

    def containing(self, raw_t: Tensor) -> tuple[Tensor, Tensor]:
        """The segment (τ_dst, τ_src] that each raw time falls in.

        Args:
            raw_t: (B,), in (0, 1].

        Returns:
            τ_src and the segment's size τ_src − τ_dst, (B,) float32 each.
        """
        ends = self.boundaries.flip(0).to(raw_t.device)
        above = torch.searchsorted(ends + BOUNDARY, raw_t.double().contiguous()).clamp(1, self.nfe)
        return ends[above].float(), (ends[above] - ends[above - 1]).float()
