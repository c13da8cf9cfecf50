"""Plots of a run: quality against network passes, and the loss. They are made for files, and open no window."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from itertools import cycle
from typing import TYPE_CHECKING

import numpy as np

from fewstep.evaluate.report import MethodResult, Report

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

INK, FAINT_INK, GRID, BASELINE, STUDENT = "#1f2933", "#6b7785", "#e5e7eb", "#6b7785", "#0b6bcb"
SOLVER_INKS = {
    "euler": (BASELINE, "Euler"),
    "heun": ("#b3402a", "Heun"),
    "dpmpp": ("#c98a1b", "DPM-Solver++"),
    "unipc": ("#3f8f5f", "UniPC"),
}
"""The teacher's solvers → their lines' colours, and their names."""
STUDENT_INKS = (STUDENT, "#7b3fb5", "#0f8b8d", "#c2185b", "#5d6d1e")
"""Of several students, in turns."""
QUARTILE_INKS = ("#9ecae9", "#5ba3d9", "#2171b5", "#08306b")
DPI = 150
"""Dots per inch of the figures."""
SMOOTHED_POINTS = 25
"""The loss curves' bold line averages over this many logged rows."""


def quality_plot(report: Report) -> Figure:
    """KID to the teacher and paired feature distance against network passes per image.

    Each of the teacher's solvers, the baseline, is a line; the student is a point (or a line, if it learned several
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
    by_solver = {
        solver: [row for row in baseline if row.method.rpartition("_")[0] == solver] for solver in SOLVER_INKS
    }
    by_model = {
        model: [row for row in students if row.model == model]
        for model in dict.fromkeys(row.model for row in students)
    }
    reference = report.row(report.teacher)
    band = "teacher against itself, other noise (95 %)"
    left.axhspan(*reference.kid_teacher_ci, color=GRID, lw=0, zorder=0, label=band)
    for rows, ink, marker, label in (
        *(
            (by_solver[solver], ink, "o", f"teacher, guided {name}")
            for solver, (ink, name) in SOLVER_INKS.items()
        ),
        *(
            (rows, ink, "D", model or "student")
            for (model, rows), ink in zip(by_model.items(), cycle(STUDENT_INKS), strict=False)
        ),
    ):
        if not rows:
            continue
        passes = [row.passes for row in rows]
        kids = [row.kid_teacher for row in rows]
        style = {"color": ink, "marker": marker, "markersize": 6 if marker == "o" else 9, "lw": 1.6}
        left.errorbar(passes, kids, yerr=_error_bars(rows), capsize=3, elinewidth=1, label=label, **style)
        right.plot(passes, [row.paired_distance for row in rows], **style)
    for row in by_solver["euler"]:
        steps = f"{row.method.rpartition('_')[2]} steps"
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


def diversity_plot(report: Report) -> Figure:
    """KID to the teacher, and to real images where there are some, against the diversity of a method's images.

    A method that is near the teacher in KID and left of it draws a part of what the teacher draws.

    Args:
        report: of an evaluation.
    """
    from matplotlib.figure import Figure

    figure = Figure(figsize=(9.6, 4.2), dpi=DPI, layout="constrained")
    real = any(row.kid_real is not None for row in report.rows)
    panels = [
        ("kid_teacher", "KID to the teacher (10⁻³)"),
        *([("kid_real", "KID to real images (10⁻³)")] if real else []),
    ]
    for axes, (kid, name) in zip(figure.subplots(1, len(panels), squeeze=False)[0], panels, strict=True):
        for row in report.rows:
            solver = SOLVER_INKS.get(row.method.rpartition("_")[0], (INK, ""))[0]
            ink, marker = (
                (STUDENT, "D") if row.by_student else (solver, "*" if row.name == report.teacher else "o")
            )
            place = row.diversity, getattr(row, kid)
            axes.plot(*place, color=ink, marker=marker, markersize=9 if marker != "o" else 6, lw=0)
            axes.annotate(row.label, place, (7, 4), textcoords="offset points", color=ink, fontsize=8)
        axes.axvline(report.row(report.teacher).diversity, color=GRID, zorder=0)
        axes.set_yscale("symlog", linthresh=1.0)
        axes.margins(x=0.25, y=0.12)
        axes.set_xlabel("diversity: mean feature distance of two images")
        dress(axes, name)
    return figure


def trajectory_plot(report: Report) -> Figure:
    """Distance of each method's states to the teacher's trajectory from the same noise, from noise to data.

    Args:
        report: of an evaluation that measured trajectories.
    """
    from matplotlib.figure import Figure

    figure = Figure(figsize=(9.6, 4.2), dpi=DPI, layout="constrained")
    axes = figure.subplots()
    models = [*dict.fromkeys(row.model for row in report.rows if row.by_student)]
    for name, points in report.trajectories.items():
        row = report.row(name)
        ink = STUDENT_INKS[models.index(row.model) % len(STUDENT_INKS)] if row.by_student else BASELINE
        sigmas, errors = zip((1.0, 0.0), *points, strict=True)
        axes.plot(sigmas, errors, color=ink, marker="D" if row.by_student else "o", markersize=5, lw=1.6)
        axes.annotate(
            row.label, points[-1], (-4, 4), textcoords="offset points", ha="right", color=ink, fontsize=8
        )
    axes.set_xlim(1.02, -0.02)
    axes.set_ylim(bottom=0)
    axes.set_xlabel("σ, from noise (1) to data (0)")
    dress(axes, "Root mean square distance to the teacher's trajectory")
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
