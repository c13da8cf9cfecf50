"""The page of a report: whole, self-contained, and with every figure."""

from __future__ import annotations

import re
from html.parser import HTMLParser

import pytest

from fewstep.evaluate.criteria import CriterionResult, check_criteria
from fewstep.evaluate.html import report_page
from fewstep.evaluate.plots import diversity_plot, quality_plot
from fewstep.evaluate.report import Report

PNG = b"\x89PNG\r\n\x1a\n"


class Page(HTMLParser):
    """Its rows of tables, as texts of cells; and whatever it refers to."""

    def __init__(self, text: str) -> None:
        super().__init__()
        self.rows: list[list[str]] = []
        self.references: list[str] = []
        self._cell = False
        self.feed(text)

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        if tag == "tr":
            self.rows.append([])
        if tag in ("td", "th"):
            self._cell = True
            self.rows[-1].append("")
        self.references += [value or "" for name, value in attrs if name in ("src", "href", "xlink:href")]

    def handle_endtag(self, tag: str) -> None:
        if tag in ("td", "th"):
            self._cell = False

    def handle_data(self, data: str) -> None:
        if self._cell:
            self.rows[-1][-1] += data


@pytest.fixture(scope="module")
def page(measured: Report) -> str:
    return report_page(
        measured,
        title="owl <b> & co",
        facts={"training": "600 steps"},
        criteria=check_criteria(measured, "quick"),
        plots={"Quality": quality_plot(measured), "Diversity": diversity_plot(measured)},
        pictures={"Images": (PNG, "Rows")},
    )


def test_it_has_every_method_with_its_figures(page: str, measured: Report) -> None:
    head, *others = Page(page).rows  # the first table's
    head, rows = head[1:], {row[0]: row[1:] for row in others if row}
    assert {"passes", "KID to teacher", "precision", "recall", "density", "coverage", "Vendi"} <= set(head)
    for result in measured.rows:
        cells = dict(zip(head, rows[result.label], strict=True))
        assert cells["passes"] == str(result.passes)
        assert cells["paired"] == f"{result.paired_distance:.2f}"
        assert result.precision_ci is not None
        low, high = result.precision_ci
        assert cells["precision"] == f"{result.precision:.2f} {low:.2f} to {high:.2f}"


def test_it_needs_no_other_file(page: str) -> None:
    assert all(one.startswith(("data:", "#")) for one in Page(page).references)
    # Names of formats are addresses by convention, which nothing opens.
    assert not re.findall(r"(?:url\(|@import|<script|<link)(?!#)", page)


def test_texts_are_texts_and_not_markup(page: str) -> None:
    assert "owl &lt;b&gt; &amp; co" in page
    assert "<b>" not in page


def test_criteria_say_whether_they_are_met() -> None:
    missed = CriterionResult("kid_teacher", "KID below 1", 2.0, 1.0, False)
    rows = Page(report_page_of(missed)).rows
    assert ["KID below 1", "missed", "2", "1"] in rows


def report_page_of(criterion: CriterionResult) -> str:
    return report_page(Report(3, ()), title="x", facts={}, criteria=[criterion])
