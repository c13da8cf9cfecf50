"""The times at which a teacher's own pipeline samples it, computed by diffusers' scheduler."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from functools import lru_cache
from typing import Any

import numpy as np
import torch
from torch import Tensor

from fewstep.flow import StepSchedule, TimeShift
from fewstep.models.family import Family

SCHEDULER_CLASS = "FlowMatchEulerDiscreteScheduler"
"""diffusers' scheduler of the pipelines whose sampler is Euler's."""


def samples_by_euler(scheduler: Mapping[str, Any] | None) -> bool:
    """Whether a scheduler's configuration is that of Euler steps over a flow."""
    return scheduler is not None and scheduler.get("_class_name") == SCHEDULER_CLASS


@dataclass(frozen=True, eq=False)
class OwnSchedule:
    """The schedule of a teacher's own pipeline for images of one size.

    Attributes:
        scheduler: configuration of its diffusers scheduler, for which `samples_by_euler` holds.
        family: of the teacher; knows how its pipeline calls the scheduler.
        tokens: image tokens, on which the shift may depend.
    """

    scheduler: Mapping[str, Any]
    family: Family
    tokens: int

    def __post_init__(self) -> None:
        object.__setattr__(self, "sigmas", lru_cache(self.sigmas))  # sampling asks at each step

    def sigmas(self, steps: int) -> Tensor:
        """σ before each of `steps` steps and after the last, (steps + 1,) float32, falling to 0."""
        if steps == 1:
            # A schedule stretched to end at a terminal σ is undefined for one step, which goes from noise to data.
            return torch.tensor([1.0, 0.0])
        from diffusers import FlowMatchEulerDiscreteScheduler

        scheduler: Any = FlowMatchEulerDiscreteScheduler.from_config(dict(self.scheduler))
        own = self.family.passes_sigmas and not self.scheduler.get("use_flow_sigmas")
        shift = {}
        if scheduler.config.use_dynamic_shifting:
            shift["mu"] = self.family.schedule_mu(self.scheduler, self.tokens, steps)
        if own:
            scheduler.set_timesteps(sigmas=np.linspace(1.0, 1 / steps, steps), **shift)
        else:
            scheduler.set_timesteps(steps, **shift)
        return scheduler.sigmas


def teacher_schedule(
    shift: float | None,
    scheduler: Mapping[str, Any] | None,
    family: Family,
    tokens: int,
    otherwise: StepSchedule,
) -> StepSchedule:
    """The schedule of a teacher's own sampler: that of its shift, or else of its scheduler.

    Args:
        shift: time shift of the teacher's own, if it has one.
        scheduler: configuration of its diffusers scheduler, if it has one.
        family: of the teacher.
        tokens: image tokens.
        otherwise: where neither says when to sample.
    """
    if shift is not None:
        return TimeShift(shift)
    if scheduler is not None and samples_by_euler(scheduler):
        return OwnSchedule(scheduler, family, tokens)
    return otherwise
