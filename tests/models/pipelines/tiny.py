"""Tiny parts that several pipelines of FLUX's and Qwen's kind share, with random weights."""

from __future__ import annotations

import string
from pathlib import Path
from typing import Any

import diffusers
import torch
from tokenizers import Tokenizer
from tokenizers.models import WordLevel
from tokenizers.pre_tokenizers import Split
from tokenizers.processors import TemplateProcessing
from torch import Tensor
from transformers import (
    AutoTokenizer,
    PreTrainedTokenizerFast,
    Qwen2_5_VLConfig,
    Qwen2_5_VLForConditionalGeneration,
)

MARKS = ["<pad>", "<s>", "</s>", "<unk>"]
VOCABULARY = {piece: index for index, piece in enumerate([*MARKS, *string.printable])}
"""Each letter is a token."""

CHAT = (
    "{% for message in messages %}{{ message['role'] }}: "
    "{% if message['content'] is string %}{{ message['content'] }}"
    "{% else %}{{ message['content'][0]['text'] }}{% endif %};{% endfor %}"
    "{% if add_generation_prompt %}assistant: {% if not enable_thinking %}thought;{% endif %}{% endif %}"
)
"""A template of chats that shows whether thinking is enabled."""

LANGUAGE = {
    "vocab_size": len(VOCABULARY), "hidden_size": 16, "intermediate_size": 16, "num_attention_heads": 2,
    "num_key_value_heads": 2, "pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2,
}  # fmt: skip
"""Settings of small language models."""

CHANNELS, CELL = 4, 2
"""Latent channels, and pixels per latent cell."""

FLUX_TIMES = {"shift": 3.0, "use_dynamic_shifting": True, "base_shift": 0.5, "max_shift": 1.15}
"""Settings of the scheduler of FLUX's pipelines, beside those that are the class's own."""

LEVELS = {
    "block_out_channels": (4, 4), "down_block_types": ("DownEncoderBlock2D",) * 2,
    "up_block_types": ("UpDecoderBlock2D",) * 2, "layers_per_block": 1, "norm_num_groups": 2,
    "latent_channels": CHANNELS,
}  # fmt: skip
"""Settings of small autoencoders."""


def tokenizer(folder: Path, template: str = "$A", **options: Any) -> Any:
    """A tokenizer of letters; `template` says what comes around a text."""
    letters = Tokenizer(WordLevel(VOCABULARY, unk_token="<unk>"))
    letters.pre_tokenizer = Split("", "isolated")
    letters.post_processor = TemplateProcessing(single=template, special_tokens=[("<s>", 1), ("</s>", 2)])
    PreTrainedTokenizerFast(
        tokenizer_object=letters, pad_token="<pad>", bos_token="<s>", eos_token="</s>", unk_token="<unk>"
    ).save_pretrained(folder)
    made = AutoTokenizer.from_pretrained(folder, **options)
    made.chat_template = CHAT
    return made


def qwen2_5_vl() -> torch.nn.Module:
    """A Qwen2.5-VL of two layers, of width 16."""
    rope = {"rope_type": "default", "mrope_section": [1, 1, 2], "rope_theta": 10_000.0}
    text = LANGUAGE | {"num_hidden_layers": 2, "rope_parameters": rope}
    vision = {"depth": 1, "hidden_size": 8, "num_heads": 1, "out_hidden_size": 16, "intermediate_size": 8}
    return Qwen2_5_VLForConditionalGeneration(Qwen2_5_VLConfig(text_config=text, vision_config=vision)).eval()


def flux_autoencoder() -> Any:
    """An AutoencoderKL with FLUX.1's units of latents."""
    return diffusers.AutoencoderKL(
        **LEVELS, scaling_factor=0.3611, shift_factor=0.1159, use_quant_conv=False, use_post_quant_conv=False
    ).eval()


def flux2_autoencoder() -> Any:
    """An AutoencoderKLFlux2 with statistics of its own."""
    model = diffusers.AutoencoderKLFlux2(**LEVELS).eval()
    model.bn.running_mean.normal_()
    model.bn.running_var.uniform_(0.5, 2)
    return model


def flow_scheduler(**settings: Any) -> Any:
    """The scheduler of all these pipelines."""
    return diffusers.FlowMatchEulerDiscreteScheduler(**settings)


def opened(folder: Path, kind: str, **parts: Any) -> Any:
    """The pipeline in a folder, of that class of diffusers, quietly."""
    pipe = getattr(diffusers, kind).from_pretrained(folder, **parts)
    pipe.set_progress_bar_config(disable=True)
    return pipe


def call(pipe: Any, prompts: list[str], noise: Tensor, steps: int, **options: Any) -> Tensor:
    """The final latents as the pipeline itself gives them, of prompts and an image of the noise's size."""
    height, width = (CELL * side for side in noise.shape[-2:])
    return pipe(
        prompt=list(prompts), height=height, width=width, num_inference_steps=steps, output_type="latent", **options
    ).images  # fmt: skip
