"""A tiny pipeline of FLUX.1 dev: guidance-distilled, with T5's states and CLIP's vector."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from diffusers import FlowMatchEulerDiscreteScheduler, FluxPipeline, FluxTransformer2DModel
from pipelines.parts import (
    CELL,
    CHANNELS,
    FLUX_TIMES,
    autoencoder,
    call,
    opened,
    tokenizer,
)
from torch import Tensor
from transformers import CLIPTextConfig, CLIPTextModel, T5Config, T5EncoderModel

EMBEDDED_GUIDANCE = 3.5
"""The guidance scale that the network gets as an input."""

CONFIG: dict[str, Any] = {
    "patch_size": 1, "in_channels": 4 * CHANNELS, "num_layers": 1, "num_single_layers": 1,
    "attention_head_dim": 16, "num_attention_heads": 2, "joint_attention_dim": 24, "pooled_projection_dim": 12,
    "guidance_embeds": True, "axes_dims_rope": (4, 6, 6),
}  # fmt: skip
"""Of the network."""


def write(folder: Path) -> None:
    """Write the pipeline, with random weights that are the same at each call."""
    torch.manual_seed(0)
    whole = tokenizer(folder / "tokenizer", "<s> $A </s>", model_max_length=40)
    words = tokenizer(folder / "tokenizer_2", "$A </s>", model_max_length=512)
    t5 = T5Config(
        vocab_size=len(words), d_model=24, d_kv=4, d_ff=16, num_layers=2, num_heads=3, pad_token_id=0,
        eos_token_id=3,
    )  # fmt: skip
    clip = CLIPTextConfig(
        vocab_size=len(whole), hidden_size=12, intermediate_size=16, num_hidden_layers=2,
        num_attention_heads=2, max_position_embeddings=40, bos_token_id=1, eos_token_id=3, pad_token_id=0,
    )  # fmt: skip
    FluxPipeline(
        scheduler=FlowMatchEulerDiscreteScheduler(**FLUX_TIMES),
        vae=autoencoder(),
        text_encoder=CLIPTextModel(clip).eval(),
        tokenizer=whole,
        text_encoder_2=T5EncoderModel(t5).eval(),
        tokenizer_2=words,
        transformer=FluxTransformer2DModel(**CONFIG).eval(),
    ).save_pretrained(folder)


def sample(
    folder: Path,
    prompts: list[str],
    noise: Tensor,
    steps: int,
    guidance_scale: float,
    negative: str | None = None,
) -> Tensor:
    """See `Case.sample`."""
    packed = FluxPipeline._pack_latents(noise, *noise.shape)
    guidance: dict[str, Any] = {"guidance_scale": EMBEDDED_GUIDANCE, "true_cfg_scale": guidance_scale}
    if guidance_scale != 1:
        guidance |= {"negative_prompt": [negative or ""] * len(prompts)}
    latents = call(opened(folder, "FluxPipeline"), prompts, noise, steps, latents=packed, **guidance)
    return FluxPipeline._unpack_latents(latents, *(CELL * side for side in noise.shape[-2:]), CELL)
