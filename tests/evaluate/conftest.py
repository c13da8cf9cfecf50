"""Reports with figures that are known, and image sets whose figures can be computed by hand."""

from __future__ import annotations

import numpy as np
import pytest

from fewstep.evaluate.measure import ImageSets, Judges, build_report
from fewstep.evaluate.report import MethodResult, Report

PASSES = {"teacher_64": 128, "student_4": 4, "euler_2": 4, "euler_4": 8, "euler_8": 16, "euler_16": 32}


@pytest.fixture(scope="session")
def passes():
    """Network passes per image, by method."""
    return PASSES


@pytest.fixture(scope="session")
def a_report():
    """Makes a report in which all methods have equal figures, but for those given for student and teacher."""

    def result(name, **figures):
        usual = {
            "kid_teacher": 1.0,
            "kid_teacher_ci": (0.5, 1.5),
            "kid_real": 4.0,
            "kid_real_ci": (3.0, 5.0),
            "paired_distance": 10.0,
            "pixel_rmse": 0.1,
            "diversity": 60.0,
        }
        return MethodResult(name=name, passes=PASSES[name], **usual | figures)

    def make(captions=384, student=None, teacher=None):
        changed = {"student_4": student or {}, "teacher_64": teacher or {}}
        return Report(captions, tuple(result(name, **changed.get(name, {})) for name in PASSES))

    return make


class MeanColours:
    """A quick extractor whose features can be computed by hand: the image's mean colour."""

    name = "EfficientNet-Lite0"

    def features(self, images):
        return images.mean(axis=(1, 2)).astype(np.float32) / 100


@pytest.fixture(scope="session")
def mean_colours():
    return MeanColours()


@pytest.fixture(scope="session")
def image_sets():
    """One set per method, the farther from the reference the fewer its passes; and the three others."""
    rng = np.random.default_rng(0)
    captions = rng.integers(60, 190, (24, 1, 1, 3))

    def images_of(spread, brighter=0):
        noise = rng.integers(-spread, spread + 1, (24, 8, 8, 3))
        return np.clip(captions + noise + brighter, 0, 255).astype(np.uint8)

    images = {
        name: images_of(4, 2 * (32 // passes)) for name, passes in PASSES.items() if name != "teacher_64"
    }
    return images, {"reference": images_of(4), "independent": images_of(4), "real": images_of(30)}


@pytest.fixture(scope="session")
def measured(image_sets, mean_colours):
    """The report of those sets."""
    images, others = image_sets
    return build_report(ImageSets(images, **others), PASSES, Judges(mean_colours))
