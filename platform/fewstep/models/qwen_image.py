"""Qwen-Image: a 60-block, 20B-parameter dual-stream transformer, and any smaller one of its class."""

from __future__ import annotations

from typing import ClassVar

from torch import Tensor, nn

from fewstep.models.conditioning import TextConditioning
from fewstep.models.packing import PATCH, PackedTransformer, pack


class QwenImage(PackedTransformer):
    """Family of diffusers' `QwenImageTransformer2DModel`."""

    name = "qwen_image"
    network: ClassVar[str] = "QwenImageTransformer2DModel"

    def denoise(self, transformer: nn.Module, x: Tensor, t: Tensor, conditioning: TextConditioning) -> Tensor:
        height, width = x.shape[-2:]
        return transformer(
            hidden_states=pack(x),
            encoder_hidden_states=conditioning.states,
            encoder_hidden_states_mask=conditioning.mask,
            timestep=t,
            img_shapes=[(1, height // PATCH, width // PATCH)] * len(x),
            return_dict=False,
        )[0]

    def lora_targets(self, transformer: nn.Module) -> list[str]:
        last = len(transformer.transformer_blocks) - 1
        text = [
            f"transformer_blocks.{index}.txt_mlp.{layer}"
            for index in range(last)  # the last block's text stream never reaches the output
            for layer in ("net.0.proj", "net.2")
        ]
        return [
            "img_mlp.net.0.proj",
            "img_mlp.net.2",
            "timestep_embedder.linear_1",
            "timestep_embedder.linear_2",
            *text,
        ]

    def blocks(self, transformer: nn.Module) -> list[nn.Module]:
        return list(transformer.transformer_blocks)

    def unused_parameters(self, transformer: nn.Module) -> list[str]:
        last = f"transformer_blocks.{len(transformer.transformer_blocks) - 1}."
        dead = (
            f"{last}attn.to_add_out.",
            f"{last}txt_mlp.",
            f"{last}attn.norm_added_q.",
            f"{last}attn.add_q_proj.",
        )
        return [name for name, _ in transformer.named_parameters() if name.startswith(dead)]
