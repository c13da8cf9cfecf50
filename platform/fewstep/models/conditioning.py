"""What teachers and students are conditioned on, beside latent and time: texts, also with images; or classes."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import Self

import torch
from torch import Tensor
from torch.nn import functional as F
from torch.nn.utils.rnn import pad_sequence


class Conditioning(ABC):
    """A batch of conditions, all texts or all classes; row i of every tensor belongs to sample i."""

    @staticmethod
    def join(parts: Sequence[Conditioning]) -> Conditioning:
        """Concatenate several batches of one kind to one batch; texts are padded to the longest of them."""
        return parts[0]._joined(parts)

    @abstractmethod
    def __len__(self) -> int:
        """B, the number of samples."""

    @property
    @abstractmethod
    def tensors(self) -> tuple[Tensor, ...]:
        """All tensors it holds."""

    @abstractmethod
    def map(self, change: Callable[[Tensor], Tensor]) -> Self:
        """A batch of the same kind, of which every tensor is `change` of this one's."""

    @abstractmethod
    def where(self, keep: Tensor, other: Self) -> Self:
        """The samples of this batch where `keep` (B,) is True, and those of `other` (B or 1) where it is False."""

    @abstractmethod
    def _joined(self, parts: Sequence[Self]) -> Self:
        """`join`, for parts that all are of this kind."""

    def __getitem__(self, samples: slice) -> Self:
        return self.map(lambda tensor: tensor[samples])

    @property
    def references(self) -> tuple[Tensor, ...]:
        """Latents of the reference images beside each sample's text, (B, C, h, w) each; none by default."""
        return ()

    def unconditional(self, null: Self, rows: Tensor | None = None) -> Self:
        """The null condition for these samples; what guidance leaves in place, such as reference images, is theirs.

        Args:
            null: the null condition (B = 1).
            rows: indices of the samples that are wanted, (R,); None for all.
        """
        return null.expand(len(self) if rows is None else len(rows))

    @property
    def prepared(self) -> bool:
        """Whether it holds what `Family.prepare` has computed, with which only that network can be called."""
        return False

    def cut(self) -> tuple[Self, Callable[[], None]]:
        """The same batch with its tensors cut from the graph that computed them, for several backward passes.

        Returns:
            The batch, and a function that takes the gradients that its tensors got meanwhile back into that graph.
        """
        return self, lambda: None

    @property
    def device(self) -> torch.device:
        """The device of its tensors."""
        return self.tensors[0].device

    @property
    def nbytes(self) -> int:
        """Size of its tensors in bytes."""
        return sum(tensor.nbytes for tensor in self.tensors)

    def to(self, device: torch.device | str, dtype: torch.dtype | None = None) -> Self:
        """Move to a device without waiting; `dtype` applies to floating-point tensors, not to masks and labels."""
        return self.map(
            lambda tensor: tensor.to(device, dtype if tensor.is_floating_point() else None, non_blocking=True)
        )

    def expand(self, batch: int) -> Self:
        """A single condition (B = 1), such as the null condition, for each sample of a batch."""
        # Views, not copies.
        return self.map(lambda tensor: tensor.expand(batch, *tensor.shape[1:]))

    def repeat(self, times: int) -> Self:
        """The whole batch `times` times: row s·B + b is sample b."""
        return self.map(lambda tensor: tensor.repeat(times, *[1] * (tensor.ndim - 1)))

    def cat(self, other: Self) -> Self:
        """This batch followed by another one."""
        return self._joined([self, other])


@dataclass(frozen=True)
class TextConditioning(Conditioning):
    """Token states of a text encoder, padded to a common length; for editing with reference images.

    Attributes:
        states: (B, L, D) float32; padding is zero.
        mask: (B, L) bool; True where a token is.
        pooled: (B, P) float32, one vector for each whole text; None where the text encoder has none.
        references: latents of reference images, (B, C, h, w) each, in the order in which the network takes them.
    """

    states: Tensor
    mask: Tensor
    pooled: Tensor | None = None
    references: tuple[Tensor, ...] = ()

    @classmethod
    def collate(cls, states: Sequence[Tensor], pooled: Sequence[Tensor] | None = None) -> TextConditioning:
        """Pad token states of different lengths to one batch.

        Args:
            states: of each text, (L_i, D).
            pooled: vector of each whole text, (P,); None where there are none.
        """
        lengths = torch.tensor([len(s) for s in states])
        padded = pad_sequence([s.float() for s in states], batch_first=True)
        mask = torch.arange(padded.shape[1])[None] < lengths[:, None]  # (B, L)
        return cls(padded, mask, None if pooled is None else torch.stack(list(pooled)).float())

    def __len__(self) -> int:
        return len(self.states)

    @property
    def tensors(self) -> tuple[Tensor, ...]:
        """States, mask, pooled vectors if there are any, and references."""
        pooled = () if self.pooled is None else (self.pooled,)
        return (self.states, self.mask, *pooled, *self.references)

    def map(self, change: Callable[[Tensor], Tensor]) -> TextConditioning:
        """Texts of which every tensor is `change` of this one's."""
        pooled = None if self.pooled is None else change(self.pooled)
        return TextConditioning(
            change(self.states), change(self.mask), pooled, tuple(map(change, self.references))
        )

    def unconditional(self, null: TextConditioning, rows: Tensor | None = None) -> TextConditioning:
        """The null text for these samples, beside their own references; see `Conditioning.unconditional`."""
        kept = self.references if rows is None else tuple(images[rows] for images in self.references)
        return replace(super().unconditional(null, rows), references=kept)

    @property
    def lengths(self) -> list[int]:
        """Number of tokens of each text; on the meta device, where masks have no values, all have the full length."""
        return [self.mask.shape[1]] * len(self) if self.mask.is_meta else self.mask.sum(1).tolist()

    def summary(self) -> Tensor:
        """One vector per text: the pooled one, (B, P), or the mean of the token states, (B, D), where there is none."""
        if self.pooled is not None:
            return self.pooled
        # Padding has share 0; the clamp keeps a text without any token from 0/0.
        share = self.mask / self.mask.sum(1, keepdim=True).clamp(min=1)
        return torch.einsum("bl,bld->bd", share.to(self.states.dtype), self.states)

    def where(self, keep: Tensor, other: TextConditioning) -> TextConditioning:
        """The texts of this batch where `keep` (B,) is True, and those of `other` (B or 1) where it is False.

        References are always this batch's.
        """
        # Both are padded to the longer of the two, so that samples can be exchanged row by row.
        length = max(self.mask.shape[1], other.mask.shape[1])
        ours, theirs = self._padded(length), other._padded(length)

        def choose(one: Tensor, another: Tensor) -> Tensor:
            return torch.where(keep.view(-1, *[1] * (one.ndim - 1)), one, another)

        if (ours.pooled is None) != (theirs.pooled is None):
            raise ValueError("conditions with and without pooled vectors can't be in one batch")
        pooled = None
        if ours.pooled is not None and theirs.pooled is not None:
            pooled = choose(ours.pooled, theirs.pooled)
        return TextConditioning(
            choose(ours.states, theirs.states), choose(ours.mask, theirs.mask), pooled, self.references
        )

    def _joined(self, parts: Sequence[TextConditioning]) -> TextConditioning:
        length = max(part.mask.shape[1] for part in parts)
        padded = [part._padded(length) for part in parts]
        states, mask = torch.cat([part.states for part in padded]), torch.cat([part.mask for part in padded])
        pooled = [part.pooled for part in padded if part.pooled is not None]
        if pooled and len(pooled) < len(padded):
            raise ValueError("conditions with and without pooled vectors can't be in one batch")
        # Also refuses conditions of different numbers of references
        references = tuple(map(torch.cat, zip(*(part.references for part in parts), strict=True)))
        return TextConditioning(states, mask, torch.cat(pooled) if pooled else None, references)

    def _padded(self, length: int) -> TextConditioning:
        """The same texts with states and mask padded to `length` tokens."""
        extra = length - self.mask.shape[1]
        if not extra:
            return self
        # Pairs of (before, after), from the last axis: nothing on D, `extra` after the tokens.
        states, mask = F.pad(self.states, (0, 0, 0, extra)), F.pad(self.mask, (0, extra))
        return replace(self, states=states, mask=mask)


@dataclass(frozen=True)
class ClassConditioning(Conditioning):
    """Classes by index, from 0; the index after the last class is the null condition of guidance.

    Attributes:
        labels: (B,) int64.
    """

    labels: Tensor

    def __len__(self) -> int:
        return len(self.labels)

    @property
    def tensors(self) -> tuple[Tensor, ...]:
        """The labels."""
        return (self.labels,)

    def map(self, change: Callable[[Tensor], Tensor]) -> ClassConditioning:
        """Classes whose labels are `change` of this one's."""
        return ClassConditioning(change(self.labels))

    def where(self, keep: Tensor, other: ClassConditioning) -> ClassConditioning:
        """The classes of this batch where `keep` (B,) is True, and those of `other` (B or 1) where it is False."""
        return ClassConditioning(torch.where(keep, self.labels, other.labels))

    def _joined(self, parts: Sequence[ClassConditioning]) -> ClassConditioning:
        return ClassConditioning(torch.cat([part.labels for part in parts]))
