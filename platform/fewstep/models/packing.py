"""Packing of latents to tokens of 2×2 latent cells, as the Qwen-Image and FLUX families take them."""

from __future__ import annotations

from importlib import import_module
from pathlib import Path
from typing import Any, ClassVar

from torch import Tensor

from fewstep.models.family import Family, Transformer
from fewstep.models.pretrained import from_pretrained, network_folder, skeleton

PATCH = 2
"""Side of a patch in latent cells."""


def pack(x: Tensor) -> Tensor:
    """(B, C, H, W) → tokens (B, H·W/4, C·4); within a token, values are ordered by channel, then row, then column."""
    batch, channels, height, width = x.shape
    # (B, C, rows, p, columns, p) → (B, rows, columns, C, p, p)
    patches = x.view(batch, channels, height // PATCH, PATCH, width // PATCH, PATCH)
    return patches.permute(0, 2, 4, 1, 3, 5).reshape(batch, -1, channels * PATCH**2)


def unpack(tokens: Tensor, channels: int, height: int, width: int) -> Tensor:
    """(B, L, n·c·4) → (B, n, c, H, W), the inverse of `pack` for n latents per sample."""
    batch = len(tokens)
    # (B, rows, columns, n, c, p, p) → (B, n, c, rows, p, columns, p)
    patches = tokens.view(batch, height // PATCH, width // PATCH, -1, channels, PATCH, PATCH)
    return patches.permute(0, 3, 4, 1, 5, 2, 6).reshape(batch, -1, channels, height, width)


class PackedTransformer(Family):
    """Base of the families of diffusers' transformers that take tokens of 2×2 patches and text token states."""

    network: ClassVar[str]
    """Name of the network's class in diffusers."""
    time_embedding: ClassVar[tuple[str, float]]
    """Name of the module that embeds the time, and the factor on t in what it is called with."""

    def load(self, path: str) -> Transformer:
        """The network of a diffusers folder or hub id, in float32."""
        return from_pretrained(self._class(), path)

    def skeleton(self, path: str) -> tuple[Transformer, Path | None]:
        """The network with its parameters on the meta device, and the folder of safetensors that has them."""
        folder = network_folder(path)
        # Older repositories have only pickled weights, which diffusers reads.
        return skeleton(self._class(), path) if any(folder.glob("*.safetensors")) else (self.load(path), None)

    def build(self, config: dict[str, Any]) -> Transformer:
        """A new network, from the keyword arguments of its class."""
        return self._class()(**config)

    def _class(self) -> type[Any]:
        # Imported when needed: diffusers takes seconds to import.
        return getattr(import_module("diffusers"), self.network)

    def latent_channels(self, transformer: Transformer) -> int:
        """Latent channels C, a quarter of the network's: a token holds four cells."""
        return transformer.config.in_channels // PATCH**2

    def condition_width(self, transformer: Transformer) -> int:
        """Width D of the token states."""
        return transformer.config.joint_attention_dim

    def patch(self, transformer: Transformer) -> int:
        """2, in latent cells."""
        return PATCH

    def unpack(self, tokens: Tensor, channels: int, height: int, width: int) -> Tensor:
        """Packed tokens (B, L, n·c·4) → n latents per sample, (B, n, c, H, W)."""
        return unpack(tokens, channels, height, width)
