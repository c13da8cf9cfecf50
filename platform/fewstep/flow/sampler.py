"""Sampling: a student in a few network evaluations, or a teacher by Euler steps."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, Protocol

import torch
from torch import Tensor

from fewstep.draws import Generators, gaussian_noise
from fewstep.flow.sampler_config import SamplerConfig
from fewstep.flow.schedule import NextStep, SamplerSchedule
from fewstep.flow.time import NO_SHIFT, TimeShift
from fewstep.policies import SUBSTEPS, Policy, rollout
from fewstep.policies.base import per_latent


def generate(
    policy_at: Callable[[Tensor, Tensor], Policy],
    x: Tensor,
    sampler: SamplerConfig | SamplerSchedule,
    *,
    generator: Generators = None,
    on_step: Callable[[int, Tensor, Tensor], None] | None = None,
    **settings: Any,
) -> Tensor:
    """Sample a student from noise: per segment one network evaluation, its policy's rollout, and re-noising.

    METHOD.md section 2 has the equations.

    Args:
        policy_at: the student, from x_src (B, C, H, W) and σ_src (B,) to a policy.
        x: noise at σ = 1, (B, C, H, W).
        sampler: segments, temperatures, and how much noise is renewed between segments; or a schedule alone.
        generator: source of the new noise; one per sample makes a sample independent of its batch. Not used
            where no noise is renewed (h = 0).
        on_step: called after each evaluation with its index, the state and the policy's x̂_0 there, for previews.
        settings: single fields of `SamplerConfig` that replace those of `sampler`.

    Returns:
        The clean latent, (B, C, H, W).
    """
    config = _as_config(sampler, settings)
    # The final temperature, and where it begins to act, are part of the last step: `next_step` has them.
    for index in range(config.nfe):
        step = config.next_step(index, len(x))
        x, clean = generate_step(
            policy_at, x, step, config.time_shift, substeps=config.substeps, generator=generator
        )
        if on_step is not None:  # without previews, x̂_0 is not computed
            on_step(index, x, clean())
    return x


def generate_step(
    policy_at: Callable[[Tensor, Tensor], Policy],
    x: Tensor,
    step: NextStep,
    shift: TimeShift,
    *,
    substeps: int = SUBSTEPS,
    generator: Generators = None,
) -> tuple[Tensor, Callable[[], Tensor]]:
    """One step of `generate`; each sample of the batch may follow a schedule of its own, and be at any step of it.

    Args:
        policy_at: as for `generate`.
        x: the samples' states at the beginning of the step, (B, C, H, W).
        step: the step of each sample.
        shift: from raw time to σ, the same for all of them.
        substeps: policy substeps per unit of raw time.
        generator: as for `generate`.

    Returns:
        The next state (B, C, H, W), and a function that gives the policy's x̂_0 (B, C, H, W) at the end of its rollout.
    """
    sigma_src, temperature = (
        column.to(x.device, non_blocking=True) for column in (step.sigma_src, step.temperature)
    )
    policy, raw = policy_at(x, sigma_src), step.raw_src
    # `step` is on the CPU, so that reading it does not wait for an accelerator.
    if (step.raw_tempered < raw).any():
        # Above raw_tempered the policy is followed without temperature. Clamped to the rollout, so that a sample whose
        # temperature acts throughout, or never, makes one of the two rollouts over no time.
        tempered = step.raw_tempered.clamp(min=step.raw_dst).minimum(raw)
        x, _ = rollout(policy, x, raw, tempered, shift, substeps)
        raw = tempered
    policy = policy.with_temperature(temperature)  # per sample, 1 where none is asked for
    x_dst, sigma_dst = rollout(policy, x, raw, step.raw_dst, shift, substeps)

    def clean() -> Tensor:
        # A function, because only previews need it, and it costs one more policy query.
        return x_dst - per_latent(sigma_dst, x_dst) * policy.velocity(x_dst, sigma_dst)

    return _renoise(x_dst, step.sigma_to, step.renoise, generator), clean


class StepSchedule(Protocol):
    """The times of an Euler sampler's steps: a `TimeShift`, or a teacher's own schedule."""

    def sigmas(self, steps: int) -> Tensor:
        """σ before each of `steps` steps and after the last, (steps + 1,) float32 on the CPU, falling to 0."""
        ...


def euler(
    velocity: Callable[[Tensor, Tensor], Tensor], x: Tensor, steps: int, schedule: StepSchedule = NO_SHIFT
) -> Tensor:
    """A teacher's own sampler: explicit Euler steps.

    Args:
        velocity: the teacher, from x_t (B, C, H, W) and σ_t (B,) to dx/dσ.
        x: noise at σ = 1, (B, C, H, W).
        steps: number of velocity queries.
        schedule: their times; uniform in raw time for a `TimeShift`.

    Returns:
        The clean latent, (B, C, H, W).
    """
    # The steps' indices stay on the CPU: `euler_step` looks times up there.
    for i in range(steps):
        x = euler_step(velocity, x, torch.full((len(x),), i), steps, schedule)
    return x


def euler_step(
    velocity: Callable[[Tensor, Tensor], Tensor],
    x: Tensor,
    step: Tensor,
    steps: Tensor | int,
    schedule: StepSchedule = NO_SHIFT,
) -> Tensor:
    """One step of `euler`; each sample of the batch may have its own number of steps, and be at any of them.

    Args:
        velocity: as for `euler`.
        x: the samples' states, (B, C, H, W).
        step: index of each sample's step, from 0, (B,) int64 on the CPU.
        steps: number of steps of each sample, (B,) int64 on the CPU, or one number for all.
        schedule: the times of the steps.

    Returns:
        The states after the step, (B, C, H, W).
    """
    counts = [steps] * len(x) if isinstance(steps, int) else steps.tolist()
    tables = {count: schedule.sigmas(count) for count in set(counts)}
    pairs = [tables[count][index : index + 2] for count, index in zip(counts, step.tolist(), strict=True)]
    # (B,) each: the samples' times now, and after the step
    sigma, after = (column.to(x.device, non_blocking=True) for column in torch.stack(pairs, 1))
    return x + per_latent(after - sigma, x) * velocity(x, sigma)  # after < σ


def _as_config(sampler: SamplerConfig | SamplerSchedule, settings: dict[str, Any]) -> SamplerConfig:
    """`sampler` with `settings` in place of its own fields; a schedule becomes the settings that make it."""
    if isinstance(sampler, SamplerSchedule):
        tables = {"nfe": sampler.nfe, "shift": sampler.shift.m, "h": sampler.h}
        return SamplerConfig(**tables, final_step_scale=sampler.final_step_scale, **settings)
    return SamplerConfig(**(sampler.model_dump() | settings)) if settings else sampler


def _renoise(x_dst: Tensor, sigma_to: Tensor, m: Tensor, generator: Generators) -> Tensor:
    """x ← (α_to + σ_to·m)·x_dst + σ_to·sqrt(1 − m²)·ε (METHOD.md section 2).

    `sigma_to` and `m` are (B,), on the CPU.
    """
    kept, fresh = 1 - sigma_to + sigma_to * m, sigma_to * (1 - m.square()).sqrt()
    x = per_latent(kept.to(x_dst.device, non_blocking=True), x_dst) * x_dst
    # Read on the CPU, without waiting for an accelerator. Where no sample renews noise (h = 0), none is drawn.
    if not fresh.any():
        return x
    noise = gaussian_noise(x.shape, generator, x.device)
    return x + per_latent(fresh.to(x.device, non_blocking=True), x) * noise
