"""From images to a report: every figure of every method."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np

from fewstep.errors import UserError
from fewstep.evaluate import metrics
from fewstep.evaluate.classifier import Classifier
from fewstep.evaluate.features import FeatureExtractor
from fewstep.evaluate.features.torchscript import LPIPS
from fewstep.evaluate.features.vision import CLIP
from fewstep.evaluate.report import LEAST_CAPTIONS, STUDENT, TEACHER, MethodResult, Report

Scorer = Callable[[np.ndarray, Sequence[str]], np.ndarray]
"""A score of one's own: from images (N, H, W, 3) uint8 and their N captions to numbers (N,); higher is better."""

NEIGHBOURS = 5
"""Most neighbours that a figure takes: precision and recall three, density and coverage five."""


@dataclass(frozen=True)
class Judges:
    """What looks at the images."""

    extractor: FeatureExtractor
    """Of the features."""
    classifier: Classifier | None = None
    """Of the classes that were asked for; None where captions are no classes."""
    clip: CLIP | None = None
    """Of how well images fit captions."""
    lpips: LPIPS | None = None
    """Of the distance to the reference."""
    scorers: Mapping[str, Scorer] = field(default_factory=dict)
    """The user's own, by name."""


@dataclass(frozen=True)
class ImageSets:
    """Images to measure: image i of every set belongs to caption i."""

    methods: Mapping[str, np.ndarray]
    """Per method's name (N, H, W, 3) uint8, generated from the reference's noise."""
    reference: np.ndarray
    """The teacher's images, many guided steps, (N, H, W, 3) uint8."""
    independent: np.ndarray
    """The teacher's images by the same sampler from other noise, (N, H, W, 3) uint8. What KID to the teacher compares
    with: the reference itself would reward copying its noise."""
    real: np.ndarray | None
    """The captions' real images, (N, H, W, 3) uint8; None where there are none."""
    captions: Sequence[str] = ()
    """The N captions; for judges that read them."""
    labels: np.ndarray | None = None
    """Indices of the classes that were asked for, (N,); with a classifier."""
    per_caption: Mapping[str, np.ndarray] = field(default_factory=dict)
    """Per method's name (P, M, H, W, 3) uint8, M images of each of some captions, each from noise of its own."""


def build_report(
    images: ImageSets,
    passes: Mapping[str, int],
    judges: Judges,
    *,
    teacher: str = TEACHER,
    student: str = STUDENT,
) -> Report:
    """Measure every set of images.

    Args:
        images: the sets.
        passes: network passes per image, for every method and for `teacher`.
        judges: what looks at them.
        teacher: name of the reference in the report.
        student: name of the student's result that is compared with all others.

    Raises:
        UserError: sets differ in shape or have fewer than three images, or a number of passes is missing.
    """
    sets = {teacher: images.reference, **images.methods}
    _check(images, sets, passes)
    measurement = _Measurement(images, sets, judges, teacher)
    order = [teacher, *sorted(images.methods, key=lambda name: (passes[name], name))]
    features, independent = measurement.features, measurement.independent
    return Report(
        captions=len(images.reference),
        rows=tuple(MethodResult(name=name, passes=passes[name], **measurement.of(name)) for name in order),
        teacher=teacher,
        student=student,
        features=judges.extractor.name,
        student_minus={
            # Of the two values' difference, and not of two intervals: captions vary more than methods do.
            name: metrics.kid_difference(features[student], features[name], independent)
            for name in order
            if student in features and name != student
        },
    )


class _Measurement:
    """All figures of one method after the other; what several of them need is computed once."""

    def __init__(
        self, images: ImageSets, sets: Mapping[str, np.ndarray], judges: Judges, teacher: str
    ) -> None:
        self._images, self._sets, self._judges, self._teacher = images, sets, judges, teacher
        features_of, real = judges.extractor.features, images.real
        self.features = {name: features_of(pixels) for name, pixels in sets.items()}
        self.independent = features_of(images.independent)
        self.real = None if real is None else features_of(real)
        # The classifier's own features tell these classes apart far better than those of everyday photographs.
        classifier = judges.classifier
        self._real_class_features = None if classifier is None or real is None else classifier.features(real)

    def of(self, name: str) -> dict[str, Any]:
        """The figures of a method, as fields of `MethodResult`."""
        mine, pixels = self.features[name], self._sets[name]
        return (
            _estimate("kid_teacher", metrics.kid_interval(mine, self.independent))
            | {
                "paired_distance": metrics.paired_distance(mine, self.features[self._teacher]),
                "pixel_rmse": metrics.pixel_rmse(pixels, self._images.reference),
                "diversity": metrics.diversity(mine),
                "vendi": metrics.vendi_score(mine),
                "fd_teacher": _frechet(mine, self.independent),
            }
            | self._against_real(mine)
            | self._classified(pixels)
            | self._captioned(pixels)
            | self._perceived(pixels)
            | self._per_caption(name)
        )

    def _against_real(self, mine: np.ndarray) -> dict[str, Any]:
        if (real := self.real) is None:
            return {"kid_real": None, "kid_real_ci": None}
        found = _estimate("kid_real", metrics.kid_interval(mine, real)) | {"fd_real": _frechet(mine, real)}
        if len(real) > NEIGHBOURS:
            found |= _estimate("precision", metrics.precision(mine, real))
            found |= _estimate("recall", metrics.precision(real, mine))
            found |= _estimate("density", metrics.density(mine, real, NEIGHBOURS))
            found |= _estimate("coverage", metrics.coverage(mine, real, NEIGHBOURS))
        return found

    def _classified(self, pixels: np.ndarray) -> dict[str, Any]:
        classifier = self._judges.classifier
        if classifier is None:
            return {}
        features = classifier.features(pixels)
        found: dict[str, Any] = {
            "accuracy": float((classifier.classes_of(features) == self._images.labels).mean())
        }
        if self._real_class_features is not None:
            found["frechet"] = metrics.frechet_distance(features, self._real_class_features)
        return found

    def _captioned(self, pixels: np.ndarray) -> dict[str, Any]:
        found: dict[str, Any] = {}
        if (clip := self._judges.clip) is not None:
            aligned = clip.align(pixels, self._images.captions)
            found |= _estimate("clip_score", metrics.mean(aligned.scores))
            found |= _estimate("retrieval_1", metrics.share(aligned.ranks < 1))
            found |= _estimate("retrieval_5", metrics.share(aligned.ranks < 5))
        if scorers := self._judges.scorers:
            found["scores"] = {
                own: float(np.mean(score(pixels, self._images.captions))) for own, score in scorers.items()
            }
        return found

    def _perceived(self, pixels: np.ndarray) -> dict[str, Any]:
        if (lpips := self._judges.lpips) is None:
            return {}
        return _estimate("lpips", metrics.mean(lpips.distances(pixels, self._images.reference)))

    def _per_caption(self, name: str) -> dict[str, Any]:
        if (several := self._images.per_caption.get(name)) is None:
            return {}
        captions, each = several.shape[:2]
        flat = self._judges.extractor.features(several.reshape(-1, *several.shape[2:]))
        distances, vendi = metrics.within_captions(flat.reshape(captions, each, -1))
        return _estimate("prompt_diversity", metrics.mean(distances)) | _estimate(
            "prompt_vendi", metrics.mean(vendi)
        )


def _estimate(name: str, found: metrics.Estimate) -> dict[str, Any]:
    """A figure and its interval, as fields of `MethodResult`."""
    return {name: found.value, f"{name}_ci": (found.low, found.high)}


def _frechet(x: np.ndarray, y: np.ndarray) -> float | None:
    """The Fréchet distance, if there are twice as many images as features: with fewer, it is mostly bias."""
    return metrics.frechet_distance(x, y) if len(x) >= 2 * x.shape[1] else None


def _check(images: ImageSets, sets: Mapping[str, np.ndarray], passes: Mapping[str, int]) -> None:
    everything = {**sets, "independent": images.independent}
    if images.real is not None:
        everything["real"] = images.real
    shapes = {name: pixels.shape for name, pixels in everything.items()}
    if len(set(shapes.values())) > 1:
        raise UserError(
            f"the image sets to compare have different shapes {shapes}: generate every method's images for the same "
            "captions, and bring the real images to the same size."
        )
    if (captions := len(images.independent)) < LEAST_CAPTIONS:
        raise UserError(
            f"an evaluation needs at least {LEAST_CAPTIONS} captions for its confidence intervals, got {captions}: "
            "raise the number of captions."
        )
    if missing := [name for name in sets if name not in passes]:
        raise UserError(f"no number of network passes for {', '.join(missing)}: add it to `passes`.")
