"""The terminal's tables hold every figure, in aligned columns."""

from __future__ import annotations

from fewstep.evaluate.criteria import check_criteria
from fewstep.evaluate.table import criteria_table, report_table

JUDGED = {"frechet": 2.0, "accuracy": 0.9}


def test_the_table_holds_every_row_and_every_figure_in_aligned_columns(measured):
    lines = report_table(measured).splitlines()
    body = lines[4 : 4 + len(measured.rows)]
    assert len({len(line) for line in lines[1 : 5 + len(measured.rows)]}) == 1
    for line, of_row in zip(body, measured.rows, strict=True):
        assert line.startswith(of_row.label)
        figures = (of_row.kid_teacher, *of_row.kid_teacher_ci, of_row.kid_real, of_row.paired_distance)
        shown = [str(of_row.passes), *(f"{figure:.2f}" for figure in figures)]
        shown += [f"{of_row.pixel_rmse:.4f}", f"{of_row.diversity:.2f}"]
        shown += [f"{of_row.fd_teacher:.2f}", f"{of_row.fd_real:.2f}"]
        words = line.replace("−", "-").replace("[", " ").replace("]", " ").replace(",", " ").split()
        assert words[-len(shown) :] == shown


def test_the_judges_columns_are_shown_where_there_is_one(a_report):
    assert "accuracy" not in report_table(a_report())
    table = report_table(a_report(student=JUDGED, teacher=JUDGED))
    assert "90.0%" in table
    assert "2.000" in table


def test_criteria_name_the_two_numbers_that_they_compare(a_report):
    text = criteria_table(check_criteria(a_report(student={"kid_teacher": -0.25}), "quick"))
    assert "met     KID to teacher below guided Euler's at 8 steps: −0.25 against 1" in text
    assert "MISSED  paired distance below guided Euler's at 4 steps: 10 against 10" in text
