"""What an evaluation measured, and which of the promises about it hold."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from typing import Literal

import numpy as np

from fewstep.errors import UserError
from fewstep.evaluate.classifier import Classifier
from fewstep.evaluate.features import FeatureExtractor
from fewstep.evaluate.metrics import (
    Estimate,
    diversity,
    frechet_distance,
    kid_difference,
    kid_interval,
    paired_distance,
    pixel_rmse,
)

TEACHER = "teacher_64"
"""Row of the reference: the teacher's guided sampler at 64 steps."""
STUDENT = "student_4"
"""Row of the student: its policy sampler at 4 network evaluations."""

CAPTIONS_NEEDED = 384
DIVERSITY_KEPT = 0.97
REAL_KID_ALLOWED = 1.05

SAMPLES_NEEDED = 2048
"""For the Fréchet distance of 128 features."""
ACCURACY_KEPT = 0.98

Kind = Literal["quick", "full", "classes"]


def distance_allowed(nfe: int) -> float:
    """How many times the teacher's distance to the real images a class-conditional student's may be."""
    return 1.3 if nfe == 1 else 1.1


@dataclass(frozen=True)
class Row:
    """The figures of one way to draw the captions."""

    name: str
    """Method and number, such as "euler_8" or "student_4"."""
    passes: int
    """Network passes per image; a guided step takes two."""
    kid_teacher: float
    """KID (10⁻³) against an independent set of teacher samples, of other noise."""
    kid_teacher_ci: tuple[float, float]
    """95 % confidence interval of `kid_teacher`."""
    kid_real: float | None
    """KID (10⁻³) against the captions' real images; None where the dataset holds prompts alone."""
    kid_real_ci: tuple[float, float] | None
    """95 % confidence interval of `kid_real`."""
    paired_distance: float
    """Mean feature distance to the reference from the same noise."""
    pixel_rmse: float
    """Root mean square pixel error to the reference from the same noise, pixels in [−1, 1]."""
    diversity: float
    """Mean feature distance of two images of the set."""
    frechet: float | None = None
    """Fréchet distance to the real images in the features of the classes' own classifier; None without one."""
    accuracy: float | None = None
    """Share of images in which that classifier sees the class that was asked for."""

    @property
    def by_student(self) -> bool:
        """Whether a student drew it, at whichever number of evaluations."""
        return self.name.startswith("student_")

    @property
    def label(self) -> str:
        """The name in words."""
        method, _, number = self.name.rpartition("_")
        words = {"teacher": "guided step", "euler": "Euler step", "student": "evaluation"}
        who = "student" if self.by_student else "teacher"
        return f"{who}, {counted(int(number), words[method])}" if method in words else self.name


def counted(number: int, noun: str) -> str:
    """1, "pass" → "1 pass"; 2 → "2 passes"."""
    plural = "" if number == 1 else "es" if noun.endswith("s") else "s"
    return f"{number} {noun}{plural}"


@dataclass(frozen=True)
class Verdict:
    """One promise, the two numbers it compares, and whether it holds."""

    name: str
    promise: str
    value: float
    bound: float
    kept: bool


@dataclass(frozen=True)
class Report:
    """All rows of an evaluation: the reference first, then by network passes."""

    captions: int
    rows: tuple[Row, ...]
    teacher: str = TEACHER
    student: str = STUDENT
    student_minus: Mapping[str, Estimate] = field(default_factory=dict)
    """The student's KID to the teacher minus each other row's, with 95 % intervals that use the pairing."""

    def row(self, name: str) -> Row:
        """The row of that name.

        Raises:
            UserError: the evaluation did not draw it.
        """
        for row in self.rows:
            if row.name == name:
                return row
        raise UserError(
            f"the evaluation has no row {name!r}, only {', '.join(row.name for row in self.rows)}: "
            "add it to the methods that are drawn."
        )

    def verdicts(self, kind: Kind = "quick") -> list[Verdict]:
        """The promises of the quick run, of the long recipe, or of class-conditional students, in order.

        Raises:
            UserError: a row that a promise compares with was not drawn, or no classifier judged the images.
        """
        student, teacher = self.row(self.student), self.row(self.teacher)
        if kind == "classes":
            return self._class_verdicts(student, teacher)

        def below_euler(figure: str, words: str, steps: int) -> Verdict:
            value, bound = getattr(student, figure), getattr(self.row(f"euler_{steps}"), figure)
            return Verdict(
                figure, f"{words} below guided Euler's at {steps} steps", value, bound, value < bound
            )

        captions = Verdict(
            "captions",
            f"measured on at least {CAPTIONS_NEEDED} captions",
            self.captions,
            CAPTIONS_NEEDED,
            self.captions >= CAPTIONS_NEEDED,
        )
        if kind == "quick":
            least = DIVERSITY_KEPT * teacher.diversity
            return [
                captions,
                below_euler("kid_teacher", "KID to teacher", 8),
                below_euler("paired_distance", "paired distance", 4),
                Verdict(
                    "diversity",
                    f"diversity at least {DIVERSITY_KEPT} of the teacher's",
                    student.diversity,
                    least,
                    student.diversity >= least,
                ),
            ]
        euler_16, (low, high) = self.row("euler_16").kid_teacher, student.kid_teacher_ci
        promises = [
            captions,
            Verdict(
                "kid_teacher",
                "KID to teacher within its interval of zero, or below guided Euler's at 16 steps",
                student.kid_teacher,
                max(euler_16, (high - low) / 2),
                low <= 0 or student.kid_teacher < euler_16,
            ),
            below_euler("paired_distance", "paired distance", 8),
            below_euler("pixel_rmse", "pixel error", 4),
        ]
        if student.kid_real is not None and teacher.kid_real is not None:
            most = REAL_KID_ALLOWED * teacher.kid_real
            words = f"KID to real at most {REAL_KID_ALLOWED} times the teacher's"
            promises.append(Verdict("kid_real", words, student.kid_real, most, student.kid_real <= most))
        return promises

    def _class_verdicts(self, student: Row, teacher: Row) -> list[Verdict]:
        figures = (student.frechet, teacher.frechet, student.accuracy, teacher.accuracy)
        if None in (*figures, student.kid_real, teacher.kid_real):
            raise UserError(
                "evaluation.promise=classes is about real images and their classifier, and there is none for this "
                "data: choose quick or full."
            )
        allowed = distance_allowed(student.passes)

        def at_most(name: str, words: str, value: float, reference: float) -> Verdict:
            bound = allowed * reference
            return Verdict(
                name, f"{words} at most {allowed} times the teacher's", value, bound, value <= bound
            )

        least = ACCURACY_KEPT * teacher.accuracy
        return [
            Verdict(
                "captions",
                f"measured on at least {SAMPLES_NEEDED} samples",
                self.captions,
                SAMPLES_NEEDED,
                self.captions >= SAMPLES_NEEDED,
            ),
            at_most("frechet", "Fréchet distance to real", student.frechet, teacher.frechet),
            at_most("kid_real", "KID to real", student.kid_real, teacher.kid_real),
            Verdict(
                "accuracy",
                f"class accuracy at least {ACCURACY_KEPT} of the teacher's",
                student.accuracy,
                least,
                student.accuracy >= least,
            ),
        ]

    def table(self) -> str:
        """The rows as plain text, with a legend."""
        judged = any(row.accuracy is not None for row in self.rows)
        header = ("", "passes", "KID teacher", "95 % interval", "KID real", "paired", "pixel", "diversity",
                  *(("Fréchet", "accuracy") if judged else ()))  # fmt: skip
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
                *((_optional(row.frechet, ".3f"), _optional(row.accuracy, ".1%")) if judged else ()),
            )
            for row in self.rows
        ]
        lines = _aligned([header, *body])
        rule = "─" * len(lines[0])
        labels = {row.name: row.label for row in self.rows}
        differences = [
            f"  {labels[self.student]} − {labels[name]}: {_signed(d.value)} [{_signed(d.low)}, {_signed(d.high)}]"
            for name, d in self.student_minus.items()
        ]
        return "\n".join([
            f"{self.captions} held-out captions, EfficientNet-Lite0 features (not FID)",
            rule, lines[0], rule, *lines[1:], rule,
            "passes      network passes per image",
            "KID         10⁻³, to other noise's teacher samples and to real images; lower is better",
            "paired      mean feature distance to the teacher's image from the same noise; lower is better",
            "pixel       root mean square error to that image, pixels in [−1, 1]; lower is better",
            "diversity   mean feature distance of two images; the teacher's is the target",
            *(_JUDGED if judged else []),
            *(["difference in KID to teacher, 95 % interval:", *differences] if differences else []),
        ])  # fmt: skip

    def metrics(self, prefix: str = "eval") -> dict[str, float]:
        """Every figure under a flat name such as `eval/student_4/kid_teacher`, for MLflow."""
        flat: dict[str, float] = {f"{prefix}/captions": float(self.captions)}
        for row in self.rows:
            for name, value in asdict(row).items():
                if value is None:
                    continue
                if name.endswith("_ci"):
                    low, high = value
                    flat |= {f"{prefix}/{row.name}/{name}_low": low, f"{prefix}/{row.name}/{name}_high": high}
                elif name != "name":
                    flat[f"{prefix}/{row.name}/{name}"] = float(value)
        return flat

    def to_json(self) -> str:
        """The whole report as indented JSON."""
        content = asdict(self) | {"student_minus": {k: v._asdict() for k, v in self.student_minus.items()}}
        return json.dumps(content, indent=2)


_JUDGED = (
    "Fréchet     distance to real images in the features of a classifier of these classes; lower is better",
    "accuracy    share of images in which that classifier sees the class that was asked for",
)


def verdict_table(verdicts: list[Verdict]) -> str:
    """Promises as plain text, one line each: kept or missed, what, and the two numbers."""
    return "\n".join(
        f"{'kept  ' if verdict.kept else 'MISSED'}  {verdict.promise}: "
        f"{_number(verdict.value)} against {_number(verdict.bound)}"
        for verdict in verdicts
    )


def build_report(
    images: Mapping[str, np.ndarray],
    *,
    reference: np.ndarray,
    independent: np.ndarray,
    real: np.ndarray | None,
    passes: Mapping[str, int],
    extractor: FeatureExtractor,
    classifier: Classifier | None = None,
    labels: np.ndarray | None = None,
    teacher: str = TEACHER,
    student: str = STUDENT,
) -> Report:
    """Measure every set of images; image i of every set belongs to caption i.

    Args:
        images: per row name (N, H, W, 3) uint8, drawn from the reference's noise.
        reference: the teacher's images, many guided steps.
        independent: the teacher's images by the same sampler from other noise. What KID to the teacher
            compares with: the reference itself would reward copying its noise.
        real: the captions' real images; None where there are none.
        passes: network passes per image, for every row and for `teacher`.
        extractor: of the features.
        classifier: of the classes that were asked for; None where captions are no classes.
        labels: those classes' indices, (N,); with `classifier`.
        teacher: row name of `reference`.
        student: row name of the student.

    Raises:
        UserError: sets differ in shape or have fewer than three images, or a number of passes is missing.
    """
    rows = {teacher: reference, **images}
    others = {"independent": independent} | ({} if real is None else {"real": real})
    _check({**rows, **others}, passes, rows)
    features = {name: extractor.features(pixels) for name, pixels in rows.items()}
    independent_features = extractor.features(independent)
    real_features = None if real is None else extractor.features(real)

    judged_real = None if classifier is None or real is None else classifier.features(real)

    def measure(name: str) -> Row:
        judged = None if classifier is None else classifier.features(rows[name])
        to_teacher = kid_interval(features[name], independent_features)
        to_real = None if real_features is None else kid_interval(features[name], real_features)
        return Row(
            name=name,
            passes=passes[name],
            kid_teacher=to_teacher.value,
            kid_teacher_ci=to_teacher[1:],
            kid_real=to_real and to_real.value,
            kid_real_ci=to_real and to_real[1:],
            paired_distance=paired_distance(features[name], features[teacher]),
            pixel_rmse=pixel_rmse(rows[name], reference),
            diversity=diversity(features[name]),
            frechet=None if judged_real is None else frechet_distance(judged, judged_real),
            accuracy=None if judged is None else float((classifier.classes_of(judged) == labels).mean()),
        )

    order = [teacher, *sorted(images, key=lambda name: (passes[name], name))]
    return Report(
        captions=len(reference),
        rows=tuple(measure(name) for name in order),
        teacher=teacher,
        student=student,
        student_minus={
            name: kid_difference(features[student], features[name], independent_features)
            for name in order
            if student in features and name != student
        },
    )


def _check(sets: Mapping[str, np.ndarray], passes: Mapping[str, int], rows: Mapping[str, np.ndarray]) -> None:
    shapes = {name: pixels.shape for name, pixels in sets.items()}
    if len(set(shapes.values())) > 1:
        raise UserError(
            f"the image sets to compare have different shapes {shapes}: draw every method for the same "
            "captions, and bring the real images to the same size."
        )
    if (captions := len(sets["independent"])) < 3:
        raise UserError(
            f"an evaluation needs at least 3 captions for its confidence intervals, got {captions}: "
            "raise the number of captions."
        )
    if missing := [name for name in rows if name not in passes]:
        raise UserError(f"no number of network passes for {', '.join(missing)}: add it to `passes`.")


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
