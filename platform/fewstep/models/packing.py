"""Latents ↔ tokens of 2×2 latent cells, as the Qwen-Image and FLUX families take them."""

from __future__ import annotations

from torch import Tensor

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
