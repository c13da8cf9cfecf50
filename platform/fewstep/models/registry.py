"""The registry of families by name."""

from __future__ import annotations

import difflib
import inspect

from fewstep.errors import UserError
from fewstep.models.dit import DiT
from fewstep.models.family import Family
from fewstep.models.flux import Flux
from fewstep.models.flux2 import Flux2
from fewstep.models.krea2 import Krea2
from fewstep.models.longcat_image import LongCatImage
from fewstep.models.qwen_image import QwenImage
from fewstep.models.qwen_image21 import QwenImage21
from fewstep.models.sd3 import SD3
from fewstep.models.unet import UNet
from fewstep.models.wan import Wan
from fewstep.models.z_image import ZImage

_FAMILIES: dict[str, Family] = {}


def register(family: Family) -> None:
    """Make a family available under its `name`, to recipes and exported students; replaces one of the same name.

    Raises:
        UserError: it is no instance of a class derived from `Family`, or its `denoise` takes no guidance scale.
    """
    if not isinstance(family, Family):
        raise UserError(f"register takes an instance of a class derived from Family, got {family!r}.")
    # Files from before fewstep 0.2 may have one without it; here, because the call would only fail in training.
    if "guidance_scale" not in inspect.signature(family.denoise).parameters:
        raise UserError(
            f"family {family.name!r}: its denoise must take a last argument guidance_scale=None since fewstep 0.2."
        )
    _FAMILIES[family.name] = family


def registered() -> dict[str, Family]:
    """All known families by name."""
    return dict(_FAMILIES)


def get_family(name: str) -> Family:
    """The family registered under `name`.

    Args:
        name: of the family; of videos with their number of latent frames, `wan:21`.

    Raises:
        UserError: there is no such family, or it is one of images and was asked for frames.
    """
    base, colon, frames = name.partition(":")
    if colon and name not in _FAMILIES:
        if not (frames.isascii() and frames.isdigit() and int(frames)):
            raise UserError(
                f"teacher.family: in {name!r}, {frames!r} is no number of latent frames: give one from 1 on, as in "
                "wan:21."
            )
        return get_family(base).of_frames(int(frames))
    if name not in _FAMILIES:
        # A suggestion if a name is close; otherwise all names.
        near = difflib.get_close_matches(name, _FAMILIES, 1)
        hint = f"did you mean {near[0]!r}?" if near else f"known are {', '.join(sorted(_FAMILIES))}; "
        hint += "" if near else "a family of your own comes from the file that teacher.module names."
        raise UserError(f"teacher.family: there is no family {name!r}; {hint}")
    return _FAMILIES[name]


def base_name(family: str) -> str:
    """Name of a family without a number of frames."""
    return family if family in _FAMILIES else family.partition(":")[0]


# fewstep's own families, in the same way as a user's.
register(DiT())
register(QwenImage())
register(QwenImage21())
register(Flux())
register(Flux2())
register(LongCatImage())
register(UNet())
register(ZImage())
register(SD3())
register(Krea2())
register(Wan())
