"""Text encoders that have diffusers' own pipeline encode a caption, as it does before it calls its network.

Captions are encoded one by one: what a caption becomes does not depend on others. Rows of padding are left out where
the pipeline's network masks them, and kept where it attends to them.
"""

from __future__ import annotations

import sys
import threading
from abc import abstractmethod
from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any, ClassVar

import torch
from torch import Tensor

from fewstep.config import Precision
from fewstep.encoders.base import as_stored
from fewstep.encoders.text import TextEncoder
from fewstep.models.conditioning import TextConditioning
from fewstep.models.diffusers_family import bare_pipeline
from fewstep.models.wan import TEXT_TOKENS


class PipelineTextEncoder(TextEncoder):
    """Base of the text encoders that call `encode_prompt` of a diffusers pipeline.

    Args:
        name: prefix and the pipeline's folder or hub id.
        tokenizer: that counts a caption's tokens.
        model: text encoder that gives the token states.
        max_tokens: longest caption in tokens; of encoders that pad to a length of their own, that length holds.
        precision: how the model's weights are held.
        parts: of the pipeline by name, beside these two or in their places, and its settings.
    """

    _pipeline_class: ClassVar[str]

    def __init__(
        self,
        name: str,
        tokenizer: Any,
        model: Any,
        max_tokens: int,
        precision: Precision,
        parts: Mapping[str, Any] | None = None,
    ) -> None:
        super().__init__(name, tokenizer, model, max_tokens, precision)
        usual = {"tokenizer": tokenizer, "text_encoder": model}
        self._pipeline = bare_pipeline(self._pipeline_class, **{**usual, **(parts or {})})
        # Pipelines are made for one thread; one of them puts a hook into its model for the time of a call.
        self._lock = threading.Lock()
        # Otherwise the limit is on the caption: the template's own tokens come on top.
        template = 0 if self._padded_length else len(self._tokenize([""])[0])
        self.max_tokens = self._padded_length or min(max_tokens + template, self._longest())

    def encode(self, captions: Sequence[str]) -> list[TextConditioning]:
        """Each caption as a batch of one, with states as shards store them.

        Raises:
            UserError: a caption is longer than `max_tokens`.
        """
        return [replace(one, states=as_stored(one.states)) for one in self.each(captions)]

    @torch.no_grad()
    def each(self, captions: Sequence[str]) -> list[TextConditioning]:
        """Each caption as a batch of one, with states that are not rounded.

        Raises:
            UserError: a caption is longer than `max_tokens`.
        """
        self.check(captions)
        encoded = []
        with self._lock, self._at_work(*self._models):
            for caption in captions:
                states, pooled = self._prompt(caption)
                vectors = None if pooled is None else [pooled.cpu()]
                encoded.append(TextConditioning.collate([states.float().cpu()], vectors))
        return encoded

    def conditioning(self, captions: Sequence[str]) -> TextConditioning:
        """The captions as one batch, with states that are not rounded.

        Raises:
            UserError: a caption is longer than `max_tokens`.
        """
        first, *others = self.each(captions)
        return first._joined([first, *others])

    def stored_states(self, captions: Sequence[str]) -> list[Tensor]:
        """Token states of each caption, (L_i, D) float32 on the CPU, rounded as shards store them.

        Raises:
            UserError: a caption is longer than `max_tokens`.
        """
        return [one.states[0] for one in self.encode(captions)]

    def states(self, captions: Sequence[str]) -> list[Tensor]:
        """Token states of each caption, (L_i, D) float32 on the CPU, not rounded.

        Raises:
            UserError: a caption is longer than `max_tokens`.
        """
        return [one.states[0] for one in self.each(captions)]

    def _longest(self) -> int:
        """Tokens, the template's included, to which the pipeline cuts captions; a large number if it does not."""
        return sys.maxsize

    @abstractmethod
    def _prompt(self, caption: str) -> tuple[Tensor, Tensor | None]:
        """The caption's states (L, D), and its vector (P,) or None, from the pipeline's `encode_prompt`."""


class ZImageTextEncoder(PipelineTextEncoder):
    """Z-Image's text encoder: the states before Qwen3's last layer, of real tokens only."""

    _pipeline_class = "ZImagePipeline"

    def _longest(self) -> int:
        return 512

    def _tokenize(self, captions: Sequence[str]) -> list[list[int]]:
        chats = [
            self._tokenizer.apply_chat_template(
                [{"role": "user", "content": caption}],
                tokenize=False,
                add_generation_prompt=True,
                enable_thinking=True,
            )
            for caption in captions
        ]
        return super()._tokenize(chats)

    def _prompt(self, caption: str) -> tuple[Tensor, None]:
        # A list made for the call, which writes the chat's text into it.
        [states], _ = self._pipeline.encode_prompt(
            [caption], device=self._model.device, do_classifier_free_guidance=False
        )
        return states, None


class LongCatImageTextEncoder(PipelineTextEncoder):
    """LongCat-Image's text encoder: Qwen2.5-VL's last states, of 512 tokens with their padding.

    Text in quotation marks is split to characters, each of which is tokenized by itself.
    """

    _pipeline_class = "LongCatImagePipeline"
    _padded_length = 512

    def _tokenize(self, captions: Sequence[str]) -> list[list[int]]:
        from diffusers.pipelines.longcat_image.pipeline_longcat_image import split_quotation

        def ids(text: str) -> list[int]:
            return self._tokenizer(text, add_special_tokens=False, verbose=False)["input_ids"]

        return [
            [token for text, quoted in split_quotation(caption) for part in (text if quoted else [text])
             for token in ids(part)]
            for caption in captions
        ]  # fmt: skip

    def _prompt(self, caption: str) -> tuple[Tensor, None]:
        # Without the rewriting of prompts by a language model, which is a step before this one.
        return self._pipeline.encode_prompt([caption])[0][0], None


class SD3TextEncoder(PipelineTextEncoder):
    """Stable Diffusion 3's three text encoders.

    States are those of both CLIP models side by side, 77 rows, and below them T5's, 256 rows, all with their padding.
    The vector of a whole caption, (P,), is that of both CLIP models.

    Args:
        name: "sd3:" and the pipeline's folder or hub id.
        tokens: T5's tokenizer and encoder.
        clips: tokenizer and text model of either CLIP.
        precision: how T5's weights are held.
    """

    _pipeline_class = "StableDiffusion3Pipeline"
    _padded_length = 256  # T5's; CLIP cuts captions to 77 tokens, as in the pipeline

    def __init__(
        self,
        name: str,
        tokens: tuple[Any, Any],
        clips: tuple[tuple[Any, Any], tuple[Any, Any]],
        precision: Precision,
    ) -> None:
        parts = {"text_encoder": clips[0][1], "tokenizer": clips[0][0]}
        parts |= {"text_encoder_2": clips[1][1], "tokenizer_2": clips[1][0]}
        parts |= {"text_encoder_3": tokens[1], "tokenizer_3": tokens[0]}
        super().__init__(name, *tokens, self._padded_length, precision, parts)
        self._clips = (clips[0][1], clips[1][1])
        self.pooled_dim = sum(clip.config.projection_dim for clip in self._clips)

    @property
    def _models(self) -> tuple[Any, ...]:
        return (self._model, *self._clips)

    def pooled(self, captions: Sequence[str]) -> list[Tensor]:
        """Both CLIP models' vectors of each caption, (P,) float32 each, on the CPU."""
        return [one.summary()[0] for one in self.each(captions)]

    def _prompt(self, caption: str) -> tuple[Tensor, Tensor]:
        states, _, pooled, _ = self._pipeline.encode_prompt(
            [caption], None, None, device=self._model.device, do_classifier_free_guidance=False
        )
        return states[0], pooled[0]


class WanTextEncoder(PipelineTextEncoder):
    """Wan's text encoder: UMT5's last states, of real tokens only.

    The zeros that its network attends to after them are added where it is called.
    """

    _pipeline_class = "WanPipeline"

    def _longest(self) -> int:
        return TEXT_TOKENS

    def _tokenize(self, captions: Sequence[str]) -> list[list[int]]:
        from diffusers.pipelines.wan.pipeline_wan import prompt_clean

        return super()._tokenize([prompt_clean(caption) for caption in captions])

    def _prompt(self, caption: str) -> tuple[Tensor, None]:
        # As a call of the pipeline; the method's own default would encode the same text to other states.
        states, _ = self._pipeline.encode_prompt(
            [caption],
            do_classifier_free_guidance=False,
            max_sequence_length=TEXT_TOKENS,
            device=self._model.device,
        )
        return states[0][: len(self._tokenize([caption])[0])], None


class QwenImage21TextEncoder(PipelineTextEncoder):
    """Qwen-Image 2.1's text encoder: Qwen3-VL's states before its last norm, without those of the system message.

    The empty caption is a single space, as in the pipeline.
    """

    _pipeline_class = "QwenImage21Pipeline"

    def __init__(self, name: str, tokenizer: Any, model: Any, max_tokens: int, precision: Precision) -> None:
        parts = {"processor": _TextProcessor(tokenizer), "text_encoder": _InnerModel(model)}
        super().__init__(name, tokenizer, model, max_tokens, precision, parts)

    def _tokenize(self, captions: Sequence[str]) -> list[list[int]]:
        template = self._pipeline.prompt_template_t2i
        return super()._tokenize([template.format(caption or " ") for caption in captions])

    def _prompt(self, caption: str) -> tuple[Tensor, None]:
        return self._pipeline.encode_prompt([caption], device=self._model.device)[0][0], None


class Krea2TextEncoder(PipelineTextEncoder):
    """Krea 2's text encoder: the states of several of Qwen3-VL's layers side by side, of real tokens only.

    Args:
        name, tokenizer, model, max_tokens, precision: as for `PipelineTextEncoder`.
        layers: indices of the hidden states that are used.
    """

    _pipeline_class = "Krea2Pipeline"

    def __init__(
        self,
        name: str,
        tokenizer: Any,
        model: Any,
        max_tokens: int,
        precision: Precision,
        layers: Sequence[int] | None,
    ) -> None:
        settings = {"text_encoder_select_layers": layers}
        super().__init__(name, tokenizer, model, max_tokens, precision, settings)
        self.dim *= len(self._pipeline.text_encoder_select_layers)

    def _longest(self) -> int:
        # Of 512 tokens beside the instruction, some are the template's end.
        pipe = self._pipeline
        return 512 + pipe.prompt_template_encode_start_idx - pipe.prompt_template_encode_num_suffix_tokens

    def _tokenize(self, captions: Sequence[str]) -> list[list[int]]:
        return super()._tokenize(
            [self._pipeline.prompt_template_encode_prefix + caption for caption in captions]
        )

    def _prompt(self, caption: str) -> tuple[Tensor, None]:
        states, mask = self._pipeline.encode_prompt([caption], device=self._model.device)
        # (L, layers, D) → (L, layers·D); between caption and template's end lies padding
        return states[0][mask[0]].flatten(1), None


class _TextProcessor:
    """What Qwen-Image 2.1's pipeline uses of Qwen3-VL's processor for texts; without torchvision, which that needs."""

    def __init__(self, tokenizer: Any) -> None:
        self.tokenizer = tokenizer

    def __call__(self, text: list[str], **options: Any) -> Any:
        return self.tokenizer(text, **options)

    def apply_chat_template(self, messages: Any, **options: Any) -> list[list[int]]:
        # Of one chat, the processor gives a batch.
        return [self.tokenizer.apply_chat_template(messages, **options)]


class _InnerModel:
    """Qwen3-VL as Qwen-Image 2.1's pipeline knows it, around the model without the projection to words."""

    def __init__(self, model: Any) -> None:
        self.model = model

    def __call__(self, **inputs: Any) -> Any:
        return self.model(**inputs)
