"""How far students and few-step solvers go from the teacher's trajectory on their way from noise to data.

A figure of the final image alone does not tell where an error arises: in the first steps, which decide what is drawn,
or in the last ones.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from fewstep.models.conditioning import Conditioning


def trajectory_errors(
    pipe: Any,
    noise: Tensor,
    conditioning: Conditioning,
    reference_steps: int,
    students: Sequence[int],
    baseline: Sequence[int],
) -> dict[str, list[tuple[float, float]]]:
    """Distances to the teacher's trajectory of many steps from the same noise, as mean squares over samples and cells.

    Between two of the teacher's states its trajectory is taken to be straight. A student that renews noise (h > 0)
    follows no trajectory, and is left out.

    Args:
        pipe: the student's pipeline.
        noise: x at σ = 1, (B, C, H, W).
        conditioning: of B samples, on the pipeline's device.
        reference_steps: the teacher's Euler steps.
        students: the student's numbers of evaluations.
        baseline: numbers of the teacher's Euler steps to compare with.

    Returns:
        Name of each method, such as "student_4" and "euler_8" → σ after each of its steps, and the distance there.
    """
    shape = noise.shape[1:]
    states: dict[str, list[tuple[float, Tensor]]] = {}
    for nfe in students:
        sampler = pipe.sampler_for((shape[0], shape[1], shape[2]), nfe=nfe)
        if sampler.h:
            continue
        own: list[tuple[float, Tensor]] = []
        ends = [float(sampler.next_step(index, 1).sigma_to[0]) for index in range(nfe)]
        pipe.sample(
            noise, conditioning, sampler,
            on_step=lambda index, x, _, own=own, ends=ends: own.append((ends[index], x)),
        )  # fmt: skip
        states[f"student_{nfe}"] = own
    for steps in baseline:
        states[f"euler_{steps}"] = list(pipe.teacher_trajectory(noise, conditioning, steps))[1:]

    asked = sorted({sigma for own in states.values() for sigma, _ in own}, reverse=True)
    there = _along(pipe.teacher_trajectory(noise, conditioning, reference_steps), asked)
    return {
        name: [(sigma, float((x - there[sigma]).square().mean())) for sigma, x in own]
        for name, own in states.items()
    }


def _along(trajectory: Any, asked: Sequence[float]) -> dict[float, Tensor]:
    """The states of a trajectory at some σ, which fall, between its own ones; kept only where they are asked for."""
    found: dict[float, Tensor] = {}
    left, (before, x) = list(asked), next(trajectory)
    for after, y in trajectory:
        while left and left[0] >= after - 1e-6:
            share = min(1.0, (before - left[0]) / (before - after))
            found[left.pop(0)] = torch.lerp(x, y, share)
        before, x = after, y
    return found
