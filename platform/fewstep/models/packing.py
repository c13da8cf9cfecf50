"""Latents ↔ tokens of 2×2 latent cells, as the Qwen-Image and FLUX families take them."""

from __future__ import annotations

from importlib import import_module
from pathlib import Path
from typing import Any, ClassVar

from torch import Tensor, nn

from fewstep.models.family import Family
from fewstep.models.pretrained import from_pretrained, skeleton

PATCH = 2
"""Side of a patch in latent cells."""


def pack(x: Tensor) -> Tensor:
    """(B, C, H, W) → tokens (B, H·W/4, C·4), channel-major inside a patch: channel, then row, then column."""
    batch, channels, height, width = x.shape
    patches = x.view(batch, channels, height // PATCH, PATCH, width // PATCH, PATCH)
    return patches.permute(0, 2, 4, 1, 3, 5).reshape(batch, -1, channels * PATCH**2)


def unpack(tokens: Tensor, channels: int, height: int, width: int) -> Tensor:
    """(B, L, n·c·4) → (B, n, c, H, W); the inverse of `pack` for n latents that share their tokens."""
    batch = len(tokens)
    patches = tokens.view(batch, height // PATCH, width // PATCH, -1, channels, PATCH, PATCH)
    return patches.permute(0, 3, 4, 1, 5, 2, 6).reshape(batch, -1, channels, height, width)


class PackedTransformer(Family):
    """What families of diffusers' transformers share that take 2×2 patches as tokens, and token states beside them."""

    network: ClassVar[str]
    """Its class in diffusers."""

    def load(self, path: str) -> nn.Module:
        return from_pretrained(self._class(), path)

    def skeleton(self, path: str) -> tuple[nn.Module, Path]:
        return skeleton(self._class(), path)

    def build(self, config: dict[str, Any]) -> nn.Module:
        return self._class()(**config)

    def _class(self) -> type[Any]:
        return getattr(import_module("diffusers"), self.network)

    def latent_channels(self, transformer: nn.Module) -> int:
        return transformer.config.in_channels // PATCH**2

    def condition_width(self, transformer: nn.Module) -> int:
        return transformer.config.joint_attention_dim

    def patch(self, transformer: nn.Module) -> int:
        return PATCH

    def unpack(self, tokens: Tensor, channels: int, height: int, width: int) -> Tensor:
        return unpack(tokens, channels, height, width)
