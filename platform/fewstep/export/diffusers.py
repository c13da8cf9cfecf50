"""See `fewstep.student.diffusers`; folders that were exported before fewstep 0.2 name these classes."""

from fewstep.student.diffusers import (
    Flux2FewStepPipeline,
    FluxFewStepPipeline,
    QwenImageFewStepPipeline,
    TransformerOnTeacher,
)
from fewstep.student.diffusers import StudentHead as PolicyHead

__all__ = [
    "Flux2FewStepPipeline",
    "FluxFewStepPipeline",
    "PolicyHead",
    "QwenImageFewStepPipeline",
    "TransformerOnTeacher",
]
