"""A student measured against its teacher: images, figures, pictures."""

from __future__ import annotations

import importlib
import os
from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path

import numpy as np
import torch
from PIL.Image import Image

from fewstep.data.schema import DatasetInfo
from fewstep.data.stream import Batch, read_split
from fewstep.encoders import load_autoencoder, load_encoder
from fewstep.errors import UserError, one_line
from fewstep.evaluate.classifier import Classifier
from fewstep.evaluate.criteria import Criteria, check_criteria
from fewstep.evaluate.features import load_features
from fewstep.evaluate.features.torchscript import LPIPS
from fewstep.evaluate.features.vision import CLIP
from fewstep.evaluate.generation import (
    Method,
    Precisions,
    discard_images,
    generate_images,
    measure_trajectories,
)
from fewstep.evaluate.grid import GridRow, comparison_grid
from fewstep.evaluate.html import report_page
from fewstep.evaluate.measure import ImageSets, Judges, Scorer, build_report
from fewstep.evaluate.memorised import find_memorised
from fewstep.evaluate.plots import diversity_plot, loss_plot, quality_plot, trajectory_plot
from fewstep.evaluate.report import LEAST_CAPTIONS, Report, counted
from fewstep.evaluate.table import criteria_table, report_table
from fewstep.models.conditioning import ClassConditioning, Conditioning
from fewstep.models.solvers import SOLVERS, Solver, evaluations_of
from fewstep.student import StudentCard, read_student_card
from fewstep.train.recipe import EvaluationConfig
from fewstep.workflow.training_metrics import training_hours

COLUMNS = 10
"""Captions in the comparison picture."""
CAPTIONS_OF_SEVERAL = 32
"""Captions whose trajectories are measured, and of which there are several images each where they are asked for."""


def held_out(card: StudentCard, data: str, count: int, *, split: str = "held_out") -> Batch:
    """Captions of a dataset, with their images where it has them; of several sizes, the student's default one.

    Args:
        card: of the student that is evaluated.
        data: prepared dataset.
        count: how many, if there are so many.
        split: which captions.

    Raises:
        UserError: the dataset can't be used.
    """
    shapes = DatasetInfo.open(data).buckets(split)
    rows = {shape: sum(shard.rows for shard in shards) for shape, shards in shapes.items()}
    # The student's own shape, unless the split has too few rows of it.
    shape = card.latent_shape
    if shape is None or rows.get(shape, 0) < LEAST_CAPTIONS:
        shape = max(rows, key=rows.__getitem__)
    return read_split(data, split, count, shape=shape)


def training_images(card: StudentCard, data: str, config: EvaluationConfig) -> Batch | None:
    """The training images of a dataset that an evaluation looks for, of the student's size; None for none.

    Args:
        card: of the student that is evaluated.
        data: prepared dataset.
        config: says how many.

    Raises:
        UserError: the dataset can't be used, or has no images.
    """
    if not config.training_images:
        return None
    found = held_out(card, data, config.training_images, split="train")
    if found.latent is None:
        raise UserError(f"evaluation.training_images: {data} holds prompts alone: leave it at 0.")
    return found


def of_prompts(card: StudentCard, prompts: Sequence[str]) -> Batch:
    """Prompts of one's own, without images to compare with.

    Args:
        card: of the student that is evaluated; its encoder and its default size are used.
        prompts: at least three.

    Raises:
        UserError: the student's encoder does not take them, its card has no size, or it edits reference images.
    """
    if card.references:
        raise UserError(
            "--prompts: this student edits reference images, of which a list of prompts has none: give --data instead."
        )
    if card.latent_shape is None:
        raise UserError("--prompts: the student's card names no size of images: give --data instead.")
    encoder = load_encoder(card.text_encoder, max_tokens=card.max_tokens)
    encoder.check(prompts)
    conditioning = Conditioning.join(encoder.encode(prompts))  # rounded as those of datasets are
    return Batch(
        None, conditioning, list(prompts), [str(row) for row in range(len(prompts))], card.latent_shape
    )


def evaluate(
    student: Path,
    batch: Batch,
    config: EvaluationConfig,
    results: Path,
    *,
    training: Batch | None = None,
    gpu: bool = False,
    precisions: Precisions | None = None,
) -> Report:
    """Compare a student with its teacher's own sampler, on the whole cluster.

    Writes `comparison.png`, `quality.png` and `report.json` into `results`. An evaluation that was ended goes on where
    it was.

    Args:
        student: exported folder.
        batch: captions, as `held_out` or `of_prompts` gives them.
        config: which steps, and what is measured.
        results: where pictures and numbers go.
        training: training images to look for what is generated in, as `training_images` gives them.
        gpu: whether to generate on GPUs.
        precisions: of the weights of student and teacher; float32 by default.

    Raises:
        UserError: the student can't be used, or there are too few captions.
    """
    card = read_student_card(student)
    reference = f"teacher_{config.reference_steps}"
    baseline: dict[str, tuple[Solver, int]] = {
        f"{solver}_{count}": (solver, count)
        for solver in SOLVERS
        if solver == "euler" or solver in config.solvers
        for count in (evaluations_of(solver, steps) for steps in config.baseline_steps)
    }
    students = {f"student_{nfe}": nfe for nfe in sorted(card.sampler.nfes)}
    methods = [
        Method(reference, config.reference_steps),
        # The same sampler from other noise: what KID to the teacher is measured against.
        Method("independent", config.reference_steps, noise=1),
        *(Method(name, nfe, student=True) for name, nfe in students.items()),
        *(Method(name, steps, solver=solver) for name, (solver, steps) in baseline.items()),
    ]
    # Before hours of generating: a judge that is missing is told at once.
    device = "cuda" if gpu else "cpu"
    judges = load_judges(config, card.text_encoder, device)
    images = generate_images(student, batch, methods, gpu=gpu, precisions=precisions)
    several = _several(student, batch, config, methods, gpu=gpu, precisions=precisions)

    # Ray gives a job's driver one thread. The actors that generated are gone, so that now all may be used.
    torch.set_num_threads(os.cpu_count() or 1)
    # Decoded like everything that was generated, so that the autoencoder's own loss counts on both sides.
    autoencoder = load_autoencoder(card.autoencoder, device=device)
    real, known = (
        None if rows is None or rows.latent is None else np.asarray(autoencoder.decode(rows.latent))
        for rows in (batch, training)
    )
    passes_per_step = card.teacher_sampler.passes
    steps = {reference: config.reference_steps, **{name: steps for name, (_, steps) in baseline.items()}}
    print(f"measuring {len(images) + (real is not None)} sets of {len(batch)} images", flush=True)
    report = build_report(
        ImageSets(
            methods={name: images[name] for name in (*baseline, *students)},
            reference=images[reference],
            independent=images["independent"],
            real=real,
            captions=batch.captions,
            labels=_labels(batch),
            per_caption=several,
        ),
        {name: count * passes_per_step for name, count in steps.items()} | students,
        judges,
        teacher=reference,
        student=f"student_{card.sampler.nfe}",
    )
    trajectories = measure_trajectories(
        student, batch.head(CAPTIONS_OF_SEVERAL), config.reference_steps, tuple(students.values()),
        [nfe for nfe in students.values() if f"euler_{nfe}" in baseline], gpu=gpu, precisions=precisions,
    )  # fmt: skip
    report = replace(report, trajectories=trajectories)
    results.mkdir(parents=True, exist_ok=True)
    if real is not None and known is not None:
        own = {name: images[name] for name in (report.student, reference)}
        memorised = find_memorised(own, real, known, batch.captions, judges.extractor)
        memorised.picture.save(results / "nearest.png")
        report = report.with_memorised(memorised.shares)
    edited = [autoencoder.decode(image).numpy() for image in batch.conditioning.references]
    picture = _picture(images, batch, reference, students, passes_per_step, edited)
    picture.save(results / "comparison.png")
    quality_plot(report).savefig(results / "quality.png")
    (results / "report.json").write_text(report.to_json())
    for measured in (batch, batch.head(CAPTIONS_OF_SEVERAL)):
        discard_images(student, measured, precisions=precisions)
    return report


def load_judges(config: EvaluationConfig, text_encoder: str, device: str = "cpu") -> Judges:
    """What looks at the images of an evaluation.

    Args:
        config: names them.
        text_encoder: of the student, whose classes a bundled classifier may know.
        device: where they compute.

    Raises:
        UserError: one can't be loaded.
    """
    return Judges(
        extractor=load_features(config.features, device),
        classifier=Classifier.bundled(text_encoder, device),
        clip=None if config.clip is None else CLIP.load(config.clip, device),
        lpips=None if config.lpips is None else LPIPS(config.lpips, device),
        scorers={name.partition(":")[2]: _scorer(name) for name in config.scores},
    )


def _scorer(name: str) -> Scorer:
    """A score of the user's own, as module:function."""
    module, _, function = name.partition(":")
    try:
        return getattr(importlib.import_module(module), function)
    except (ImportError, AttributeError, ValueError) as error:
        raise UserError(
            f"evaluation.scores: {name} can't be imported: {one_line(error)}: give module:function, with the module's "
            "folder in PYTHONPATH."
        ) from None


def _several(
    student: Path,
    batch: Batch,
    config: EvaluationConfig,
    methods: Sequence[Method],
    *,
    gpu: bool,
    precisions: Precisions | None,
) -> dict[str, np.ndarray]:
    """Each method's images of some captions from several noises, (P, M, H, W, 3) uint8, if they are asked for."""
    if not config.images_per_caption:
        return {}
    batch = batch.head(CAPTIONS_OF_SEVERAL)
    own = [method for method in methods if method.name != "independent"]
    # Noises of their own, beside that of the paired images and that of the independent ones.
    noises = range(2, 2 + config.images_per_caption)
    every = [
        replace(method, name=f"{method.name}:{noise}", noise=noise) for method in own for noise in noises
    ]
    images = generate_images(student, batch, every, gpu=gpu, precisions=precisions)
    return {
        method.name: np.stack([images[f"{method.name}:{noise}"] for noise in noises], axis=1)
        for method in own
    }


def summary(report: Report, criteria: Criteria) -> str:
    """A report's table, and which acceptance criteria are met, as plain text.

    Args:
        report: of an evaluation.
        criteria: which ones.

    Raises:
        UserError: the report lacks what the criteria compare with.
    """
    return f"{report_table(report)}\n\n{criteria_table(check_criteria(report, criteria))}\n"


def write_page(
    report: Report,
    config: EvaluationConfig | None,
    results: Path,
    title: str,
    losses: Sequence[Mapping[str, float]] = (),
) -> Path:
    """Write `report.html`, which needs no other file: tables, criteria, plots, and the picture that `evaluate` made.

    Args:
        report: of the evaluation that wrote to `results`.
        config: of that evaluation; None for a report of several students, whose criteria are in their own.
        results: where it goes.
        title: what was measured, for the heading.
        losses: rows of the training's losses as `loss_plot` takes them, and `train/seconds_per_step`.

    Returns:
        The file.
    """
    plots = {
        "Quality against network passes": quality_plot(report),
        "Quality against diversity": diversity_plot(report),
    }
    if report.trajectories:
        plots["Error along the way"] = trajectory_plot(report)
    if losses:
        plots["Training"] = loss_plot(losses)
    what = "Rows of one caption begin from the same noise."
    pictures = {
        "Images" if file.parent == results else f"Images of {file.parent.name}": (file.read_bytes(), what)
        for file in sorted([*results.glob("comparison.png"), *results.glob("*/comparison.png")])
    }
    # One of a former evaluation in the same folder is not this one's.
    if any(row.memorised is not None for row in report.rows) and (results / "nearest.png").exists():
        pictures["Nearest training images"] = (results / "nearest.png").read_bytes(), "By their features."
    page = report_page(
        report,
        title=title,
        facts={"reference": report.row(report.teacher).label} | _cost(losses),
        criteria=[] if config is None else check_criteria(report, config.criteria),
        plots=plots,
        pictures=pictures,
    )
    file = results / "report.html"
    file.write_text(page)
    return file


def _cost(losses: Sequence[Mapping[str, float]]) -> dict[str, str]:
    """What the training took, as far as its metrics tell."""
    if (hours := training_hours(losses)) is None:
        return {}
    return {"training": f"{losses[-1]['step']:.0f} steps in {hours:.2f} hours of each worker"}


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
    edited: Sequence[np.ndarray],
) -> Image:
    """The teacher's reference, and each student above the Euler sampler of as many steps, on some captions.

    Above them stand the reference images that were edited, (N, H, W, 3) uint8 each.
    """
    # Evenly over the split, whose neighbours may be variants of one thing.
    chosen = np.linspace(0, len(batch) - 1, min(COLUMNS, len(batch))).round().astype(int)
    steps = int(reference.rpartition("_")[2])

    def words(count: int, what: str, passes_each: int) -> str:
        return f"{counted(count, what)}\n{counted(count * passes_each, 'pass')}"

    rows = [GridRow("reference", "image that is edited", pixels[chosen]) for pixels in edited]
    rows.append(GridRow("teacher", words(steps, "guided step", passes_per_step), images[reference][chosen]))
    for name, nfe in students.items():
        rows.append(GridRow("student", words(nfe, "evaluation", 1), images[name][chosen], highlighted=True))
        if (euler := f"euler_{nfe}") in images:
            detail = words(nfe, "Euler step", passes_per_step)
            rows.append(GridRow("teacher", detail, images[euler][chosen]))
    return comparison_grid(rows, [batch.captions[index] for index in chosen])
