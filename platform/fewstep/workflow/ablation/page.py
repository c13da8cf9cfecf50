"""The results of grids as one page of the documentation, made of nothing but their files."""

from __future__ import annotations

import math
from collections.abc import Sequence
from pathlib import Path
from shlex import quote

import numpy as np

from fewstep.evaluate.figures import FIGURES
from fewstep.train.runs import EXPORTS
from fewstep.workflow.ablation.cells import CellResult, chosen, read_results, values
from fewstep.workflow.ablation.claims import ClaimResult, judge
from fewstep.workflow.ablation.grid import Cell, Grid

INTRODUCTION = """\
# Comparison

What the variants of a recipe come to when they are trained on equal compute, with several seeds, and measured alike;
and whether that agrees with what papers say. This page is written by `fewstep ablate --only-page` out of result files,
one of each training, and nothing else.

Steps are as many as cost the operations of the first variant's. Figures are means over seeds with their standard
deviation; KID is in 10⁻³ of EfficientNet-Lite0 features, and no figure here compares with one of a paper's. A claim
**agrees** or **disagrees** where the 95 % interval of the difference (Student's t, paired by seed) says so, and is
**open** where seeds differ more than variants. With three seeds that interval is wide: 2.5 standard deviations of the
differences to each side.
"""


def results_page(grids: Sequence[Grid], folder: Path) -> str:
    """The page.

    Args:
        grids: those to tell of.
        folder: with their result files.

    Raises:
        UserError: a file is no result.
    """
    return "\n".join([INTRODUCTION, *(_section(grid, read_results(folder, grid)) for grid in grids)])


def _section(grid: Grid, results: dict[str, CellResult]) -> str:
    title = f"## {grid.name}\n\n{grid.about}\n"
    if not (cells := [one for one in results.values() if not one.cell.is_search]):
        return f"{title}\nNo cell of this grid has been trained yet: `fewstep ablate --grid {grid.name}`.\n"
    every = list(results.values())
    machines = " and ".join(sorted({one.machine for one in every}))
    hours = sum(one.hours for one in every)
    facts = (
        f"Base `{grid.base}`, {grid.steps:,} steps of it; {len(cells)} of {len(grid.seeds) * len(grid.variants)} "
        f"trainings, measured on {cells[0].captions:,} held-out captions; {hours:.1f} hours of training in all"
        f"{', with those of the search' if len(every) > len(cells) else ''}, on {machines}.\n"
    )
    parts = [title, facts, _figures(grid, results), _teacher(grid, cells)]
    if grid.claims:
        parts.append(_claims([judge(claim, results) for claim in grid.claims]))
    if grid.searched():
        parts.append(_search(grid, results))
    parts.append(_commands(grid, results))
    return "\n".join(parts)


def _figures(grid: Grid, results: dict[str, CellResult]) -> str:
    rows = []
    for name, variant in grid.variants.items():
        cells = [one for one in results.values() if one.cell.variant == name and not one.cell.is_search]
        diverged = sum(one.failure is not None for one in cells)
        note = f"; diverged in {diverged} of {len(cells)}" if diverged else ""
        if not cells:
            rows.append([name, variant.about, "", "", *("" for _ in grid.figures)])
            continue
        hours = np.mean([one.hours for one in cells])
        rows.append([
            name, variant.about + note, f"{cells[0].steps:,}", f"{hours:.2f}",
            *(_mean(list(values(results, name, figure).values()), figure) for figure in grid.figures),
        ])  # fmt: skip
    return _table(
        ["variant", "what it is", "steps", "hours", *(FIGURES[one].head for one in grid.figures)], rows
    )


def _teacher(grid: Grid, cells: Sequence[CellResult]) -> str:
    """The teacher's own results, which are the same for all cells of one seed of the evaluation."""
    one = next((cell for cell in cells if cell.teacher), None)
    if one is None:
        return ""
    rows = []
    for name, row in {"reference": one.teacher, **one.solvers}.items():
        told = (_write(row[figure], figure) if figure in row else "" for figure in grid.figures)
        rows.append([name, f"{row['passes']:.0f}", *told])
    rows.sort(key=lambda row: (row[0] != "reference", int(row[1])))
    head = "The teacher itself:\n"
    return "\n".join(
        [head, _table(["teacher", "network passes", *(FIGURES[one].head for one in grid.figures)], rows)]
    )


def _claims(results: Sequence[ClaimResult]) -> str:
    rows = []
    for one in results:
        claim, gap = one.claim, one.difference
        better = FIGURES[claim.figure].better
        told = "not measured yet" if gap is None else _difference(gap.mean, gap.low, gap.high, claim.figure)
        if gap is not None:
            told += f" ({100 * gap.mean / abs(gap.other):+.1f} %, {gap.seeds} seeds)".replace("-", "−")
        if any(one.diverged):
            told += f"; diverged: {one.diverged[0]} and {one.diverged[1]}"
        what = f"{FIGURES[claim.figure].head} of {claim.variant} minus {claim.against}; {better} is better"
        rows.append([claim.claim, claim.paper, what, told, f"**{one.verdict}**"])
    return "\n".join(
        ["### Claims\n", _table(["claim", "the paper", "compared", "here, with 95 % interval", ""], rows)]
    )


def _search(grid: Grid, results: dict[str, CellResult]) -> str:
    assert grid.search is not None
    figure, found = grid.search.figure, chosen(grid, results)
    rows = []
    for variant in grid.variants:
        tried = [cell for cell in grid.searched() if cell.variant == variant]
        told = []
        for cell in tried:
            done = results.get(cell.name)
            value = (
                "–" if done is None else "diverged" if done.failure else _write(done.figures[figure], figure)
            )
            text = f"{', '.join(cell.found)}: {value}"
            told.append(f"**{text}**" if found.get(variant) == cell.found else text)
        rows.append([variant, "; ".join(told)])
    head = (
        f"### The search\n\nEvery variant's were chosen in the same way: {grid.search.share:.0%} of the steps, seed "
        f"{grid.search.seed}, the best {FIGURES[figure].head} (in bold).\n"
    )
    return "\n".join([head, _table(["variant", "tried"], rows)])


def _commands(grid: Grid, results: dict[str, CellResult]) -> str:
    found, lines = chosen(grid, results), []
    for name, variant in grid.variants.items():
        done = next(
            (one for one in results.values() if one.cell.variant == name and not one.cell.is_search), None
        )
        steps = [] if done is None else [f"train.steps={done.steps}"]
        start: tuple[str, ...] = ()
        if variant.before is not None:
            first = grid.stages(Cell(grid.name, name, 0))[0]
            lines.append(
                _command(
                    grid, [*variant.before.set, f"train.steps={first.train.steps}"], f"before {name}: RUN"
                )
            )
            start = (f"student.start={EXPORTS}/RUN",)
        lines.append(_command(grid, [*variant.set, *start, *found.get(name, ()), *steps], name))
    head = (
        f"### Again\n\nAll of it: `fewstep ablate --grid {grid.name}`. One training of each, as of seed 0:\n"
    )
    return "\n".join([head, "```bash", *lines, "```", ""])


def _command(grid: Grid, settings: Sequence[str], comment: str) -> str:
    changes = " ".join(f"--set {quote(setting)}" for setting in [*grid.set, *settings])
    return f"fewstep distill --recipe {grid.base} {changes}  # {comment}"


def _table(head: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    lines = [head, ["---" for _ in head], *rows]
    return "\n".join(f"| {' | '.join(cell.replace('|', '/') for cell in line)} |" for line in lines) + "\n"


def _mean(numbers: Sequence[float], figure: str) -> str:
    if not numbers:
        return "–"
    spread = f" ± {_write(float(np.std(numbers, ddof=1)), figure)}" if len(numbers) > 1 else ""
    return _write(float(np.mean(numbers)), figure) + spread


def _difference(mean: float, low: float, high: float, figure: str) -> str:
    if math.isinf(low):
        return f"{_write(mean, figure)} [one seed]"
    return f"{_write(mean, figure)} [{_write(low, figure)}, {_write(high, figure)}]"


def _write(value: float, figure: str) -> str:
    return FIGURES[figure].write(value)
