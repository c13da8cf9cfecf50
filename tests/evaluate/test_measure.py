"""A report measures every set against the one that it is to be compared with."""

from __future__ import annotations

import json
import math

import numpy as np
import pytest

from fewstep.errors import UserError
from fewstep.evaluate.criteria import check_criteria
from fewstep.evaluate.features.efficientnet import EfficientNetLite0
from fewstep.evaluate.measure import ImageSets, Judges, build_report
from fewstep.evaluate.metrics import kid, paired_distance, pixel_rmse
from fewstep.evaluate.table import report_table


def test_every_figure_is_measured_against_the_set_it_is_named_after(
    measured, image_sets, mean_colours, passes
):
    images, others = image_sets
    features = mean_colours.features
    for name, pixels in {**images, "teacher_64": others["reference"]}.items():
        of_row = measured.row(name)
        assert of_row.kid_teacher == pytest.approx(kid(features(pixels), features(others["independent"])))
        assert of_row.kid_real == pytest.approx(kid(features(pixels), features(others["real"])))
        assert of_row.kid_teacher_ci[0] < of_row.kid_teacher < of_row.kid_teacher_ci[1]
        assert of_row.paired_distance == paired_distance(features(pixels), features(others["reference"]))
        assert of_row.pixel_rmse == pixel_rmse(pixels, others["reference"])
        assert of_row.passes == passes[name]


def test_the_teacher_comes_first_at_distance_zero_and_the_others_by_passes(measured):
    first, *others = measured.rows
    assert (first.name, first.paired_distance, first.pixel_rmse) == ("teacher_64", 0.0, 0.0)
    assert [r.passes for r in others] == sorted(r.passes for r in others)
    assert measured.captions == 24


def test_the_student_is_compared_with_every_other_row(measured, passes):
    assert set(measured.student_minus) == set(passes) - {"student_4"}
    for name, difference in measured.student_minus.items():
        expected = measured.row("student_4").kid_teacher - measured.row(name).kid_teacher
        assert difference.value == pytest.approx(expected, abs=1e-9)


def test_sets_of_different_captions_or_sizes_are_refused(image_sets, mean_colours, passes):
    images, others = image_sets
    with pytest.raises(UserError, match="different shapes"):
        build_report(
            ImageSets(images, **others | {"real": others["real"][:-1]}), passes, Judges(mean_colours)
        )


def test_too_few_captions_for_an_interval_are_refused(image_sets, mean_colours, passes):
    images, others = image_sets
    few = {name: pixels[:2] for name, pixels in images.items()}
    with pytest.raises(UserError, match="at least 3 captions"):
        build_report(ImageSets(few, **{k: v[:2] for k, v in others.items()}), passes, Judges(mean_colours))


def test_a_row_without_its_number_of_passes_is_refused(image_sets, mean_colours, passes):
    images, others = image_sets
    without = {name: count for name, count in passes.items() if name != "euler_4"}
    with pytest.raises(UserError, match="no number of network passes for euler_4"):
        build_report(ImageSets(images, **others), without, Judges(mean_colours))


def test_real_features_rank_blurred_images_as_the_eye_does(passes):
    rng = np.random.default_rng(1)
    sharp = rng.integers(0, 256, (8, 4, 4, 3), dtype=np.uint8).repeat(4, axis=1).repeat(4, axis=2)
    slightly = (0.9 * sharp + 0.1 * 128).astype(np.uint8)
    mostly = (0.3 * sharp + 0.7 * 128).astype(np.uint8)
    sets = ImageSets({"student_4": slightly, "euler_4": mostly}, sharp, sharp, sharp)
    measured = build_report(sets, passes, Judges(EfficientNetLite0.load()))
    student, euler = measured.row("student_4"), measured.row("euler_4")
    assert 0 < student.paired_distance < euler.paired_distance
    assert student.kid_teacher < euler.kid_teacher
    assert student.diversity > euler.diversity


def test_prompts_alone_are_measured_without_real_images(image_sets, mean_colours, passes):
    images, others = image_sets
    bare = build_report(ImageSets(images, **{**others, "real": None}), passes, Judges(mean_colours))
    assert {of_row.kid_real for of_row in bare.rows} == {None}
    assert all(math.isfinite(value) for value in bare.metrics().values())
    assert json.loads(bare.to_json())["rows"][0]["kid_real"] is None
    assert "kid_real" not in {result.name for result in check_criteria(bare, "full")}
    assert "  –  " in report_table(bare)


@pytest.mark.parametrize("captions", [3, 5, 6])
def test_figures_of_neighbours_are_left_out_of_a_few_captions(image_sets, mean_colours, passes, captions):
    images, others = image_sets
    few = ImageSets(
        {name: pixels[:captions] for name, pixels in images.items()},
        **{name: pixels[:captions] for name, pixels in others.items()},
    )
    report = build_report(few, passes, Judges(mean_colours))
    assert {row.coverage is None for row in report.rows} == {captions <= 5}
    assert {row.fd_real is None for row in report.rows} == {captions < 6}, "three features need six images"
    assert all(math.isfinite(value) for value in report.metrics().values())
