"""Classifier-free guidance of a teacher."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from fewstep.policies.base import per_latent


def guided_velocity(
    pos: Tensor,
    neg: Tensor,
    scale: float | Tensor,
    orthogonal: float = 0.0,
    parallel_to: Tensor | None = None,
) -> Tensor:
    """u = u_c + (w − 1)(u_c − u_∅), optionally without the part that only rescales (METHOD.md section 4).

    Args:
        pos: conditional velocity u_c, (B, C, H, W).
        neg: unconditional velocity u_∅, (B, C, H, W).
        scale: w, one number or one per sample, (B,); 1 is no guidance.
        orthogonal: how much of the difference's component parallel to `parallel_to` is removed, 0 to 1.
        parallel_to: that direction, per sample, usually the teacher's x̂_0; default `pos`.
    """
    difference = pos - neg
    if orthogonal:
        direction = pos if parallel_to is None else parallel_to
        axes = tuple(range(1, pos.ndim))
        along = (difference * direction).sum(axes, keepdim=True)
        along = along / direction.square().sum(axes, keepdim=True).clamp(min=1e-12)
        difference = difference - orthogonal * along * direction
    weight = per_latent(scale, pos) if isinstance(scale, Tensor) else scale
    return pos + (weight - 1) * difference


@dataclass(frozen=True)
class GuidanceInterval:
    """Guidance of strength `scale` where low ≤ σ ≤ high, and none (scale 1) outside."""

    scale: float
    low: float = 0.0
    high: float = 1.0

    def contains(self, sigma: Tensor) -> Tensor:
        """Whether guidance acts there, bool, shaped like `sigma`."""
        return (sigma >= self.low) & (sigma <= self.high)

    def at(self, sigma: Tensor) -> Tensor:
        """The guidance scale of each sample, shaped like `sigma`."""
        return torch.where(self.contains(sigma), self.scale, 1.0)
