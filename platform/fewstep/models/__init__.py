"""Teachers and students: families of networks, policy heads, and how to add a family of one's own."""

from fewstep.models.own import ModuleFamily
from fewstep.models.registry import get_family, register

__all__ = ["ModuleFamily", "get_family", "register"]
