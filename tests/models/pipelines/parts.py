"""What several tiny pipelines have in common: tokenizers, autoencoders, and how to see what they do."""

from __future__ import annotations

import inspect
import string
from functools import wraps
from pathlib import Path
from typing import Any

import pytest
import torch
from diffusers import AutoencoderKL
from tokenizers import AddedToken, Regex, Tokenizer
from tokenizers.models import WordPiece
from tokenizers.normalizers import Lowercase
from tokenizers.pre_tokenizers import Split
from tokenizers.processors import TemplateProcessing
from torch import Tensor, nn
from transformers import PreTrainedTokenizerFast

PAD, BEGIN, UNKNOWN, END = SPECIAL = ["<pad>", "<s>", "<unk>", "</s>"]
"""Tokens 0 to 3. No text ends in token 2: CLIP's models then look for the end in another way."""

CHAT = ["<|im_start|>", "<|im_end|>"]
QWEN3 = (
    "{% for message in messages %}<|im_start|>{{ message['role'] }}\n{{ message['content'] }}<|im_end|>\n"
    "{% endfor %}{% if add_generation_prompt %}<|im_start|>assistant\n"
    "{% if not enable_thinking %}<think>\n\n</think>\n\n{% endif %}{% endif %}"
)
"""The part of Qwen3's chat template that captions reach."""


def tokenizer(
    folder: Path, length: int, template: str = "$A", words: str = "", chat: str | None = None
) -> int:
    """Write a tokenizer of letters, in which every caption has its own tokens; return the size of its vocabulary.

    Args:
        folder: for `PreTrainedTokenizerFast`.
        length: most tokens (`model_max_length`).
        template: what stands before and after a text.
        words: that are one token each, of a fixed template; all other words are letters.
        chat: template of messages.
    """
    letters = string.ascii_lowercase + string.digits
    pieces = [*SPECIAL, *CHAT, "\n", *string.punctuation, *letters, *(f"##{letter}" for letter in letters)]
    vocabulary = {
        piece: index for index, piece in enumerate(dict.fromkeys([*pieces, *words.lower().split()]))
    }
    built = Tokenizer(WordPiece(vocabulary, unk_token=UNKNOWN))
    built.normalizer = Lowercase()
    built.pre_tokenizer = Split(Regex(r"\n|[A-Za-z0-9]+|[^A-Za-z0-9\s]"), "removed", invert=True)
    built.post_processor = TemplateProcessing(single=template, special_tokens=[(BEGIN, 1), (END, 3)])
    built.add_special_tokens([AddedToken(token, special=True, normalized=False) for token in CHAT])
    fast = PreTrainedTokenizerFast(
        tokenizer_object=built, pad_token=PAD, bos_token=BEGIN, eos_token=END, unk_token=UNKNOWN,
        padding_side="right", model_max_length=length,
    )  # fmt: skip
    fast.chat_template = chat
    fast.save_pretrained(folder)
    return len(fast)


def autoencoder(channels: int, scaling_factor: float, shift_factor: float) -> AutoencoderKL:
    """A tiny autoencoder of 2×2 pixels per latent cell, with a model's normalisation of latents."""
    return AutoencoderKL(
        down_block_types=("DownEncoderBlock2D",) * 2, up_block_types=("UpDecoderBlock2D",) * 2,
        block_out_channels=(4, 4), layers_per_block=1, latent_channels=channels, norm_num_groups=2,
        sample_size=16, scaling_factor=scaling_factor, shift_factor=shift_factor,
        use_quant_conv=False, use_post_quant_conv=False,
    )  # fmt: skip


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
