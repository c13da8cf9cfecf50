"""Stable Diffusion 3 and 3.5: dual-stream transformers of 24 to 38 blocks, 2B to 8B parameters; and smaller ones."""

from __future__ import annotations

import math
from dataclasses import replace
from typing import ClassVar

from torch import Tensor, nn

from fewstep.models.conditioning import TextConditioning
from fewstep.models.diffusers_family import DiffusersFamily
from fewstep.models.ending import Ending
from fewstep.models.family import Transformer
from fewstep.models.packing import unpack_channel_last


class SD3(DiffusersFamily):
    """Family of diffusers' `SD3Transformer2DModel`.

    The network has no mask: it attends to all states it is given, the padding of its text encoders included. Those
    give every caption the same number of tokens, so that no batch has padding of its own.
    """

    name = "sd3"
    network: ClassVar[str] = "SD3Transformer2DModel"
    pipeline: ClassVar[str] = "StableDiffusion3Pipeline"
    time_embedding: ClassVar[str] = "time_text_embed"
    passes_sigmas: ClassVar[bool] = False

    def denoise(
        self,
        transformer: Transformer,
        x: Tensor,
        t: Tensor,
        conditioning: TextConditioning,
        guidance_scale: float | Tensor | None = None,
    ) -> Tensor:
        """Call the network; it takes no guidance scale."""
        return self.tokens_of(
            transformer,
            hidden_states=x,
            encoder_hidden_states=conditioning.states,
            pooled_projections=conditioning.summary(),
            timestep=self.embedded_time(t),
        )

    def ending(self, transformer: Transformer) -> Ending:
        """The last norm and projection."""
        return replace(super().ending(transformer), channel_last=True)

    def latent_channels(self, transformer: Transformer) -> int:
        """Latent channels C."""
        return transformer.config.in_channels

    def condition_width(self, transformer: Transformer) -> int:
        """Width D of the token states."""
        return transformer.config.joint_attention_dim

    def pooled_width(self, transformer: Transformer) -> int | None:
        """Width P of the whole caption's vector, of both CLIP encoders together."""
        return transformer.config.pooled_projection_dim

    def patch(self, transformer: Transformer) -> int:
        """Side of a patch."""
        return transformer.config.patch_size

    def largest_side(self, transformer: Transformer) -> int | None:
        """Most latent height and width, those of the network's table of positions."""
        return transformer.config.pos_embed_max_size * transformer.config.patch_size

    def unpack(self, tokens: Tensor, channels: int, height: int, width: int) -> Tensor:
        """Packed tokens (B, L, n·c·p²) → n latents per sample, (B, n, c, H, W)."""
        patch = math.isqrt(height * width // tokens.shape[1])
        return unpack_channel_last(tokens, channels, height, width, patch)

    def lora_targets(self, transformer: Transformer) -> list[str]:
        """Image and text FFNs, and the time embedding."""
        text = [
            f"transformer_blocks.{index}.ff_context.{layer}"
            for index in range(len(transformer.transformer_blocks) - 1)  # the last block has none
            for layer in ("net.0.proj", "net.2")
        ]
        return [
            "ff.net.0.proj",
            "ff.net.2",
            # The embedding of the pooled text has layers of these names, too.
            "timestep_embedder.linear_1",
            "timestep_embedder.linear_2",
            *text,
        ]

    def blocks(self, transformer: Transformer) -> list[nn.Module]:
        """Its transformer blocks."""
        return list(transformer.transformer_blocks)

    def unused_parameters(self, transformer: Transformer) -> list[str]:
        """The text's queries in the last block, whose text stream is not continued."""
        # Its keys and values are read by the image.
        last = f"transformer_blocks.{len(transformer.transformer_blocks) - 1}.attn."
        dead = (f"{last}add_q_proj.", f"{last}norm_added_q.")
        return [name for name, _ in transformer.named_parameters() if name.startswith(dead)]
