"""A tiny pipeline of Stable Diffusion 3.5, as the medium model is: dual attention in its first layers."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from diffusers import FlowMatchEulerDiscreteScheduler, SD3Transformer2DModel, StableDiffusion3Pipeline
from pipelines.parts import autoencoder, call, opened, tokenizer, varied
from torch import Tensor
from transformers import (
    CLIPTextConfig,
    CLIPTextModelWithProjection,
    T5Config,
    T5EncoderModel,
)

CONFIG: dict[str, Any] = {
    "sample_size": 8, "patch_size": 2, "in_channels": 4, "out_channels": 4, "num_layers": 3,
    "attention_head_dim": 8, "num_attention_heads": 3, "joint_attention_dim": 28, "caption_projection_dim": 24,
    "pooled_projection_dim": 14, "pos_embed_max_size": 12, "dual_attention_layers": (0, 1),
    "qk_norm": "rms_norm",
}  # fmt: skip


def write(folder: Path) -> None:
    """Write the pipeline, with random weights that are the same at each call."""
    torch.manual_seed(0)
    parts: dict[str, Any] = {}
    for suffix, width, projection in (("", 8, 6), ("_2", 12, 8)):
        words = tokenizer(folder / f"tokenizer{suffix}", "<s> $A </s>", model_max_length=77)
        clip = CLIPTextConfig(
            vocab_size=len(words), hidden_size=width, intermediate_size=16, num_hidden_layers=3,
            num_attention_heads=2, projection_dim=projection, bos_token_id=1, eos_token_id=3, pad_token_id=0,
        )  # fmt: skip
        parts[f"text_encoder{suffix}"] = CLIPTextModelWithProjection(clip).eval()
        parts[f"tokenizer{suffix}"] = words
    words = parts["tokenizer_3"] = tokenizer(folder / "tokenizer_3", "$A </s>", model_max_length=512)
    t5 = T5Config(
        vocab_size=len(words), d_model=28, d_kv=4, d_ff=16, num_layers=2, num_heads=3, eos_token_id=3
    )
    parts["text_encoder_3"] = T5EncoderModel(t5).eval()
    StableDiffusion3Pipeline(
        transformer=varied(SD3Transformer2DModel(**CONFIG)),
        scheduler=FlowMatchEulerDiscreteScheduler(shift=3.0),
        vae=autoencoder(1.5305, 0.0609),
        **parts,
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
    return call(
        opened(folder, "StableDiffusion3Pipeline"), prompts, noise, steps, latents=noise,
        guidance_scale=guidance_scale,
        negative_prompt=None if negative is None else [negative] * len(prompts),
    )  # fmt: skip
