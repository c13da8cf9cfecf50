"""Z-Image: a single-stream transformer of 30 blocks after two pairs of refiners, 6B parameters; and smaller ones."""

from __future__ import annotations

from typing import Any, ClassVar, cast

from torch import Tensor, nn

from fewstep.models.conditioning import TextConditioning
from fewstep.models.diffusers_family import DiffusersFamily
from fewstep.models.ending import Ending, last_modules
from fewstep.models.family import Transformer
from fewstep.models.packing import PATCH, unpack_channel_last

LAST_LAYER = f"all_final_layer.{PATCH}-1"
"""The last layer for patches of 2×2 cells of one frame."""


class ZImage(DiffusersFamily):
    """Family of diffusers' `ZImageTransformer2DModel`.

    The network takes the time reversed, 0 for noise and 1 for data, and predicts −u. It takes captions as a list of
    their own lengths, pads each to a multiple of 32 by tokens of its own, and attends to that padding; where an image's
    positions begin follows from its own caption alone. So captions of different lengths are one batch.
    """

    name = "z_image"
    network: ClassVar[str] = "ZImageTransformer2DModel"
    pipeline: ClassVar[str] = "ZImagePipeline"
    time_embedding: ClassVar[str] = "t_embedder"
    last_layers: ClassVar[tuple[str, ...]] = (LAST_LAYER,)
    joint_layers: ClassVar[tuple[str, ...]] = ("all_x_embedder.", "cap_embedder.")

    def embedded_time(self, t: Tensor) -> Tensor:
        """What the module that embeds the time is called with for σ = t, (B,) float32."""
        return self.time_scale * (1 - t.float())

    def denoise(
        self,
        transformer: Transformer,
        x: Tensor,
        t: Tensor,
        conditioning: TextConditioning,
        guidance_scale: float | Tensor | None = None,
    ) -> Tensor:
        """Call the network; it takes no guidance scale. Its tokens are −u."""
        texts = zip(conditioning.states, conditioning.lengths, strict=True)
        captions = [states[:length] for states, length in texts]
        # An axis of one frame: (C, 1, H, W) each
        tokens = self.tokens_of(transformer, list(x.unsqueeze(2)), 1 - t, captions)
        # The image's tokens come before its padding and the caption's. Copied, as FSDP warns of results that are views.
        return tokens[:, : x.shape[-2] * x.shape[-1] // PATCH**2].clone()

    def ending(self, transformer: Transformer) -> Ending:
        """The last layer's norm and projection; it predicts −u."""
        [layer] = last_modules(transformer, self.last_layers)
        modulation: Any = layer.adaLN_modulation
        return Ending(
            _ScaledNorm(layer),
            cast(nn.Linear, layer.linear),
            sign=-1.0,
            channel_last=True,
            time_width=modulation[-1].in_features,
        )

    def velocity(self, tokens: Tensor, channels: int, height: int, width: int) -> Tensor:
        """The velocity (B, C, H, W), float32, that the teacher's packed tokens (B, L, C·4), −u, are."""
        return -super().velocity(tokens, channels, height, width)

    def latent_channels(self, transformer: Transformer) -> int:
        """Latent channels C."""
        return transformer.config.in_channels

    def condition_width(self, transformer: Transformer) -> int:
        """Width D of the token states."""
        return transformer.config.cap_feat_dim

    def patch(self, transformer: Transformer) -> int:
        """2, in latent cells."""
        return PATCH

    def largest_side(self, transformer: Transformer) -> int | None:
        """Most latent height and width, those of the network's tables of positions."""
        return PATCH * min(transformer.config.axes_lens[1:])

    def unpack(self, tokens: Tensor, channels: int, height: int, width: int) -> Tensor:
        """Packed tokens (B, L, n·c·4) → n latents per sample, (B, n, c, H, W)."""
        return unpack_channel_last(tokens, channels, height, width)

    def lora_targets(self, transformer: Transformer) -> list[str]:
        """The FFN of every block, refiners included, and the time embedding."""
        return [
            "feed_forward.w1",
            "feed_forward.w2",
            "feed_forward.w3",
            "t_embedder.mlp.0",
            "t_embedder.mlp.2",
        ]

    def blocks(self, transformer: Transformer) -> list[nn.Module]:
        """Refiners of image and caption, then the blocks of both."""
        return [*transformer.noise_refiner, *transformer.context_refiner, *transformer.layers]

    def unused_parameters(self, transformer: Transformer) -> list[str]:
        """None. (Those of the padding get a gradient of zero where nothing is padded.)"""
        return []


class _ScaledNorm(nn.Module):
    """The last layer without its projection: (B, L, D), time embedding → (B, L, D)."""

    def __init__(self, layer: Any) -> None:
        super().__init__()
        self.norm_final, self.adaLN_modulation = layer.norm_final, layer.adaLN_modulation

    def forward(self, hidden: Tensor, embedding: Tensor) -> Tensor:
        return self.norm_final(hidden) * (1 + self.adaLN_modulation(embedding))[:, None]
