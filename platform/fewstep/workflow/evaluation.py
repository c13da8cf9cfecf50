"""A student measured against its teacher: images, figures, pictures."""

from __future__ import annotations

import os
from collections.abc import Mapping
from pathlib import Path

import numpy as np
import torch
from PIL.Image import Image

from fewstep.data.schema import DatasetInfo
from fewstep.data.stream import Batch, read_split
from fewstep.encoders import load_autoencoder
from fewstep.evaluate.classifier import Classifier
from fewstep.evaluate.criteria import Criteria, check_criteria
from fewstep.evaluate.features import FeatureExtractor
from fewstep.evaluate.generation import Method, Precisions, generate_images
from fewstep.evaluate.grid import GridRow, comparison_grid
from fewstep.evaluate.measure import build_report
from fewstep.evaluate.plots import quality_plot
from fewstep.evaluate.report import LEAST_CAPTIONS, Report, counted
from fewstep.evaluate.table import criteria_table, report_table
from fewstep.models.conditioning import ClassConditioning
from fewstep.student import StudentCard, read_student_card
from fewstep.train.recipe import EvaluationConfig

COLUMNS = 10
"""Captions in the comparison picture."""


def evaluate(
    student: Path,
    data: str,
    config: EvaluationConfig,
    results: Path,
    *,
    split: str = "held_out",
    gpu: bool = False,
    precisions: Precisions | None = None,
) -> Report:
    """Compare a student with its teacher's own sampler on held-out captions, on the whole cluster.

    Writes `comparison.png`, `quality.png` and `report.json` into `results`.

    Args:
        student: exported folder.
        data: prepared dataset; of several sizes, the student's default one is taken.
        config: how many captions, which steps.
        results: where pictures and numbers go.
        split: which captions.
        gpu: whether to generate on GPUs.
        precisions: of the weights of student and teacher; float32 by default.

    Raises:
        UserError: the student or the dataset can't be used, or has too few captions.
    """
    card = read_student_card(student)
    shapes = DatasetInfo.open(data).buckets(split)
    rows = {shape: sum(shard.rows for shard in shards) for shape, shards in shapes.items()}
    # The student's own shape, unless the split has too few rows of it.
    shape = card.latent_shape
    if shape is None or rows.get(shape, 0) < LEAST_CAPTIONS:
        shape = max(rows, key=rows.__getitem__)
    batch = read_split(data, split, config.captions, shape=shape)
    reference = f"teacher_{config.reference_steps}"
    baseline = {f"euler_{steps}": steps for steps in config.baseline_steps}
    students = {f"student_{nfe}": nfe for nfe in sorted(card.sampler.nfes)}
    methods = [
        Method(reference, config.reference_steps),
        # The same sampler from other noise: what KID to the teacher is measured against.
        Method("independent", config.reference_steps, noise=1),
        *(Method(name, nfe, student=True) for name, nfe in students.items()),
        *(Method(name, steps) for name, steps in baseline.items()),
    ]
    images = generate_images(student, batch, methods, gpu=gpu, precisions=precisions)

    # Ray gives a job's driver one thread. The actors that generated are gone, so that now all may be used.
    torch.set_num_threads(os.cpu_count() or 1)
    device = "cuda" if gpu else "cpu"
    real = None
    if batch.latent is not None:
        # Decoded like everything that was generated, so that the autoencoder's own loss counts on both sides.
        real = np.asarray(load_autoencoder(card.autoencoder, device=device).decode(batch.latent))
    passes_per_step = _passes_per_step(card)
    steps = {reference: config.reference_steps, **baseline}
    print(f"measuring {len(images) + (real is not None)} sets of {len(batch)} images", flush=True)
    report = build_report(
        {name: images[name] for name in (*baseline, *students)},
        reference=images[reference],
        independent=images["independent"],
        real=real,
        passes={name: count * passes_per_step for name, count in steps.items()} | students,
        extractor=FeatureExtractor.load(device),
        classifier=Classifier.bundled(card.text_encoder, device),
        labels=_labels(batch),
        teacher=reference,
        student=f"student_{card.sampler.nfe}",
    )
    results.mkdir(parents=True, exist_ok=True)
    _picture(images, batch, reference, students, passes_per_step).save(results / "comparison.png")
    quality_plot(report).savefig(results / "quality.png")
    (results / "report.json").write_text(report.to_json())
    return report


def summary(report: Report, criteria: Criteria) -> str:
    """A report's table, and which acceptance criteria are met, as plain text.

    Args:
        report: of an evaluation.
        criteria: which ones.

    Raises:
        UserError: the report lacks what the criteria compare with.
    """
    return f"{report_table(report)}\n\n{criteria_table(check_criteria(report, criteria))}\n"


def _passes_per_step(card: StudentCard) -> int:
    """Network passes of one step of the teacher's sampler: with guidance there is one more, without the condition."""
    return 1 if card.teacher_sampler.guidance_scale == 1 else 2


def _labels(batch: Batch) -> np.ndarray | None:
    """The classes that were asked for, (N,); None for texts."""
    conditioning = batch.conditioning
    return conditioning.labels.numpy() if isinstance(conditioning, ClassConditioning) else None


def _picture(
    images: Mapping[str, np.ndarray],
    batch: Batch,
    reference: str,
    students: Mapping[str, int],
    passes_per_step: int,
) -> Image:
    """The teacher's reference, and each student above the Euler sampler of as many steps, on some captions."""
    # Evenly over the split, whose neighbours may be variants of one thing.
    chosen = np.linspace(0, len(batch) - 1, min(COLUMNS, len(batch))).round().astype(int)
    steps = int(reference.rpartition("_")[2])

    def words(count: int, what: str, passes_each: int) -> str:
        return f"{counted(count, what)}\n{counted(count * passes_each, 'pass')}"

    rows = [GridRow("teacher", words(steps, "guided step", passes_per_step), images[reference][chosen])]
    for name, nfe in students.items():
        rows.append(GridRow("student", words(nfe, "evaluation", 1), images[name][chosen], highlighted=True))
        if (euler := f"euler_{nfe}") in images:
            detail = words(nfe, "Euler step", passes_per_step)
            rows.append(GridRow("teacher", detail, images[euler][chosen]))
    return comparison_grid(rows, [batch.captions[index] for index in chosen])
