"""Trajectory regression: a segment's end is learned from the teacher's own steps, as progressive distillation does.

The teacher goes from a segment's source to its end in a few steps of its own; the student is to arrive at the same
point in one evaluation. With two of the teacher's steps, and a student that becomes the next teacher, this is a round
of progressive distillation (Salimans and Ho, arXiv 2202.00512); with more it needs no rounds.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from itertools import pairwise
from typing import Literal

import torch
from pydantic import Field
from torch import Tensor

from fewstep.config import Config
from fewstep.distill.result import BatchGenerators, LossResult, sample_rms
from fewstep.distill.starts import Start, change, displacement, noised_start
from fewstep.flow import SamplerConfig
from fewstep.policies import Policy, rollout


class RegressionConfig(Config):
    """Settings of trajectory regression. The student's segments are settings of `SamplerConfig`."""

    data_free: bool = False
    """Begin segments where the student's own rollout of those before has ended, instead of at noised data."""
    steps: int = Field(4, ge=1)
    """The teacher's steps per segment, equal in raw time."""
    solver: Literal["euler", "heun"] = "euler"
    """How it takes them; heun takes two of its evaluations each."""
    loss_scale: float = Field(30.0, gt=0)
    """Factor on the mean squared error of the mean velocity over the segment."""


def regression_loss(
    student: Callable[[Tensor, Tensor], Policy],
    teacher: Callable[[Tensor, Tensor], Tensor],
    x_0: Tensor,
    generator: BatchGenerators,
    sampler: SamplerConfig,
    config: RegressionConfig,
) -> LossResult:
    """One segment per sample, which starts from noised data; arguments as for `imitation_loss`."""
    start = noised_start(x_0, generator, sampler, at_sources=True)
    per_sample, end = _segment_error(student, teacher, start, sampler, config)
    return LossResult(per_sample.mean(), per_sample.detach(), start.raw, sample_rms(end))


def regression_walk(
    student: Callable[[Tensor, Tensor], Policy],
    teacher: Callable[[Tensor, Tensor], Tensor],
    noise: Tensor,
    sampler: SamplerConfig,
    config: RegressionConfig,
) -> Iterator[LossResult]:
    """All segments, from noise on, along the student's own rollouts; one loss each, as of `imitation_walk`."""
    x = noise
    for upper, lower in pairwise(sampler.segments.boundaries.float()):
        raw, raw_dst = upper.expand(len(x)), lower.expand(len(x))
        start = Start(x, raw, raw, raw_dst)
        per_sample, x = _segment_error(student, teacher, start, sampler, config)
        yield LossResult(float(upper - lower) * per_sample.mean(), per_sample.detach(), raw, sample_rms(x))


def _segment_error(
    student: Callable[[Tensor, Tensor], Policy],
    teacher: Callable[[Tensor, Tensor], Tensor],
    start: Start,
    sampler: SamplerConfig,
    config: RegressionConfig,
) -> tuple[Tensor, Tensor]:
    """Errors of each sample, (B,), and where the student arrives, (B, C, H, W)."""
    with torch.no_grad():
        end = _teachers_end(teacher, start, sampler, config)
    # Mean velocities rather than end points: errors of short segments count as much as those of long ones.
    target = (end - start.x) / change(sampler, start.raw, start.raw_dst, start.x)
    policy = student(start.x, start.sigma(sampler))
    error = displacement(policy, start.x, start.raw, start.raw_dst, sampler) - target
    with torch.no_grad():
        arrived, _ = rollout(
            policy.detach(), start.x, start.raw, start.raw_dst, sampler.time_shift, sampler.substeps
        )
    return config.loss_scale * error.square().flatten(1).mean(1), arrived


def _teachers_end(
    teacher: Callable[[Tensor, Tensor], Tensor],
    start: Start,
    sampler: SamplerConfig,
    config: RegressionConfig,
) -> Tensor:
    """Where the teacher's steps arrive, (B, C, H, W)."""
    x, shift = start.x, sampler.time_shift
    shares = torch.linspace(0, 1, config.steps + 1, dtype=torch.float64).float()
    times = [torch.lerp(start.raw, start.raw_dst, share) for share in shares]
    for now, after in pairwise(times):
        size = change(sampler, now, after, x)
        velocity = teacher(x, shift.warp(now)).float()
        if config.solver == "heun":
            later = teacher(x + size * velocity, shift.warp(after)).float()
            velocity = (velocity + later) / 2
        x = x + size * velocity
    return x
