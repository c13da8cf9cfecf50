"""What a teacher and its student are conditioned on, beside the latent and the time."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn import functional as F
from torch.nn.utils.rnn import pad_sequence


@dataclass(frozen=True)
class TextConditioning:
    """Token states of a text encoder, padded to a common length.

    Attributes:
        states: (B, L, D) float32; padding is zero.
        mask: (B, L) bool; True where a token is.
    """

    states: Tensor
    mask: Tensor

    @classmethod
    def collate(cls, states: Sequence[Tensor]) -> TextConditioning:
        """Pad token states of different lengths, each (L_i, D), to one batch."""
        lengths = torch.tensor([len(s) for s in states])
        padded = pad_sequence([s.float() for s in states], batch_first=True)
        return cls(padded, torch.arange(padded.shape[1])[None] < lengths[:, None])

    def __len__(self) -> int:
        return len(self.states)

    def to(self, device: torch.device | str) -> TextConditioning:
        return TextConditioning(
            self.states.to(device, non_blocking=True), self.mask.to(device, non_blocking=True)
        )

    def expand(self, batch: int) -> TextConditioning:
        """Repeat a single condition (B = 1), such as the null condition, for a whole batch."""
        return TextConditioning(self.states.expand(batch, -1, -1), self.mask.expand(batch, -1))

    def repeat(self, times: int) -> TextConditioning:
        """The whole batch several times over: row s·B + b is sample b."""
        return TextConditioning(self.states.repeat(times, 1, 1), self.mask.repeat(times, 1))

    def where(self, keep: Tensor, other: TextConditioning) -> TextConditioning:
        """Samples of this batch where `keep` (B,) is True, and of `other` (B = 1 or B) where it is not."""
        length = max(self.mask.shape[1], other.mask.shape[1])
        first, second = self._padded(length), other._padded(length)
        return TextConditioning(
            torch.where(keep[:, None, None], first.states, second.states),
            torch.where(keep[:, None], first.mask, second.mask),
        )

    def cat(self, other: TextConditioning) -> TextConditioning:
        """Stack two batches, padding the shorter one's tokens."""
        length = max(self.mask.shape[1], other.mask.shape[1])
        first, second = self._padded(length), other._padded(length)
        return TextConditioning(
            torch.cat([first.states, second.states]), torch.cat([first.mask, second.mask])
        )

    def _padded(self, length: int) -> TextConditioning:
        extra = length - self.mask.shape[1]
        return TextConditioning(F.pad(self.states, (0, 0, 0, extra)), F.pad(self.mask, (0, extra)))
