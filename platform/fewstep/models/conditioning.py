"""What a teacher and its student are conditioned on, beside the latent and the time."""

from __future__ import annotations

from collections.abc import Callable, Sequence
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
        pooled: (B, P) float32, one vector for each whole text; None where the text encoder has none.
    """

    states: Tensor
    mask: Tensor
    pooled: Tensor | None = None

    @classmethod
    def collate(cls, states: Sequence[Tensor], pooled: Sequence[Tensor] | None = None) -> TextConditioning:
        """Pad token states of different lengths, each (L_i, D), to one batch; `pooled` are (P,) each."""
        lengths = torch.tensor([len(s) for s in states])
        padded = pad_sequence([s.float() for s in states], batch_first=True)
        mask = torch.arange(padded.shape[1])[None] < lengths[:, None]
        return cls(padded, mask, None if pooled is None else torch.stack(list(pooled)).float())

    @classmethod
    def join(cls, parts: Sequence[TextConditioning]) -> TextConditioning:
        """Several batches of one text encoder as one, padded to the longest text among them."""
        length = max(part.mask.shape[1] for part in parts)
        padded = [part._padded(length) for part in parts]
        states, mask = torch.cat([part.states for part in padded]), torch.cat([part.mask for part in padded])
        pooled = None if padded[0].pooled is None else torch.cat([part.pooled for part in padded])
        return cls(states, mask, pooled)

    def __len__(self) -> int:
        return len(self.states)

    def __getitem__(self, samples: slice) -> TextConditioning:
        return self._each(lambda tensor: tensor[samples])

    def summary(self) -> Tensor:
        """One vector per text, (B, P): the pooled one, or the mean token state where there is none."""
        if self.pooled is not None:
            return self.pooled
        share = self.mask / self.mask.sum(1, keepdim=True).clamp(min=1)
        return torch.einsum("bl,bld->bd", share.to(self.states.dtype), self.states)

    def to(self, device: torch.device | str, dtype: torch.dtype | None = None) -> TextConditioning:
        """Move, and change the type of all but the mask, without waiting."""
        return self._each(
            lambda tensor: tensor.to(device, dtype if tensor.is_floating_point() else None, non_blocking=True)
        )

    def expand(self, batch: int) -> TextConditioning:
        """Repeat a single condition (B = 1), such as the null condition, for a whole batch."""
        return self._each(lambda tensor: tensor.expand(batch, *tensor.shape[1:]))

    def repeat(self, times: int) -> TextConditioning:
        """The whole batch several times over: row s·B + b is sample b."""
        return self._each(lambda tensor: tensor.repeat(times, *[1] * (tensor.ndim - 1)))

    def where(self, keep: Tensor, other: TextConditioning) -> TextConditioning:
        """Samples of this batch where `keep` (B,) is True, and of `other` (B = 1 or B) where it is not."""
        length = max(self.mask.shape[1], other.mask.shape[1])
        ours, theirs = self._padded(length), other._padded(length)

        def choose(one: Tensor, another: Tensor) -> Tensor:
            return torch.where(keep.view(-1, *[1] * (one.ndim - 1)), one, another)

        pooled = None if ours.pooled is None else choose(ours.pooled, theirs.pooled)
        return TextConditioning(choose(ours.states, theirs.states), choose(ours.mask, theirs.mask), pooled)

    def cat(self, other: TextConditioning) -> TextConditioning:
        """Stack two batches, padding the shorter one's tokens."""
        return TextConditioning.join([self, other])

    def _each(self, change: Callable[[Tensor], Tensor]) -> TextConditioning:
        pooled = None if self.pooled is None else change(self.pooled)
        return TextConditioning(change(self.states), change(self.mask), pooled)

    def _padded(self, length: int) -> TextConditioning:
        extra = length - self.mask.shape[1]
        if not extra:
            return self
        states, mask = F.pad(self.states, (0, 0, 0, extra)), F.pad(self.mask, (0, extra))
        return TextConditioning(states, mask, self.pooled)
