"""A tiny pipeline of LongCat-Image."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from diffusers import FlowMatchEulerDiscreteScheduler, LongCatImagePipeline, LongCatImageTransformer2DModel
from pipelines.parts import (
    CELL,
    CHANNELS,
    FLUX_TIMES,
    autoencoder,
    call,
    opened,
    qwen2_5_vl,
    tokenizer,
)
from torch import Tensor

CONFIG: dict[str, Any] = {
    "patch_size": 1, "in_channels": 4 * CHANNELS, "num_layers": 1, "num_single_layers": 1,
    "attention_head_dim": 16, "num_attention_heads": 2, "joint_attention_dim": 16, "axes_dims_rope": (4, 6, 6),
}  # fmt: skip
"""Of the network."""


def write(folder: Path) -> None:
    """Write the pipeline, with random weights that are the same at each call."""
    torch.manual_seed(0)
    words = tokenizer(folder / "tokenizer")
    LongCatImagePipeline(
        scheduler=FlowMatchEulerDiscreteScheduler(**FLUX_TIMES),
        vae=autoencoder(),
        text_encoder=qwen2_5_vl(len(words)),
        tokenizer=words,
        text_processor=None,  # only for the rewriting of prompts
        transformer=LongCatImageTransformer2DModel(**CONFIG).eval(),
    ).save_pretrained(folder)


def sample(
    folder: Path,
    prompts: list[str],
    noise: Tensor,
    steps: int,
    guidance_scale: float,
    negative: str | None = None,
) -> Tensor:
    """See `Case.sample`; with the pipeline's renormalised guidance, and without its rewriting of prompts."""
    latents = call(
        opened(folder, "LongCatImagePipeline", text_processor=None), prompts, noise, steps,
        latents=LongCatImagePipeline._pack_latents(noise, *noise.shape), guidance_scale=guidance_scale,
        negative_prompt=[negative or ""] * len(prompts), enable_prompt_rewrite=False,
    )  # fmt: skip
    return LongCatImagePipeline._unpack_latents(latents, *(CELL * side for side in noise.shape[-2:]), CELL)
