"""How a student's mean velocity changes along the teacher's trajectory, which continuous-time losses need."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from fewstep.distill.starts import Start, change
from fewstep.flow import SamplerConfig
from fewstep.policies.base import per_latent

DIFFERENCE = 5e-3
"""Raw time between the two states of which the difference is taken: a larger one is less exact, with a smaller one
float32's rounding shows."""


@torch.no_grad()
def total_derivative(
    mean: Callable[[Tensor, Tensor], Tensor],
    start: Start,
    raw_end: Tensor,
    velocity: Tensor,
    sampler: SamplerConfig,
) -> Tensor:
    """d/dσ of a mean velocity u(x, σ) along dx/dσ = v: ∂u/∂σ + v·∂u/∂x, (B, C, H, W), without gradient.

    It is a difference quotient of two evaluations of the network, half `DIFFERENCE` earlier and later, and not a
    Jacobian-vector product (`torch.func.jvp`): fused kernels, custom autograd functions and FSDP have no forward-mode
    derivatives. The two evaluations are as many operations as a product takes.

    Args:
        mean: from x (B, C, H, W) and raw times (B,) to u (B, C, H, W); the end of its average stays where it is.
        start: the states, and their segments.
        raw_end: where averages end, (B,).
        velocity: v at the states.
        sampler: the student's shift.
    """
    x, raw = start.x, start.raw
    # Within the segment: at its end already, the network is asked for the next one.
    earlier = (raw + DIFFERENCE / 2).minimum(start.raw_src)
    later = (raw - DIFFERENCE / 2).maximum((raw + raw_end) / 2)
    before, after = (mean(x + change(sampler, raw, time, x) * velocity, time) for time in (earlier, later))
    span = change(sampler, later, earlier, x)
    # Where a state is at the end already, nothing changes any more.
    return torch.where(span > 0, (before - after) / span.clamp(min=1e-8), torch.zeros_like(x))


def ramp(step: int, warmup_steps: int) -> float:
    """Share of the derivative in its target at an optimizer step (from 1): rises linearly to 1 over the warm-up."""
    return min(1.0, step / warmup_steps) if warmup_steps else 1.0


def per_sample_rms(x: Tensor) -> Tensor:
    """Root mean square of each sample, of a shape that broadcasts to it."""
    return per_latent(x.square().flatten(1).mean(1).sqrt(), x)
