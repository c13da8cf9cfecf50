"""Losses that students and teachers are trained with, and the average of trained weights. Plain torch."""

from fewstep.distill.consistency import ConsistencyConfig, consistency_loss
from fewstep.distill.dmd2 import DMD2Config, critic_loss, matching_loss, student_images
from fewstep.distill.ema import PowerEMA
from fewstep.distill.flow_matching import flow_matching_loss
from fewstep.distill.imitation import (
    ImitationConfig,
    imitation_loss,
    imitation_walk,
    segment_errors,
    teacher_ratio,
)
from fewstep.distill.meanflow import MeanFlowConfig, meanflow_loss
from fewstep.distill.regression import RegressionConfig, regression_loss, regression_walk
from fewstep.distill.result import BatchGenerators, LossResult, sample_rms

__all__ = [
    "BatchGenerators",
    "ConsistencyConfig",
    "DMD2Config",
    "ImitationConfig",
    "LossResult",
    "MeanFlowConfig",
    "PowerEMA",
    "RegressionConfig",
    "consistency_loss",
    "critic_loss",
    "flow_matching_loss",
    "imitation_loss",
    "imitation_walk",
    "matching_loss",
    "meanflow_loss",
    "regression_loss",
    "regression_walk",
    "sample_rms",
    "segment_errors",
    "student_images",
    "teacher_ratio",
]
