"""FLUX.2: 8 dual-stream and 48 single-stream blocks that share their modulation, 32B parameters, and smaller ones."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from torch import Tensor, nn

from fewstep.models.conditioning import TextConditioning
from fewstep.models.flux import Flux, grid


@dataclass(frozen=True)
class Flux2(Flux):
    """Family of diffusers' `Flux2Transformer2DModel`: FLUX.1's class without pooled text, its layers named otherwise.

    FLUX.2's own pipeline packs 2×2 cells of its 32-channel latents before the network; latents here are those of the
    autoencoder (C = 32), and `denoise` packs, so that each cell has its own mixture weights, as in FLUX.1.
    """

    name: ClassVar[str] = "flux2"
    network: ClassVar[str] = "Flux2Transformer2DModel"

    def inputs_beside(self, conditioning: TextConditioning, rows: int, columns: int) -> dict[str, Tensor]:
        device, length = conditioning.states.device, conditioning.states.shape[1]
        # Positions (image, row, column, token of the text).
        return {
            "img_ids": grid(1, rows, columns, 1, device=device),
            "txt_ids": grid(1, 1, 1, length, device=device),
        }

    def pooled_width(self, transformer: nn.Module) -> int | None:
        return None

    def lora_targets(self, transformer: nn.Module) -> list[str]:
        # FLUX.1's layers under their names here; in single blocks the FFN is one matrix with the attention.
        single = [
            f"single_transformer_blocks.{index}.attn.{layer}"
            for index in range(len(transformer.single_transformer_blocks))
            for layer in ("to_qkv_mlp_proj", "to_out")
        ]
        return [
            "ff.linear_in",
            "ff.linear_out",
            "ff_context.linear_in",
            "ff_context.linear_out",
            "timestep_embedder.linear_1",
            "timestep_embedder.linear_2",
            *single,
        ]
