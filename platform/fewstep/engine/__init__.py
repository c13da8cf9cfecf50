"""Generation as a service needs it, without HTTP: models by name, and batches of whatever may share one."""

from fewstep.engine.batcher import DynamicBatcher, Overloaded
from fewstep.engine.engine import BatchReport, Engine, GeneratedImage, ImageTask, Preview, Stages
from fewstep.engine.models import LoadedModel, ModelSource, ModelStore, UnknownModel

__all__ = [
    "BatchReport",
    "DynamicBatcher",
    "Engine",
    "GeneratedImage",
    "ImageTask",
    "LoadedModel",
    "ModelSource",
    "ModelStore",
    "Overloaded",
    "Preview",
    "Stages",
    "UnknownModel",
]
