"""A tiny pipeline of FLUX.2 klein: guided by a second pass, with a Qwen3 as text encoder."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from diffusers import FlowMatchEulerDiscreteScheduler, Flux2KleinPipeline, Flux2Transformer2DModel
from pipelines.parts import (
    CHANNELS,
    FLUX_TIMES,
    LANGUAGE,
    call,
    flux2_autoencoder,
    opened,
    tokenizer,
)
from torch import Tensor
from transformers import Qwen3Config, Qwen3ForCausalLM

CONFIG: dict[str, Any] = {
    "patch_size": 1, "in_channels": 4 * CHANNELS, "num_layers": 1, "num_single_layers": 1,
    "attention_head_dim": 16, "num_attention_heads": 2, "joint_attention_dim": 3 * 16, "guidance_embeds": False,
    "axes_dims_rope": (4, 4, 4, 4),
}  # fmt: skip
"""Of the network."""


def write(folder: Path) -> None:
    """Write the pipeline, with random weights that are the same at each call."""
    torch.manual_seed(0)
    words = tokenizer(folder / "tokenizer")
    # States of layer 27 are used.
    language = Qwen3Config(**LANGUAGE, vocab_size=len(words), head_dim=8, num_hidden_layers=28)
    Flux2KleinPipeline(
        scheduler=FlowMatchEulerDiscreteScheduler(**FLUX_TIMES),
        vae=flux2_autoencoder(),
        text_encoder=Qwen3ForCausalLM(language).eval(),
        tokenizer=words,
        transformer=Flux2Transformer2DModel(**CONFIG).eval(),
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
    assert not negative
    pipe = opened(folder, "Flux2KleinPipeline")
    patches = pipe._patchify_latents(noise)
    raw = call(pipe, prompts, noise, steps, latents=patches, guidance_scale=guidance_scale)
    # The pipeline gives the autoencoder's own units.
    std = (pipe.vae.bn.running_var + pipe.vae.config.batch_norm_eps).sqrt().view(1, -1, 1, 1)
    normed = (pipe._patchify_latents(raw) - pipe.vae.bn.running_mean.view(1, -1, 1, 1)) / std
    return pipe._unpatchify_latents(normed)
