"""From images to a report: every figure of every method."""

from __future__ import annotations

from collections.abc import Mapping

import numpy as np

from fewstep.errors import UserError
from fewstep.evaluate.classifier import Classifier
from fewstep.evaluate.features import FeatureExtractor
from fewstep.evaluate.metrics import (
    diversity,
    frechet_distance,
    kid_difference,
    kid_interval,
    paired_distance,
    pixel_rmse,
)
from fewstep.evaluate.report import LEAST_CAPTIONS, STUDENT, TEACHER, MethodResult, Report


def build_report(
    images: Mapping[str, np.ndarray],
    *,
    reference: np.ndarray,
    independent: np.ndarray,
    real: np.ndarray | None,
    passes: Mapping[str, int],
    extractor: FeatureExtractor,
    classifier: Classifier | None = None,
    labels: np.ndarray | None = None,
    teacher: str = TEACHER,
    student: str = STUDENT,
) -> Report:
    """Measure every set of images; image i of every set belongs to caption i.

    Args:
        images: per method's name (N, H, W, 3) uint8, generated from the reference's noise.
        reference: the teacher's images, many guided steps, (N, H, W, 3) uint8.
        independent: the teacher's images by the same sampler from other noise, (N, H, W, 3) uint8. What KID to the
            teacher compares with: the reference itself would reward copying its noise.
        real: the captions' real images, (N, H, W, 3) uint8; None where there are none.
        passes: network passes per image, for every method and for `teacher`.
        extractor: of the features.
        classifier: of the classes that were asked for; None where captions are no classes.
        labels: those classes' indices, (N,); with `classifier`.
        teacher: name of `reference` in the report.
        student: name of the student's result that is compared with all others.

    Raises:
        UserError: sets differ in shape or have fewer than three images, or a number of passes is missing.
    """
    sets = {teacher: reference, **images}
    others = {"independent": independent} | ({} if real is None else {"real": real})
    _check({**sets, **others}, passes, sets)
    features = {name: extractor.features(pixels) for name, pixels in sets.items()}
    independent_features = extractor.features(independent)
    real_features = None if real is None else extractor.features(real)
    # The classifier's own features tell these classes apart far better than those of everyday photographs.
    real_class_features = None if classifier is None or real is None else classifier.features(real)

    def result(name: str) -> MethodResult:
        to_teacher = kid_interval(features[name], independent_features)
        to_real = None if real_features is None else kid_interval(features[name], real_features)
        frechet = accuracy = None
        if classifier is not None:
            class_features = classifier.features(sets[name])
            accuracy = float((classifier.classes_of(class_features) == labels).mean())
            if real_class_features is not None:
                frechet = frechet_distance(class_features, real_class_features)
        return MethodResult(
            name=name,
            passes=passes[name],
            kid_teacher=to_teacher.value,
            kid_teacher_ci=(to_teacher.low, to_teacher.high),
            kid_real=None if to_real is None else to_real.value,
            kid_real_ci=None if to_real is None else (to_real.low, to_real.high),
            paired_distance=paired_distance(features[name], features[teacher]),
            pixel_rmse=pixel_rmse(sets[name], reference),
            diversity=diversity(features[name]),
            frechet=frechet,
            accuracy=accuracy,
        )

    order = [teacher, *sorted(images, key=lambda name: (passes[name], name))]
    return Report(
        captions=len(reference),
        rows=tuple(result(name) for name in order),
        teacher=teacher,
        student=student,
        student_minus={
            # Of the two values' difference, and not of two intervals: captions vary more than methods do.
            name: kid_difference(features[student], features[name], independent_features)
            for name in order
            if student in features and name != student
        },
    )


def _check(
    everything: Mapping[str, np.ndarray], passes: Mapping[str, int], methods: Mapping[str, np.ndarray]
) -> None:
    shapes = {name: pixels.shape for name, pixels in everything.items()}
    if len(set(shapes.values())) > 1:
        raise UserError(
            f"the image sets to compare have different shapes {shapes}: generate every method's images for the same "
            "captions, and bring the real images to the same size."
        )
    if (captions := len(everything["independent"])) < LEAST_CAPTIONS:
        raise UserError(
            f"an evaluation needs at least {LEAST_CAPTIONS} captions for its confidence intervals, got {captions}: "
            "raise the number of captions."
        )
    if missing := [name for name in methods if name not in passes]:
        raise UserError(f"no number of network passes for {', '.join(missing)}: add it to `passes`.")
