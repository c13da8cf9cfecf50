"""Krea 2: a single-stream transformer of 28 blocks after a text fusion, 13B parameters; and smaller ones."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, ClassVar, cast

import torch
from torch import Tensor, nn

from fewstep.models.conditioning import TextConditioning
from fewstep.models.ending import Ending, last_modules
from fewstep.models.family import Transformer
from fewstep.models.flux import grid
from fewstep.models.packing import PATCH, PackedFamily, pack


class Krea2(PackedFamily):
    """Family of diffusers' `Krea2Transformer2DModel`.

    The network takes states of several layers of the text encoder for each token. Here a token's state is those of all
    layers, one layer after the other in the order of the pipeline's `text_encoder_select_layers`: D is 12·2,560 in the
    published model. Text tokens have no order and padding is masked, so only a caption's real tokens have to be kept.
    """

    name = "krea2"
    network: ClassVar[str] = "Krea2Transformer2DModel"
    pipeline: ClassVar[str] = "Krea2Pipeline"
    time_embedding: ClassVar[str] = "time_embed"
    time_scale: ClassVar[float] = 1.0
    last_layers: ClassVar[tuple[str, ...]] = ("final_layer",)

    def denoise(
        self,
        transformer: Transformer,
        x: Tensor,
        t: Tensor,
        conditioning: TextConditioning,
        guidance_scale: float | Tensor | None = None,
    ) -> Tensor:
        """Call the network; it takes no guidance scale."""
        rows, columns = (side // PATCH for side in x.shape[-2:])
        image = grid(1, rows, columns, device=x.device)
        layers = (transformer.config.num_text_layers, transformer.config.text_hidden_dim)
        return transformer(
            hidden_states=pack(x),
            encoder_hidden_states=conditioning.states.unflatten(-1, layers),
            timestep=t,
            # (image, row, column); those of text tokens are all zero.
            position_ids=torch.cat([image.new_zeros(conditioning.states.shape[1], 3), image]),
            encoder_attention_mask=conditioning.mask,
            return_dict=False,
        )[0]

    def schedule_mu(self, scheduler: Mapping[str, Any], tokens: int, steps: int) -> float:
        """log of the shift: as FLUX.1's, but up to 6,400 tokens where the scheduler does not say."""
        return super().schedule_mu({"max_image_seq_len": 6400, **scheduler}, tokens, steps)

    def ending(self, transformer: Transformer) -> Ending:
        """The last layer's norm with its modulation, and its projection."""
        [layer] = last_modules(transformer, self.last_layers)
        return Ending(_ModulatedNorm(layer), cast(nn.Linear, layer.linear))

    def condition_width(self, transformer: Transformer) -> int:
        """Width D of the token states: that of all the text encoder's layers together."""
        return transformer.config.num_text_layers * transformer.config.text_hidden_dim

    def lora_targets(self, transformer: Transformer) -> list[str]:
        """The FFN of every block, those of the text fusion included, and the time embedding."""
        # The projection of the text has a linear_1 and linear_2, too.
        return ["ff.gate", "ff.up", "ff.down", "time_embed.linear_1", "time_embed.linear_2"]

    def blocks(self, transformer: Transformer) -> list[nn.Module]:
        """Those of the text fusion, then those of text and image."""
        fusion = transformer.text_fusion
        return [*fusion.layerwise_blocks, *fusion.refiner_blocks, *transformer.transformer_blocks]

    def unused_parameters(self, transformer: Transformer) -> list[str]:
        """None: up to the last block, text is attended to by the image."""
        return []


class _ModulatedNorm(nn.Module):
    """The last layer without its projection: (B, L, D), time embedding (B, 1, D) → (B, L, D)."""

    def __init__(self, layer: Any) -> None:
        super().__init__()
        self.scale_shift_table, self.norm = layer.scale_shift_table, layer.norm

    def forward(self, hidden: Tensor, embedding: Tensor) -> Tensor:
        scale, shift = (embedding + self.scale_shift_table).chunk(2, dim=1)
        return (1 + scale) * self.norm(hidden) + shift
