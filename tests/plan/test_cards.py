"""The published table of cards is what the plans say."""

from __future__ import annotations

from pathlib import Path

import pytest

from fewstep.plan.cards import TEACHERS, rows

PAGE = Path(__file__).parents[2] / "docs" / "gpus.md"


@pytest.mark.parametrize("teacher", TEACHERS)
def test_the_published_table_is_that_of_the_plans(teacher: str) -> None:
    """Anew after a change: `python -m fewstep.plan.cards`."""
    lines = [line for line in PAGE.read_text().splitlines() if line.startswith(f"| {teacher}: ")]
    assert [line.strip("| ").split(" | ") for line in lines] == rows({teacher: TEACHERS[teacher]})
