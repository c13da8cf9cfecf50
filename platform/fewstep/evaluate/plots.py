"""Plots of a run: quality against network passes, and the loss. They are made for files, and open no window."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING

import numpy as np

from fewstep.evaluate.report import MethodResult, Report

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

INK, FAINT_INK, GRID, BASELINE, STUDENT = "#1f2933", "#6b7785", "#e5e7eb", "#6b7785", "#0b6bcb"
QUARTILE_INKS = ("#9ecae9", "#5ba3d9", "#2171b5", "#08306b")
DPI = 150
"""Dots per inch of the figures."""
SMOOTHED_POINTS = 25
"""The loss curves' bold line averages over this many logged rows."""


def quality_plot(report: Report) -> Figure:
    """KID to the teacher and paired feature distance against network passes per image.

    The teacher's Euler sampler, the baseline, is a line; the student is a point (or a line, if it learned several
    numbers of evaluations); the reference's own KID is a band.

    Args:
        report: of an evaluation.
    """
    # Matplotlib is imported where it is used: it takes a second, and who only measures needs none of it.
    from matplotlib.figure import Figure

    figure = Figure(figsize=(9.6, 4.2), dpi=DPI, layout="constrained")
    left, right = figure.subplots(1, 2)
    students = [row for row in report.rows if row.by_student]
    baseline = [row for row in report.rows if row not in students and row.name != report.teacher]
    reference = report.row(report.teacher)
    band = "teacher against itself, other noise (95 %)"
    left.axhspan(*reference.kid_teacher_ci, color=GRID, lw=0, zorder=0, label=band)
    for rows, ink, marker, label in (
        (baseline, BASELINE, "o", "teacher, guided Euler"),
        (students, STUDENT, "D", "student"),
    ):
        passes = [row.passes for row in rows]
        kids = [row.kid_teacher for row in rows]
        style = {"color": ink, "marker": marker, "markersize": 6 if marker == "o" else 9, "lw": 1.6}
        left.errorbar(passes, kids, yerr=_error_bars(rows), capsize=3, elinewidth=1, label=label, **style)
        right.plot(passes, [row.paired_distance for row in rows], **style)
    for row in baseline:
        steps = f"{row.name.rpartition('_')[2]} steps"
        for axes, height in ((left, row.kid_teacher), (right, row.paired_distance)):
            axes.annotate(
                steps, (row.passes, height), (7, 5), textcoords="offset points", color=BASELINE, fontsize=8
            )
    figure.legend(loc="outside lower center", ncols=3, frameon=False, fontsize=9, labelcolor=INK)
    # On a linear axis the few large values of very few steps would press those near zero into one line.
    left.set_yscale("symlog", linthresh=max(1.0, reference.kid_teacher_ci[1]), linscale=0.6)
    right.set_ylim(bottom=0)
    dress(left, "KID to the teacher (10⁻³)")
    dress(right, "Paired feature distance to the teacher")
    for axes in (left, right):
        axes.set_xscale("log", base=2)
        # Only the numbers of passes that were measured; between powers of two matplotlib would add others.
        ticks = sorted({row.passes for row in [*baseline, *students]})
        axes.margins(x=0.16)
        axes.set_xticks(ticks, [str(tick) for tick in ticks])
        axes.minorticks_off()
        axes.set_xlabel("network passes per image")
    return figure


def loss_plot(rows: Sequence[Mapping[str, float]]) -> Figure:
    """Loss, and loss by quartile of time, against the step.

    Args:
        rows: logged metrics in order, each with "step", "train/loss" and, for quartiles of time that the batches
            held, "train/loss_t1of4" (times next to the image) to "train/loss_t4of4" (next to the noise).
    """
    from matplotlib.figure import Figure
    from matplotlib.ticker import LogLocator, NullLocator

    figure = Figure(figsize=(9.6, 4.2), dpi=DPI, layout="constrained")
    left, right = figure.subplots(1, 2, sharex=True, subplot_kw={"yscale": "log", "xlabel": "step"})
    _curve(left, rows, "train/loss", INK, None)
    names = ("image side", "second", "third", "noise side")
    for index, (name, ink) in enumerate(zip(names, QUARTILE_INKS, strict=True), start=1):
        _curve(right, rows, f"train/loss_t{index}of4", ink, name)
    if right.lines:
        right.legend(frameon=False, fontsize=9, labelcolor=INK)
    dress(left, "Loss")
    dress(right, "Loss by quartile of time")
    for axes in (left, right):
        axes.yaxis.set_major_locator(LogLocator(subs=(1, 2, 5)))
        axes.yaxis.set_major_formatter("{x:g}")
        axes.yaxis.set_minor_locator(NullLocator())
    return figure


def _curve(axes: Axes, rows: Sequence[Mapping[str, float]], key: str, ink: str, label: str | None) -> None:
    # Not every row has every quartile: a small batch may have drawn no time of it.
    points = [(row["step"], row[key]) for row in rows if key in row]
    if not points:
        return
    steps, values = np.array(points).T
    # The single values stay visible behind their average: their spread says how far to trust it.
    axes.plot(steps, values, color=ink, lw=0.8, alpha=0.3)
    axes.plot(steps, _smoothed(values), color=ink, lw=1.8, label=label)


def _smoothed(values: np.ndarray) -> np.ndarray:
    """Centred moving average of values (N,) over `SMOOTHED_POINTS`; at both ends over as many as there are."""
    sums = np.concatenate([[0.0], np.cumsum(values)])
    places = np.arange(len(values))
    first = np.maximum(places - SMOOTHED_POINTS // 2, 0)
    last = np.minimum(places + SMOOTHED_POINTS // 2 + 1, len(values))
    return (sums[last] - sums[first]) / (last - first)


def _error_bars(rows: Sequence[MethodResult]) -> np.ndarray:
    """Distances of the KID intervals' ends from the values, (2, rows)."""
    below = [row.kid_teacher - row.kid_teacher_ci[0] for row in rows]
    above = [row.kid_teacher_ci[1] - row.kid_teacher for row in rows]
    return np.array([below, above])


def dress(axes: Axes, title: str) -> None:
    """Give a plot its title, and grid lines instead of a frame."""
    axes.xaxis.label.set_color(FAINT_INK)
    axes.set_title(title, loc="left", color=INK, fontsize=11, pad=10)
    axes.grid(color=GRID, lw=0.8)
    axes.set_axisbelow(True)
    axes.tick_params(colors=FAINT_INK, length=0)
    axes.spines[:].set_visible(False)
