"""A tiny pipeline of Krea 2."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from diffusers import (
    AutoencoderKLQwenImage,
    FlowMatchEulerDiscreteScheduler,
    Krea2Pipeline,
    Krea2Transformer2DModel,
)
from pipelines.parts import CELL, call, opened, qwen3_vl, tokenizer, varied
from torch import Tensor
from transformers import Qwen3VLModel

LAYERS = (1, 2, 4)
"""Of the text encoder's hidden states, those that the network takes."""

CONFIG: dict[str, Any] = {
    "in_channels": 16, "num_layers": 2, "attention_head_dim": 12, "num_attention_heads": 2,
    "num_key_value_heads": 1, "intermediate_size": 32, "timestep_embed_dim": 16, "text_hidden_dim": 16,
    "num_text_layers": len(LAYERS), "text_num_attention_heads": 2, "text_num_key_value_heads": 2,
    "text_intermediate_size": 24, "num_layerwise_text_blocks": 1, "num_refiner_text_blocks": 1,
    "axes_dims_rope": (4, 4, 4),
}  # fmt: skip

WORDS = """system user assistant describe the image by detailing the color shape size texture quantity text spatial
relationships of the objects and background"""
"""Of the pipeline's template, whose beginning it takes to be 34 tokens and whose end 5."""


def write(folder: Path) -> None:
    """Write the pipeline, with random weights that are the same at each call."""
    torch.manual_seed(0)
    words = tokenizer(folder / "tokenizer", words=WORDS)
    vae = AutoencoderKLQwenImage(
        base_dim=4, z_dim=4, dim_mult=[1, 1], num_res_blocks=1, temperal_downsample=[False],
        latents_mean=[0.1, -0.2, 0.3, 0.0], latents_std=[1.5, 2.0, 0.8, 1.1],
    )  # fmt: skip
    Krea2Pipeline(
        scheduler=FlowMatchEulerDiscreteScheduler(
            use_dynamic_shifting=True, base_shift=0.5, max_shift=1.15, base_image_seq_len=256,
            max_image_seq_len=6400,
        ),
        vae=vae,
        text_encoder=Qwen3VLModel(qwen3_vl(len(words), layers=4)).eval(),
        tokenizer=words,
        transformer=varied(Krea2Transformer2DModel(**CONFIG)),
        text_encoder_select_layers=LAYERS,
    ).save_pretrained(folder)  # fmt: skip


def sample(
    folder: Path,
    prompts: list[str],
    noise: Tensor,
    steps: int,
    guidance_scale: float,
    negative: str | None = None,
) -> Tensor:
    """See `Case.sample`."""
    pipe = opened(folder, "Krea2Pipeline")
    tokens = call(
        pipe, prompts, noise, steps, latents=pipe._pack_latents(noise, *noise.shape),
        guidance_scale=guidance_scale - 1,  # it counts from 0
        negative_prompt=None if negative is None else [negative] * len(prompts),
    )  # fmt: skip
    return pipe._unpack_latents(tokens, *(CELL * side for side in noise.shape[2:]))[:, :, 0]
