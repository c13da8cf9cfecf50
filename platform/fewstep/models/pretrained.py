"""Networks from diffusers folders and hub repositories."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from torch import nn


def from_pretrained(kind: type[Any], path: str) -> nn.Module:
    """A diffusers network in float32.

    Args:
        kind: its class.
        path: a folder, a hub id, or `owner/name:folder` for one part of a pipeline on the hub.
    """
    location, _, subfolder = (path, "", "") if Path(path).is_dir() else path.partition(":")
    return kind.from_pretrained(location, subfolder=subfolder or None, torch_dtype=torch.float32)
