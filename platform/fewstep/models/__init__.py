"""Teachers and students: families of networks, policy heads, and the registration of further families."""

from fewstep.models.conditioning import ClassConditioning, Conditioning, TextConditioning
from fewstep.models.module_family import ModuleFamily
from fewstep.models.projection import time_features
from fewstep.models.registry import get_family, register

__all__ = [
    "ClassConditioning",
    "Conditioning",
    "ModuleFamily",
    "TextConditioning",
    "get_family",
    "register",
    "time_features",
]
