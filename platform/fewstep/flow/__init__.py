"""Time, guidance and sampling of flow models, in plain torch."""

from fewstep.draws import Generators, SampleGenerators, gaussian_noise
from fewstep.flow.guidance import (
    GuidanceInterval,
    Renorm,
    TeacherSamplerConfig,
    guided_velocity,
    renormalised,
)
from fewstep.flow.sampler import (
    StepSchedule,
    euler,
    euler_step,
    generate,
    generate_step,
)
from fewstep.flow.sampler_config import MAX_NFE, SamplerConfig, auto_temperature
from fewstep.flow.schedule import NextStep, SamplerSchedule
from fewstep.flow.time import NO_SHIFT, TEXT_TO_IMAGE_SHIFT, Segments, TimeShift

__all__ = [
    "MAX_NFE",
    "NO_SHIFT",
    "TEXT_TO_IMAGE_SHIFT",
    "Generators",
    "GuidanceInterval",
    "NextStep",
    "Renorm",
    "SampleGenerators",
    "SamplerConfig",
    "SamplerSchedule",
    "Segments",
    "StepSchedule",
    "TeacherSamplerConfig",
    "TimeShift",
    "auto_temperature",
    "euler",
    "euler_step",
    "gaussian_noise",
    "generate",
    "generate_step",
    "guided_velocity",
    "renormalised",
]
