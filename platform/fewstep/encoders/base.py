"""The interface of encoders of conditions (texts or classes), and the names of encoders.

A dataset is prepared with one encoder, and generating needs the same one again. `load_encoder` loads it by name.
"""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from collections.abc import Sequence

import torch
from torch import Tensor

from fewstep.config import Precision
from fewstep.models.conditioning import Conditioning

MINILM = "minilm"
"""Name of the text encoder that is installed as a package: all-MiniLM-L6-v2, 22.7M parameters, D = 384, Apache-2.0."""

LABELS = "labels:"
"""Prefix of the names of label encoders, for classes instead of texts (see `labels.py`)."""

PIPELINES = (
    "flux",
    "flux2",
    "krea2",
    "longcat-image",
    "qwen-image",
    "qwen-image-2.1",
    "sd3",
    "wan",
    "z-image",
)
"""Prefixes of the names of pipelines' own text encoders, before ":" and the pipeline's folder or hub id
(see `pipelines.py`)."""

USUALLY_EXACT = ("flux", "sd3")
"""Those of `PIPELINES` that are loaded in float32 also on a GPU, unless a precision is asked for."""


class ConditionEncoder(ABC):
    """Encodes captions to what a network is conditioned on.

    Attributes:
        name: as `load_encoder` was given it; stored in a dataset's manifest.
        precision: how its weights are held; None for encoders without weights. Encodings of the same caption differ
            between precisions.
    """

    name: str
    precision: Precision | None = None

    @property
    def nbytes(self) -> int:
        """Bytes that its weights take on its device, when they are there."""
        return 0

    def offload(self) -> None:  # noqa: B027 (not abstract: encoders without weights have nothing to move)
        """From now on, have its weights wait on the host, and visit the device for each batch."""

    @abstractmethod
    def refusals(self, captions: Sequence[str]) -> list[tuple[str, str] | None]:
        """For each caption None if it can be encoded, otherwise the reason and details why not."""

    @abstractmethod
    def check(self, captions: Sequence[str]) -> None:
        """Refuse captions that can't be encoded, before any work is done for them.

        Raises:
            UserError: some can't; the message is about the first of them.
        """

    @abstractmethod
    def encode(self, captions: Sequence[str]) -> Sequence[Conditioning]:
        """Each caption as a batch of one on the CPU, with the same numbers as shards store."""

    def each(self, captions: Sequence[str]) -> Sequence[Conditioning]:
        """Each caption as a batch of one on the CPU, without the rounding of shards; for generating."""
        return self.encode(captions)

    def conditioning(self, captions: Sequence[str]) -> Conditioning:
        """The captions as one batch on the CPU, without the rounding of shards; for generating."""
        return Conditioning.join(self.each(captions))

    @abstractmethod
    def null(self) -> Conditioning:
        """The empty caption as a batch of one: the null condition of guidance, rounded as shards are."""


def as_stored(states: Tensor) -> Tensor:
    """Token states of a caption as shards store them: rounded to float16 times `storage_scale`; float32."""
    scale = storage_scale(states)
    return (states.float() / scale).half().float() * scale


def storage_scale(states: Tensor) -> float:
    """The power of two by which a caption's token states are divided where shards store them in float16.

    Some language models have a few activations of 10⁵ and more, beyond float16's range. It is 1 for all others.
    """
    largest = float(states.abs().max()) if states.numel() else 0.0
    share = largest / torch.finfo(torch.float16).max
    # States that aren't finite pass as they are: what went wrong should be seen.
    return 2.0 ** math.ceil(math.log2(share)) if 1 < share < math.inf else 1.0


def usual_precision(name: str, on_cpu: bool) -> Precision:
    """The precision in which a text encoder is loaded where none is asked for."""
    return "float32" if on_cpu or of_pipeline(name) in (None, *USUALLY_EXACT) else "bfloat16"


def of_pipeline(name: str) -> str | None:
    """Which of `PIPELINES` an encoder's name begins with; None for other encoders."""
    # "flux" without a colon is a folder's or hub id's name, like any other.
    kind, colon, _ = name.partition(":")
    return kind if colon and kind in PIPELINES else None
