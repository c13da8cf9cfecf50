"""Distillation: what a student learns from a teacher. Pure torch."""

from fewstep.distill.ema import PowerEMA
from fewstep.distill.flow_matching import flow_matching_loss
from fewstep.distill.imitation import (
    ImitationSettings,
    imitation_loss,
    imitation_walk,
    segment_errors,
    teacher_ratio,
)
from fewstep.distill.protocols import Student, Teacher
from fewstep.distill.result import LossResult

__all__ = [
    "ImitationSettings",
    "LossResult",
    "PowerEMA",
    "Student",
    "Teacher",
    "flow_matching_loss",
    "imitation_loss",
    "imitation_walk",
    "segment_errors",
    "teacher_ratio",
]
