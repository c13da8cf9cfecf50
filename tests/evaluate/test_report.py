"""The report: every figure where it belongs, and verdicts that turn exactly at their bounds."""

from __future__ import annotations

import json
import math
from dataclasses import replace

import numpy as np
import pytest

from fewstep.errors import UserError
from fewstep.evaluate.features import FeatureExtractor
from fewstep.evaluate.metrics import kid, paired_distance, pixel_rmse
from fewstep.evaluate.report import Report, Row, build_report, verdict_table

PASSES = {"teacher_64": 128, "student_4": 4, "euler_2": 4, "euler_4": 8, "euler_8": 16, "euler_16": 32}


def row(name, **figures):
    usual = {
        "kid_teacher": 1.0,
        "kid_teacher_ci": (0.5, 1.5),
        "kid_real": 4.0,
        "kid_real_ci": (3.0, 5.0),
        "paired_distance": 10.0,
        "pixel_rmse": 0.1,
        "diversity": 60.0,
    }
    return Row(name=name, passes=PASSES[name], **usual | figures)


def report(captions=384, student=None, teacher=None):
    changed = {"student_4": student or {}, "teacher_64": teacher or {}}
    return Report(captions, tuple(row(name, **changed.get(name, {})) for name in PASSES))


def kept(report, kind, name):
    return {verdict.name: verdict.kept for verdict in report.verdicts(kind)}[name]


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
def test_a_promise_turns_exactly_at_its_bound(kind, name, at_bound, student, expected):
    assert kept(report(student=student), kind, name) is expected


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
def test_a_class_conditional_student_is_held_to_its_number_of_evaluations(passes, name, student, expected):
    measured = report(2048, student=JUDGED | student, teacher=JUDGED)
    rows = tuple(replace(r, passes=passes) if r.name == "student_4" else r for r in measured.rows)
    assert kept(replace(measured, rows=rows), "classes", name) is expected


def test_classes_need_enough_samples_and_a_judge():
    assert kept(report(2047, JUDGED, JUDGED), "classes", "captions") is False
    assert kept(report(2048, JUDGED, JUDGED), "classes", "captions") is True
    with pytest.raises(UserError, match="choose quick or full"):
        report(2048).verdicts("classes")


def test_the_judges_columns_are_shown_where_there_is_one():
    assert "accuracy" not in report().table()
    table = report(student=JUDGED, teacher=JUDGED).table()
    assert "90.0%" in table
    assert "2.000" in table


@pytest.mark.parametrize(
    ("kind", "name", "rung", "figures"),
    [
        ("quick", "kid_teacher", "euler_8", {"kid_teacher": 1.1}),
        ("quick", "paired_distance", "euler_4", {"paired_distance": 10.1}),
        ("full", "kid_teacher", "euler_16", {"kid_teacher": 1.1}),
        ("full", "paired_distance", "euler_8", {"paired_distance": 10.1}),
        ("full", "pixel_rmse", "euler_4", {"pixel_rmse": 0.11}),
    ],
)
def test_a_promise_compares_with_its_own_rung_of_the_ladder(kind, name, rung, figures):
    level = report()
    assert not kept(level, kind, name)
    raised = replace(level, rows=tuple(replace(r, **figures) if r.name == rung else r for r in level.rows))
    assert kept(raised, kind, name)


def test_the_teacher_sets_the_bounds_of_diversity_and_of_kid_to_real():
    assert not kept(report(teacher={"diversity": 62.0}), "quick", "diversity")
    assert kept(report(student={"kid_real": 8.3}, teacher={"kid_real": 8.0}), "full", "kid_real")


@pytest.mark.parametrize("kind", ["quick", "full"])
def test_fewer_captions_than_promised_are_a_missed_promise(kind):
    assert kept(report(captions=384), kind, "captions")
    assert not kept(report(captions=383), kind, "captions")


def test_verdicts_name_the_two_numbers_that_they_compare():
    text = verdict_table(report(student={"kid_teacher": -0.25}).verdicts("quick"))
    assert "kept    KID to teacher below guided Euler's at 8 steps: −0.25 against 1" in text
    assert "MISSED  paired distance below guided Euler's at 4 steps: 10 against 10" in text


def test_a_promise_about_a_row_that_was_not_drawn_says_which():
    short = replace(report(), rows=tuple(r for r in report().rows if r.name != "euler_8"))
    with pytest.raises(UserError, match=r"no row 'euler_8', only teacher_64, .* add it to the methods"):
        short.verdicts("quick")


class MeanColours:
    """A quick extractor whose features can be computed by hand: the image's mean colour."""

    def features(self, images):
        return images.mean(axis=(1, 2)).astype(np.float32) / 100


@pytest.fixture(scope="module")
def drawn():
    """One set per method, the farther from the reference the fewer its passes; and the three others."""
    rng = np.random.default_rng(0)
    captions = rng.integers(60, 190, (24, 1, 1, 3))

    def draw(spread, brighter=0):
        noise = rng.integers(-spread, spread + 1, (24, 8, 8, 3))
        return np.clip(captions + noise + brighter, 0, 255).astype(np.uint8)

    images = {name: draw(4, 2 * (32 // passes)) for name, passes in PASSES.items() if name != "teacher_64"}
    return images, {"reference": draw(4), "independent": draw(4), "real": draw(30)}


@pytest.fixture(scope="module")
def measured(drawn):
    images, others = drawn
    return build_report(images, **others, passes=PASSES, extractor=MeanColours())


def test_every_figure_is_measured_against_the_set_it_is_named_after(measured, drawn):
    images, others = drawn
    features = MeanColours().features
    for name, pixels in {**images, "teacher_64": others["reference"]}.items():
        of_row = measured.row(name)
        assert of_row.kid_teacher == pytest.approx(kid(features(pixels), features(others["independent"])))
        assert of_row.kid_real == pytest.approx(kid(features(pixels), features(others["real"])))
        assert of_row.kid_teacher_ci[0] < of_row.kid_teacher < of_row.kid_teacher_ci[1]
        assert of_row.paired_distance == paired_distance(features(pixels), features(others["reference"]))
        assert of_row.pixel_rmse == pixel_rmse(pixels, others["reference"])
        assert of_row.passes == PASSES[name]


def test_the_teacher_comes_first_at_distance_zero_and_the_others_by_passes(measured):
    first, *others = measured.rows
    assert (first.name, first.paired_distance, first.pixel_rmse) == ("teacher_64", 0.0, 0.0)
    assert [r.passes for r in others] == sorted(r.passes for r in others)
    assert measured.captions == 24


def test_the_student_is_compared_with_every_other_row(measured):
    assert set(measured.student_minus) == set(PASSES) - {"student_4"}
    for name, difference in measured.student_minus.items():
        expected = measured.row("student_4").kid_teacher - measured.row(name).kid_teacher
        assert difference.value == pytest.approx(expected, abs=1e-9)


def test_the_table_holds_every_row_and_every_figure_in_aligned_columns(measured):
    lines = measured.table().splitlines()
    body = lines[4 : 4 + len(measured.rows)]
    assert len({len(line) for line in lines[1 : 5 + len(measured.rows)]}) == 1
    for line, of_row in zip(body, measured.rows, strict=True):
        assert line.startswith(of_row.label)
        figures = (of_row.kid_teacher, *of_row.kid_teacher_ci, of_row.kid_real, of_row.paired_distance)
        shown = [str(of_row.passes), *(f"{figure:.2f}" for figure in figures)]
        shown += [f"{of_row.pixel_rmse:.4f}", f"{of_row.diversity:.2f}"]
        words = line.replace("−", "-").replace("[", " ").replace("]", " ").replace(",", " ").split()
        assert words[-len(shown) :] == shown


def test_the_metrics_are_flat_finite_numbers_for_every_row(measured):
    metrics = measured.metrics()
    assert metrics["eval/captions"] == 24
    assert metrics["eval/student_4/kid_teacher"] == measured.row("student_4").kid_teacher
    assert metrics["eval/euler_8/kid_teacher_ci_high"] == measured.row("euler_8").kid_teacher_ci[1]
    assert len(metrics) == 1 + 10 * len(PASSES)
    assert all(type(value) is float and math.isfinite(value) for value in metrics.values())


def test_the_json_holds_rows_captions_and_differences(measured):
    content = json.loads(measured.to_json())
    assert [r["name"] for r in content["rows"]] == [r.name for r in measured.rows]
    assert content["captions"] == 24
    assert content["student_minus"]["euler_8"]["low"] == measured.student_minus["euler_8"].low


def test_sets_of_different_captions_or_sizes_are_refused(drawn):
    images, others = drawn
    with pytest.raises(UserError, match="different shapes"):
        build_report(images, **others | {"real": others["real"][:-1]}, passes=PASSES, extractor=MeanColours())


def test_too_few_captions_for_an_interval_are_refused(drawn):
    images, others = drawn
    few = {name: pixels[:2] for name, pixels in images.items()}
    with pytest.raises(UserError, match="at least 3 captions"):
        build_report(few, **{k: v[:2] for k, v in others.items()}, passes=PASSES, extractor=MeanColours())


def test_a_row_without_its_number_of_passes_is_refused(drawn):
    images, others = drawn
    passes = {name: count for name, count in PASSES.items() if name != "euler_4"}
    with pytest.raises(UserError, match="no number of network passes for euler_4"):
        build_report(images, **others, passes=passes, extractor=MeanColours())


def test_real_features_rank_blurred_images_as_the_eye_does():
    rng = np.random.default_rng(1)
    sharp = rng.integers(0, 256, (8, 4, 4, 3), dtype=np.uint8).repeat(4, axis=1).repeat(4, axis=2)
    slightly = (0.9 * sharp + 0.1 * 128).astype(np.uint8)
    mostly = (0.3 * sharp + 0.7 * 128).astype(np.uint8)
    measured = build_report(
        {"student_4": slightly, "euler_4": mostly},
        reference=sharp, independent=sharp, real=sharp, passes=PASSES, extractor=FeatureExtractor.load(),
    )  # fmt: skip
    student, euler = measured.row("student_4"), measured.row("euler_4")
    assert 0 < student.paired_distance < euler.paired_distance
    assert student.kid_teacher < euler.kid_teacher
    assert student.diversity > euler.diversity


def test_prompts_alone_are_measured_without_real_images(drawn):
    images, others = drawn
    bare = build_report(images, **{**others, "real": None}, passes=PASSES, extractor=MeanColours())
    assert {of_row.kid_real for of_row in bare.rows} == {None}
    assert all(math.isfinite(value) for value in bare.metrics().values())
    assert json.loads(bare.to_json())["rows"][0]["kid_real"] is None
    assert "kid_real" not in {verdict.name for verdict in bare.verdicts("full")}
    assert "  –  " in bare.table()


@pytest.mark.parametrize(
    ("name", "label"),
    [
        ("student_1", "student, 1 evaluation"),
        ("student_4", "student, 4 evaluations"),
        ("euler_1", "teacher, 1 Euler step"),
        ("teacher_64", "teacher, 64 guided steps"),
    ],
)
def test_rows_are_labelled_in_words(name, label):
    assert replace(row("student_4"), name=name).label == label
