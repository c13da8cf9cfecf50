"""Where losses begin: noised data, and the segment of the student's that each sample is in."""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

from torch import Tensor

from fewstep.distill.result import BatchGenerators, draw_noise, draw_times
from fewstep.flow import SamplerConfig
from fewstep.policies import Policy, mean_velocity
from fewstep.policies.base import per_latent


class Start(NamedTuple):
    """States of a batch, in the student's segments."""

    x: Tensor
    """Noised data, (B, C, H, W)."""
    raw: Tensor
    """Their raw times, (B,)."""
    raw_src: Tensor
    """Where their segments begin, (B,)."""
    raw_dst: Tensor
    """Where their segments end, (B,)."""

    def sigma(self, sampler: SamplerConfig) -> Tensor:
        """σ of the states, (B,), on their device."""
        return sampler.time_shift.warp(self.raw).to(self.x.device, non_blocking=True)


def noised_start(
    x_0: Tensor, generator: BatchGenerators, sampler: SamplerConfig, *, at_sources: bool = False
) -> Start:
    """Data noised at times drawn uniformly in raw time.

    Args:
        x_0: clean latents, (B, C, H, W).
        generator: source of times and noise.
        sampler: the student's segments.
        at_sources: move each sample to its segment's source, where a student is evaluated when it samples.
    """
    raw = draw_times(len(x_0), generator)
    raw_src, size = sampler.draw_segments(raw, generator)
    raw_dst = raw_src - size
    if at_sources:
        raw = raw_src
    sigma = sampler.time_shift.warp(raw).to(x_0.device, non_blocking=True)
    # x = (1 − σ)·x_0 + σ·ε
    return Start(x_0.lerp(draw_noise(x_0, generator), per_latent(sigma, x_0)), raw, raw_src, raw_dst)


def change(sampler: SamplerConfig, raw_from: Tensor, raw_to: Tensor, like: Tensor) -> Tensor:
    """σ(raw_to) − σ(raw_from), of a shape that broadcasts to the latents `like`."""
    warp = sampler.time_shift.warp
    return per_latent((warp(raw_to) - warp(raw_from)).to(like.device, non_blocking=True), like)


def displacement(
    policy: Policy, x: Tensor, raw_from: Tensor, raw_to: Tensor, sampler: SamplerConfig
) -> Tensor:
    """The policy's mean velocity from one raw time to another, (B, C, H, W), with gradient to its network."""
    return mean_velocity(policy, x, raw_from, raw_to, sampler.time_shift, sampler.substeps)


def mean_velocity_to(
    student: Callable[[Tensor, Tensor], Policy], raw_end: Tensor, sampler: SamplerConfig
) -> Callable[[Tensor, Tensor], Tensor]:
    """From states (B, C, H, W) and raw times (B,) to the student's mean velocity from there to `raw_end`, (B,)."""

    def mean(x: Tensor, raw: Tensor) -> Tensor:
        sigma = sampler.time_shift.warp(raw).to(x.device, non_blocking=True)
        return displacement(student(x, sigma), x, raw, raw_end, sampler)

    return mean
