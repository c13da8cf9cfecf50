"""Label encoders: class names to class indices, the conditions of class-conditional teachers.

The name or number of a class takes the place of a caption, so that datasets, streams and prompts work as for texts.
"""

from __future__ import annotations

import difflib
from collections.abc import Sequence

import torch

from fewstep.encoders.base import LABELS, ConditionEncoder
from fewstep.errors import UserError
from fewstep.models.conditioning import ClassConditioning

MOST_CLASSES = 2048
"""Most classes: shards from before fewstep 0.2 hold the index as float16, which has all integers up to 2,048."""

FASHION_MNIST = (
    "t-shirt", "trouser", "pullover", "dress", "coat", "sandal", "shirt", "sneaker", "bag", "ankle boot",
)  # fmt: skip
"""Fashion-MNIST's classes, in the order of its own label numbers."""

CLASS_SETS = {"fashion-mnist": FASHION_MNIST}
"""Sets of classes that a label encoder's name can refer to."""


def is_labels(name: str) -> bool:
    """Whether an encoder's name is that of a label encoder."""
    return name.startswith(LABELS)


def class_names(name: str) -> tuple[str, ...]:
    """The classes of the label encoder of this name, in the order of their indices.

    `labels:fashion-mnist` names one of `CLASS_SETS`, `labels:cat,dog` lists the classes, and `labels:1000` gives their
    number: their names are then 0 to 999.

    Raises:
        UserError: the set is unknown, or there are no, too many or repeated classes.
    """
    # The three forms, in the order in which they are told apart: a known set, a number, a list.
    what = name.removeprefix(LABELS)
    if what in CLASS_SETS:
        return CLASS_SETS[what]
    classes = tuple(part.strip() for part in what.split(","))
    if what.isdecimal():
        # One more than allowed is enough to be refused below; a huge number would fill memory first.
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


class LabelEncoder(ConditionEncoder):
    """Encodes classes, by name (upper or lower case) or by number.

    The empty caption "" is the null class of guidance, whose index is the number of classes.

    Attributes:
        classes: names of the classes, in the order of their indices.
    """

    def __init__(self, name: str) -> None:
        self.name = name
        self.classes = class_names(name)
        numbers = {str(index): index for index in range(len(self.classes))}
        names = {label.casefold(): index for index, label in enumerate(self.classes)}
        # Names come last, so that a class called "3" is found by its name.
        self._index = {**numbers, **names, "": len(self.classes)}

    def refusals(self, captions: Sequence[str]) -> list[tuple[str, str] | None]:
        """For each caption None if it is a class, otherwise the reason and details."""
        return [
            None if _key(caption) in self._index else ("unknown class", self._unknown(caption))
            for caption in captions
        ]

    def check(self, captions: Sequence[str]) -> None:
        """Refuse captions that are no classes.

        Raises:
            UserError: some are not; the message names the first of them and the most similar class.
        """
        for refusal in self.refusals(captions):
            if refusal is not None:
                raise UserError(refusal[1])

    def encode(self, captions: Sequence[str]) -> list[ClassConditioning]:
        """The class of each caption, as a batch of one.

        Raises:
            UserError: a caption is no class.
        """
        self.check(captions)
        return [ClassConditioning(torch.tensor([self._index[_key(caption)]])) for caption in captions]

    def null(self) -> ClassConditioning:
        """The null class, as a batch of one."""
        return ClassConditioning(torch.tensor([len(self.classes)]))

    def _unknown(self, caption: str) -> str:
        """The message about a caption that is no class."""
        # cutoff 0: some class is always the nearest.
        near = difflib.get_close_matches(_key(caption), [n for n in self._index if n], 1, cutoff=0)[0]
        return (
            f"there is no class {caption[:60]!r}: the nearest is {self.classes[self._index[near]]!r}; classes may also "
            f"be given as numbers, 0 to {len(self.classes) - 1}."
        )


def _key(caption: str) -> str:
    """A caption as it is looked up: without spaces around it, and in one case."""
    return caption.strip().casefold()
