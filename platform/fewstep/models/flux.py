"""FLUX.1: 19 dual-stream and 38 single-stream blocks, 12B parameters; and smaller networks of the same class."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor, nn

from fewstep.models.conditioning import TextConditioning
from fewstep.models.family import Transformer
from fewstep.models.packing import PATCH, PackedFamily, own_tokens, pack_all


@dataclass(frozen=True)
class Flux(PackedFamily):
    """Family of diffusers' `FluxTransformer2DModel`.

    Args:
        embedded_guidance_scale: the guidance scale that a guidance-distilled network (FLUX.1 dev, FLUX.2 dev) gets as
            an input, unless a call gives another; None for networks that take none (FLUX.1 schnell).
    """

    embedded_guidance_scale: float | None = None

    name = "flux"
    network: ClassVar[str] = "FluxTransformer2DModel"
    pipeline: ClassVar[str] = "FluxPipeline"
    time_embedding: ClassVar[str] = "time_text_embed"

    def denoise(
        self,
        transformer: Transformer,
        x: Tensor,
        t: Tensor,
        conditioning: TextConditioning,
        guidance_scale: float | Tensor | None = None,
    ) -> Tensor:
        """Call the network; guidance-distilled ones take `guidance_scale`, by default the family's own."""
        tokens = pack_all(x, conditioning.references)  # (B, L, C·4)
        rows, columns = (side // PATCH for side in x.shape[-2:])
        output = transformer(
            hidden_states=tokens,
            encoder_hidden_states=conditioning.states,
            timestep=t,
            guidance=self._guidance(x, guidance_scale),
            joint_attention_kwargs={"attention_mask": joint_mask(conditioning.mask, tokens.shape[1])},
            return_dict=False,
            **self.inputs_beside(conditioning, rows, columns),
        )[0]
        return own_tokens(output, x)

    def inputs_beside(self, conditioning: TextConditioning, rows: int, columns: int) -> dict[str, Tensor]:
        """The network's further inputs by name: rotary positions, and for FLUX.1 the vector of the whole text.

        Args:
            conditioning: texts of L tokens.
            rows, columns: number of the image's tokens in each direction.
        """
        device, length = conditioning.states.device, conditioning.states.shape[1]
        return {
            "pooled_projections": conditioning.summary(),
            # Positions (image, row, column); those of text tokens are all zero.
            "img_ids": grid(1, rows, columns, device=device),
            "txt_ids": torch.zeros(length, 3, device=device),
        }

    def _guidance(self, x: Tensor, scale: float | Tensor | None) -> Tensor | None:
        """The guidance scale as the network takes it, (B,), or None."""
        scale = self.embedded_guidance_scale if scale is None else scale
        if isinstance(scale, Tensor):
            return scale.to(x)
        # None for networks without the input, whose forward takes no guidance.
        return None if scale is None else x.new_full((len(x),), scale)

    def pooled_width(self, transformer: Transformer) -> int | None:
        """Width P of the whole caption's vector, which CLIP gives."""
        return transformer.config.pooled_projection_dim

    def takes_guidance(self, transformer: Transformer) -> bool:
        """Whether the network is guidance-distilled: FLUX.1 dev is, FLUX.1 schnell is not."""
        return transformer.config.guidance_embeds

    def lora_targets(self, transformer: Transformer) -> list[str]:
        """FFN and output layers of all blocks, and the time embedding (METHOD.md section 5)."""
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

    def blocks(self, transformer: Transformer) -> list[nn.Module]:
        """Dual-stream blocks, then single-stream ones."""
        return [*transformer.transformer_blocks, *transformer.single_transformer_blocks]

    def unused_parameters(self, transformer: Transformer) -> list[str]:
        """None: up to the last single-stream block, text is attended to by the image."""
        return []


def grid(*sizes: int, device: torch.device) -> Tensor:
    """All positions of a grid of these sizes, in order of memory (last axis fastest), (positions, axes) int64."""
    return torch.cartesian_prod(*(torch.arange(size, device=device) for size in sizes))


def joint_mask(text: Tensor, image_tokens: int) -> Tensor:
    """Mask of the tokens that are attended to: text without its padding, and all of the image.

    FLUX's own sampler pads every prompt to one length and attends to the padding. Here a batch is padded to its longest
    caption, which must not affect the other samples, so this padding is masked. Padding that a model was trained with
    is part of the text encoder's states, and not masked.

    Args:
        text: (B, L) bool, True where a token is.
        image_tokens: number of the image's tokens.

    Returns:
        (B, 1, 1, L + image_tokens) bool.
    """
    return torch.cat([text, text.new_ones(len(text), image_tokens)], dim=1)[:, None, None]
