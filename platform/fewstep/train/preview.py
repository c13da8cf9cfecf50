"""What a run's sample grids tell: statistics of the pictures, and how near they are to the teacher's."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from typing import TYPE_CHECKING, Any

import numpy as np

from fewstep.evaluate.metrics import NORMAL_95

if TYPE_CHECKING:
    from fewstep.evaluate.features.efficientnet import EfficientNetLite0

BEST = "best-"
"""Prefix of the names of folders in a run's storage that hold the best student so far, before its step."""

REFERENCE_STEPS = 32
"""Guided Euler steps of the teacher's pictures that the student's are compared with."""


def grid_statistics(images: np.ndarray) -> dict[str, float]:
    """Brightness, contrast and roughness of pictures.

    Args:
        images: (N, H, W, 3) uint8.

    Returns:
        `brightness`, the mean in [0, 1]; `contrast`, the standard deviation over all pixels of all pictures; and
        `roughness`, the mean difference of neighbouring pixels as a share of the contrast: 1.1 for white noise.
    """
    pixels = images.astype(np.float64) / 255
    contrast = float(pixels.std())
    steps = [float(np.abs(np.diff(pixels, axis=axis)).mean()) for axis in (1, 2) if pixels.shape[axis] > 1]
    # One colour has neither: no division by zero.
    roughness = float(np.mean(steps)) / max(contrast, 1e-6) if steps else 0.0
    return {"brightness": float(pixels.mean()), "contrast": contrast, "roughness": roughness}


@dataclass(frozen=True)
class BestStudent:
    """The student with the least held-out paired distance so far."""

    step: int
    """Optimizer steps that it had."""
    distances: list[float]
    """Distance of each held-out picture's features from the teacher's picture of the same caption and noise."""

    @property
    def distance(self) -> float:
        """The paired distance: the mean."""
        return sum(self.distances) / len(self.distances)

    @property
    def folder(self) -> str:
        """Name of its folder in the run's storage."""
        return f"{BEST}{self.step:07d}"

    def as_dict(self) -> dict[str, Any]:
        """For JSON."""
        return asdict(self)

    @classmethod
    def of(cls, state: dict[str, Any] | None) -> BestStudent | None:
        """From JSON; None if there was none."""
        return None if state is None else cls(int(state["step"]), [float(one) for one in state["distances"]])


def clearly_better(one: Sequence[float], other: Sequence[float]) -> bool:
    """Whether paired distances are less than others by more than chance: beyond the 95 % interval of their difference.

    Args:
        one, other: distances of the same captions, in the same order.
    """
    gaps = np.asarray(one, dtype=np.float64) - np.asarray(other, dtype=np.float64)
    error = gaps.std(ddof=1) / math.sqrt(len(gaps)) if len(gaps) > 1 else np.inf
    return bool(gaps.mean() < -NORMAL_95 * error)


def takes_place(now: BestStudent, best: BestStudent | None, last: bool) -> bool:
    """Whether a student takes the place of the best so far.

    Args:
        now: the student.
        best: the best one before; None if there was none.
        last: whether `now` is the run's last: then only what is clearly better stays before it, as a few captions vary.
    """
    if best is None:
        return True
    if not math.isfinite(now.distance):
        return False
    if last:
        return not clearly_better(best.distances, now.distances)
    return not best.distance <= now.distance  # which is also so where the best is NaN


class PairedDistance:
    """Distances of pictures' features from a reference's, picture by picture.

    Args:
        reference: the teacher's pictures, (N, H, W, 3) uint8.
    """

    def __init__(self, reference: np.ndarray) -> None:
        from fewstep.evaluate.features.efficientnet import EfficientNetLite0

        self._extractor: EfficientNetLite0 = EfficientNetLite0.load("cpu")
        self._reference = self._extractor.features(reference)

    def of(self, images: np.ndarray) -> list[float]:
        """N distances, of pictures (N, H, W, 3) uint8."""
        return np.linalg.norm(self._extractor.features(images) - self._reference, axis=1).tolist()
