"""Time, guidance and sampling of flow models. Pure torch."""

from fewstep.flow.guidance import GuidanceInterval, guided_velocity
from fewstep.flow.sampler import (
    Generators,
    NextStep,
    SamplerSchedule,
    auto_temperature,
    euler,
    euler_step,
    gaussian_noise,
    generate,
    generate_step,
)
from fewstep.flow.time import NO_SHIFT, TEXT_TO_IMAGE_SHIFT, Segments, TimeShift

__all__ = [
    "NO_SHIFT",
    "TEXT_TO_IMAGE_SHIFT",
    "Generators",
    "GuidanceInterval",
    "NextStep",
    "SamplerSchedule",
    "Segments",
    "TimeShift",
    "auto_temperature",
    "euler",
    "euler_step",
    "gaussian_noise",
    "generate",
    "generate_step",
    "guided_velocity",
]
