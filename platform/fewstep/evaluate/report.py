"""What an evaluation measured: the figures of every method, and their names in MLflow and in JSON.

`measure` makes a report from images, `criteria` judges it, and `table` shows it.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field, fields, replace
from typing import Any

from fewstep.errors import UserError
from fewstep.evaluate.metrics import Estimate

TEACHER = "teacher_64"
"""Name of the reference: the teacher's guided sampler at 64 steps."""
STUDENT = "student_4"
"""Name of the student's result: its policy sampler at 4 network evaluations."""

OF = " of "
"""Between a method and a student in names of results of several students."""

LEAST_CAPTIONS = 3
"""Captions that an evaluation needs: its confidence intervals leave one out at a time."""


_OPTIONAL = (
    "kid_real", "kid_real_ci", "frechet", "accuracy", "vendi", "fd_teacher", "fd_real", "scores",
    *(
        name + end
        for name in (
            "precision", "recall", "density", "coverage", "clip_score", "retrieval_1", "retrieval_5", "lpips",
            "memorised", "prompt_diversity", "prompt_vendi",
        )
        for end in ("", "_ci")
    ),
)  # fmt: skip
"""Figures that a result may lack."""


@dataclass(frozen=True)
class MethodResult:
    """The figures of one way to generate images from the captions."""

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
    """Share of images, 0 to 1, in which that classifier sees the class that was asked for; None without one."""
    precision: float | None = None
    """Share of images that lie among the real ones (k = 3); None where the dataset holds prompts alone."""
    precision_ci: tuple[float, float] | None = None
    """95 % confidence interval of `precision`."""
    recall: float | None = None
    """Share of real images that lie among the generated ones (k = 3); None as above."""
    recall_ci: tuple[float, float] | None = None
    """95 % confidence interval of `recall`."""
    density: float | None = None
    """Real images' neighbourhoods that an image lies in, of k = 5; None as above."""
    density_ci: tuple[float, float] | None = None
    """95 % confidence interval of `density`."""
    coverage: float | None = None
    """Share of real images with a generated one in their neighbourhood (k = 5); None as above."""
    coverage_ci: tuple[float, float] | None = None
    """95 % confidence interval of `coverage`."""
    vendi: float | None = None
    """Vendi score, the effective number of different images; None in reports from before it was measured."""
    fd_teacher: float | None = None
    """Fréchet distance to the independent set of teacher samples; None of fewer images than it needs."""
    fd_real: float | None = None
    """Fréchet distance to the captions' real images; None as above, or where there are none."""
    memorised: float | None = None
    """Share of images nearer to a training image than 19 of 20 unseen real ones; None where it was not looked for."""
    memorised_ci: tuple[float, float] | None = None
    """95 % confidence interval of `memorised`."""
    lpips: float | None = None
    """Mean LPIPS to the reference from the same noise; None where its network was not given."""
    lpips_ci: tuple[float, float] | None = None
    """95 % confidence interval of `lpips`."""
    clip_score: float | None = None
    """Mean CLIP score of image and caption; None where no CLIP was given."""
    clip_score_ci: tuple[float, float] | None = None
    """95 % confidence interval of `clip_score`."""
    retrieval_1: float | None = None
    """Share of images whose own caption fits best to CLIP, of all captions (R@1); None as above."""
    retrieval_1_ci: tuple[float, float] | None = None
    """95 % confidence interval of `retrieval_1`."""
    retrieval_5: float | None = None
    """Share of images whose own caption is among the best five (R@5); None as above."""
    retrieval_5_ci: tuple[float, float] | None = None
    """95 % confidence interval of `retrieval_5`."""
    prompt_diversity: float | None = None
    """Mean feature distance of two images of one caption; None where captions have one image each."""
    prompt_diversity_ci: tuple[float, float] | None = None
    """95 % confidence interval of `prompt_diversity`, over captions."""
    prompt_vendi: float | None = None
    """Mean Vendi score of the images of one caption; None as above."""
    prompt_vendi_ci: tuple[float, float] | None = None
    """95 % confidence interval of `prompt_vendi`, over captions."""
    scores: Mapping[str, float] | None = None
    """Means of the user's own scores, by name; None where there are none."""

    @property
    def by_student(self) -> bool:
        """Whether a student generated the images, at whichever number of evaluations."""
        return self.name.startswith("student_")

    @property
    def model(self) -> str | None:
        """Which student, or student's teacher, where the report has several of them (see `side_by_side`)."""
        return self.name.partition(OF)[2] or None

    @property
    def method(self) -> str:
        """The name without the student's: method and number."""
        return self.name.partition(OF)[0]

    @property
    def label(self) -> str:
        """The name in words, such as "teacher, 8 Euler steps"."""
        method, _, number = self.method.rpartition("_")
        words = {
            "teacher": "guided step",
            "euler": "Euler step",
            "heun": "Heun evaluation",
            "dpmpp": "DPM-Solver++ step",
            "unipc": "UniPC step",
            "student": "evaluation",
        }
        who = "student" if self.by_student else "teacher"
        if self.model is not None:
            who = self.model if self.by_student else f"teacher of {self.model}"
        return f"{who}, {counted(int(number), words[method])}" if method in words else self.name


def counted(number: int, noun: str) -> str:
    """A number with its noun in singular or plural: 1, "pass" → "1 pass"; 2 → "2 passes"."""
    plural = "" if number == 1 else "es" if noun.endswith("s") else "s"
    return f"{number} {noun}{plural}"


@dataclass(frozen=True)
class Report:
    """The results of all methods of an evaluation: the reference first, then by network passes."""

    captions: int
    """On how many captions, or samples of classes, all was measured."""
    rows: tuple[MethodResult, ...]
    """One result per method."""
    teacher: str = TEACHER
    """Name of the reference's result."""
    student: str = STUDENT
    """Name of the student's result at its main number of evaluations, which the criteria are about."""
    features: str = "EfficientNet-Lite0"
    """Name of the network of the features."""
    trajectories: Mapping[str, Sequence[tuple[float, float]]] = field(default_factory=dict)
    """Per method: σ after each of its steps, and the root mean square distance of its states there to the teacher's
    trajectory from the same noise."""
    student_minus: Mapping[str, Estimate] = field(default_factory=dict)
    """The student's KID to the teacher minus each other method's, with 95 % intervals that use the pairing."""

    def row(self, name: str) -> MethodResult:
        """The result of that name.

        Raises:
            UserError: the evaluation did not generate images by that method.
        """
        for row in self.rows:
            if row.name == name:
                return row
        raise UserError(
            f"the evaluation has no row {name!r}, only {', '.join(row.name for row in self.rows)}: "
            "add it to the methods that are evaluated."
        )

    def with_memorised(self, shares: Mapping[str, Estimate]) -> Report:
        """The report with what was memorised.

        Args:
            shares: name of a result → its figure.
        """
        rows = (
            replace(row, memorised=found.value, memorised_ci=(found.low, found.high))
            if (found := shares.get(row.name)) is not None
            else row
            for row in self.rows
        )
        return replace(self, rows=tuple(rows))

    def metrics(self, prefix: str = "eval") -> dict[str, float]:
        """Every figure under a flat name such as `eval/student_4/kid_teacher`, for MLflow."""
        flat: dict[str, float] = {f"{prefix}/captions": float(self.captions)}
        for row in self.rows:
            for name, value in asdict(row).items():
                if value is None:
                    continue
                # MLflow's metrics are single numbers, so an interval becomes two of them.
                if name == "scores":
                    flat |= {f"{prefix}/{row.name}/score_{own}": score for own, score in value.items()}
                elif name.endswith("_ci"):
                    low, high = value
                    flat |= {f"{prefix}/{row.name}/{name}_low": low, f"{prefix}/{row.name}/{name}_high": high}
                elif name != "name":
                    flat[f"{prefix}/{row.name}/{name}"] = float(value)
        return flat

    @classmethod
    def from_metrics(cls, metrics: Mapping[str, float], student: str, prefix: str = "eval") -> Report | None:
        """The report whose `metrics` these are, but for the differences; None if they lack a reference or the student.

        Args:
            metrics: flat names → figures; names of other things are left out.
            student: name of the student's main result.
            prefix: of the names.
        """
        figures: dict[str, dict[str, Any]] = {}
        for flat, value in metrics.items():
            match flat.split("/"):
                case [first, method, figure] if first == prefix:
                    figures.setdefault(method, {})[figure] = value
        rows = [row for method, found in figures.items() if (row := _result(method, found)) is not None]
        teacher = next((row.name for row in rows if row.name.startswith("teacher_")), None)
        if (
            teacher is None
            or student not in {row.name for row in rows}
            or f"{prefix}/captions" not in metrics
        ):
            return None
        return cls(int(metrics[f"{prefix}/captions"]), tuple(rows), teacher, student)

    def to_json(self) -> str:
        """The whole report as indented JSON."""
        # asdict leaves named tuples as tuples, whose fields JSON would not name.
        content = asdict(self) | {"student_minus": {k: v._asdict() for k, v in self.student_minus.items()}}
        return json.dumps(content, indent=2)


def side_by_side(reports: Mapping[str, Report]) -> Report:
    """One report of several students, measured on the same captions.

    Results of a teacher that the first student has, too, are there once; the first student is the main one.

    Args:
        reports: name of each student → its report.

    Raises:
        UserError: they were measured on different numbers of captions, or with features of different networks.
    """
    first = next(iter(reports.values()))
    for name, report in reports.items():
        if (report.captions, report.features) != (first.captions, first.features):
            raise UserError(
                f"{name} was measured on {report.captions} captions with {report.features}, and others on "
                f"{first.captions} with {first.features}: measure them alike."
            )
    rows: list[MethodResult] = []
    for name, report in reports.items():
        for row in report.rows:
            if row.by_student:
                rows.append(replace(row, name=f"{row.name}{OF}{name}"))
            elif row not in rows:
                taken = any(row.name == other.name for other in rows)
                rows.append(replace(row, name=f"{row.name}{OF}{name}") if taken else row)
    rows.sort(key=lambda row: (row.name != first.teacher, row.passes))
    main = f"{first.student}{OF}{next(iter(reports))}"
    names = {row.name for row in rows}
    trajectories = {
        own: points
        for name, report in reports.items()
        for method, points in report.trajectories.items()
        if (own := f"{method}{OF}{name}") in names or (own := method) in names
    }
    return Report(first.captions, tuple(rows), first.teacher, main, first.features, trajectories)


def _result(method: str, figures: Mapping[str, float]) -> MethodResult | None:
    """A result of its figures as `Report.metrics` names them; None if one is missing that every result has."""
    known: dict[str, Any] = {"name": method}
    for one in fields(MethodResult):
        if one.name == "scores":
            own = {k.removeprefix("score_"): v for k, v in figures.items() if k.startswith("score_")}
            known[one.name] = own or None
        elif one.name.endswith("_ci"):
            ends = figures.get(f"{one.name}_low"), figures.get(f"{one.name}_high")
            known[one.name] = None if None in ends else ends
        elif one.name != "name":
            known[one.name] = figures.get(one.name)
    if any(value is None and name not in _OPTIONAL for name, value in known.items()):
        return None
    return MethodResult(**known | {"passes": int(known["passes"])})
