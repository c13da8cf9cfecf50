"""Families by name."""

from __future__ import annotations

import difflib

from fewstep.errors import UserError
from fewstep.models.dit import DiT
from fewstep.models.family import Family
from fewstep.models.flux import Flux
from fewstep.models.flux2 import Flux2
from fewstep.models.qwen_image import QwenImage
from fewstep.models.unet import UNet

_FAMILIES: dict[str, Family] = {}


def register(family: Family) -> None:
    """Make a family known under its `name`, for recipes and exported students."""
    _FAMILIES[family.name] = family


def registered() -> dict[str, Family]:
    """All known families by name."""
    return dict(_FAMILIES)


def get_family(name: str) -> Family:
    """The family registered under `name`.

    Raises:
        UserError: there is none.
    """
    if name not in _FAMILIES:
        near = difflib.get_close_matches(name, _FAMILIES, 1)
        hint = f"did you mean {near[0]!r}?" if near else f"known are {', '.join(sorted(_FAMILIES))}; "
        hint += "" if near else "a family of your own comes from the file that teacher.module names."
        raise UserError(f"teacher.family: there is no family {name!r}; {hint}")
    return _FAMILIES[name]


register(DiT())
register(QwenImage())
register(Flux())
register(Flux2())
register(UNet())
