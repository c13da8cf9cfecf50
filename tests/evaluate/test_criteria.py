"""Acceptance criteria that turn exactly at their bounds."""

from __future__ import annotations

import math
from dataclasses import replace

import pytest

from fewstep.errors import UserError
from fewstep.evaluate.criteria import check_criteria


def met(report, kind, name):
    return {result.name: result.met for result in check_criteria(report, kind)}[name]


BELOW_ONE, BELOW_TEN = math.nextafter(1.0, 0), math.nextafter(10.0, 0)


@pytest.mark.parametrize(
    ("kind", "name", "at_bound", "student", "expected"),
    [
        ("quick", "kid_teacher", "equal", {"kid_teacher": 1.0}, False),
        ("quick", "kid_teacher", "below", {"kid_teacher": BELOW_ONE}, True),
        ("quick", "paired_distance", "equal", {"paired_distance": 10.0}, False),
        ("quick", "paired_distance", "below", {"paired_distance": BELOW_TEN}, True),
        ("quick", "diversity", "equal", {"diversity": 0.97 * 60.0}, True),
        ("quick", "diversity", "below", {"diversity": math.nextafter(0.97 * 60.0, 0)}, False),
        ("full", "paired_distance", "equal", {"paired_distance": 10.0}, False),
        ("full", "pixel_rmse", "equal", {"pixel_rmse": 0.1}, False),
        ("full", "pixel_rmse", "below", {"pixel_rmse": math.nextafter(0.1, 0)}, True),
        ("full", "kid_real", "equal", {"kid_real": 1.05 * 4.0}, True),
        ("full", "kid_real", "above", {"kid_real": math.nextafter(1.05 * 4.0, 5)}, False),
        (
            "full",
            "kid_teacher",
            "interval touches zero",
            {"kid_teacher": 2.0, "kid_teacher_ci": (0.0, 4.0)},
            True,
        ),
        (
            "full",
            "kid_teacher",
            "interval above zero",
            {"kid_teacher": 2.0, "kid_teacher_ci": (0.1, 3.9)},
            False,
        ),
        ("full", "kid_teacher", "below Euler", {"kid_teacher": 0.9, "kid_teacher_ci": (0.8, 1.0)}, True),
    ],
)
def test_a_criterion_turns_exactly_at_its_bound(a_report, kind, name, at_bound, student, expected):
    assert met(a_report(student=student), kind, name) is expected


JUDGED = {"frechet": 2.0, "accuracy": 0.9}


@pytest.mark.parametrize(
    ("passes", "name", "student", "expected"),
    [
        (1, "frechet", {"frechet": 1.3 * 2.0}, True),
        (1, "frechet", {"frechet": math.nextafter(1.3 * 2.0, 9)}, False),
        (2, "frechet", {"frechet": 1.3 * 2.0}, False),
        (2, "frechet", {"frechet": 1.1 * 2.0}, True),
        (1, "kid_real", {"kid_real": 1.3 * 4.0}, True),
        (2, "kid_real", {"kid_real": 1.2 * 4.0}, False),
        (1, "accuracy", {"accuracy": 0.98 * 0.9}, True),
        (1, "accuracy", {"accuracy": math.nextafter(0.98 * 0.9, 0)}, False),
    ],
)
def test_a_class_conditional_student_is_held_to_its_number_of_evaluations(
    a_report, passes, name, student, expected
):
    measured = a_report(2048, student=JUDGED | student, teacher=JUDGED)
    rows = tuple(replace(r, passes=passes) if r.name == "student_4" else r for r in measured.rows)
    assert met(replace(measured, rows=rows), "classes", name) is expected


def test_classes_need_enough_samples_and_a_judge(a_report):
    assert met(a_report(2047, JUDGED, JUDGED), "classes", "captions") is False
    assert met(a_report(2048, JUDGED, JUDGED), "classes", "captions") is True
    with pytest.raises(UserError, match="choose quick or full"):
        check_criteria(a_report(2048), "classes")


@pytest.mark.parametrize(
    ("kind", "name", "baseline", "figures"),
    [
        ("quick", "kid_teacher", "euler_8", {"kid_teacher": 1.1}),
        ("quick", "paired_distance", "euler_4", {"paired_distance": 10.1}),
        ("full", "kid_teacher", "euler_16", {"kid_teacher": 1.1}),
        ("full", "paired_distance", "euler_8", {"paired_distance": 10.1}),
        ("full", "pixel_rmse", "euler_4", {"pixel_rmse": 0.11}),
    ],
)
def test_a_criterion_compares_with_its_own_row_of_the_baseline(a_report, kind, name, baseline, figures):
    level = a_report()
    assert not met(level, kind, name)
    raised = replace(
        level, rows=tuple(replace(r, **figures) if r.name == baseline else r for r in level.rows)
    )
    assert met(raised, kind, name)


def test_the_teacher_sets_the_bounds_of_diversity_and_of_kid_to_real(a_report):
    assert not met(a_report(teacher={"diversity": 62.0}), "quick", "diversity")
    assert met(a_report(student={"kid_real": 8.3}, teacher={"kid_real": 8.0}), "full", "kid_real")


@pytest.mark.parametrize("kind", ["quick", "full"])
def test_fewer_captions_than_needed_are_a_missed_criterion(a_report, kind):
    assert met(a_report(captions=384), kind, "captions")
    assert not met(a_report(captions=383), kind, "captions")


def test_a_criterion_about_a_method_that_was_not_generated_says_which(a_report):
    short = replace(a_report(), rows=tuple(r for r in a_report().rows if r.name != "euler_8"))
    with pytest.raises(UserError, match=r"no row 'euler_8', only teacher_64, .* add it to the methods"):
        check_criteria(short, "quick")


def test_a_dataset_of_prompts_alone_has_no_criterion_about_real_images(a_report):
    without = a_report(student={"kid_real": None}, teacher={"kid_real": None})
    assert "kid_real" not in {result.name for result in check_criteria(without, "full")}
