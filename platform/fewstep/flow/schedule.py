"""The times at which a student's network is evaluated and its policies' rollouts end (METHOD.md section 2)."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import NamedTuple

import torch
from torch import Tensor

from fewstep.flow.time import NO_SHIFT, Segments, TimeShift


class NextStep(NamedTuple):
    """The step that each sample of a batch takes next; all fields are (B,) float32, on the CPU.

    A step is one network evaluation, its policy's rollout, and the re-noising after it.
    """

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
    """Raw time at and below which the policy has that temperature; above, the mixture is as predicted."""

    @classmethod
    def join(cls, steps: Sequence[NextStep]) -> NextStep:
        """The steps of several batches, concatenated into one batch; they may belong to different schedules."""
        # Field by field: a NamedTuple is a tuple of its columns.
        return cls(*map(torch.cat, zip(*steps, strict=True)))


@dataclass(frozen=True)
class SamplerSchedule:
    """The times of a sampler's `nfe` steps (METHOD.md section 2).

    In a segment from σ_src to σ_to, the policy's rollout goes down to σ_dst ≤ σ_to, and new noise brings the state back
    up to σ_to:

        m = (σ_to·α_src / (σ_src·α_to))^(h²)        σ_dst = σ_to·m / (α_to + σ_to·m)
        x ← (α_to + σ_to·m)·x_dst + σ_to·sqrt(1 − m²)·ε

    h = 0 is deterministic (m = 1, σ_dst = σ_to); h = ∞ goes down to the data and replaces all noise (m = 0).
    All properties are (nfe,), float32, on the CPU, from noise to data.

    Attributes:
        nfe: number of network evaluations.
        shift: from raw time to σ.
        final_step_scale: size of the last segment relative to the others.
        h: how much noise is renewed between segments.
    """

    nfe: int
    shift: TimeShift = NO_SHIFT
    final_step_scale: float = 1.0
    h: float = 0.0

    @cached_property
    def _tables(self) -> dict[str, Tensor]:
        # In float64: m is a quotient of products that are small at both ends, σ at the data and α at the noise.
        raw = Segments(self.nfe, self.final_step_scale).boundaries
        sigma = self.shift.warp(raw)  # (nfe + 1,), from 1 to 0
        src, to = sigma[:-1], sigma[1:]
        # At the first step α_src = 0 and at the last σ_to = 0: the base is 0 there, and 0^0 = 1 where h = 0.
        renoise = (to * (1 - src) / (src * (1 - to))) ** (self.h * self.h)
        # With less noise than σ_to, so that adding ε brings the state to σ_to exactly.
        dst = to * renoise / (1 - to + to * renoise)
        # float32 from here on, as the networks and rollouts that read them.
        return {
            "raw_src": raw[:-1].float(),
            # Below `to` where h > 0, so no boundary of a segment.
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
        """σ after re-noising: that of the next evaluation, and 0 after the last."""
        return self._tables["sigma_to"]

    @property
    def renoise(self) -> Tensor:
        """m of each step: 1 keeps the rollout's noise, 0 replaces all of it."""
        return self._tables["renoise"]
