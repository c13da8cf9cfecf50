"""FLUX.1's text: T5's token states, and CLIP's one vector for the whole caption."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from fewstep.data.text import GROUP, LEAST_TOKENS, TextEncoder, loading

FLUX_TOKENS = 512
"""FLUX.1 dev pads every caption to this length, and attends to the padding: it is part of the states."""


class FluxTextEncoder(TextEncoder):
    """The two text encoders of a FLUX.1 pipeline. Token states are T5's, (512, D) for every caption.

    Args:
        name: "flux:" and the pipeline's folder or hub id.
        tokens: T5's tokenizer and encoder.
        whole: CLIP's tokenizer and text model, whose pooled output is the caption's vector.
    """

    def __init__(
        self, name: str, tokens: tuple[Any, torch.nn.Module], whole: tuple[Any, torch.nn.Module]
    ) -> None:
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

    def _states(self, ids: Tensor, least: int = LEAST_TOKENS) -> Tensor:
        padding = (0, FLUX_TOKENS - ids.shape[1])
        return super()._states(F.pad(ids, padding, value=self._tokenizer.pad_token_id), least)


def load_flux_encoders(name: str, device: torch.device | str) -> FluxTextEncoder:
    """The encoders of a FLUX.1 pipeline, `name` being "flux:" and its folder or hub id.

    Raises:
        UserError: no such encoders are there.
    """
    from transformers import AutoTokenizer, CLIPTextModel, T5EncoderModel

    with loading(name) as where:
        pairs = [
            (
                AutoTokenizer.from_pretrained(**where, subfolder=f"tokenizer{part}"),
                kind.from_pretrained(**where, subfolder=f"text_encoder{part}", dtype=torch.float32)
                .eval()
                .requires_grad_(False)
                .to(device),
            )
            for kind, part in ((T5EncoderModel, "_2"), (CLIPTextModel, ""))
        ]
    return FluxTextEncoder(name, *pairs)
