"""A tiny pipeline of Qwen-Image 2.1."""

from __future__ import annotations

import string
from pathlib import Path
from typing import Any
from unittest.mock import patch

import torch
from diffusers import (
    AutoencoderKLQwenImage21,
    FlowMatchEulerDiscreteScheduler,
    QwenImage21Pipeline,
    QwenImage21Transformer2DModel,
)
from pipelines.parts import opened, qwen3_vl, varied
from tokenizers import AddedToken, Tokenizer
from tokenizers.models import WordLevel
from tokenizers.pre_tokenizers import Split
from torch import Tensor
from transformers import (
    PreTrainedTokenizerFast,
    Qwen2VLImageProcessorPil,
    Qwen3VLForConditionalGeneration,
    Qwen3VLProcessor,
)

CHANNELS, CELL = 4, 16
"""Latent channels, and pixels per latent cell, which the pipeline has as a constant."""

CONFIG: dict[str, Any] = {
    "in_channels": CHANNELS, "out_channels": CHANNELS, "num_layers": 2, "attention_head_dim": 16,
    "num_attention_heads": 2, "context_in_dim": 16, "axes_dims_rope": (4, 6, 6),
}  # fmt: skip
"""Of the network."""

TIMES = {
    "use_dynamic_shifting": True, "base_shift": 0.5, "max_shift": 1.15, "base_image_seq_len": 256,
    "max_image_seq_len": 4096,
}  # fmt: skip
"""Of the scheduler; these are what the pipeline falls back on."""

SPECIAL = [
    "<|im_start|>",
    "<|im_end|>",
    "<|image_pad|>",
    "<|video_pad|>",
    "<|vision_start|>",
    "<|vision_end|>",
]
VOCABULARY = {
    piece: index for index, piece in enumerate(["<pad>", "<unk>", *SPECIAL, "system", *string.printable])
}
"""Each letter is a token."""

CHAT = (
    "{% for message in messages %}<|im_start|>{{ message['role'] }}\n"
    "{% if message['content'] is string %}{{ message['content'] }}"
    "{% else %}{% for part in message['content'] %}{{ part['text'] }}{% endfor %}{% endif %}<|im_end|>\n{% endfor %}"
)
"""The part of the processor's template that captions reach."""


def write(folder: Path) -> None:
    """Write the pipeline, with random weights that are the same at each call."""
    torch.manual_seed(0)
    qwen = qwen3_vl(
        len(VOCABULARY), layers=2,
        image_token_id=VOCABULARY["<|image_pad|>"], video_token_id=VOCABULARY["<|video_pad|>"],
        vision_start_token_id=VOCABULARY["<|vision_start|>"], vision_end_token_id=VOCABULARY["<|vision_end|>"],
    )  # fmt: skip
    vae = AutoencoderKLQwenImage21(
        base_dim=4, decoder_base_dim=4, z_dim=CHANNELS, dim_mult=[1, 1, 1, 1, 1], num_res_blocks=1,
        latents_mean=[0.5, -0.25, 0.1, 0.0], latents_std=[2.0, 1.5, 2.5, 1.0],
    )  # fmt: skip
    QwenImage21Pipeline(
        scheduler=FlowMatchEulerDiscreteScheduler(**TIMES),
        vae=vae.eval(),
        text_encoder=Qwen3VLForConditionalGeneration(qwen).eval(),
        processor=processor(),
        transformer=varied(QwenImage21Transformer2DModel(**CONFIG)),
    ).save_pretrained(folder)


def processor() -> Qwen3VLProcessor:
    """A processor whose tokens are letters. It takes no videos: that part needs torchvision, and captions have none."""
    letters = Tokenizer(WordLevel(VOCABULARY, unk_token="<unk>"))
    letters.pre_tokenizer = Split("", "isolated")
    letters.add_special_tokens([AddedToken(token, special=True, normalized=False) for token in SPECIAL])
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=letters, pad_token="<pad>", unk_token="<unk>", padding_side="left"
    )
    with patch.object(Qwen3VLProcessor, "check_argument_for_proper_class"):
        images = Qwen2VLImageProcessorPil(patch_size=4)
        return Qwen3VLProcessor(images, tokenizer, NoVideos(), chat_template=CHAT)


class NoVideos(dict[str, Any]):
    """In place of a processor's part for videos: settings, of which there are none."""

    _auto_class = None
    model_input_names: tuple[str, ...] = ()

    def save_pretrained(self, *_: Any, **__: Any) -> list[str]:
        """Write nothing."""
        return []


def sample(
    folder: Path,
    prompts: list[str],
    noise: Tensor,
    steps: int,
    guidance_scale: float,
    negative: str | None = None,
) -> Tensor:
    """See `Case.sample`; on each prompt alone: padding would change what it gives."""
    # Reading a processor from a folder would need its part for videos.
    pipe = opened(folder, "QwenImage21Pipeline", processor=processor())
    height, width = (CELL * side for side in noise.shape[-2:])
    latents = [
        pipe(
            prompt=prompt, negative_prompt=(negative or "") if guidance_scale > 1 else None,
            true_cfg_scale=guidance_scale, height=height, width=width, num_inference_steps=steps,
            latents=QwenImage21Pipeline._pack_latents(one, *one.shape), output_type="latent",
        ).images
        for prompt, one in zip(prompts, noise.split(1), strict=True)
    ]  # fmt: skip
    return QwenImage21Pipeline._unpack_latents(torch.cat(latents), height, width, CELL)[:, :, 0]
