"""A network's architecture without its weights: enough to build it where tensors have no data."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import torch

from fewstep.assets import asset
from fewstep.errors import UserError
from fewstep.hub import hub_folder
from fewstep.models.family import Family, Transformer
from fewstep.models.registry import get_family
from fewstep.models.teacher import locate, told_guidance

NETWORKS = {
    "Qwen/Qwen-Image": "qwen_image",
    "Qwen/Qwen-Image-2.1": "qwen_image21",
    "Qwen/Qwen-Image-2512": "qwen_image",
    "Tongyi-MAI/Z-Image": "z_image",
    "Wan-AI/Wan2.1-T2V-1.3B-Diffusers": "wan21_1_3b",
    "black-forest-labs/FLUX.1-dev": "flux_dev",
    "black-forest-labs/FLUX.2-dev": "flux2_dev",
    "black-forest-labs/FLUX.2-klein-base-4B": "flux2_klein_4b",
    "black-forest-labs/FLUX.2-klein-base-9B": "flux2_klein_9b",
    "facebook/DiT-XL-2-256": "dit_xl_2",
    "meituan-longcat/LongCat-Image": "longcat_image",
    "stabilityai/stable-diffusion-3.5-large": "sd35_large",
}
"""Hub ids whose architecture is known without a network connection → folder in `assets/networks`."""

NETWORK = "network"
"""Name of a network's own configuration in that folder, which may have those of its pipeline's other parts, too."""

PLACES = ("config.json", "transformer/config.json", "unet/config.json")
"""Where a configuration lies: in a folder of the network alone, or in that of a whole diffusers pipeline."""


def build_on_meta(
    path: str, family: str, embedded_guidance_scale: float | None
) -> tuple[Transformer, Family]:
    """A teacher at full size on the meta device, whose tensors have shapes and no values, and its family.

    Args:
        path: as in `teacher.path`: a bundled name, a folder, or a hub id.
        family: name of its family.
        embedded_guidance_scale: input of a guidance-distilled network; None for others.

    Raises:
        UserError: its architecture can't be found, or a guidance scale is missing, or given to one that takes none.
    """
    config, known = network_config(path), get_family(family)
    with torch.device("meta"):
        transformer = known.build(config)
    return transformer, told_guidance(known, transformer, embedded_guidance_scale, path)


def network_config(path: str) -> dict[str, Any]:
    """Keyword arguments of a teacher's network class, without its weights.

    Args:
        path: as for `build_on_meta`.

    Raises:
        UserError: no configuration is found there, or the hub can't be reached.
    """
    # First, so that the best-known teachers can be known without a connection (and without access to their weights).
    if (known := known_config(path, NETWORK)) is not None:
        return known
    location = locate(path)
    return _in_folder(Path(location), path) if Path(location).is_dir() else _on_hub(location, path)


def known_config(path: str, part: str) -> Any:
    """The configuration of a part of a pipeline that is known without a connection; None for all others.

    Args:
        path: hub id of the pipeline.
        part: name of the part, such as "vae".
    """
    if path not in NETWORKS:
        return None
    file = asset("networks") / NETWORKS[path] / f"{part}.json"
    return json.loads(file.read_text()) if file.exists() else None


def _in_folder(folder: Path, path: str) -> dict[str, Any]:
    for place in PLACES:
        if (file := folder / place).exists():
            return json.loads(file.read_text())
    raise UserError(f"teacher.path: {path!r} has no config.json, so its network can't be planned: add it.")


def _on_hub(hub_id: str, path: str) -> dict[str, Any]:
    try:
        folder = hub_folder(hub_id, PLACES)
    except OSError as error:
        raise UserError(
            f"teacher.path: {error}: known without a connection are {', '.join(NETWORKS)}."
        ) from error
    return _in_folder(folder, path)
