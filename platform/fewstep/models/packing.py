"""Packing of latents to tokens of 2×2 latent cells, as the Qwen-Image and FLUX families take them."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from fewstep.models.diffusers_family import DiffusersFamily
from fewstep.models.family import Transformer

PATCH = 2
"""Side of a patch in latent cells."""


def pack(x: Tensor) -> Tensor:
    """(B, C, H, W) → tokens (B, H·W/4, C·4); within a token, values are ordered by channel, then row, then column."""
    batch, channels, height, width = x.shape
    # (B, C, rows, p, columns, p) → (B, rows, columns, C, p, p)
    patches = x.view(batch, channels, height // PATCH, PATCH, width // PATCH, PATCH)
    return patches.permute(0, 2, 4, 1, 3, 5).reshape(batch, -1, channels * PATCH**2)


def pack_all(x: Tensor, references: Sequence[Tensor]) -> Tensor:
    """Tokens of latents (B, C, H, W), and behind them those of their reference images, (B, L + …, C·4)."""
    return torch.cat([pack(x), *map(pack, references)], dim=1) if references else pack(x)


def own_tokens(tokens: Tensor, x: Tensor) -> Tensor:
    """Those of the tokens that `pack_all` made, or of a network's output for them, that are of the latents `x`."""
    count = x.shape[-2] * x.shape[-1] // PATCH**2
    # Copied, as FSDP warns of results that are views.
    return tokens if tokens.shape[1] == count else tokens[:, :count].clone()


def unpack(tokens: Tensor, channels: int, height: int, width: int) -> Tensor:
    """(B, L, n·c·4) → (B, n, c, H, W), the inverse of `pack` for n latents per sample."""
    batch = len(tokens)
    # (B, rows, columns, n, c, p, p) → (B, n, c, rows, p, columns, p)
    patches = tokens.view(batch, height // PATCH, width // PATCH, -1, channels, PATCH, PATCH)
    return patches.permute(0, 3, 4, 1, 5, 2, 6).reshape(batch, -1, channels, height, width)


def unpack_channel_last(tokens: Tensor, channels: int, height: int, width: int, patch: int = PATCH) -> Tensor:
    """(B, L, n·p²·c), values ordered by row, column, channel → n latents per sample, (B, n, c, H, W)."""
    batch = len(tokens)
    # (B, rows, columns, n, p, p, c) → (B, n, c, rows, p, columns, p)
    patches = tokens.reshape(batch, height // patch, width // patch, -1, patch, patch, channels)
    return patches.permute(0, 3, 6, 1, 4, 2, 5).reshape(batch, -1, channels, height, width)


class PackedFamily(DiffusersFamily):
    """Base of the families of diffusers' transformers that take tokens of 2×2 patches and text token states."""

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
