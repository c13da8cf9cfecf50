"""FLUX.2: 8 dual-stream and 48 single-stream blocks that share their modulation, 32B parameters; klein, 4B and 9B."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch import Tensor

from fewstep.models.conditioning import TextConditioning
from fewstep.models.family import Transformer
from fewstep.models.flux import Flux, grid
from fewstep.models.packing import PATCH

REFERENCE_STEP = 10
"""How far the positions of one image and the next are apart along the axis of images."""


@dataclass(frozen=True)
class Flux2(Flux):
    """Family of diffusers' `Flux2Transformer2DModel`: as FLUX.1's, without pooled text, and with other layer names.

    FLUX.2's own pipeline packs 2×2 cells of its 32-channel latents to one of 128 channels before sampling. Here latents
    are those of the autoencoder (C = 32) and `denoise` packs them, so that each cell has its own mixture weights, as in
    FLUX.1. FLUX.2 dev is guidance-distilled; klein takes no guidance scale, and is guided by a second pass.
    """

    name = "flux2"
    network: ClassVar[str] = "Flux2Transformer2DModel"
    pipeline: ClassVar[str] = "Flux2Pipeline"
    time_embedding: ClassVar[str] = "time_guidance_embed"
    takes_references: ClassVar[bool] = True

    def inputs_beside(self, conditioning: TextConditioning, rows: int, columns: int) -> dict[str, Tensor]:
        """The network's further inputs by name: rotary positions (image, row, column, token of the text)."""
        device, length = conditioning.states.device, conditioning.states.shape[1]
        sides = [(image.shape[-2] // PATCH, image.shape[-1] // PATCH) for image in conditioning.references]
        images = [grid(1, *side, 1, device=device) for side in [(rows, columns), *sides]]
        for number, positions in enumerate(images):
            positions[:, 0] = REFERENCE_STEP * number
        # Unlike FLUX.1's, text tokens have positions of their own, along the last axis.
        return {
            "img_ids": torch.cat(images),
            "txt_ids": grid(1, 1, 1, length, device=device),
        }

    def schedule_mu(self, scheduler: Mapping[str, Any], tokens: int, steps: int) -> float:
        """log of the shift; it depends on the number of steps, but for more than 4,300 tokens."""
        from diffusers.pipelines.flux2.pipeline_flux2 import compute_empirical_mu

        return compute_empirical_mu(tokens, steps)

    def pooled_width(self, transformer: Transformer) -> int | None:
        """None: the network takes only token states."""
        return None

    def lora_targets(self, transformer: Transformer) -> list[str]:
        """The layers of FLUX.1's list by their names here."""
        # In single-stream blocks the FFN shares its first matrix with the attention; it is adapted as a whole.
        single = [
            f"single_transformer_blocks.{index}.attn.to_out"
            for index in range(len(transformer.single_transformer_blocks))
        ]
        return [
            "ff.linear_in",
            "ff.linear_out",
            "ff_context.linear_in",
            "ff_context.linear_out",
            "timestep_embedder.linear_1",
            "timestep_embedder.linear_2",
            *self.shared_matrices(transformer),
            *single,
        ]

    def shared_matrices(self, transformer: Transformer) -> list[str]:
        """The first matrix of each single-stream block: queries, keys, values and the FFN's first layer in one."""
        return [
            f"single_transformer_blocks.{index}.attn.to_qkv_mlp_proj"
            for index in range(len(transformer.single_transformer_blocks))
        ]
