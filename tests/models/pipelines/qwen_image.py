"""A tiny pipeline of Qwen-Image."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from diffusers import (
    AutoencoderKLQwenImage,
    FlowMatchEulerDiscreteScheduler,
    QwenImagePipeline,
    QwenImageTransformer2DModel,
)
from pipelines.parts import CELL, CHANNELS, call, opened, qwen2_5_vl, tokenizer
from torch import Tensor

CONFIG: dict[str, Any] = {
    "patch_size": 2, "in_channels": 4 * CHANNELS, "out_channels": CHANNELS, "num_layers": 2,
    "attention_head_dim": 16, "num_attention_heads": 2, "joint_attention_dim": 16, "axes_dims_rope": (4, 6, 6),
}  # fmt: skip
"""Of the network."""

TIMES = {
    "use_dynamic_shifting": True, "base_shift": 0.5, "max_shift": 0.9, "base_image_seq_len": 256,
    "max_image_seq_len": 8192, "shift_terminal": 0.02, "time_shift_type": "exponential",
}  # fmt: skip
"""Of the scheduler."""


def write(folder: Path) -> None:
    """Write the pipeline, with random weights that are the same at each call."""
    torch.manual_seed(0)
    vae = AutoencoderKLQwenImage(
        base_dim=4, z_dim=CHANNELS, dim_mult=[1, 1], num_res_blocks=1, temperal_downsample=[False],
        latents_mean=[0.5, -0.25, 0.1, 0.0], latents_std=[2.0, 1.5, 2.5, 1.0],
    )  # fmt: skip
    words = tokenizer(folder / "tokenizer")
    QwenImagePipeline(
        scheduler=FlowMatchEulerDiscreteScheduler(**TIMES),
        vae=vae.eval(),
        text_encoder=qwen2_5_vl(len(words)),
        tokenizer=words,
        transformer=QwenImageTransformer2DModel(**CONFIG).eval(),
    ).save_pretrained(folder)


def sample(
    folder: Path,
    prompts: list[str],
    noise: Tensor,
    steps: int,
    guidance_scale: float,
    negative: str | None = None,
) -> Tensor:
    """See `Case.sample`; with the pipeline's renormalised guidance."""
    latents = call(
        opened(folder, "QwenImagePipeline"), prompts, noise, steps,
        latents=QwenImagePipeline._pack_latents(noise, *noise.shape), true_cfg_scale=guidance_scale,
        negative_prompt=[negative or ""] * len(prompts),
    )  # fmt: skip
    size = (CELL * side for side in noise.shape[-2:])
    return QwenImagePipeline._unpack_latents(latents, *size, CELL)[:, :, 0]
