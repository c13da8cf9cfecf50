"""FLUX.1: 19 dual-stream and 38 single-stream blocks, 12B parameters, and any smaller one of its class."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor, nn

from fewstep.models.conditioning import TextConditioning
from fewstep.models.packing import PATCH, PackedTransformer, pack


@dataclass(frozen=True)
class Flux(PackedTransformer):
    """Family of diffusers' `FluxTransformer2DModel`.

    Args:
        embedded_guidance: the guidance scale that a guidance-distilled network (FLUX.1 dev, FLUX.2 dev) is told
            beside the time, one number or one per sample (B,); None for networks that take none (FLUX.1 schnell).
    """

    embedded_guidance: float | Tensor | None = None

    name: ClassVar[str] = "flux"
    network: ClassVar[str] = "FluxTransformer2DModel"

    def denoise(self, transformer: nn.Module, x: Tensor, t: Tensor, conditioning: TextConditioning) -> Tensor:
        tokens = pack(x)
        rows, columns = (side // PATCH for side in x.shape[-2:])
        return transformer(
            hidden_states=tokens,
            encoder_hidden_states=conditioning.states,
            timestep=t,
            guidance=self._guidance(x),
            joint_attention_kwargs={"attention_mask": joint_mask(conditioning.mask, tokens.shape[1])},
            return_dict=False,
            **self.inputs_beside(conditioning, rows, columns),
        )[0]

    def inputs_beside(self, conditioning: TextConditioning, rows: int, columns: int) -> dict[str, Tensor]:
        """What the network takes beside tokens, time and guidance: rotary positions, and here the pooled text.

        Args:
            conditioning: of L text tokens.
            rows, columns: of the image's tokens.
        """
        device, length = conditioning.states.device, conditioning.states.shape[1]
        return {
            "pooled_projections": conditioning.summary(),
            # Positions (image, row, column): those of text are all zero.
            "img_ids": grid(1, rows, columns, device=device),
            "txt_ids": torch.zeros(length, 3, device=device),
        }

    def _guidance(self, x: Tensor) -> Tensor | None:
        """The guidance scale as the network takes it, (B,)."""
        scale = self.embedded_guidance
        if isinstance(scale, Tensor):
            return scale.to(x)
        return None if scale is None else x.new_full((len(x),), scale)

    def pooled_width(self, transformer: nn.Module) -> int | None:
        return transformer.config.pooled_projection_dim

    def takes_guidance(self, transformer: nn.Module) -> bool:
        return transformer.config.guidance_embeds

    def lora_targets(self, transformer: nn.Module) -> list[str]:
        single = [
            f"single_transformer_blocks.{index}.{layer}"  # in full: the network itself ends in a `proj_out`, too
            for index in range(len(transformer.single_transformer_blocks))
            for layer in ("proj_mlp", "proj_out")
        ]
        return [
            "ff.net.0.proj",
            "ff.net.2",
            "ff_context.net.0.proj",
            "ff_context.net.2",
            "timestep_embedder.linear_1",
            "timestep_embedder.linear_2",
            *single,
        ]

    def blocks(self, transformer: nn.Module) -> list[nn.Module]:
        return [*transformer.transformer_blocks, *transformer.single_transformer_blocks]

    def unused_parameters(self, transformer: nn.Module) -> list[str]:
        return []  # the single-stream blocks at the end mix text into the image up to the last one


def grid(*sizes: int, device: torch.device) -> Tensor:
    """Every position of a grid of those sizes, the last axis fastest, (positions, axes) int64."""
    return torch.cartesian_prod(*(torch.arange(size, device=device) for size in sizes))


def joint_mask(text: Tensor, image_tokens: int) -> Tensor:
    """Which tokens are attended to: text that is not padding, then all of the image; (B, 1, 1, L + image_tokens).

    FLUX's own sampler pads every prompt to one length and attends to the padding. Here a batch is padded to its
    longest caption, on which no sample may depend; padding that a model was trained with belongs to the states.
    """
    return torch.cat([text, text.new_ones(len(text), image_tokens)], dim=1)[:, None, None]
