"""A tiny pipeline of Wan 2.1."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from diffusers import AutoencoderKLWan, FlowMatchEulerDiscreteScheduler, WanPipeline, WanTransformer3DModel
from pipelines.parts import opened, tokenizer, varied
from torch import Tensor
from transformers import UMT5Config, UMT5EncoderModel

CONFIG: dict[str, Any] = {
    "num_attention_heads": 2, "attention_head_dim": 12, "in_channels": 4, "out_channels": 4, "text_dim": 16,
    "freq_dim": 32, "ffn_dim": 40, "num_layers": 2, "rope_max_seq_len": 16,
}  # fmt: skip

FRAMES = 2
"""Latent frames."""

CELL, PICTURES = 4, 5
"""Pixels per latent cell along each side, and pictures of two latent frames."""


def video_autoencoder() -> Any:
    """A tiny autoencoder of videos: four pictures of each latent frame but the first."""
    levels = {"dim_mult": [1, 1, 1], "num_res_blocks": 1, "temperal_downsample": [True, True]}
    statistics = {"latents_mean": [0.1, -0.2, 0.3, 0.0], "latents_std": [1.5, 0.5, 1.0, 2.0]}
    return AutoencoderKLWan(base_dim=4, z_dim=4, scale_factor_spatial=CELL, **levels, **statistics).eval()


def write(folder: Path) -> None:
    """Write the pipeline, with random weights that are the same at each call."""
    torch.manual_seed(0)
    words = tokenizer(folder / "tokenizer", "$A </s>", model_max_length=512)
    umt5 = UMT5Config(
        vocab_size=len(words), d_model=16, d_kv=4, d_ff=16, num_layers=2, num_heads=3, eos_token_id=3
    )
    WanPipeline(
        scheduler=FlowMatchEulerDiscreteScheduler(shift=3.0),
        vae=varied(video_autoencoder()),
        text_encoder=varied(UMT5EncoderModel(umt5)),
        tokenizer=words,
        transformer=varied(WanTransformer3DModel(**CONFIG)),
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
    pipe = opened(folder, "WanPipeline")
    video = pipe(
        prompt=list(prompts), num_inference_steps=steps, output_type="latent", guidance_scale=guidance_scale,
        negative_prompt=None if negative is None else [negative] * len(prompts),
        # (B, C, T·H, W) → (B, C, T, H, W)
        latents=noise.unflatten(2, (FRAMES, -1)), height=16, width=16, num_frames=PICTURES,
    ).frames  # fmt: skip
    return video.flatten(2, 3)
