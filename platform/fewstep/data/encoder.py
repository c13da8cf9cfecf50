"""What every encoder of captions gives, whatever is behind it."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Sequence

from torch import Tensor

from fewstep.models.conditioning import TextConditioning


class CaptionEncoder(ABC):
    """Captions → what a network is conditioned on. Encoders derive from this one and define `encode`."""

    pooled_dim: int | None = None
    """P, the width of vectors of whole captions; None for encoders that have none."""

    @abstractmethod
    def encode(self, captions: Sequence[str]) -> list[Tensor]:
        """Token states of each caption, (L_i, D) float32 on the CPU."""

    def encode_apart(self, captions: Sequence[str]) -> list[Tensor]:
        """The same up to rounding, for a few captions that are to be drawn."""
        return self.encode(captions)

    def pooled(self, captions: Sequence[str]) -> list[Tensor] | None:
        """One vector (P,) float32 for each caption; None if the encoder has none."""
        return None

    def conditioning(self, captions: Sequence[str]) -> TextConditioning:
        """The captions as one batch."""
        return TextConditioning.collate(self.encode_apart(captions), self.pooled(captions))

    def each(self, captions: Sequence[str]) -> list[TextConditioning]:
        """Every caption as a batch of its own, without padding."""
        states, pooled = self.encode_apart(captions), self.pooled(captions)
        vectors = [None] * len(states) if pooled is None else [[vector] for vector in pooled]
        return [TextConditioning.collate([s], v) for s, v in zip(states, vectors, strict=True)]
