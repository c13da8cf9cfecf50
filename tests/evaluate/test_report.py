"""A report as flat metrics, as JSON and in words."""

from __future__ import annotations

import json
import math
from dataclasses import replace

import pytest

from fewstep.errors import UserError
from fewstep.evaluate.plots import diversity_plot, quality_plot
from fewstep.evaluate.report import Report, side_by_side


def test_the_metrics_are_flat_finite_numbers_for_every_row(measured, passes):
    metrics = measured.metrics()
    assert metrics["eval/captions"] == 24
    assert metrics["eval/student_4/kid_teacher"] == measured.row("student_4").kid_teacher
    assert metrics["eval/euler_8/kid_teacher_ci_high"] == measured.row("euler_8").kid_teacher_ci[1]
    assert len(metrics) == 1 + 25 * len(passes)
    assert all(type(value) is float and math.isfinite(value) for value in metrics.values())


def test_the_json_holds_rows_captions_and_differences(measured):
    content = json.loads(measured.to_json())
    assert [r["name"] for r in content["rows"]] == [r.name for r in measured.rows]
    assert content["captions"] == 24
    assert content["student_minus"]["euler_8"]["low"] == measured.student_minus["euler_8"].low


def test_the_report_is_read_back_from_its_metrics(measured, a_report):
    for report in (measured, a_report()):
        again = Report.from_metrics(
            report.metrics() | {"loss": 1.0, "eval/student_4/more/deeply": 2.0}, report.student
        )
        assert again == replace(report, student_minus={})


@pytest.mark.parametrize(
    "missing", ["eval/captions", "eval/teacher_64/diversity", "eval/student_4/kid_teacher_ci_low"]
)
def test_metrics_that_are_no_whole_report_are_none(measured, missing):
    metrics = measured.metrics()
    del metrics[missing]
    assert Report.from_metrics(metrics, "student_4") is None
    assert Report.from_metrics(measured.metrics(), "student_1") is None
    assert Report.from_metrics({}, "student_4") is None


@pytest.mark.parametrize(
    ("name", "label"),
    [
        ("student_1", "student, 1 evaluation"),
        ("student_4", "student, 4 evaluations"),
        ("euler_1", "teacher, 1 Euler step"),
        ("teacher_64", "teacher, 64 guided steps"),
    ],
)
def test_methods_are_labelled_in_words(a_report, name, label):
    assert replace(a_report().row("student_4"), name=name).label == label


def test_students_of_one_teacher_stand_side_by_side(a_report):
    first, second = a_report(), a_report(student={"kid_teacher": 1.4})
    together = side_by_side({"old": first, "new": second})
    assert [row.name for row in together.rows].count("teacher_64") == 1
    assert len(together.rows) == len(first.rows) + 1
    assert together.row("student_4 of new").kid_teacher == 1.4
    assert together.row("student_4 of new").label == "new, 4 evaluations"
    assert together.student == "student_4 of old"
    assert len(quality_plot(together).legends[0].get_texts()) == 4
    diversity_plot(together)


def test_another_teacher_has_rows_of_its_own(a_report):
    together = side_by_side({"old": a_report(), "new": a_report(teacher={"kid_real": 9.0})})
    assert together.row("teacher_64 of new").label == "teacher of new, 64 guided steps"


def test_students_that_were_measured_differently_are_refused(a_report):
    with pytest.raises(UserError, match=r"384 captions .* others on 100"):
        side_by_side({"old": a_report(captions=100), "new": a_report()})
