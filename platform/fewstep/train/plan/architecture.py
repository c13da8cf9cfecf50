"""A teacher's architecture without its weights: enough to build its network where tensors have no data."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from fewstep.assets import asset
from fewstep.errors import UserError
from fewstep.models.teacher import locate

NETWORKS = {
    "Qwen/Qwen-Image": "qwen_image",
    "black-forest-labs/FLUX.1-dev": "flux_dev",
    "facebook/DiT-XL-2-256": "dit_xl_2",
}
"""Hub ids whose architecture is known without a network connection → file in `assets/networks`."""

PLACES = ("config.json", "transformer/config.json", "unet/config.json")
"""Where a configuration lies: in a folder of the network alone, or in that of a whole diffusers pipeline."""


def network_config(path: str) -> dict[str, Any]:
    """Keyword arguments of a teacher's network class, without its weights.

    Args:
        path: as in `teacher.path`: a bundled name, a folder, or a hub id.

    Raises:
        UserError: no configuration is found there, or the hub can't be reached.
    """
    # First, so that the best-known teachers can be planned without a connection (and without access to their weights).
    if path in NETWORKS:
        return json.loads((asset("networks") / f"{NETWORKS[path]}.json").read_text())
    location = locate(path)
    return _in_folder(Path(location), path) if Path(location).is_dir() else _on_hub(location, path)


def _in_folder(folder: Path, path: str) -> dict[str, Any]:
    for place in PLACES:
        if (file := folder / place).exists():
            return json.loads(file.read_text())
    raise UserError(f"teacher.path: {path!r} has no config.json, so its network can't be planned: add it.")


def _on_hub(hub_id: str, path: str) -> dict[str, Any]:
    from huggingface_hub import hf_hub_download
    from huggingface_hub.errors import EntryNotFoundError

    for place in PLACES:
        try:
            return json.loads(Path(hf_hub_download(hub_id, place)).read_text())
        except EntryNotFoundError:
            continue
        except (OSError, ValueError) as error:
            raise UserError(
                f"teacher.path: the configuration of {path!r} can't be fetched ({str(error).splitlines()[0]}): known "
                f"without a connection are {', '.join(NETWORKS)}."
            ) from error
    raise UserError(f"teacher.path: the hub's {path!r} has no config.json, so its network can't be planned.")
