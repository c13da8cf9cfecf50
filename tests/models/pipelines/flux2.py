"""A tiny pipeline of FLUX.2 dev: guidance-distilled, with a Mistral 3 as text encoder."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from diffusers import FlowMatchEulerDiscreteScheduler, Flux2Pipeline, Flux2Transformer2DModel
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
from transformers import Mistral3Config, Mistral3ForConditionalGeneration

EMBEDDED_GUIDANCE = 4.0
"""The guidance scale that the network gets as an input."""

CONFIG: dict[str, Any] = {
    "patch_size": 1, "in_channels": 4 * CHANNELS, "num_layers": 1, "num_single_layers": 1,
    "attention_head_dim": 16, "num_attention_heads": 2, "joint_attention_dim": 3 * 16, "guidance_embeds": True,
    "axes_dims_rope": (4, 4, 4, 4),
}  # fmt: skip
"""Of the network."""


def write(folder: Path) -> None:
    """Write the pipeline, with random weights that are the same at each call."""
    torch.manual_seed(0)
    words = tokenizer(folder / "tokenizer", padding_side="left")
    # Layer 30 is used.
    size = {"vocab_size": len(words), "head_dim": 8, "num_hidden_layers": 31}
    text = LANGUAGE | {"model_type": "mistral"} | size
    vision = {"model_type": "pixtral", "hidden_size": 8, "intermediate_size": 8, "num_attention_heads": 1}
    language = Mistral3Config(text_config=text, vision_config=vision | {"num_hidden_layers": 1})
    Flux2Pipeline(
        scheduler=FlowMatchEulerDiscreteScheduler(**FLUX_TIMES),
        vae=flux2_autoencoder(),
        text_encoder=Mistral3ForConditionalGeneration(language).eval(),
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
    """See `Case.sample`; which has no second pass."""
    assert guidance_scale == 1
    assert negative is None
    pipe = opened(folder, "Flux2Pipeline")
    patches = pipe._patchify_latents(noise)
    tokens = call(pipe, prompts, noise, steps, latents=patches, guidance_scale=EMBEDDED_GUIDANCE)
    return pipe._unpatchify_latents(tokens.transpose(1, 2).reshape(patches.shape))
