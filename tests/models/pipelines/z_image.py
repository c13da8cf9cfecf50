"""A tiny pipeline of Z-Image."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from diffusers import FlowMatchEulerDiscreteScheduler, ZImagePipeline, ZImageTransformer2DModel
from pipelines.parts import autoencoder, call, opened, tokenizer, varied
from torch import Tensor
from transformers import Qwen3Config, Qwen3Model

CONFIG: dict[str, Any] = {
    "in_channels": 4, "dim": 264, "n_layers": 1, "n_refiner_layers": 1, "n_heads": 2, "n_kv_heads": 2,
    "cap_feat_dim": 16, "axes_dims": [44, 44, 44], "axes_lens": [1024, 16, 16],
}  # fmt: skip
"""More than 256 wide, as the time embedding is never wider than that."""


def write(folder: Path) -> None:
    """Write the pipeline, with random weights that are the same at each call."""
    torch.manual_seed(0)
    words = tokenizer(folder / "tokenizer", words="user assistant think")
    qwen = Qwen3Config(
        vocab_size=len(words), hidden_size=16, intermediate_size=24, num_hidden_layers=3, num_attention_heads=2,
        num_key_value_heads=1, head_dim=8,
    )  # fmt: skip
    ZImagePipeline(
        scheduler=FlowMatchEulerDiscreteScheduler(shift=3.0),
        vae=autoencoder(),
        text_encoder=Qwen3Model(qwen).eval(),
        tokenizer=words,
        transformer=varied(ZImageTransformer2DModel(**CONFIG)),
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
        opened(folder, "ZImagePipeline"), prompts, noise, steps, latents=noise,
        guidance_scale=guidance_scale - 1,  # it counts from 0
        negative_prompt=None if negative is None else [negative] * len(prompts),
    )  # fmt: skip
