"""Consistency distillation: all states of a teacher's trajectory are to lead to the same end of their segment.

Discrete: a state and the one that a small step of the teacher's leads to have the same end (Luo et al., latent
consistency models, arXiv 2310.04378; with several segments, Wang et al., arXiv 2405.18407). Continuous: the limit of
small steps, with the tangent normalised and warmed up (Lu and Song, sCM, arXiv 2410.11081), here for flow matching's
straight interpolation instead of that paper's trigonometric one.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from pydantic import Field
from torch import Tensor

from fewstep.config import Config
from fewstep.distill.result import BatchGenerators, LossResult, sample_rms
from fewstep.distill.starts import Start, change, displacement, mean_velocity_to, noised_start
from fewstep.distill.tangent import per_sample_rms, ramp, total_derivative
from fewstep.flow import SamplerConfig
from fewstep.policies import Policy

LEAST_T = 1e-3
"""Least raw time that the network is asked at: nothing is left to go below it."""


class ConsistencyConfig(Config):
    """Settings of consistency distillation. The student's segments are settings of `SamplerConfig`."""

    continuous: bool = False
    """The limit of small steps, by the change of the student's velocity along the teacher's trajectory."""
    step: float = Field(0.02, gt=0, le=1)
    """Raw time of the teacher's step; not for continuous."""
    huber: float = Field(0.03, ge=0)
    """c of the pseudo-Huber distance sqrt(d² + c²) − c of root mean square differences d, which large errors dominate
    less than the squared distance; 0 is the root mean square. Not for continuous."""
    tangent_offset: float = Field(0.1, gt=0)
    """c in the normalised tangent g / (rms(g) + c); for continuous."""
    warmup_steps: int = Field(200, ge=0)
    """Optimizer steps over which the derivative's share of the tangent rises to 1; for continuous."""
    loss_scale: float = Field(1.0, gt=0)
    """Factor on the loss."""


def consistency_loss(
    student: Callable[[Tensor, Tensor], Policy],
    teacher: Callable[[Tensor, Tensor], Tensor],
    x_0: Tensor,
    generator: BatchGenerators,
    sampler: SamplerConfig,
    config: ConsistencyConfig,
    step: int,
) -> LossResult:
    """One state per sample, noised data at any time of its segment; other arguments as for `imitation_loss`.

    Args:
        student, teacher, x_0, generator, sampler: see there.
        config: discrete or continuous, and its settings.
        step: optimizer step, from 1.
    """
    start = noised_start(x_0, generator, sampler)
    given = student, teacher, start, sampler, config
    per_sample, end = _tangent(*given, step) if config.continuous else _difference(*given)
    per_sample = config.loss_scale * per_sample
    return LossResult(per_sample.mean(), per_sample.detach(), start.raw, sample_rms(end))


def _difference(
    student: Callable[[Tensor, Tensor], Policy],
    teacher: Callable[[Tensor, Tensor], Tensor],
    start: Start,
    sampler: SamplerConfig,
    config: ConsistencyConfig,
) -> tuple[Tensor, Tensor]:
    x, raw, _, raw_dst = start
    sigma = sampler.time_shift.warp
    end = _end(student(x, start.sigma(sampler)), x, raw, raw_dst, sampler)
    with torch.no_grad():
        after = (raw - config.step).maximum(raw_dst)
        moved = x + change(sampler, raw, after, x) * teacher(x, sigma(raw)).float()
        # With the student's own weights, and not an average of them, which only delays (Song and Dhariwal, 2310.14189).
        asked = sigma(after.clamp(min=LEAST_T)).to(x.device, non_blocking=True)
        later = student(moved, asked)
        target = _end(later, moved, after, raw_dst, sampler)
        # A state whose step ends its segment has nothing left to go: its end is where the step leads.
        target = torch.where(change(sampler, after, raw_dst, x) < 0, target, moved)
    squared = (end - target).square().flatten(1).mean(1)
    # The sum under the root is never 0, where a root has no gradient.
    distance = (squared + max(config.huber, 1e-6) ** 2).sqrt() - config.huber
    return distance, target


def _tangent(
    student: Callable[[Tensor, Tensor], Policy],
    teacher: Callable[[Tensor, Tensor], Tensor],
    start: Start,
    sampler: SamplerConfig,
    config: ConsistencyConfig,
    step: int,
) -> tuple[Tensor, Tensor]:
    x, raw, _, raw_dst = start
    mean = mean_velocity_to(student, raw_dst, sampler)
    with torch.no_grad():
        velocity = teacher(x, sampler.time_shift.warp(raw)).float()
    now = mean(x, raw)
    with torch.no_grad():
        to_go = change(sampler, raw, raw_dst, x)  # negative: σ falls
        derivative = total_derivative(mean, start, raw_dst, velocity, sampler)
        # The end F = x + (σ_dst − σ)·u moves by dF/dσ = v − u + (σ_dst − σ)·du/dσ, which is to become 0.
        moves = velocity - now + ramp(step, config.warmup_steps) * to_go * derivative
        target = now + moves / (per_sample_rms(moves) + config.tangent_offset)
        end = x + to_go * now
    return (now - target).square().flatten(1).mean(1), end


def _end(policy: Policy, x: Tensor, raw: Tensor, raw_dst: Tensor, sampler: SamplerConfig) -> Tensor:
    """Where the policy leads at the segment's end, with gradient."""
    return x + change(sampler, raw, raw_dst, x) * displacement(policy, x, raw, raw_dst, sampler)
