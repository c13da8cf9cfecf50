"""Class names → class indices: the conditioning of class-conditional teachers, as a text encoder gives its own.

A caption is a class's name or number, and its token states are the one number (1, 1) that says which class: exact
in float16, the type of shards, up to 2,048. So labels travel through shards, streams and servers as captions do.
"""

from __future__ import annotations

import difflib
from collections.abc import Sequence

import torch
from torch import Tensor

from fewstep.data.encoder import LABELS, CaptionEncoder
from fewstep.errors import UserError

MOST_CLASSES = 2048
"""The null class follows the last one, and float16 counts to 2,048 without a gap."""

FASHION_MNIST = (
    "t-shirt", "trouser", "pullover", "dress", "coat", "sandal", "shirt", "sneaker", "bag", "ankle boot",
)  # fmt: skip
"""In the order of the set's own label numbers."""

CLASS_SETS = {"fashion-mnist": FASHION_MNIST}
"""Sets of classes that are known by name."""


def is_labels(name: str) -> bool:
    """Whether an encoder's name is that of a label encoder."""
    return name.startswith(LABELS)


def class_names(name: str) -> tuple[str, ...]:
    """The classes that a label encoder's name stands for, in the order of their indices.

    `labels:fashion-mnist` is a known set, `labels:cat,dog` lists them, `labels:1000` only counts them.

    Raises:
        UserError: it names no known set, or too few, too many or equal classes.
    """
    what = name.removeprefix(LABELS)
    if what in CLASS_SETS:
        return CLASS_SETS[what]
    classes = tuple(part.strip() for part in what.split(","))
    if what.isdecimal():
        classes = tuple(map(str, range(min(int(what), MOST_CLASSES + 1))))
    elif len(classes) == 1:
        near = difflib.get_close_matches(what, CLASS_SETS, 1, cutoff=0)[0]
        raise UserError(
            f"the text encoder {name[:80]!r} names no known set of classes: the nearest is {LABELS + near!r}; or list "
            f"the classes ({LABELS}cat,dog), or give their number ({LABELS}1000)."
        )
    if not 1 <= len(classes) <= MOST_CLASSES:
        raise UserError(
            f"the text encoder {name[:80]!r} has {'too many' if classes else 'no'} classes: give 1 to {MOST_CLASSES}."
        )
    if "" in classes or len({label.casefold() for label in classes}) < len(classes):
        raise UserError(
            f"the text encoder {name[:80]!r} has an empty or repeated class: name each once, between commas."
        )
    return classes


class LabelEncoder(CaptionEncoder):
    """Classes by name, letter case aside, or by number.

    The empty caption "" is the null class of guidance, whose index is the number of classes.

    Attributes:
        classes: their names, in the order of their indices.
    """

    def __init__(self, name: str) -> None:
        self.name, self.dim = name, 1
        self.classes = class_names(name)
        numbers = {str(index): index for index in range(len(self.classes))}
        names = {label.casefold(): index for index, label in enumerate(self.classes)}
        self._index = {**numbers, **names, "": len(self.classes)}

    def refusals(self, captions: Sequence[str]) -> list[tuple[str, str] | None]:
        return [
            None if _key(caption) in self._index else ("unknown class", self._unknown(caption))
            for caption in captions
        ]

    def check(self, captions: Sequence[str]) -> None:
        """Refuse what is no class.

        Raises:
            UserError: names the first such caption and the nearest class.
        """
        for refusal in self.refusals(captions):
            if refusal is not None:
                raise UserError(refusal[1])

    def encode(self, captions: Sequence[str]) -> list[Tensor]:
        """The class index of each caption as token states, (1, 1) float32 on the CPU.

        Raises:
            UserError: a caption is no class.
        """
        self.check(captions)
        return [torch.tensor([[float(self._index[_key(caption)])]]) for caption in captions]

    def _unknown(self, caption: str) -> str:
        near = difflib.get_close_matches(_key(caption), [n for n in self._index if n], 1, cutoff=0)[0]
        return (
            f"there is no class {caption[:60]!r}: the nearest is {self.classes[self._index[near]]!r}; classes may also "
            f"be given as numbers, 0 to {len(self.classes) - 1}."
        )


def _key(caption: str) -> str:
    return caption.strip().casefold()
