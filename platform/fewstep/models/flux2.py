"""FLUX.2: 8 dual-stream and 48 single-stream blocks that share their modulation, 32B parameters, and smaller ones."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from torch import Tensor, nn

from fewstep.models.conditioning import TextConditioning
from fewstep.models.flux import embedded, grid, joint_mask
from fewstep.models.packing import PATCH, PackedTransformer, pack


@dataclass(frozen=True)
class Flux2(PackedTransformer):
    """Family of diffusers' `Flux2Transformer2DModel`.

    FLUX.2's own pipeline packs 2×2 cells of its 32-channel latents before the network; latents here are those of the
    autoencoder (C = 32), and `denoise` packs, so that each cell has its own mixture weights, as in FLUX.1.

    Args:
        embedded_guidance: the guidance scale that a guidance-distilled network (FLUX.2 dev) is told beside the
            time, one number or one per sample (B,); None for networks that take none.
    """

    embedded_guidance: float | Tensor | None = None

    name: ClassVar[str] = "flux2"
    network: ClassVar[str] = "Flux2Transformer2DModel"

    def denoise(self, transformer: nn.Module, x: Tensor, t: Tensor, conditioning: TextConditioning) -> Tensor:
        height, width = x.shape[-2:]
        tokens, length = pack(x), conditioning.mask.shape[1]
        return transformer(
            hidden_states=tokens,
            encoder_hidden_states=conditioning.states,
            timestep=t,
            guidance=embedded(self.embedded_guidance, x),
            # Rotary positions (image, row, column, token of the text).
            img_ids=grid(1, height // PATCH, width // PATCH, 1, device=x.device),
            txt_ids=grid(1, 1, 1, length, device=x.device),
            joint_attention_kwargs={"attention_mask": joint_mask(conditioning.mask, tokens.shape[1])},
            return_dict=False,
        )[0]

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

    def blocks(self, transformer: nn.Module) -> list[nn.Module]:
        return [*transformer.transformer_blocks, *transformer.single_transformer_blocks]

    def unused_parameters(self, transformer: nn.Module) -> list[str]:
        return []
