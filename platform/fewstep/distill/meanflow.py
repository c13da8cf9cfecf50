"""MeanFlow distillation: a student's mean velocity over any interval satisfies the MeanFlow identity.

With v the teacher's velocity at x_t and u the student's mean velocity from t to r, u = v + (σ_r − σ_t)·du/dσ along the
teacher's trajectory (Geng et al., arXiv 2505.13447, with a teacher in place of the data's velocity). There the network
is told r as a second time. Here its policy gives the mean velocity to every r of its segment, so that any network can
be distilled; DX with several points and GMFlow can represent one that changes with r, DX with one point can't.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from pydantic import Field
from torch import Tensor

from fewstep.config import Config
from fewstep.distill.result import BatchGenerators, LossResult, sample_rms
from fewstep.distill.starts import change, mean_velocity_to, noised_start
from fewstep.distill.tangent import ramp, total_derivative
from fewstep.draws import uniform
from fewstep.flow import SamplerConfig
from fewstep.policies import Policy


class MeanFlowConfig(Config):
    """Settings of MeanFlow distillation. The student's segments are settings of `SamplerConfig`."""

    whole_segments: float = Field(0.5, ge=0, le=1)
    """Share of samples whose interval ends with their segment, as in sampling; others end before, uniformly."""
    power: float = Field(1.0, ge=0)
    """p of the weight 1 / (d² + c)^p of a sample with mean squared error d²; 0 weighs all alike."""
    offset: float = Field(1e-3, gt=0)
    """c of that weight."""
    warmup_steps: int = Field(0, ge=0)
    """Optimizer steps over which the derivative's share of the target rises to 1."""
    loss_scale: float = Field(1.0, gt=0)
    """Factor on the loss."""


def meanflow_loss(
    student: Callable[[Tensor, Tensor], Policy],
    teacher: Callable[[Tensor, Tensor], Tensor],
    x_0: Tensor,
    generator: BatchGenerators,
    sampler: SamplerConfig,
    config: MeanFlowConfig,
    step: int,
) -> LossResult:
    """One state per sample, noised data, and one interval that begins there; arguments as for `consistency_loss`."""
    start = noised_start(x_0, generator, sampler)
    x, raw = start.x, start.raw
    draw = uniform((len(x), 2), generator, raw.device)
    share = torch.where(draw[:, 0] < config.whole_segments, torch.ones_like(raw), draw[:, 1])
    raw_end = raw + share * (start.raw_dst - raw)
    mean = mean_velocity_to(student, raw_end, sampler)
    with torch.no_grad():
        velocity = teacher(x, sampler.time_shift.warp(raw)).float()
        derivative = total_derivative(mean, start, raw_end, velocity, sampler)
        to_go = change(sampler, raw, raw_end, x)
        target = velocity + ramp(step, config.warmup_steps) * to_go * derivative
    now = mean(x, raw)
    squared = (now - target).square().flatten(1).mean(1)
    weighted = squared / (squared.detach() + config.offset) ** config.power
    per_sample = config.loss_scale * weighted
    return LossResult(per_sample.mean(), per_sample.detach(), raw, sample_rms(x + to_go * now.detach()))
