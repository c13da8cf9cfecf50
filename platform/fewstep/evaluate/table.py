"""Reports and acceptance criteria as plain text for the terminal."""

from __future__ import annotations

from collections.abc import Sequence

from fewstep.evaluate.criteria import CriterionResult
from fewstep.evaluate.figures import FIGURES
from fewstep.evaluate.report import Report

_CLASSIFIER_LEGEND = (
    "Fréchet     distance to real images in the features of a classifier of these classes; lower is better",
    "accuracy    share of images in which that classifier sees the class that was asked for",
)

MORE = (
    "fd_teacher", "fd_real", "memorised", "lpips", "clip_score", "retrieval_1", "retrieval_5", "prompt_diversity",
    "prompt_vendi",
)  # fmt: skip
"""Figures that have a column where they were measured."""


def report_table(report: Report) -> str:
    """The results of all methods, one line each, with a legend.

    The columns of the classifier are there where one judged the images.
    """
    classified = any(row.accuracy is not None for row in report.rows)
    more = [name for name in MORE if any(getattr(row, name) is not None for row in report.rows)]
    header = ("", "passes", "KID teacher", "95 % interval", "KID real", "paired", "pixel", "diversity",
              *(("Fréchet", "accuracy") if classified else ()), *(FIGURES[name].head for name in more))  # fmt: skip
    body = [
        (
            row.label,
            f"{row.passes}",
            _signed(row.kid_teacher),
            f"[{_signed(row.kid_teacher_ci[0])}, {_signed(row.kid_teacher_ci[1])}]",
            "–" if row.kid_real is None else _signed(row.kid_real),
            f"{row.paired_distance:.2f}",
            f"{row.pixel_rmse:.4f}",
            f"{row.diversity:.2f}",
            *((_optional(row.frechet, ".3f"), _optional(row.accuracy, ".1%")) if classified else ()),
            *("–" if (value := getattr(row, name)) is None else FIGURES[name].write(value) for name in more),
        )
        for row in report.rows
    ]
    lines = _aligned([header, *body])
    rule = "─" * len(lines[0])
    labels = {row.name: row.label for row in report.rows}
    differences = [
        f"  {labels[report.student]} − {labels[name]}: {_signed(d.value)} [{_signed(d.low)}, {_signed(d.high)}]"
        for name, d in report.student_minus.items()
    ]
    return "\n".join([
        f"{report.captions} held-out captions, features of {report.features}",
        rule, lines[0], rule, *lines[1:], rule,
        "passes      network passes per image",
        "KID         10⁻³, to other noise's teacher samples and to real images; lower is better",
        "paired      mean feature distance to the teacher's image from the same noise; lower is better",
        "pixel       root mean square error to that image, pixels in [−1, 1]; lower is better",
        "diversity   mean feature distance of two images; the teacher's is the target",
        *(_CLASSIFIER_LEGEND if classified else []),
        *(f"{FIGURES[name].head:<12}{FIGURES[name].meaning}; {FIGURES[name].better} is better" for name in more),
        *(["difference in KID to teacher, 95 % interval:", *differences] if differences else []),
    ])  # fmt: skip


def criteria_table(results: Sequence[CriterionResult]) -> str:
    """Acceptance criteria, one line each: whether it is met, what it says, and the two numbers that it compares."""
    # Capitals, so that the eye finds what was missed among lines that all look alike.
    return "\n".join(
        f"{'met   ' if result.met else 'MISSED'}  {result.criterion}: "
        f"{_number(result.value)} against {_number(result.bound)}"
        for result in results
    )


def _number(value: float) -> str:
    return f"{value:.4g}".replace("-", "−")


def _optional(value: float | None, spec: str) -> str:
    return "–" if value is None else format(value, spec)


def _signed(value: float) -> str:
    return f"{value:.2f}".replace("-", "−")


def _aligned(rows: list[tuple[str, ...]]) -> list[str]:
    """Columns padded to equal width: the first to the left, the rest to the right."""
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    return [
        "  ".join([row[0].ljust(widths[0]), *(c.rjust(w) for c, w in zip(row[1:], widths[1:], strict=True))])
        for row in rows
    ]
