"""Old import path of these names, for family files from before fewstep 0.2; students carry copies of such files."""

from fewstep.models.module_family import ModuleFamily
from fewstep.models.projection import time_features

__all__ = ["ModuleFamily", "time_features"]
