"""What several tiny pipelines have in common: parts with random weights, and how to call them and see what they do."""

from __future__ import annotations

import inspect
import string
from functools import wraps
from pathlib import Path
from typing import Any

import diffusers
import pytest
import torch
from tokenizers import AddedToken, Regex, Tokenizer
from tokenizers.models import WordPiece
from tokenizers.normalizers import Lowercase
from tokenizers.pre_tokenizers import Split
from tokenizers.processors import TemplateProcessing
from torch import Tensor, nn
from transformers import (
    AutoTokenizer,
    PreTrainedTokenizerFast,
    Qwen2_5_VLConfig,
    Qwen2_5_VLForConditionalGeneration,
    Qwen3VLConfig,
)

PAD, BEGIN, UNKNOWN, END = SPECIAL = ["<pad>", "<s>", "<unk>", "</s>"]
"""Tokens 0 to 3. No text ends in token 2: CLIP's models then look for the end in another way."""

TURN = ["<|im_start|>", "<|im_end|>"]
CHAT = (
    "{% for message in messages %}<|im_start|>{{ message['role'] }}\n"
    "{% if message['content'] is string %}{{ message['content'] }}"
    "{% else %}{{ message['content'][0]['text'] }}{% endif %}<|im_end|>\n"
    "{% endfor %}{% if add_generation_prompt %}<|im_start|>assistant\n"
    "{% if not enable_thinking %}<think>\n\n</think>\n\n{% endif %}{% endif %}"
)
"""The part of Qwen3's chat template that captions reach, also for contents in several pieces."""

LANGUAGE = {
    "hidden_size": 16, "intermediate_size": 16, "num_attention_heads": 2, "num_key_value_heads": 2,
    "pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 3,
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


def tokenizer(folder: Path, template: str = "$A", *, words: str = "", **options: Any) -> Any:
    """Write a tokenizer of letters, in which every caption has its own tokens, and read it.

    Args:
        folder: that it is written to.
        template: what stands before and after a text.
        words: that are one token each, of a fixed template; all other words are letters.
        options: of the tokenizer, such as `model_max_length`.
    """
    letters = string.ascii_lowercase + string.digits
    pieces = [*SPECIAL, *TURN, "\n", *string.punctuation, *letters, *(f"##{letter}" for letter in letters)]
    vocabulary = {
        piece: index for index, piece in enumerate(dict.fromkeys([*pieces, *words.lower().split()]))
    }
    built = Tokenizer(WordPiece(vocabulary, unk_token=UNKNOWN))
    built.normalizer = Lowercase()
    built.pre_tokenizer = Split(Regex(r"\n|[A-Za-z0-9]+|[^A-Za-z0-9\s]"), "removed", invert=True)
    built.post_processor = TemplateProcessing(single=template, special_tokens=[(BEGIN, 1), (END, 3)])
    built.add_special_tokens([AddedToken(token, special=True, normalized=False) for token in TURN])
    fast = PreTrainedTokenizerFast(
        tokenizer_object=built, pad_token=PAD, bos_token=BEGIN, eos_token=END, unk_token=UNKNOWN,
        **{"padding_side": "right"} | options,
    )  # fmt: skip
    fast.chat_template = CHAT
    fast.save_pretrained(folder)
    return AutoTokenizer.from_pretrained(folder)


def autoencoder(scaling_factor: float = 0.3611, shift_factor: float = 0.1159) -> Any:
    """A tiny autoencoder of 2×2 pixels per latent cell, with a model's units of latents; by default FLUX.1's."""
    return diffusers.AutoencoderKL(
        **LEVELS, sample_size=16, scaling_factor=scaling_factor, shift_factor=shift_factor, use_quant_conv=False,
        use_post_quant_conv=False,
    ).eval()  # fmt: skip


def flux2_autoencoder() -> Any:
    """An AutoencoderKLFlux2 with statistics of its own."""
    model = diffusers.AutoencoderKLFlux2(**LEVELS).eval()
    model.bn.running_mean.normal_()
    model.bn.running_var.uniform_(0.5, 2)
    return model


def qwen2_5_vl(vocabulary: int) -> nn.Module:
    """A Qwen2.5-VL of two layers, of width 16."""
    rope = {"rope_type": "default", "mrope_section": [1, 1, 2], "rope_theta": 10_000.0}
    text = LANGUAGE | {"vocab_size": vocabulary, "num_hidden_layers": 2, "rope_parameters": rope}
    vision = {"depth": 1, "hidden_size": 8, "num_heads": 1, "out_hidden_size": 16, "intermediate_size": 8}
    return Qwen2_5_VLForConditionalGeneration(Qwen2_5_VLConfig(text_config=text, vision_config=vision)).eval()


def qwen3_vl(vocabulary: int, layers: int, **tokens: int) -> Qwen3VLConfig:
    """Settings of a Qwen3-VL of width 16.

    Args:
        vocabulary: its size.
        layers: of the language model.
        tokens: ids of images and videos.
    """
    return Qwen3VLConfig(
        text_config={
            "vocab_size": vocabulary, "hidden_size": 16, "intermediate_size": 24, "num_hidden_layers": layers,
            "num_attention_heads": 2, "num_key_value_heads": 1, "head_dim": 8, "pad_token_id": 0,
            "rope_parameters": {"rope_type": "default", "rope_theta": 5e6, "mrope_section": [2, 1, 1],
                                "mrope_interleaved": True},
        },
        vision_config={
            "depth": 1, "hidden_size": 16, "intermediate_size": 16, "num_heads": 2, "out_hidden_size": 16,
            "patch_size": 4, "num_position_embeddings": 16, "deepstack_visual_indexes": [0],
        },
        **tokens,
    )  # fmt: skip


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


@torch.no_grad()
def varied(network: nn.Module, seed: int = 0) -> nn.Module:
    """The same network with all parameters moved a little, as many begin at 0 or 1."""
    generator = torch.Generator().manual_seed(seed)
    for parameter in network.parameters():
        parameter.add_(torch.randn(parameter.shape, generator=generator) * 0.05)
    return network.eval()


class Calls:
    """The arguments, by name, of all calls of a network's class while it is patched.

    Args:
        kind: the class.
        patch: that puts it back after the test.
    """

    def __init__(self, kind: type[nn.Module], patch: pytest.MonkeyPatch) -> None:
        self.arguments: list[dict[str, Any]] = []
        forward, signature = kind.forward, inspect.signature(kind.forward)

        @wraps(forward)
        def recorded(*args: Any, **named: Any) -> Any:
            self.arguments.append(dict(signature.bind(*args, **named).arguments))
            return forward(*args, **named)

        patch.setattr(kind, "forward", recorded)


def check_steps(velocities: list[Tensor], states: list[Tensor], times: list[float]) -> None:
    """Check that a pipeline moved from each state to the next as the velocity u = ε − x0 says, at these σ."""
    assert len(velocities) == len(states) - 1 == len(times) - 1 >= 2
    for index, velocity in enumerate(velocities):
        expected = states[index] + (times[index + 1] - times[index]) * velocity
        # Pipelines round times at other places; at frequencies up to 1,000, that is seen in the fifth digit.
        torch.testing.assert_close(states[index + 1], expected, atol=1e-4, rtol=0)
    assert (states[1] - states[0]).abs().mean() > 1e-2
