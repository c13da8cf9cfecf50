"""Acceptance criteria: what a student must reach, and whether it did."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from fewstep.errors import UserError
from fewstep.evaluate.report import MethodResult, Report

CAPTIONS_NEEDED = 384
"""Least number of captions for the criteria of text-to-image students."""
DIVERSITY_KEPT = 0.97
"""Least diversity as a share of the teacher's."""
REAL_KID_ALLOWED = 1.05
"""Largest KID to real images, as a multiple of the teacher's."""

SAMPLES_NEEDED = 2048
"""Least number of samples for class-conditional students: the Fréchet distance of 128 features needs so many."""
ACCURACY_KEPT = 0.98
"""Least class accuracy as a share of the teacher's."""

Criteria = Literal["quick", "full", "classes"]
"""Which criteria: of the quick recipe, of the long one, or of class-conditional students."""


@dataclass(frozen=True)
class CriterionResult:
    """One acceptance criterion, the two numbers that it compares, and whether it is met."""

    name: str
    """Of the figure that it is about, such as "kid_teacher"."""
    criterion: str
    """What must hold, as a sentence."""
    value: float
    """What was measured."""
    bound: float
    """What it is compared with."""
    met: bool
    """Whether it holds."""


def check_criteria(report: Report, kind: Criteria = "quick") -> list[CriterionResult]:
    """Check a report against the acceptance criteria of a kind, in order.

    Args:
        report: what was measured.
        kind: which criteria.

    Raises:
        UserError: a method that a criterion compares with was not evaluated, or no classifier judged the images.
    """
    student, teacher = report.row(report.student), report.row(report.teacher)
    if kind == "classes":
        return _check_classes(report, student, teacher)
    captions = _at_least(
        "captions", f"measured on at least {CAPTIONS_NEEDED} captions", report.captions, CAPTIONS_NEEDED
    )
    if kind == "quick":
        return [
            captions,
            _below_euler(report, student, "kid_teacher", "KID to teacher", 8),
            _below_euler(report, student, "paired_distance", "paired distance", 4),
            _at_least(
                "diversity",
                f"diversity at least {DIVERSITY_KEPT} of the teacher's",
                student.diversity,
                DIVERSITY_KEPT * teacher.diversity,
            ),
        ]
    results = [
        captions,
        _close_to_teacher(report, student),
        _below_euler(report, student, "paired_distance", "paired distance", 8),
        _below_euler(report, student, "pixel_rmse", "pixel error", 4),
    ]
    # Datasets of prompts alone have no real images; the other criteria hold without them.
    if student.kid_real is not None and teacher.kid_real is not None:
        results.append(
            _at_most("kid_real", "KID to real", student.kid_real, teacher.kid_real, REAL_KID_ALLOWED)
        )
    return results


def distance_allowed(nfe: int) -> float:
    """How many times the teacher's distance to the real images a class-conditional student's may be.

    Args:
        nfe: network evaluations of the student; one alone is allowed more.
    """
    return 1.3 if nfe == 1 else 1.1


def _check_classes(report: Report, student: MethodResult, teacher: MethodResult) -> list[CriterionResult]:
    if (
        student.frechet is None or teacher.frechet is None
        or student.accuracy is None or teacher.accuracy is None
        or student.kid_real is None or teacher.kid_real is None
    ):  # fmt: skip
        raise UserError(
            "evaluation.criteria=classes is about real images and their classifier, and there is none for this "
            "data: choose quick or full."
        )
    # A student takes one pass per evaluation: it is asked without a second, unconditional pass.
    allowed = distance_allowed(student.passes)
    return [
        _at_least(
            "captions", f"measured on at least {SAMPLES_NEEDED} samples", report.captions, SAMPLES_NEEDED
        ),
        _at_most("frechet", "Fréchet distance to real", student.frechet, teacher.frechet, allowed),
        _at_most("kid_real", "KID to real", student.kid_real, teacher.kid_real, allowed),
        _at_least(
            "accuracy",
            f"class accuracy at least {ACCURACY_KEPT} of the teacher's",
            student.accuracy,
            ACCURACY_KEPT * teacher.accuracy,
        ),
    ]


def _close_to_teacher(report: Report, student: MethodResult) -> CriterionResult:
    euler_16, (low, high) = report.row("euler_16").kid_teacher, student.kid_teacher_ci
    return CriterionResult(
        "kid_teacher",
        "KID to teacher within its interval of zero, or below guided Euler's at 16 steps",
        student.kid_teacher,
        # The bound that is easier to meet: an interval reaches zero where the value is at most half its width.
        max(euler_16, (high - low) / 2),
        low <= 0 or student.kid_teacher < euler_16,
    )


def _below_euler(
    report: Report, student: MethodResult, figure: str, words: str, steps: int
) -> CriterionResult:
    """A figure of the student is below that of the teacher's Euler sampler at a number of steps."""
    value, bound = getattr(student, figure), getattr(report.row(f"euler_{steps}"), figure)
    return CriterionResult(
        figure, f"{words} below guided Euler's at {steps} steps", value, bound, value < bound
    )


def _at_most(name: str, words: str, value: float, teacher: float, times: float) -> CriterionResult:
    """A distance is at most some multiple of the teacher's."""
    bound = times * teacher
    return CriterionResult(name, f"{words} at most {times} times the teacher's", value, bound, value <= bound)


def _at_least(name: str, criterion: str, value: float, bound: float) -> CriterionResult:
    return CriterionResult(name, criterion, value, bound, value >= bound)
