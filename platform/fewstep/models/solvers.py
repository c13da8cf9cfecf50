"""Solvers of higher order for a teacher's ODE, by diffusers' schedulers: what a student is compared with."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, Literal, get_args

import torch
from torch import Tensor

from fewstep.errors import UserError
from fewstep.flow import StepSchedule, euler

Solver = Literal["euler", "heun", "dpmpp", "unipc"]
SOLVERS: tuple[Solver, ...] = get_args(Solver)
"""Explicit Euler steps, Heun's method, DPM-Solver++ (2M) and UniPC (order 2)."""

MOST_NOISE = 1 - 1e-4
"""Largest σ that multistep solvers are told: they compute in log((1 − σ)/σ), which noise alone has no value of."""

UNITS = 1000
"""Timesteps of diffusers' schedulers per unit of σ."""


def evaluations_of(solver: Solver, steps: int) -> int:
    """Network evaluations nearest to `steps`, and not above, that the solver can take."""
    # Heun's method takes two per step, but for the last, which ends at σ = 0, where there is nothing to evaluate.
    return steps - 1 if solver == "heun" and steps % 2 == 0 else steps


def solve(
    solver: Solver,
    velocity: Callable[[Tensor, Tensor], Tensor],
    noise: Tensor,
    evaluations: int,
    schedule: StepSchedule,
) -> Tensor:
    """Follow a teacher from noise to data.

    Args:
        solver: one of `SOLVERS`.
        velocity: the teacher, from x_t (B, C, H, W) and σ_t (B,) to dx/dσ.
        noise: x at σ = 1, (B, C, H, W).
        evaluations: of the velocity; for "heun" an odd number.
        schedule: the times of steps.

    Returns:
        The clean latent, (B, C, H, W).

    Raises:
        UserError: an even number for "heun".
    """
    if solver == "euler":
        return euler(velocity, noise, evaluations, schedule)
    if solver == "heun" and evaluations % 2 == 0:
        raise UserError(f"solver heun takes an odd number of evaluations, not {evaluations}: give one less.")
    scheduler = _scheduler(
        solver, schedule.sigmas((evaluations + 1) // 2 if solver == "heun" else evaluations)
    )
    x = noise
    for index, time in enumerate(scheduler.timesteps):
        # The network is told the time that is meant, and not the one that the solver can compute with.
        sigma = (time / UNITS if index else torch.ones(())).expand(len(x)).to(torch.float32)
        x = scheduler.step(velocity(x, sigma), time, x, return_dict=False)[0]
    return x


def _scheduler(solver: Solver, sigmas: Tensor) -> Any:
    """A scheduler of diffusers that steps through these σ, (steps + 1,), the last of them 0."""
    import diffusers

    steps = len(sigmas) - 1
    if solver == "heun":
        scheduler: Any = diffusers.FlowMatchHeunDiscreteScheduler(num_train_timesteps=UNITS)
        scheduler.set_timesteps(steps)
        # Each σ but the first and last twice: where a step ends, and where the next begins.
        scheduler.sigmas = torch.cat([sigmas[:1], sigmas[1:-1].repeat_interleave(2), sigmas[-1:]])
        scheduler.timesteps = scheduler.sigmas[:-1] * UNITS
        return scheduler
    settings = {
        "num_train_timesteps": UNITS, "solver_order": 2, "prediction_type": "flow_prediction", "use_flow_sigmas": True,
        "final_sigmas_type": "zero",
    }  # fmt: skip
    kind = {"dpmpp": diffusers.DPMSolverMultistepScheduler, "unipc": diffusers.UniPCMultistepScheduler}[
        solver
    ]
    scheduler = kind(**settings)
    scheduler.set_timesteps(steps)
    # The schedule's own times in place of the scheduler's: then solvers differ in nothing else.
    scheduler.sigmas = torch.cat([sigmas[:1].clamp(max=MOST_NOISE), sigmas[1:]])
    scheduler.timesteps = scheduler.sigmas[:-1] * UNITS
    return scheduler
