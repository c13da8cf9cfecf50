"""Encoders of captions: what each gives, whatever is behind it, and which there are, by name.

A dataset is prepared with one; whoever generates must use the same one again.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Sequence
from dataclasses import replace

import torch
from torch import Tensor

from fewstep.data.schema import MAX_TOKENS
from fewstep.models.conditioning import TextConditioning

MINILM = "minilm"
"""The text encoder that comes as a package: all-MiniLM-L6-v2, 22.7M parameters, D = 384, Apache-2.0."""

LABELS = "labels:"
"""What names begin with that stand for classes instead of text (see `labels.py`)."""

PIPELINES = ("flux", "flux2", "qwen-image")
"""Before ":" and the folder or hub id of a diffusers pipeline: its own text encoders (see `pipeline_text.py`)."""


class CaptionEncoder(ABC):
    """Captions → what a network is conditioned on.

    Attributes:
        name: what `load_encoder` was given; a dataset's manifest keeps it.
        dim: D, the width of the token states.
    """

    name: str
    dim: int
    pooled_dim: int | None = None
    """P, the width of vectors of whole captions; None for encoders that have none."""

    @abstractmethod
    def refusals(self, captions: Sequence[str]) -> list[tuple[str, str] | None]:
        """Per caption: None if it can be encoded, otherwise the kind of trouble, and what exactly."""

    @abstractmethod
    def check(self, captions: Sequence[str]) -> None:
        """Refuse captions that can't be encoded, before any work is done for them.

        Raises:
            UserError: a sentence about the first of them.
        """

    @abstractmethod
    def encode(self, captions: Sequence[str]) -> list[Tensor]:
        """Token states of each caption, (L_i, D) float32 on the CPU: the very numbers that shards store."""

    def encode_to_draw(self, captions: Sequence[str]) -> list[Tensor]:
        """The same before shards' rounding, for captions that are to be drawn."""
        return self.encode(captions)

    def pooled(self, captions: Sequence[str]) -> list[Tensor] | None:
        """One vector (P,) float32 for each caption; None if the encoder has none."""
        return None

    def conditioning(self, captions: Sequence[str]) -> TextConditioning:
        """The captions as one batch."""
        return TextConditioning.collate(self.encode_to_draw(captions), self.pooled(captions))

    def null(self) -> TextConditioning:
        """The empty caption as a batch of one: the null condition of guidance, rounded as shards are."""
        empty = self.conditioning([""])
        return replace(empty, states=as_stored(empty.states))

    def each(self, captions: Sequence[str]) -> list[TextConditioning]:
        """Every caption as a batch of its own, without padding."""
        states, pooled = self.encode_to_draw(captions), self.pooled(captions)
        vectors = [None] * len(states) if pooled is None else [[vector] for vector in pooled]
        return [TextConditioning.collate([s], v) for s, v in zip(states, vectors, strict=True)]


def as_stored(states: Tensor) -> Tensor:
    """Token states as shards hold them: float32 rounded through float16, what lies beyond its range at the range's end.

    Some language models have a few activations of 10⁴ and more; one infinity would end a training.
    """
    largest = torch.finfo(torch.float16).max
    return states.float().clamp(-largest, largest).half().float()


def load_encoder(
    name: str = MINILM, *, max_tokens: int = MAX_TOKENS, device: torch.device | str = "cpu"
) -> CaptionEncoder:
    """Load "minilm", "labels:…", a pipeline's own (`PIPELINES`), or a transformers model from a folder or hub id.

    Args:
        name: of the encoder.
        max_tokens: longest caption of encoders that do not pad to a length of their own.
        device: where it runs.

    Raises:
        UserError: nothing loads under that name.
    """
    if name.startswith(LABELS):
        from fewstep.data.labels import LabelEncoder

        return LabelEncoder(name)
    if of_pipeline(name):
        from fewstep.data.pipeline_text import load_pipeline_encoder

        return load_pipeline_encoder(name, max_tokens, device)
    from fewstep.data.text import TextEncoder

    return TextEncoder.load(name, max_tokens=max_tokens, device=device)


def encoder_widths(name: str) -> tuple[int, int | None]:
    """(D of token states, P of vectors of whole captions or None) of an encoder, without its weights.

    Raises:
        UserError: as `load_encoder`.
    """
    if name.startswith(LABELS):
        return load_encoder(name).dim, None
    if of_pipeline(name):
        from fewstep.data.pipeline_text import pipeline_widths

        return pipeline_widths(name)
    from fewstep.data.text import text_width

    return text_width(name), None


def of_pipeline(name: str) -> str | None:
    """Which of `PIPELINES` a name belongs to; None for other encoders."""
    kind, colon, _ = name.partition(":")
    return kind if colon and kind in PIPELINES else None
