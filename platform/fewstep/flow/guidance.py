"""Classifier-free guidance of a teacher, and the settings of its sampler."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, Literal

import torch
from pydantic import Field, model_validator
from torch import Tensor
from torch.nn import functional as F

from fewstep.config import Config
from fewstep.policies.base import per_latent

Renorm = Literal["none", "token", "token_cap", "sample_cap"]
"""What of a guided velocity is scaled to the conditional one's norm: nothing, every token, too large tokens, or too
large samples."""


def guided_velocity(
    pos: Tensor,
    neg: Tensor,
    scale: float | Tensor,
    orthogonal: float = 0.0,
    parallel_to: Tensor | None = None,
) -> Tensor:
    """Classifier-free guidance: u = u_c + (w − 1)(u_c − u_∅), optionally orthogonal (METHOD.md section 4).

    Args:
        pos: conditional velocity u_c, (B, C, H, W).
        neg: unconditional velocity u_∅, (B, C, H, W).
        scale: w, one number or one per sample, (B,); 1 is no guidance.
        orthogonal: share, 0 to 1, of the component of u_c − u_∅ parallel to `parallel_to` that is removed.
        parallel_to: that direction, (B, C, H, W), usually the teacher's x̂_0; default `pos`.

    Returns:
        (B, C, H, W).
    """
    difference = pos - neg
    if orthogonal:
        direction = pos if parallel_to is None else parallel_to
        axes = tuple(range(1, pos.ndim))  # one projection per sample, over all of its latent
        # (B, 1, 1, 1), the coefficient of the projection on `direction`
        along = (difference * direction).sum(axes, keepdim=True)
        # The clamp keeps a direction of zeros from 0/0.
        along = along / direction.square().sum(axes, keepdim=True).clamp(min=1e-12)
        difference = difference - orthogonal * along * direction
    # From u_c rather than from u_∅: exactly u_c where w = 1.
    weight = per_latent(scale, pos) if isinstance(scale, Tensor) else scale
    return pos + (weight - 1) * difference


def renormalised(guided: Tensor, pos: Tensor, how: Renorm, patch: int = 1) -> Tensor:
    """A guided velocity, scaled towards the norm of the conditional one, as some teachers' own pipelines do.

    Args:
        guided: guided velocity, (B, C, H, W).
        pos: conditional velocity u_c, (B, C, H, W).
        how: what is scaled, and whether up, too.
        patch: side p of the patches that are the teacher's tokens.

    Returns:
        (B, C, H, W).
    """
    if how == "none":
        return guided
    if how == "sample_cap":
        axes = tuple(range(1, pos.ndim))
        ratio = _norm(pos, axes) / _norm(guided, axes)
        return guided * ratio.clamp(max=1)
    tokens, wanted = (F.pixel_unshuffle(u, patch) for u in (guided, pos))  # (B, C·p², H/p, W/p)
    ratio = _norm(wanted, (1,)) / _norm(tokens, (1,))
    if how == "token_cap":
        ratio = ratio.clamp(max=1)
    return F.pixel_shuffle(tokens * ratio, patch)


def _norm(u: Tensor, axes: tuple[int, ...]) -> Tensor:
    """Euclidean norm over `axes`, which are kept; never 0."""
    return torch.linalg.vector_norm(u, dim=axes, keepdim=True).clamp(min=1e-8)


@dataclass(frozen=True)
class GuidanceInterval:
    """Guidance of strength `scale` where low ≤ σ ≤ high, and none (scale 1) outside."""

    scale: float
    low: float = 0.0
    high: float = 1.0

    def contains(self, sigma: Tensor) -> Tensor:
        """Whether guidance acts at σ, bool, shaped like `sigma`."""
        return (sigma >= self.low) & (sigma <= self.high)

    def at(self, sigma: Tensor) -> Tensor:
        """The guidance scale of each sample, shaped like `sigma`."""
        # A scale of 1 makes `guided_velocity` return the conditional velocity.
        return torch.where(self.contains(sigma), self.scale, 1.0)


class TeacherSamplerConfig(Config):
    """How a teacher's velocity is computed, and how its own sampler runs; stored in a student's card."""

    guidance_scale: float = Field(3.0, ge=1)
    """Classifier-free guidance scale of the teacher's velocity; 1 is no guidance."""
    guidance_interval: tuple[float, float] = (0.0, 1.0)
    """Range of σ in which guidance acts."""
    embedded_guidance_scale: float | None = Field(None, ge=0)
    """Guidance scale that a guidance-distilled network takes as an input (FLUX.1 dev: 3.5); null for all others."""
    orthogonal: float = Field(0.0, ge=0, le=1)
    """Orthogonal guidance: share of the guidance direction's component parallel to x0 that is removed."""
    renorm: Renorm = "none"
    """Scaling of the guided velocity to the norm of the conditional one: "token", of every token (Qwen-Image's own
    pipeline); "token_cap", of tokens whose norm is larger (LongCat-Image's); "sample_cap", of samples whose norm is
    larger (Z-Image's cfg_normalization). The method's published students were trained with "none"."""
    shift: float | None = Field(None, gt=0)
    """Time shift of the teacher's own sampler, with which the student is compared; null takes the one in the teacher's
    card, else the teacher's own schedule (`scheduler`), else the student's shift."""
    scheduler: dict[str, Any] | None = None
    """Configuration of the teacher's scheduler, as in diffusers' scheduler_config.json; null takes the one beside the
    teacher's weights, if there is one."""

    @property
    def passes(self) -> int:
        """Network passes of one velocity: with guidance there is one more, without the condition."""
        return 1 if self.guidance_scale == 1 else 2

    @model_validator(mode="after")
    def _interval_ascends(self) -> TeacherSamplerConfig:
        if not self.guidance_interval[0] < self.guidance_interval[1]:
            raise ValueError("guidance_interval must be [least, largest] σ")
        return self
