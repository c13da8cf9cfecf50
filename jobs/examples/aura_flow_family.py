"""A family for a network of diffusers that is not built in, AuraFlow: `--set teacher.module=aura_flow_family.py`."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

from torch import Tensor, nn

from fewstep.models import register
from fewstep.models.diffusers_family import DiffusersFamily
from fewstep.models.packing import unpack_channel_last


class AuraFlow(DiffusersFamily):
    """Family of diffusers' `AuraFlowTransformer2DModel`: it takes images and σ, attends to padding, and predicts u."""

    name, network, pipeline = "aura_flow", "AuraFlowTransformer2DModel", "AuraFlowPipeline"
    time_embedding, time_scale = "time_step_embed", 1.0

    def denoise(
        self, transformer: Any, x: Tensor, t: Tensor, conditioning: Any, guidance_scale: Any = None
    ) -> Tensor:
        return self.tokens_of(transformer, x, encoder_hidden_states=conditioning.states, timestep=t)

    def ending(self, transformer: Any) -> Any:
        return replace(
            super().ending(transformer), channel_last=True
        )  # a token's values: row, column, channel

    def unpack(self, tokens: Tensor, channels: int, height: int, width: int) -> Tensor:
        return unpack_channel_last(tokens, channels, height, width)

    def latent_channels(self, transformer: Any) -> int:
        return transformer.config.in_channels

    def condition_width(self, transformer: Any) -> int:
        return transformer.config.joint_attention_dim

    def patch(self, transformer: Any) -> int:
        return transformer.config.patch_size

    def lora_targets(self, transformer: Any) -> list[str]:
        layers = ("linear_1", "linear_2", "out_projection")
        feed_forward = [f"{part}.{layer}" for part in ("ff", "ff_context") for layer in layers]
        return [*feed_forward, "time_step_proj.linear_1", "time_step_proj.linear_2"]

    def blocks(self, transformer: Any) -> list[nn.Module]:
        return [*transformer.joint_transformer_blocks, *transformer.single_transformer_blocks]

    def unused_parameters(self, transformer: Any) -> list[str]:
        return []


register(AuraFlow())
