"""Losses that students and teachers are trained with, and the average of trained weights. Plain torch."""

from fewstep.distill.ema import PowerEMA
from fewstep.distill.flow_matching import flow_matching_loss
from fewstep.distill.imitation import (
    ImitationConfig,
    imitation_loss,
    imitation_walk,
    segment_errors,
    teacher_ratio,
)
from fewstep.distill.result import BatchGenerators, LossResult

__all__ = [
    "BatchGenerators",
    "ImitationConfig",
    "LossResult",
    "PowerEMA",
    "flow_matching_loss",
    "imitation_loss",
    "imitation_walk",
    "segment_errors",
    "teacher_ratio",
]
