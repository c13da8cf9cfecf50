"""Networks from diffusers folders and hub repositories."""

from __future__ import annotations

from typing import Any

import torch
from torch import nn


def from_pretrained(kind: type[Any], path: str) -> nn.Module:
    """A diffusers network in float32.

    Args:
        kind: its class.
        path: folder or hub id of the network itself, or of a pipeline, whose `transformer` it then is.
    """
    try:
        return kind.from_pretrained(path, torch_dtype=torch.float32)
    except OSError as error:
        try:
            return kind.from_pretrained(path, subfolder="transformer", torch_dtype=torch.float32)
        except OSError:
            raise error from None
