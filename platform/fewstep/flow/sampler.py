"""Sampling: few network evaluations of a student, or many of a teacher."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Literal, NamedTuple

import torch
from torch import Tensor

from fewstep.flow.time import NO_SHIFT, Segments, TimeShift
from fewstep.policies import SUBSTEPS, Policy, rollout
from fewstep.policies.base import per_latent

Generators = torch.Generator | Sequence[torch.Generator] | None
"""One generator for a batch, one per sample, or torch's own."""


class NextStep(NamedTuple):
    """The step that each sample of a batch takes next; all fields are (B,) float32, on the CPU."""

    raw_src: Tensor
    """Raw time of the network evaluation."""
    raw_dst: Tensor
    """Raw time at which the policy's rollout ends."""
    sigma_src: Tensor
    """σ of the network evaluation."""
    sigma_to: Tensor
    """σ after re-noising."""
    renoise: Tensor
    """m: 1 keeps the rollout's noise, 0 replaces all of it."""
    temperature: Tensor
    """GM temperature of the policy."""
    raw_tempered: Tensor
    """Raw time from which on it has that temperature; above, the mixture is as it was predicted."""

    @classmethod
    def join(cls, steps: Sequence[NextStep]) -> NextStep:
        """Those of several batches as one; they may be steps of different schedules."""
        return cls(*map(torch.cat, zip(*steps, strict=True)))


@dataclass(frozen=True)
class SamplerSchedule:
    """Where each of `nfe` network evaluations starts and where its policy ends (METHOD.md section 2).

    A segment from σ_src to σ_to is walked by the policy to σ_dst ≤ σ_to, and re-noised back up to σ_to:

        m = (σ_to·α_src / (σ_src·α_to))^(h²)        σ_dst = σ_to·m / (α_to + σ_to·m)
        x ← (α_to + σ_to·m)·x_dst + σ_to·sqrt(1 − m²)·ε

    h = 0 is deterministic (m = 1, σ_dst = σ_to); h = ∞ goes to the data and re-noises in full (m = 0).
    All tables are (nfe,), float32, on the CPU, from noise to data.
    """

    nfe: int
    shift: TimeShift = NO_SHIFT
    final_step_scale: float = 1.0
    h: float = 0.0

    @cached_property
    def _tables(self) -> dict[str, Tensor]:
        raw = Segments(self.nfe, self.final_step_scale).boundaries
        sigma = self.shift.warp(raw)
        src, to = sigma[:-1], sigma[1:]
        renoise = (to * (1 - src) / (src * (1 - to))) ** self.h**2
        dst = to * renoise / (1 - to + to * renoise)
        return {
            "raw_src": raw[:-1].float(),
            "raw_dst": self.shift.unwarp(dst).float(),
            "sigma_src": src.float(),
            "sigma_dst": dst.float(),
            "sigma_to": to.float(),
            "renoise": renoise.float(),
        }

    @property
    def raw_src(self) -> Tensor:
        """Raw time of each network evaluation."""
        return self._tables["raw_src"]

    @property
    def raw_dst(self) -> Tensor:
        """Raw time at which each policy's rollout ends."""
        return self._tables["raw_dst"]

    @property
    def sigma_src(self) -> Tensor:
        """σ of each network evaluation."""
        return self._tables["sigma_src"]

    @property
    def sigma_dst(self) -> Tensor:
        """σ at which each policy's rollout ends."""
        return self._tables["sigma_dst"]

    @property
    def sigma_to(self) -> Tensor:
        """σ after re-noising: the next evaluation's, and 0 at the end."""
        return self._tables["sigma_to"]

    @property
    def renoise(self) -> Tensor:
        """m of each step: 1 keeps the rollout's noise, 0 replaces all of it."""
        return self._tables["renoise"]

    def next_step(
        self,
        index: int,
        batch: int = 1,
        *,
        temperature: float | Literal["auto"] = 1.0,
        final_temperature: float = 1.0,
        final_temperature_below: float = 1.0,
    ) -> NextStep:
        """Step `index` (from 0) for `batch` samples. Temperatures as for `generate`."""
        raw_tempered = 1.0
        if index == self.nfe - 1:
            temperature, raw_tempered = final_temperature, self.shift.unwarp(final_temperature_below)
        elif temperature == "auto":
            temperature = auto_temperature(self.nfe)
        tables = (self.raw_src, self.raw_dst, self.sigma_src, self.sigma_to, self.renoise)
        rows = [table[index].expand(batch) for table in tables]
        return NextStep(*rows, *(torch.full((batch,), float(value)) for value in (temperature, raw_tempered)))


def generate(
    policy_at: Callable[[Tensor, Tensor], Policy],
    x: Tensor,
    schedule: SamplerSchedule,
    *,
    temperature: float | Literal["auto"] = 1.0,
    final_temperature: float = 1.0,
    final_temperature_below: float = 1.0,
    substeps: int = SUBSTEPS,
    generator: Generators = None,
    on_step: Callable[[int, Tensor, Tensor], None] | None = None,
) -> Tensor:
    """Sample a student from noise: per segment one network evaluation, its policy's rollout, re-noise.

    Args:
        policy_at: the student, from x_src (B, C, H, W) and σ_src (B,) to a policy.
        x: noise at σ = 1, (B, C, H, W).
        schedule: the segments and how much noise is renewed between them.
        temperature: GM temperature of every step but the last; "auto" follows the number of steps.
        final_temperature: GM temperature of the last step. The paper's is 1; a student of one evaluation has no other
            step to sharpen.
        final_temperature_below: σ below which it acts. Sharpening serves details; what the whole is to be is decided
            above, where it would only take from the variety.
        substeps: substeps of the rollouts per unit of raw time.
        generator: source of the re-noise; one per sample makes a sample independent of its batch. Not
            drawn from where the schedule renews nothing (h = 0).
        on_step: called after each step with its index, the state and the policy's x̂_0 there, for previews.

    Returns:
        The clean latent, (B, C, H, W).
    """
    for i in range(schedule.nfe):
        step = schedule.next_step(
            i,
            len(x),
            temperature=temperature,
            final_temperature=final_temperature,
            final_temperature_below=final_temperature_below,
        )
        x, clean = generate_step(policy_at, x, step, schedule.shift, substeps=substeps, generator=generator)
        if on_step is not None:
            on_step(i, x, clean())
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
    """One step of `generate`, in which each sample may be on a schedule of its own, and anywhere on it.

    Args:
        policy_at: as for `generate`.
        x: the samples' states at the beginning of the step, (B, C, H, W).
        step: what each of them does.
        shift: that of all their schedules.
        substeps: as for `generate`.
        generator: as for `generate`.

    Returns:
        The next state (B, C, H, W), and a function that gives the policy's x̂_0 (B, C, H, W) at the end of its rollout.
    """
    sigma_src, temperature = (
        column.to(x.device, non_blocking=True) for column in (step.sigma_src, step.temperature)
    )
    policy, raw = policy_at(x, sigma_src), step.raw_src
    if (step.raw_tempered < raw).any():  # on the CPU: no accelerator is waited for
        tempered = step.raw_tempered.clamp(min=step.raw_dst).minimum(raw)
        x, _ = rollout(policy, x, raw, tempered, shift, substeps)
        raw = tempered
    policy = policy.with_temperature(temperature)
    x_dst, sigma_dst = rollout(policy, x, raw, step.raw_dst, shift, substeps)

    def clean() -> Tensor:
        return x_dst - per_latent(sigma_dst, x_dst) * policy.velocity(x_dst, sigma_dst)

    return _renoise(x_dst, step.sigma_to, step.renoise, generator), clean


def auto_temperature(nfe: int) -> float:
    """The GM temperature that suits a number of steps: clamp(0.1·(n − 1), 0, 1), 0.3 at 4 and 0.7 at 8."""
    return min(0.1 * (nfe - 1), 1.0)


def gaussian_noise(
    shape: Sequence[int], generator: Generators = None, device: torch.device | str = "cpu"
) -> Tensor:
    """Standard normal noise of shape (B, …), drawn on the generators' device and moved to `device`.

    With a sequence of B generators every sample has its own stream, whatever batch it is in.
    """
    if isinstance(generator, Sequence):
        draws = [torch.randn(shape[1:], generator=g, device=g.device).to(device) for g in generator]
        return torch.stack(draws)
    source = device if generator is None else generator.device
    return torch.randn(tuple(shape), generator=generator, device=source).to(device)


def _renoise(x_dst: Tensor, sigma_to: Tensor, m: Tensor, generator: Generators) -> Tensor:
    kept, fresh = 1 - sigma_to + sigma_to * m, sigma_to * (1 - m.square()).sqrt()
    x = per_latent(kept.to(x_dst.device, non_blocking=True), x_dst) * x_dst
    if not fresh.any():  # on the CPU: no accelerator is waited for
        return x
    noise = gaussian_noise(x.shape, generator, x.device)
    return x + per_latent(fresh.to(x.device, non_blocking=True), x) * noise


def euler(
    velocity: Callable[[Tensor, Tensor], Tensor], x: Tensor, steps: int, shift: TimeShift = NO_SHIFT
) -> Tensor:
    """A teacher's own sampler: explicit Euler over `steps` uniform steps of raw time.

    Args:
        velocity: the teacher, from x_t (B, C, H, W) and σ_t (B,) to dx/dσ.
        x: noise at σ = 1, (B, C, H, W).
        steps: number of network evaluations.
        shift: from raw time to σ.
    """
    for i in range(steps):
        x = euler_step(velocity, x, torch.full((len(x),), i), steps, shift)
    return x


def euler_step(
    velocity: Callable[[Tensor, Tensor], Tensor],
    x: Tensor,
    step: Tensor,
    steps: Tensor | int,
    shift: TimeShift = NO_SHIFT,
) -> Tensor:
    """One step of `euler`, in which each sample may be on a schedule of its own, and anywhere on it.

    Args:
        step: the samples' indices in their schedules, (B,) int64 on the CPU.
        steps: how many each of them takes, (B,) int64 on the CPU or one number.
    """
    sigma, after = (
        shift.warp(1 - i.double() / steps).float().to(x.device, non_blocking=True) for i in (step, step + 1)
    )
    return x + per_latent(after - sigma, x) * velocity(x, sigma)
