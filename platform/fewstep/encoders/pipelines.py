"""Text encoders of diffusers pipelines: captions are encoded as the pipelines' networks were trained with.

Their names are `flux:PIPELINE`, `flux2:PIPELINE` and so on (`PIPELINES`), where PIPELINE is a folder or hub id.
Unless a precision is asked for, those of FLUX.1 and Stable Diffusion 3 are loaded in float32, and large language models
in float32 on a CPU and in bfloat16 on a GPU. Those of FLUX and Qwen-Image are below, the others in `prompts.py`.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from fewstep.config import Precision
from fewstep.encoders.base import of_pipeline, usual_precision
from fewstep.encoders.prompts import (
    Krea2TextEncoder,
    LongCatImageTextEncoder,
    QwenImage21TextEncoder,
    SD3TextEncoder,
    WanTextEncoder,
    ZImageTextEncoder,
)
from fewstep.encoders.text import GROUP, TextEncoder, loading
from fewstep.encoders.weights import load_frozen
from fewstep.errors import UserError
from fewstep.models.diffusers_family import bare_pipeline
from fewstep.models.precision import LIBRARIES

FLUX_TOKENS = 512
"""Length in tokens that FLUX pads every caption to; networks were trained with the states of the padding."""


class FluxTextEncoder(TextEncoder):
    """The two text encoders of a FLUX.1 pipeline.

    T5 gives a caption's token states, (512, D), and CLIP one vector for the whole caption, (P,).

    Args:
        name: "flux:" and the pipeline's folder or hub id.
        tokens: T5's tokenizer and encoder.
        whole: CLIP's tokenizer and text model, whose pooled output is the caption's vector.
        precision: how T5's weights are held.
    """

    _padded_length = FLUX_TOKENS

    def __init__(
        self, name: str, tokens: tuple[Any, Any], whole: tuple[Any, Any], precision: Precision
    ) -> None:
        super().__init__(name, *tokens, FLUX_TOKENS, precision)
        self._clip_tokenizer, self._clip = whole
        self.pooled_dim = self._clip.config.hidden_size

    @torch.no_grad()
    def pooled(self, captions: Sequence[str]) -> list[Tensor]:
        """CLIP's vector of each caption, (P,) float32 each, on the CPU."""
        vectors: list[Tensor] = []
        with self._at_work(self._clip):
            for start in range(0, len(captions), GROUP):
                # CLIP takes 77 tokens: longer captions are cut, as in FLUX's own pipeline.
                ids = self._clip_tokenizer(
                    list(captions[start : start + GROUP]), padding="max_length", truncation=True,
                    max_length=self._clip.config.max_position_embeddings, return_tensors="pt",
                )["input_ids"]  # fmt: skip
                vectors += self._clip(input_ids=ids.to(self._clip.device)).pooler_output.float().cpu()
        return vectors

    @property
    def _models(self) -> tuple[Any, ...]:
        return (self._model, self._clip)

    def _states(self, ids: Sequence[Sequence[int]]) -> list[Tensor]:
        # Padded by hand, because `super` masks what it pads itself, and here padding is attended to.
        padding = self._tokenizer.pad_token_id
        return super()._states([[*tokens, *[padding] * (FLUX_TOKENS - len(tokens))] for tokens in ids])


class QwenImageTextEncoder(TextEncoder):
    """Qwen-Image's text encoder: the last states of Qwen2.5-VL, (L, D).

    The caption is put into a template that begins with a fixed instruction; the instruction's states are left out.
    """

    def __init__(self, name: str, tokenizer: Any, model: Any, max_tokens: int, precision: Precision) -> None:
        super().__init__(name, tokenizer, model, max_tokens, precision)
        # Without parts: only the pipeline's constructor knows the template and the length of the instruction.
        settings = bare_pipeline("QwenImagePipeline")
        self._template = settings.prompt_template_encode
        self._instruction = settings.prompt_template_encode_start_idx
        # The limit is on the caption: the template's own tokens come on top.
        self.max_tokens = max_tokens + len(self._tokenize([""])[0])

    def _tokenize(self, captions: Sequence[str]) -> list[list[int]]:
        return super()._tokenize([self._template.format(caption) for caption in captions])

    def _states(self, ids: Sequence[Sequence[int]]) -> list[Tensor]:
        return [states[self._instruction :] for states in super()._states(ids)]


@dataclass(frozen=True)
class _Reading:
    """How FLUX.2 uses a language model."""

    layers: tuple[int, ...]
    """Indices of the hidden states that are used."""
    has_instruction: bool
    """Whether a system message comes before the caption."""
    options: dict[str, Any]
    """Further arguments of the tokenizer's chat template."""


READINGS = {
    "mistral3": _Reading((10, 20, 30), True, {}),  # dev
    "qwen3": _Reading((9, 18, 27), False, {"add_generation_prompt": True, "enable_thinking": False}),  # klein
}
"""transformers' type of the language model → how FLUX.2 uses it."""


class Flux2TextEncoder(TextEncoder):
    """FLUX.2's text encoder: the states of three layers of a language model, concatenated to (512, 3·D)."""

    _padded_length = FLUX_TOKENS

    def __init__(self, name: str, tokenizer: Any, model: Any, precision: Precision) -> None:
        super().__init__(name, tokenizer, model, FLUX_TOKENS, precision)
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
        """The caption as a chat, which the tokenizer's template turns into tokens."""
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
        # (B, 512, 3·D)
        side_by_side = torch.cat([states[layer] for layer in self._reading.layers], dim=-1)
        return list(side_by_side.float().cpu())


def load_pipeline_encoder(
    name: str, max_tokens: int, device: torch.device | str, precision: Precision | None = None
) -> TextEncoder:
    """Load the text encoder of a pipeline.

    Args:
        name: one of `PIPELINES`, ":", and the pipeline's folder or hub id.
        max_tokens: longest caption in tokens, of encoders that do not pad to a length of their own.
        device: where it runs.
        precision: how its weights are held; None for the usual one (see above).

    Raises:
        UserError: there is no such encoder, or it does not fit the device.
    """
    import transformers

    held = precision or usual_precision(name, torch.device(device).type == "cpu")
    kinds = text_models(name)
    with loading(name) as where:

        def part(number: str = "", tokenizer: str = "tokenizer") -> tuple[Any, Any]:
            kind, place = kinds[number], where | {"subfolder": f"text_encoder{number}"}
            # CLIP takes a fortieth of T5's memory, and its vector reaches every layer: it isn't made of integers.
            own: Precision = "bfloat16" if held in LIBRARIES and kind.startswith("CLIP") else held
            words = transformers.AutoTokenizer.from_pretrained(**where, subfolder=f"{tokenizer}{number}")
            return words, load_frozen(getattr(transformers, kind), name, place, own, device)

        match of_pipeline(name):
            case "flux":
                return FluxTextEncoder(name, part("_2"), part(), held)
            case "flux2":
                return Flux2TextEncoder(name, *part(), held)
            case "sd3":
                return SD3TextEncoder(name, part("_3"), (part(), part("_2")), held)
            case "z-image":
                return ZImageTextEncoder(name, *part(), max_tokens, held)
            case "wan":
                return WanTextEncoder(name, *part(), max_tokens, held)
            case "longcat-image":
                return LongCatImageTextEncoder(name, *part(), max_tokens, held)
            case "qwen-image-2.1":
                return QwenImage21TextEncoder(name, *part(tokenizer="processor"), max_tokens, held)
            case "krea2":
                return Krea2TextEncoder(name, *part(), max_tokens, held, _krea2_layers(where))
        return QwenImageTextEncoder(name, *part(), max_tokens, held)


def text_models(name: str) -> dict[str, str]:
    """The text encoders of a pipeline, first the one that gives token states.

    Args:
        name: as for `load_pipeline_encoder`; without a pipeline's prefix, there is one text encoder.

    Returns:
        What follows `text_encoder` in their folders' names ("_2" of the second) → their classes in transformers.
    """
    match of_pipeline(name):
        case "flux":
            return {"_2": "T5EncoderModel", "": "CLIPTextModel"}
        case "sd3":
            clip = "CLIPTextModelWithProjection"
            return {"_3": "T5EncoderModel", "": clip, "_2": clip}
        case "wan":
            return {"": "UMT5EncoderModel"}
    return {"": "AutoModel"}


def pipeline_widths(name: str) -> tuple[int, int | None]:
    """D of the token states, and P of the vectors of whole captions or None; from configurations, without weights.

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
            case "sd3":
                return config("_3").hidden_size, config().projection_dim + config("_2").projection_dim
            case "krea2":
                layers = bare_pipeline("Krea2Pipeline", text_encoder_select_layers=_krea2_layers(where))
                return config().hidden_size * len(layers.text_encoder_select_layers), None
            case "flux2":
                kind = AutoConfig.from_pretrained(**where, subfolder="text_encoder").model_type
                return config().hidden_size * len(_reading(kind).layers), None
        return config().hidden_size, None


def _krea2_layers(where: dict[str, Any]) -> Sequence[int] | None:
    """The layers whose states a Krea 2 pipeline uses; None for the usual ones."""
    from diffusers import Krea2Pipeline

    return Krea2Pipeline.load_config(**where).get("text_encoder_select_layers")


def _reading(model_type: str) -> _Reading:
    """How FLUX.2 uses a language model of this type.

    Raises:
        UserError: the type is unknown.
    """
    if model_type not in READINGS:
        raise UserError(
            f"--text-encoder flux2: knows FLUX.2's language models ({', '.join(READINGS)}), and this pipeline's is "
            f"{model_type!r}."
        )
    return READINGS[model_type]
