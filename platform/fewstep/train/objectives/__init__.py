"""Objectives, what a training run optimises: a few-step student, or the velocity of a teacher; with one interface."""

from __future__ import annotations

import torch

from fewstep.models.conditioning import Conditioning
from fewstep.train.objectives.alternatives import (
    ConsistencyDistillation,
    DistributionMatching,
    MeanFlowDistillation,
    RegressionDistillation,
)
from fewstep.train.objectives.distillation import Distillation
from fewstep.train.objectives.interface import Objective
from fewstep.train.objectives.teachers import FlowMatching, GuidanceDistillation
from fewstep.train.recipe import DistillRecipe, TeacherRecipe

__all__ = [
    "ConsistencyDistillation",
    "Distillation",
    "DistributionMatching",
    "FlowMatching",
    "GuidanceDistillation",
    "MeanFlowDistillation",
    "Objective",
    "RegressionDistillation",
    "build_objective",
]

DISTILLATIONS = {
    "imitation": Distillation,
    "consistency": ConsistencyDistillation,
    "dmd2": DistributionMatching,
    "meanflow": MeanFlowDistillation,
    "regression": RegressionDistillation,
}
"""A recipe's `objective` → the class."""


def build_objective(
    recipe: DistillRecipe | TeacherRecipe,
    null: Conditioning,
    device: torch.device,
    sharded: bool = False,
) -> Objective:
    """The objective of a recipe; arguments as for `Distillation`."""
    if isinstance(recipe, DistillRecipe):
        return DISTILLATIONS[recipe.objective](recipe, null, device, sharded)
    kind = FlowMatching if recipe.guidance_distillation.teacher is None else GuidanceDistillation
    return kind(recipe, null, device)
