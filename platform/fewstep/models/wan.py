"""Wan 2.1: a transformer of 30 or 40 blocks for videos from texts, 1.3B or 14B parameters; and smaller ones."""

from __future__ import annotations

import json
import math
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, ClassVar, cast

from torch import Tensor, nn
from torch.nn import functional as F

from fewstep.models.conditioning import TextConditioning
from fewstep.models.diffusers_family import DiffusersFamily
from fewstep.models.ending import Ending, LateTime, SwitchedNorm, TokenCatch, last_modules
from fewstep.models.family import Transformer
from fewstep.models.packing import unpack_channel_last
from fewstep.models.pretrained import network_folder

TEXT_TOKENS = 512
"""Text tokens that the network is always given: zeros follow a shorter text, and are attended to."""


@dataclass(frozen=True)
class Wan(DiffusersFamily):
    """Family of diffusers' `WanTransformer3DModel`, of networks that take a text and no image.

    A video's latent frames stand under each other in one latent: (C, T·H, W) for T frames of (C, H, W). Nothing but the
    network itself and the autoencoder has to know of frames then, as all else acts on each latent cell by itself.

    Args:
        frames: latent frames T of a video; 1 for images.
    """

    frames: int = 1

    network: ClassVar[str] = "WanTransformer3DModel"
    pipeline: ClassVar[str] = "WanPipeline"
    time_embedding: ClassVar[str] = "condition_embedder"
    late_time: ClassVar[bool] = True
    passes_sigmas: ClassVar[bool] = False

    @property
    def name(self) -> str:
        """wan, or for videos wan:FRAMES."""
        return "wan" if self.frames == 1 else f"wan:{self.frames}"

    def of_frames(self, frames: int) -> Wan:
        """The family of videos of so many latent frames."""
        return replace(self, frames=frames)

    def denoise(
        self,
        transformer: Transformer,
        x: Tensor,
        t: Tensor,
        conditioning: TextConditioning,
        guidance_scale: float | Tensor | None = None,
    ) -> Tensor:
        """Call the network; it takes no guidance scale."""
        missing = max(0, TEXT_TOKENS - conditioning.states.shape[1])

        def call() -> Any:
            return transformer(
                hidden_states=x.unflatten(2, (self.frames, -1)),  # (B, C, T, H, W)
                timestep=self.embedded_time(t),
                encoder_hidden_states=F.pad(conditioning.states, (0, 0, 0, missing)),
                return_dict=False,
            )

        return _tokens(transformer, call)

    def ending(self, transformer: Transformer) -> Ending:
        """The last norm with the network's table of scale and shift, and its projection."""
        norm, projection = last_modules(transformer, self.last_layers)
        modulated = _NormWithTable(norm, transformer.scale_shift_table)
        return Ending(modulated, cast(nn.Linear, projection), channel_last=True)

    def latent_channels(self, transformer: Transformer) -> int:
        """Latent channels C."""
        return transformer.config.in_channels

    def condition_width(self, transformer: Transformer) -> int:
        """Width D of the token states."""
        return transformer.config.text_dim

    def patch(self, transformer: Transformer) -> int:
        """Side of a patch, which is of one frame."""
        return transformer.config.patch_size[-1]

    def largest_side(self, transformer: Transformer) -> int | None:
        """Most latent height and width of a frame, those of the network's table of positions."""
        return self.patch(transformer) * transformer.config.rope_max_seq_len

    def unpack(self, tokens: Tensor, channels: int, height: int, width: int) -> Tensor:
        """Packed tokens (B, L, n·c·p²), frame by frame → n latents per sample, (B, n, c, T·H, W)."""
        patch = math.isqrt(height * width // tokens.shape[1])
        return unpack_channel_last(tokens, channels, height, width, patch)

    def lora_targets(self, transformer: Transformer) -> list[str]:
        """The FFN of every block, and the time embedding."""
        return [
            "ffn.net.0.proj",
            "ffn.net.2",
            # The embedding of the text has a linear_1 and linear_2, too.
            "time_embedder.linear_1",
            "time_embedder.linear_2",
        ]

    def blocks(self, transformer: Transformer) -> list[nn.Module]:
        """Its transformer blocks."""
        return list(transformer.blocks)

    def unused_parameters(self, transformer: Transformer) -> list[str]:
        """None of a teacher; of a student the last table of scale and shift, of which its head has its own copy."""
        return ["scale_shift_table"] if isinstance(transformer.norm_out, SwitchedNorm) else []

    def unsupported(self, transformer: Transformer) -> str | None:
        """Images beside the text, or patches of several frames."""
        config = transformer.config
        if config.image_dim is not None or config.added_kv_proj_dim is not None:
            return "an image beside the text (image_dim, added_kv_proj_dim)"
        if config.out_channels not in (None, config.in_channels):
            return "an image beside the noise (more in_channels than out_channels)"
        if config.patch_size[0] != 1 or config.patch_size[1] != config.patch_size[2]:
            return f"patches of {tuple(config.patch_size)} cells (frames, rows, columns)"
        return None

    def load(self, path: str) -> Transformer:
        """The network of a diffusers folder or hub id, in float32."""
        _check_pipeline(path)
        return super().load(path)

    def skeleton(self, path: str) -> tuple[Transformer, Path | None]:
        """The network with its parameters on the meta device, and the folder of safetensors that has them."""
        _check_pipeline(path)
        return super().skeleton(path)


def _check_pipeline(path: str) -> None:
    """Refuse the pipelines of Wan 2.2.

    Raises:
        ValueError: the network is one of a pair, or its frames have times of their own.
    """
    folder = network_folder(path)
    index = folder.parent / "model_index.json"
    if folder.name != "transformer" or not index.exists():
        return
    settings = json.loads(index.read_text())
    if settings.get("boundary_ratio") is not None:
        raise ValueError(
            "its pipeline has a second network for small σ (boundary_ratio), and a student has one teacher: give a Wan "
            "2.1 text-to-video model"
        )
    if settings.get("expand_timesteps"):
        raise ValueError(
            "each of its tokens has a time of its own (expand_timesteps), which the family wan does not give it: give "
            "a Wan 2.1 text-to-video model"
        )


def _tokens(transformer: Transformer, call: Callable[[], Any]) -> Tensor:
    """The tokens of a call of the network in its present role: of its projection, or of the student's head.

    The network scales and shifts what its last norm gives, by the time embedding that the norm does not get. So the
    student's head, in the norm's place, is given it here, and what it gives is caught before it is scaled.
    """
    LateTime.carry(transformer, Wan.time_embedding, "norm_out")
    norm, config = transformer.norm_out, transformer.config
    if isinstance(norm, SwitchedNorm) and norm.student:
        width = config.num_attention_heads * config.attention_head_dim
        return TokenCatch.of(transformer, "norm_out", width).during(call)
    return TokenCatch.of(transformer, "proj_out", config.in_channels * config.patch_size[-1] ** 2).during(
        call
    )


class _NormWithTable(nn.Module):
    """The last norm, and what the network does with its result: (B, L, D), time embedding (B, D) → (B, L, D)."""

    def __init__(self, norm: nn.Module, table: nn.Parameter) -> None:
        super().__init__()
        self.norm, self.scale_shift_table = norm, table

    def forward(self, hidden: Tensor, embedding: Tensor) -> Tensor:
        shift, scale = (self.scale_shift_table + embedding[:, None]).chunk(2, dim=1)
        return self.norm(hidden) * (1 + scale) + shift
