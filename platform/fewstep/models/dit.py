"""DiT: class-conditional transformers in diffusers' layout (`DiTTransformer2DModel`), run in continuous time.

diffusers' forward takes whole time steps, embeds time and class anew in every block (with a copy of the same
embedder in each) and ends in an image. A velocity network that students grow on has one embedder, and ends in
tokens behind `norm_out` and `proj_out`, as the other families do. `_restructured` turns the one into the other, in
place; `DiT.published` turns weights back, so that folders on disk stay diffusers' own.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from types import MethodType
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from fewstep.models.conditioning import TextConditioning
from fewstep.models.family import Family

TIME_SCALE = 1000.0
"""The embedder's unit is one of the 1,000 steps of a diffusion schedule; t in [0, 1] spans them, fractions too."""

INITIAL_EMBEDDING_STD = 0.02
"""Of a new network's class embeddings (the DiT paper's)."""


class DiT(Family):
    """Family of diffusers' `DiTTransformer2DModel`.

    Its conditioning is a class index c as the one token state (B, 1, 1) that `data.labels` encodes; the index
    after the last class is the null condition of guidance.
    """

    name = "dit"

    def load(self, path: str) -> nn.Module:
        from diffusers import DiTTransformer2DModel

        return _restructured(DiTTransformer2DModel.from_pretrained(path, torch_dtype=torch.float32))

    def build(self, config: dict[str, Any]) -> nn.Module:
        from diffusers import DiTTransformer2DModel

        return _initialised(_restructured(DiTTransformer2DModel(**config)))

    def published(self, transformer: nn.Module, weights: Mapping[str, Tensor]) -> dict[str, Tensor]:
        config = transformer.config
        state: dict[str, Tensor] = {}
        for name, tensor in weights.items():
            if name.startswith("embedding."):
                part = name.removeprefix("embedding.")
                copies = [
                    f"transformer_blocks.{index}.norm1.emb.{part}" for index in range(config.num_layers)
                ]
                state.update(dict.fromkeys(copies, tensor))
            elif name.startswith("norm_out.linear."):
                state[name.replace("norm_out.linear", "proj_out_1")] = tensor
            elif name.startswith("proj_out."):
                state[name.replace("proj_out", "proj_out_2")] = _channel_last(tensor, config.patch_size)
            else:
                state[name] = tensor
        return state

    def latent_channels(self, transformer: nn.Module) -> int:
        return transformer.config.in_channels

    def condition_width(self, transformer: nn.Module) -> int:
        return 1

    def classes(self, transformer: nn.Module) -> int:
        return transformer.config.num_embeds_ada_norm

    def patch(self, transformer: nn.Module) -> int:
        return transformer.config.patch_size

    def denoise(self, transformer: nn.Module, x: Tensor, t: Tensor, conditioning: TextConditioning) -> Tensor:
        return transformer(x, t, conditioning.states[:, 0, 0].long())

    def unpack(self, tokens: Tensor, channels: int, height: int, width: int) -> Tensor:
        batch, length = tokens.shape[:2]
        patch = math.isqrt(height * width // length)
        cells = tokens.view(batch, height // patch, width // patch, -1, channels, patch, patch)
        return cells.permute(0, 3, 4, 1, 5, 2, 6).reshape(batch, -1, channels, height, width)

    def lora_targets(self, transformer: nn.Module) -> list[str]:
        return ["ff.net.0.proj", "ff.net.2", "timestep_embedder.linear_1", "timestep_embedder.linear_2"]

    def blocks(self, transformer: nn.Module) -> list[nn.Module]:
        return list(transformer.transformer_blocks)

    def unused_parameters(self, transformer: nn.Module) -> list[str]:
        return []


class _AdaptiveNorm(nn.Module):
    """DiT's last norm with its modulation, called as other families' are: (B, L, D), (B, D) → (B, L, D)."""

    def __init__(self, norm: nn.Module, linear: nn.Linear) -> None:
        super().__init__()
        self.norm, self.linear = norm, linear

    def forward(self, hidden: Tensor, embedding: Tensor) -> Tensor:
        shift, scale = self.linear(F.silu(embedding)).chunk(2, dim=-1)
        return self.norm(hidden) * (1 + scale[:, None]) + shift[:, None]


class _Given(nn.Module):
    """In place of a block's own embedder: the embedding comes in where diffusers' blocks take the time."""

    def forward(self, embedding: Tensor, class_labels: None, hidden_dtype: torch.dtype) -> Tensor:
        return embedding


def _restructured(dit: nn.Module) -> nn.Module:
    """A `DiTTransformer2DModel` with one embedder for all blocks, `norm_out`, `proj_out` and `_forward`."""
    config = dit.config
    dit.embedding = dit.transformer_blocks[0].norm1.emb
    dit.embedding.class_embedder.dropout_prob = 0.0  # whoever trains it drops conditions, reproducibly
    for block in dit.transformer_blocks:
        block.norm1.emb = _Given()
    dit.norm_out = _AdaptiveNorm(dit.norm_out, dit.proj_out_1)
    last = dit.proj_out_2
    dit.proj_out = nn.Linear(
        last.in_features, config.in_channels * config.patch_size**2, device=last.weight.device
    )
    for name, parameter in last.named_parameters():
        rows = _channel_first(parameter.detach(), config.patch_size, config.in_channels)
        setattr(dit.proj_out, name, nn.Parameter(rows))
    del dit.proj_out_1, dit.proj_out_2
    dit.register_to_config(out_channels=config.in_channels)
    dit.forward = MethodType(_forward, dit)
    return dit


def _forward(self: nn.Module, x: Tensor, t: Tensor, labels: Tensor) -> Tensor:
    """(B, C, H, W), (B,) in [0, 1], (B,) class indices → packed velocity (B, L, C·p²), channel-major."""
    hidden = self.pos_embed(x)
    embedding = self.embedding(t.float() * TIME_SCALE, labels, hidden_dtype=hidden.dtype)
    for block in self.transformer_blocks:
        if self.gradient_checkpointing and torch.is_grad_enabled():
            hidden = self._gradient_checkpointing_func(block, hidden, None, None, None, embedding)
        else:
            hidden = block(hidden, timestep=embedding)
    return self.proj_out(self.norm_out(hidden, embedding))


def _channel_first(rows: Tensor, patch: int, channels: int) -> Tensor:
    """Rows (p·p·C', …) of DiT's projection as (C·p·p, …); C' = 2C where it learned variances: those are dropped."""
    return rows.unflatten(0, (patch, patch, -1))[:, :, :channels].movedim(2, 0).flatten(0, 2)


def _channel_last(rows: Tensor, patch: int) -> Tensor:
    """The inverse of `_channel_first`."""
    return rows.unflatten(0, (-1, patch, patch)).movedim(0, 2).flatten(0, 2)


@torch.no_grad()
def _initialised(dit: nn.Module) -> nn.Module:
    """adaLN-Zero (arXiv 2212.09748, section 3.2): every block begins as the identity, the velocity as zero."""
    for module in dit.modules():
        if isinstance(module, nn.Linear | nn.Conv2d):
            nn.init.xavier_uniform_(module.weight.flatten(1))
            if module.bias is not None:
                nn.init.zeros_(module.bias)
    nn.init.normal_(dit.embedding.class_embedder.embedding_table.weight, std=INITIAL_EMBEDDING_STD)
    closed = [block.norm1.linear for block in dit.transformer_blocks]
    for layer in (*closed, dit.norm_out.linear, dit.proj_out):
        nn.init.zeros_(layer.weight)
    return dit
