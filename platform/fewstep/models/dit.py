"""DiT: class-conditional transformers in diffusers' layout (`DiTTransformer2DModel`), run in continuous time.

A flow-matching network (SiT, REPA) predicts the velocity. A network with a diffusion scheduler beside it (the first
DiTs predict noise) is given that schedule's states, and its prediction is converted to a velocity (`prediction.py`).

diffusers' forward takes whole timesteps, embeds time and class again in every block (each holds a copy of the same
embedder) and returns an image. Students need a network with one embedder, which ends in `norm_out` and `proj_out` and
returns tokens, as those of other families do. `_restructured` changes the one to the other, in place;
`DiT.published` renames weights back, so that folders on disk are in diffusers' own format.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from types import MethodType
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from fewstep.models.conditioning import ClassConditioning
from fewstep.models.family import Family, Transformer
from fewstep.models.prediction import DiffusionPrediction, is_flow
from fewstep.models.pretrained import SCHEDULER, network_folder, read, scheduler_config
from fewstep.models.projection import LastProjection
from fewstep.policies.base import per_latent

TIME_SCALE = 1000.0
"""Factor from t in [0, 1] to the unit of the time embedder, one of 1,000 diffusion timesteps. Fractions are fine."""

INITIAL_EMBEDDING_STD = 0.02
"""Standard deviation of a new network's class embeddings (as in the DiT paper)."""


class DiT(Family):
    """Family of diffusers' `DiTTransformer2DModel`.

    Its conditioning is a class index per sample (`ClassConditioning`); the index after the last class is the null
    condition of guidance.
    """

    name = "dit"

    def load(self, path: str) -> Transformer:
        """The transformer of a folder or hub id, or of the pipeline there, in float32.

        The scheduler beside it, if any, says what the network predicts.
        """
        from diffusers import DiTTransformer2DModel

        folder = network_folder(path)
        transformer = read(DiTTransformer2DModel, folder)
        own = DiTTransformer2DModel.load_config(folder)
        return _restructured(transformer, own.get(SCHEDULER) or scheduler_config(folder))

    def build(self, config: dict[str, Any]) -> Transformer:
        """A new network, from its class's keyword arguments, and a `scheduler` if it does not predict the velocity."""
        from diffusers import DiTTransformer2DModel

        own = {key: value for key, value in config.items() if key != SCHEDULER}
        return _initialised(_restructured(DiTTransformer2DModel(**own), config.get(SCHEDULER)))

    def published(self, transformer: Transformer, weights: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """Weights under diffusers' own names, so that diffusers opens the folder."""
        config = transformer.config
        state: dict[str, Tensor] = {}
        for name, tensor in weights.items():
            if name.startswith("embedding."):
                # The one embedder of all blocks: diffusers reads a copy in each.
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

    def latent_channels(self, transformer: Transformer) -> int:
        """Latent channels C."""
        return transformer.config.in_channels

    def condition_width(self, transformer: Transformer) -> int:
        """0: it takes classes, and no text."""
        return 0

    def classes(self, transformer: Transformer) -> int:
        """Number of its classes, without the null class."""
        return transformer.config.num_embeds_ada_norm

    def patch(self, transformer: Transformer) -> int:
        """Side of a patch in latent cells, 2 to 8 depending on the network."""
        return transformer.config.patch_size

    def denoise(
        self,
        transformer: Transformer,
        x: Tensor,
        t: Tensor,
        conditioning: ClassConditioning,
        guidance_scale: float | Tensor | None = None,
    ) -> Tensor:
        """Call the network with class indices; it takes no guidance scale."""
        return transformer(x, t, conditioning.labels)

    def unpack(self, tokens: Tensor, channels: int, height: int, width: int) -> Tensor:
        """Packed tokens (B, L, n·c·p²) → n latents per sample, (B, n, c, H, W)."""
        batch, length = tokens.shape[:2]
        patch = math.isqrt(height * width // length)
        cells = tokens.view(batch, height // patch, width // patch, -1, channels, patch, patch)
        return cells.permute(0, 3, 4, 1, 5, 2, 6).reshape(batch, -1, channels, height, width)

    def lora_targets(self, transformer: Transformer) -> list[str]:
        """The FFN of every block and the time embedding, as in the paper's text-to-image students."""
        return ["ff.net.0.proj", "ff.net.2", "timestep_embedder.linear_1", "timestep_embedder.linear_2"]

    def blocks(self, transformer: Transformer) -> list[nn.Module]:
        """Its transformer blocks."""
        return list(transformer.transformer_blocks)

    def unused_parameters(self, transformer: Transformer) -> list[str]:
        """None: every weight reaches the output."""
        return []


class _AdaptiveNorm(nn.Module):
    """DiT's last norm with its modulation, as one module like other families': (B, L, D), (B, D) → (B, L, D)."""

    def __init__(self, norm: nn.Module, linear: nn.Linear) -> None:
        super().__init__()
        self.norm, self.linear = norm, linear

    def forward(self, hidden: Tensor, embedding: Tensor) -> Tensor:
        shift, scale = self.linear(F.silu(embedding)).chunk(2, dim=-1)
        return self.norm(hidden) * (1 + scale[:, None]) + shift[:, None]


class _ConvertingNorm(_AdaptiveNorm):
    """The last norm of a network that does not predict the velocity: tokens [hidden, a·x, b] → [b·normed, a·x, b].

    The velocity a·x + b·prediction is a linear map of these tokens, and a policy head can start as copies of that map.
    """

    def forward(self, hidden: Tensor, embedding: Tensor) -> Tensor:
        width = self.linear.in_features
        hidden, state, b = hidden.split([width, hidden.shape[-1] - width - 1, 1], dim=-1)
        return torch.cat([b * super().forward(hidden, embedding[:, :width]), state, b], dim=-1)


class _Given(nn.Module):
    """Replaces a block's own embedder: returns the embedding that is passed in place of the time."""

    def forward(self, embedding: Tensor, class_labels: None, hidden_dtype: torch.dtype) -> Tensor:
        return embedding


def _restructured(dit: Transformer, scheduler: Mapping[str, Any] | None = None) -> Transformer:
    """Give a `DiTTransformer2DModel` one embedder for all blocks, `norm_out`, `proj_out` and `_forward`.

    Args:
        dit: modified in place, and returned.
        scheduler: configuration of its diffusers scheduler, which says what it predicts; None if it is the velocity.
    """
    config = dit.config
    dit.embedding = dit.transformer_blocks[0].norm1.emb
    # Conditions are dropped by the training objective, from its seeded generator.
    dit.embedding.class_embedder.dropout_prob = 0.0
    # One embedder, outside of the blocks: FSDP shards each block as a group, which can't share a module with another.
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
    else:  # maps the tokens of `_ConvertingNorm`
        dit.proj_out = LastProjection(last, mixes_state=True, owns_layer=True)
    del dit.proj_out_1, dit.proj_out_2
    dit.register_to_config(out_channels=config.in_channels)
    dit.forward = MethodType(_forward, dit)
    return dit


def _projection(last: nn.Linear, patch: int, channels: int) -> nn.Linear:
    """DiT's last layer D → C·p² with its outputs in channel-major order, and without those that predict variances."""
    # Made on the meta device, as its values are replaced at once.
    weight, bias = (
        _channel_first(parameter.detach(), patch, channels) for parameter in (last.weight, last.bias)
    )
    projection = nn.Linear(weight.shape[1], len(bias), device="meta")
    projection.weight, projection.bias = nn.Parameter(weight), nn.Parameter(bias)
    return projection


def _forward(self: Transformer, x: Tensor, t: Tensor, labels: Tensor) -> Tensor:
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
        # A policy head is built for one width, of tokens and of embedding.
        embedding = F.pad(embedding, (0, hidden.shape[-1] - embedding.shape[-1]))
    return self.proj_out(self.norm_out(hidden, embedding))


def _channel_first(rows: Tensor, patch: int, channels: int) -> Tensor:
    """Rows (p·p·C', …) of DiT's projection as (C·p·p, …). C' = 2C if it also predicts variances, which are dropped."""
    return rows.unflatten(0, (patch, patch, -1))[:, :, :channels].movedim(2, 0).flatten(0, 2)


def _channel_last(rows: Tensor, patch: int) -> Tensor:
    """The inverse of `_channel_first`."""
    return rows.unflatten(0, (-1, patch, patch)).movedim(0, 2).flatten(0, 2)


@torch.no_grad()
def _initialised(dit: Transformer) -> Transformer:
    """Initialise as adaLN-Zero (arXiv 2212.09748, section 3.2): every block is the identity, the velocity is zero."""
    for module in dit.modules():
        if isinstance(module, nn.Linear | nn.Conv2d):
            # A view: a convolution is initialised as the linear map of its patch.
            nn.init.xavier_uniform_(module.weight.flatten(1))
            if module.bias is not None:
                nn.init.zeros_(module.bias)
    nn.init.normal_(dit.embedding.class_embedder.embedding_table.weight, std=INITIAL_EMBEDDING_STD)
    # Zero modulation (shift, scale, gate) closes every residual branch.
    closed = [block.norm1.linear for block in dit.transformer_blocks]
    last = dit.proj_out if dit.prediction is None else dit.proj_out.layer
    for layer in (*closed, dit.norm_out.linear, last):
        nn.init.zeros_(layer.weight)
    return dit
