"""DiT: class-conditional transformers in diffusers' layout (`DiTTransformer2DModel`), run in continuous time.

A flow-matching network (SiT, REPA) gives the velocity itself. One beside a diffusion scheduler (the first DiTs predict
noise) is asked about that schedule's states, and its answer converted (`prediction.py`).

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
from fewstep.models.own import LastProjection
from fewstep.models.prediction import DiffusionPrediction, is_flow
from fewstep.models.pretrained import SCHEDULER, network_folder, read, scheduler_config
from fewstep.policies.base import per_latent

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
        """The transformer of a pipeline, or one in a folder of its own; with the scheduler that lies beside it."""
        from diffusers import DiTTransformer2DModel

        folder = network_folder(path)
        transformer = read(DiTTransformer2DModel, folder)
        own = DiTTransformer2DModel.load_config(folder)
        return _restructured(transformer, own.get(SCHEDULER) or scheduler_config(folder))

    def build(self, config: dict[str, Any]) -> nn.Module:
        """A new network, from its class's keyword arguments and, unless it is a flow's, a `scheduler`."""
        from diffusers import DiTTransformer2DModel

        own = {key: value for key, value in config.items() if key != SCHEDULER}
        return _initialised(_restructured(DiTTransformer2DModel(**own), config.get(SCHEDULER)))

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
                last = name.replace("proj_out.layer", "proj_out").replace("proj_out", "proj_out_2")
                state[last] = _channel_last(tensor, config.patch_size)
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


class _ConvertingNorm(_AdaptiveNorm):
    """The same where the network predicts no velocity: tokens [hidden, a·x, b] → [b·normed, a·x, b].

    So that the velocity a·x + b·prediction is one linear map of them, of which a policy head begins as copies.
    """

    def forward(self, hidden: Tensor, embedding: Tensor) -> Tensor:
        width = self.linear.in_features
        hidden, state, b = hidden.split([width, hidden.shape[-1] - width - 1, 1], dim=-1)
        return torch.cat([b * super().forward(hidden, embedding[:, :width]), state, b], dim=-1)


class _Given(nn.Module):
    """In place of a block's own embedder: the embedding comes in where diffusers' blocks take the time."""

    def forward(self, embedding: Tensor, class_labels: None, hidden_dtype: torch.dtype) -> Tensor:
        return embedding


def _restructured(dit: nn.Module, scheduler: Mapping[str, Any] | None = None) -> nn.Module:
    """A `DiTTransformer2DModel` with one embedder for all blocks, `norm_out`, `proj_out` and `_forward`.

    Args:
        dit: modified in place.
        scheduler: diffusers' configuration of it, which says what the network predicts; None is a velocity.
    """
    config = dit.config
    dit.embedding = dit.transformer_blocks[0].norm1.emb
    dit.embedding.class_embedder.dropout_prob = 0.0  # whoever trains it drops conditions, reproducibly
    for block in dit.transformer_blocks:
        block.norm1.emb = _Given()
    dit.prediction = None
    if scheduler is not None and not is_flow(scheduler):
        dit.prediction = DiffusionPrediction.from_scheduler(scheduler)
        dit.register_to_config(**{SCHEDULER: dict(scheduler)})
    norm = _AdaptiveNorm if dit.prediction is None else _ConvertingNorm
    dit.norm_out = norm(dit.norm_out, dit.proj_out_1)
    last = _projection(dit.proj_out_2, config.patch_size, config.in_channels)
    if dit.prediction is None:
        dit.proj_out = last
    else:  # of `_ConvertingNorm`'s tokens
        dit.proj_out = LastProjection(last, mixes_state=True, owns_layer=True)
    del dit.proj_out_1, dit.proj_out_2
    dit.register_to_config(out_channels=config.in_channels)
    dit.forward = MethodType(_forward, dit)
    return dit


def _projection(last: nn.Linear, patch: int, channels: int) -> nn.Linear:
    """DiT's last layer, channel-major and without variances: D → C·p²."""
    weight, bias = (
        _channel_first(parameter.detach(), patch, channels) for parameter in (last.weight, last.bias)
    )
    projection = nn.Linear(weight.shape[1], len(bias), device="meta")
    projection.weight, projection.bias = nn.Parameter(weight), nn.Parameter(bias)
    return projection


def _forward(self: nn.Module, x: Tensor, t: Tensor, labels: Tensor) -> Tensor:
    """(B, C, H, W), (B,) in [0, 1], (B,) class indices → packed velocity (B, L, C·p²), channel-major."""
    state, timestep = (
        (x, t.float() * TIME_SCALE) if self.prediction is None else self.prediction.question(x, t)
    )
    hidden = self.pos_embed(state)
    embedding = self.embedding(timestep, labels, hidden_dtype=hidden.dtype)
    for block in self.transformer_blocks:
        if self.gradient_checkpointing and torch.is_grad_enabled():
            hidden = self._gradient_checkpointing_func(block, hidden, None, None, None, embedding)
        else:
            hidden = block(hidden, timestep=embedding)
    if self.prediction is not None:
        a, b = (per_latent(c, hidden).to(hidden) for c in self.prediction.coefficients(t))
        cells = F.pixel_unshuffle(x, self.config.patch_size).flatten(2).mT.to(hidden)
        hidden = torch.cat([hidden, a * cells, b.expand(-1, hidden.shape[1], 1)], dim=-1)
        # Heads want one width for both.
        embedding = F.pad(embedding, (0, hidden.shape[-1] - embedding.shape[-1]))
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
    last = dit.proj_out if dit.prediction is None else dit.proj_out.layer
    for layer in (*closed, dit.norm_out.linear, last):
        nn.init.zeros_(layer.weight)
    return dit
