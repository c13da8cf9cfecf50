"""Text encoders of diffusers pipelines: captions become what FLUX.1, FLUX.2 and Qwen-Image were trained on.

They are `flux:PIPELINE`, `flux2:PIPELINE` and `qwen-image:PIPELINE`, PIPELINE being a folder or hub id. Their large
language models are held in float32 on a CPU and in bfloat16 on a GPU.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from fewstep.data.text import GROUP, TextEncoder, loading, of_pipeline
from fewstep.errors import UserError

FLUX_TOKENS = 512
"""FLUX dev pads every caption to this length: padding is part of the states."""


class FluxTextEncoder(TextEncoder):
    """The two text encoders of a FLUX.1 pipeline: T5's token states, (512, D) for every caption, and CLIP's one vector.

    Args:
        name: "flux:" and the pipeline's folder or hub id.
        tokens: T5's tokenizer and encoder.
        whole: CLIP's tokenizer and text model, whose pooled output is the caption's vector.
    """

    _padded_length = FLUX_TOKENS

    def __init__(self, name: str, tokens: tuple[Any, nn.Module], whole: tuple[Any, nn.Module]) -> None:
        super().__init__(name, *tokens, max_tokens=FLUX_TOKENS)
        self._clip_tokenizer, self._clip = whole
        self.pooled_dim = self._clip.config.hidden_size

    @torch.no_grad()
    def pooled(self, captions: Sequence[str]) -> list[Tensor]:
        vectors: list[Tensor] = []
        for start in range(0, len(captions), GROUP):
            # CLIP reads 77 tokens; what is longer is cut, as FLUX's own pipeline does.
            ids = self._clip_tokenizer(
                list(captions[start : start + GROUP]), padding="max_length", truncation=True, return_tensors="pt",
                max_length=self._clip.config.max_position_embeddings,
            )["input_ids"]  # fmt: skip
            vectors += self._clip(input_ids=ids.to(self._clip.device)).pooler_output.float().cpu()
        return vectors

    def _states(self, ids: Sequence[Sequence[int]]) -> list[Tensor]:
        padding = self._tokenizer.pad_token_id
        return super()._states([[*tokens, *[padding] * (FLUX_TOKENS - len(tokens))] for tokens in ids])


class QwenImageTextEncoder(TextEncoder):
    """Qwen-Image's: the last states of Qwen2.5-VL, (L, D), after a fixed instruction, whose own states are left out."""

    def __init__(self, name: str, tokenizer: Any, model: nn.Module, max_tokens: int) -> None:
        super().__init__(name, tokenizer, model, max_tokens)
        from diffusers import QwenImagePipeline

        parts = ("scheduler", "vae", "text_encoder", "tokenizer", "transformer")
        settings = QwenImagePipeline(**dict.fromkeys(parts))
        self._template = settings.prompt_template_encode
        self._instruction = settings.prompt_template_encode_start_idx
        self.max_tokens = max_tokens + len(self._tokenize([""])[0])

    def _tokenize(self, captions: Sequence[str]) -> list[list[int]]:
        return super()._tokenize([self._template.format(caption) for caption in captions])

    def _states(self, ids: Sequence[Sequence[int]]) -> list[Tensor]:
        return [states[self._instruction :] for states in super()._states(ids)]


@dataclass(frozen=True)
class _Reading:
    """How FLUX.2 reads a language model: which hidden states, and how a caption is put to it."""

    layers: tuple[int, ...]
    has_instruction: bool
    options: dict[str, Any]


READINGS = {
    "mistral3": _Reading((10, 20, 30), True, {}),  # dev
    "qwen3": _Reading((9, 18, 27), False, {"add_generation_prompt": True, "enable_thinking": False}),  # klein
}
"""By the language model's type."""


class Flux2TextEncoder(TextEncoder):
    """FLUX.2's: states of three layers of a language model side by side, (512, 3·D) for every caption."""

    _padded_length = FLUX_TOKENS

    def __init__(self, name: str, tokenizer: Any, model: nn.Module) -> None:
        super().__init__(name, tokenizer, model, max_tokens=FLUX_TOKENS)
        self._reading = _reading(model.config.model_type)
        self.dim *= len(self._reading.layers)

    def _tokenize(self, captions: Sequence[str]) -> list[list[int]]:
        return [
            self._tokenizer.apply_chat_template(
                self._messages(caption), tokenize=True, return_dict=True, **self._reading.options
            )["input_ids"]
            for caption in captions
        ]

    def _messages(self, caption: str) -> list[dict[str, Any]]:
        if not self._reading.has_instruction:
            return [{"role": "user", "content": caption}]
        from diffusers.pipelines.flux2.pipeline_flux2 import SYSTEM_MESSAGE, format_input

        [messages] = format_input([caption], SYSTEM_MESSAGE)
        return messages

    def _states(self, ids: Sequence[Sequence[int]]) -> list[Tensor]:
        inputs = self._tokenizer.pad(
            {"input_ids": list(ids)}, padding="max_length", max_length=FLUX_TOKENS, return_tensors="pt"
        )
        inputs = {key: inputs[key].to(self._model.device) for key in ("input_ids", "attention_mask")}
        states = self._model(**inputs, output_hidden_states=True, use_cache=False).hidden_states
        side_by_side = torch.cat([states[layer] for layer in self._reading.layers], dim=-1)
        return list(side_by_side.float().cpu())


def load_pipeline_encoder(name: str, max_tokens: int, device: torch.device | str) -> TextEncoder:
    """The text encoder of a pipeline.

    Args:
        name: "flux:", "flux2:" or "qwen-image:", and the pipeline's folder or hub id.
        max_tokens: longest caption of encoders that do not pad.
        device: where it runs.

    Raises:
        UserError: no such encoder is there.
    """
    from transformers import AutoModel, AutoTokenizer, CLIPTextModel, T5EncoderModel

    large = torch.float32 if torch.device(device).type == "cpu" else torch.bfloat16
    with loading(name) as where:

        def part(kind: Any, number: str = "", dtype: torch.dtype = large) -> tuple[Any, nn.Module]:
            tokenizer = AutoTokenizer.from_pretrained(**where, subfolder=f"tokenizer{number}")
            model = kind.from_pretrained(**where, subfolder=f"text_encoder{number}", dtype=dtype)
            return tokenizer, model.eval().requires_grad_(False).to(device)

        match of_pipeline(name):
            case "flux":
                t5, clip = part(T5EncoderModel, "_2", torch.float32), part(CLIPTextModel, dtype=torch.float32)
                return FluxTextEncoder(name, t5, clip)
            case "flux2":
                return Flux2TextEncoder(name, *part(AutoModel))
        return QwenImageTextEncoder(name, *part(AutoModel), max_tokens)


def pipeline_widths(name: str) -> tuple[int, int | None]:
    """(D of the token states, P of the vectors of whole captions or None), from configurations alone.

    Raises:
        UserError: as `load_pipeline_encoder`.
    """
    from transformers import AutoConfig

    with loading(name) as where:

        def config(number: str = "") -> Any:
            return AutoConfig.from_pretrained(**where, subfolder=f"text_encoder{number}").get_text_config()

        match of_pipeline(name):
            case "flux":
                return config("_2").hidden_size, config().hidden_size
            case "flux2":
                kind = AutoConfig.from_pretrained(**where, subfolder="text_encoder").model_type
                return config().hidden_size * len(_reading(kind).layers), None
        return config().hidden_size, None


def _reading(model_type: str) -> _Reading:
    if model_type not in READINGS:
        raise UserError(
            f"--text-encoder flux2: knows FLUX.2's language models ({', '.join(READINGS)}), and this pipeline's is "
            f"{model_type!r}."
        )
    return READINGS[model_type]
