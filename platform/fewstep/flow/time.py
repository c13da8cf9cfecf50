"""Raw time, shifted time, and the segments that network evaluations cut raw time into."""

from __future__ import annotations

import math
from dataclasses import dataclass
from functools import cached_property

import torch
from torch import Tensor

from fewstep.policies.base import Time

BOUNDARY = 1e-6
"""A raw time at most this far above a boundary counts as the boundary: float32 rounding has moved it."""


@dataclass(frozen=True)
class TimeShift:
    """The map from raw time τ to σ = t (METHOD.md section 2); with `m` > 1 more of raw time is at high noise."""

    m: float = 1.0

    def warp(self, raw: Time) -> Time:
        """σ = mτ / (1 + (m − 1)τ)."""
        # Written without torch, so that it takes numbers, tensors and numpy arrays alike.
        return self.m * raw / (1 + (self.m - 1) * raw)

    def unwarp(self, sigma: Time) -> Time:
        """τ = σ / (m + (1 − m)σ)."""
        return sigma / (self.m + (1 - self.m) * sigma)

    def sigmas(self, steps: int) -> Tensor:
        """σ before each of `steps` uniform steps of raw time and after the last, (steps + 1,) float32, from 1 to 0."""
        # In float64, so that times are rounded once, after the shift.
        return self.warp(1 - torch.arange(steps + 1, dtype=torch.float64) / steps).float()

    @classmethod
    def for_sequence(cls, length: int) -> TimeShift:
        """Dynamic shift (METHOD.md section 2) for a sequence of `length` image tokens.

        log m is linear in the length, through (256, 0.5) and (4096, 1.15).
        """
        # (tokens, log m) at 256² and 1024² pixels, for latents of 8× reduction in patches of 2×2
        return cls(math.exp(0.5 + (length - 256) / (4096 - 256) * (1.15 - 0.5)))


NO_SHIFT = TimeShift(1.0)
"""σ = τ."""
TEXT_TO_IMAGE_SHIFT = TimeShift(3.2)
"""The paper's fixed shift for images of one megapixel."""


@dataclass(frozen=True)
class Segments:
    """Raw time [0, 1] cut into `nfe` segments, of which the last, at the data, is scaled (METHOD.md section 2).

    Attributes:
        nfe: number n of network evaluations, one per segment.
        final_step_scale: size f of the last segment relative to the others.
    """

    nfe: int
    final_step_scale: float = 1.0

    @property
    def base_size(self) -> float:
        """Size of every segment but the last, b = 1 / (n − 1 + f)."""
        return 1 / (self.nfe - 1 + self.final_step_scale)

    @cached_property
    def boundaries(self) -> Tensor:
        """The boundaries of the segments from noise to data, 1 to 0; (nfe + 1,) float64."""
        # The last segment may have another size, so its end, 0, is appended.
        upper = 1 - self.base_size * torch.arange(self.nfe, dtype=torch.float64)
        return torch.cat([upper, upper.new_zeros(1)])

    def containing(self, raw_t: Tensor) -> tuple[Tensor, Tensor]:
        """The segment (τ_dst, τ_src] that each raw time falls in.

        Args:
            raw_t: (B,), in (0, 1].

        Returns:
            τ_src and the segment's size τ_src − τ_dst, (B,) float32 each.
        """
        # Rising, as searchsorted needs.
        ends = self.boundaries.flip(0).to(raw_t.device)
        # BOUNDARY is added so that a segment contains its upper end also where float32 has rounded that up.
        above = torch.searchsorted(ends + BOUNDARY, raw_t.double().contiguous()).clamp(1, self.nfe)
        # `ends` are rising, so the segment's source (nearer to noise) is the upper one.
        return ends[above].float(), (ends[above] - ends[above - 1]).float()
