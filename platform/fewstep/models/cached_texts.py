"""Texts as the keys and values that a network's blocks have computed of them, for networks whose texts know no time."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import NamedTuple

import torch
from torch import Tensor

from fewstep.models.conditioning import Conditioning


class CachedText(NamedTuple):
    """One text of L tokens: of each block, a tensor (L, heads, width of a head)."""

    keys: tuple[Tensor, ...]
    """With the text's own positions."""
    values: tuple[Tensor, ...]
    """As many."""


@dataclass(frozen=True)
class CachedTexts(Conditioning):
    """A batch of texts, of different lengths, whose keys and values are computed already.

    Samples of one text share its tensors: repeating, slicing and joining batches copies nothing.

    Attributes:
        texts: of each sample.
        student: whether they are the student's, whose adapters change them, or the teacher's.
    """

    texts: tuple[CachedText, ...]
    student: bool = False

    def __len__(self) -> int:
        return len(self.texts)

    def __getitem__(self, samples: slice) -> CachedTexts:
        return replace(self, texts=self.texts[samples])

    @property
    def lengths(self) -> list[int]:
        """Tokens of each sample's text, known without asking the device."""
        return [len(text.keys[0]) for text in self.texts]

    @property
    def prepared(self) -> bool:
        """True."""
        return True

    @property
    def tensors(self) -> tuple[Tensor, ...]:
        """Keys and values of each text once."""
        once = {id(text): text for text in self.texts}
        return tuple(tensor for text in once.values() for tensor in (*text.keys, *text.values))

    def map(self, change: Callable[[Tensor], Tensor]) -> CachedTexts:
        """Texts of which every tensor is `change` of this one's. Theirs have no axis of samples."""
        once = {
            id(text): CachedText(tuple(map(change, text.keys)), tuple(map(change, text.values)))
            for text in self.texts
        }
        return replace(self, texts=tuple(once[id(text)] for text in self.texts))

    def expand(self, batch: int) -> CachedTexts:
        """A single text (B = 1) for each sample of a batch."""
        return replace(self, texts=self.texts * batch)

    def repeat(self, times: int) -> CachedTexts:
        """The whole batch `times` times: row s·B + b is sample b."""
        return replace(self, texts=self.texts * times)

    def where(self, keep: Tensor, other: CachedTexts) -> CachedTexts:
        """The texts of this batch where `keep` (B,) is True, and those of `other` (B or 1) where it is False."""
        others = other.texts * (len(self) if len(other) == 1 else 1)
        chosen = zip(keep.tolist(), self.texts, others, strict=True)
        return replace(self, texts=tuple(ours if kept else theirs for kept, ours, theirs in chosen))

    def cut(self) -> tuple[CachedTexts, Callable[[], None]]:
        """See `Conditioning.cut`."""
        if not self.tensors[0].requires_grad:
            return self, lambda: None
        leaves = self.map(lambda tensor: tensor.detach().requires_grad_())

        def finish() -> None:
            pairs = zip(self.tensors, leaves.tensors, strict=True)
            reached = {tensor: leaf.grad for tensor, leaf in pairs if leaf.grad is not None}
            if reached:  # a loss may have been looked at only
                torch.autograd.backward(list(reached), list(reached.values()))

        return leaves, finish

    def _joined(self, parts: Sequence[CachedTexts]) -> CachedTexts:
        if len({part.student for part in parts}) > 1:
            raise ValueError("texts cached for the student and for the teacher can't be in one batch")
        return replace(self, texts=tuple(text for part in parts for text in part.texts))
