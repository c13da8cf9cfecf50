"""Flow matching, with which a teacher is trained: on data, or on the velocity of another teacher."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from fewstep.distill.result import BatchGenerators, LossResult, draw_noise, draw_times
from fewstep.flow import NO_SHIFT, TimeShift


def flow_matching_loss(
    velocity: Callable[[Tensor, Tensor], Tensor],
    x_0: Tensor,
    generator: BatchGenerators,
    shift: TimeShift = NO_SHIFT,
    teacher: Callable[[Tensor, Tensor], Tensor] | None = None,
) -> LossResult:
    """Regress the velocity u(x_t, t) on ε − x_0 at x_t = (1 − t)·x_0 + t·ε; t is a uniform raw time, shifted.

    Args:
        velocity: the network, from x_t (B, C, H, W) and t (B,) to a velocity.
        x_0: clean latents, (B, C, H, W).
        generator: source of times and noise.
        shift: from raw time to t.
        teacher: the velocity to regress on instead of ε − x_0, such as another network's guided one (Meng et al. 2023,
            arXiv 2210.03142, equation 1); called without autograd.

    Returns:
        The mean squared error.
    """
    raw_t = draw_times(len(x_0), generator)
    t = shift.warp(raw_t).to(x_0.device)
    # All random numbers on the generator's device, so that a seed gives the same ones on every device.
    noise = draw_noise(x_0, generator)
    x_t = torch.lerp(x_0, noise, t.view(-1, *[1] * (x_0.ndim - 1)))
    with torch.no_grad():
        target = noise - x_0 if teacher is None else teacher(x_t, t).float()
    error = velocity(x_t, t).float() - target  # in float32: networks may answer in bfloat16
    per_sample = error.square().flatten(1).mean(1)
    return LossResult(per_sample.mean(), per_sample.detach(), raw_t)
