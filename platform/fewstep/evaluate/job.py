"""A student measured against its teacher, with everything that is kept of it: table, picture, plots, model version."""

from __future__ import annotations

import os
from dataclasses import replace
from pathlib import Path
from shlex import quote

import numpy as np
import torch
from PIL.Image import Image

from fewstep.data.autoencoder import load_autoencoder
from fewstep.data.schema import DatasetInfo, read_shard
from fewstep.data.stream import Batch, read_split
from fewstep.evaluate.classifier import Classifier
from fewstep.evaluate.features import FeatureExtractor
from fewstep.evaluate.grid import GridRow, comparison_grid
from fewstep.evaluate.plots import loss_plot, quality_plot
from fewstep.evaluate.report import Report, build_report, counted, verdict_table
from fewstep.evaluate.sampling import Method, draw_images
from fewstep.export.pipeline import read_student_card, write_card
from fewstep.tracking.registry import register
from fewstep.tracking.run import Tracker
from fewstep.train.recipe import DistillRecipe, EvaluationSection
from fewstep.train.trainer import TrainedModel, spool

COLUMNS = 10
"""Captions in the comparison picture."""


def evaluate_and_register(recipe: DistillRecipe, trained: TrainedModel) -> None:
    """The end of a distillation: measure, draw, track, register, and say where everything is.

    Raises:
        UserError: MLflow did not take the model version; everything else is done and printed by then.
        Exception: the evaluation failed; the student is registered, without figures.
    """
    results, settings = Path("out") / trained.run_name, recipe.tracking
    tracker = Tracker.start(
        uri=settings.uri, experiment=settings.experiment, run_name=trained.run_name,
        params={}, tags={}, spool=spool(), run_id=trained.mlflow_run,
    )  # fmt: skip
    metrics: dict[str, float] = {}
    failure: Exception | None = None
    with tracker:
        if recipe.evaluation.enabled:
            try:
                metrics = _measure(recipe, trained, results, tracker)
            except Exception as error:  # hours of training shall not go unregistered for it
                failure = error
        loss_plot(_history(tracker)).savefig(_made(results) / "loss.png")
        tracker.log_artifact(results, "results")
    print(
        f"student     {trained.folder.absolute()}\n"
        f"MLflow run  {trained.run_name} ({tracker.run_id})\n"
        f"open MLflow mlflow ui --backend-store-uri {tracker.uri}   (or: make ui), then visit port 5000",
        flush=True,
    )
    version = register(trained.folder, settings.model, tracker.uri, tracker.run_id, settings.alias, metrics)
    model = f"models:/{settings.model}@{settings.alias}"
    print(
        f"registered  models:/{version.name}/{version.version}, now {model}\n"
        f"generate    jobs/generate.py --model {model} --prompt {quote(_held_out_caption(recipe))} --seed 0",
        flush=True,
    )
    if failure is not None:
        raise failure


def _measure(
    recipe: DistillRecipe, trained: TrainedModel, results: Path, tracker: Tracker
) -> dict[str, float]:
    """Evaluate; the metrics also go to MLflow, into the student's card and, as a table, to the user."""
    report = evaluate(trained.folder, recipe.data.path, recipe.evaluation, results, gpu=recipe.train.gpu)
    metrics, verdicts = report.metrics(), report.verdicts(recipe.evaluation.promise)
    tracker.log_metrics(metrics, recipe.train.steps)
    tracker.set_tags({f"promise.{v.name}": "kept" if v.kept else "missed" for v in verdicts})
    text = f"{report.table()}\n\n{verdict_table(verdicts)}\n"
    (results / "report.txt").write_text(text)
    write_card(replace(read_student_card(trained.folder), metrics=metrics), trained.folder)
    print(f"\n{text}\npicture     {results.absolute() / 'comparison.png'}", flush=True)
    return metrics


def _held_out_caption(recipe: DistillRecipe) -> str:
    """Some caption that the model knows how to draw."""
    info = DatasetInfo.open(recipe.data.path)
    shard = next(iter(info.buckets("held_out").values()))[0]
    return read_shard(info.storage, shard.path)["caption"][0].as_py()


def evaluate(
    student: Path,
    data: str,
    settings: EvaluationSection,
    results: Path,
    *,
    split: str = "held_out",
    gpu: bool = False,
) -> Report:
    """Compare a student with its teacher's ladder on held-out captions, on the whole cluster.

    Writes `comparison.png`, `quality.png` and `report.json` into `results`.

    Args:
        student: exported folder.
        data: prepared dataset; of several sizes, the student's default one is taken.
        settings: how many captions, which steps.
        results: where pictures and numbers go.
        split: which captions.
        gpu: whether to draw on GPUs.
    """
    card = read_student_card(student)
    shapes = DatasetInfo.open(data).buckets(split)
    shape = card.latent_shape if card.latent_shape in shapes else next(iter(shapes))
    batch = read_split(data, split, settings.captions, shape=shape)
    passes_per_step = 1 if card.guidance == 1 else 2
    reference = f"teacher_{settings.reference_steps}"
    ladder = {f"euler_{steps}": steps for steps in settings.ladder}
    students = {f"student_{nfe}": nfe for nfe in sorted(card.nfes)}
    methods = [
        Method(reference, settings.reference_steps),
        Method("independent", settings.reference_steps, noise=1),
        *(Method(name, nfe, student=True) for name, nfe in students.items()),
        *(Method(name, steps) for name, steps in ladder.items()),
    ]
    device = "cuda" if gpu else "cpu"
    classifier = Classifier.bundled(card.text_encoder, device)
    images = draw_images(student, batch, methods, gpu=gpu)
    decode = load_autoencoder(card.autoencoder, device=device).decode
    real = None if batch.latent is None else np.asarray(decode(batch.latent))
    steps = {reference: settings.reference_steps, **ladder}
    torch.set_num_threads(os.cpu_count() or 1)  # the samplers are done; Ray gives a job's driver one
    print(f"measuring {len(images) + (real is not None)} sets of {len(batch)} images", flush=True)
    report = build_report(
        {name: images[name] for name in (*ladder, *students)},
        reference=images[reference],
        independent=images["independent"],
        real=real,
        passes={name: count * passes_per_step for name, count in steps.items()} | students,
        extractor=FeatureExtractor.load(device),
        classifier=classifier,
        labels=None if classifier is None else batch.conditioning.states[:, 0, 0].long().numpy(),
        teacher=reference,
        student=f"student_{card.nfe}",
    )
    _made(results)
    _picture(images, batch, reference, students, passes_per_step).save(results / "comparison.png")
    quality_plot(report).savefig(results / "quality.png")
    (results / "report.json").write_text(report.to_json())
    return report


def _picture(
    images: dict[str, np.ndarray], batch: Batch, reference: str, students: dict[str, int], passes: int
) -> Image:
    chosen = np.linspace(0, len(batch) - 1, min(COLUMNS, len(batch))).round().astype(int)
    steps = int(reference.rpartition("_")[2])

    def words(count: int, what: str, passes_each: int) -> str:
        return f"{counted(count, what)}\n{counted(count * passes_each, 'pass')}"

    rows = [GridRow("teacher", words(steps, "guided step", passes), images[reference][chosen])]
    for name, nfe in students.items():
        rows.append(GridRow("student", words(nfe, "evaluation", 1), images[name][chosen], highlighted=True))
        if (euler := f"euler_{nfe}") in images:
            rows.append(GridRow("teacher", words(nfe, "Euler step", passes), images[euler][chosen]))
    return comparison_grid(rows, [batch.captions[index] for index in chosen])


def _history(tracker: Tracker) -> list[dict[str, float]]:
    """The run's training losses as rows, from MLflow itself; none while it is away."""
    from mlflow.exceptions import MlflowException

    from fewstep.tracking.address import connect

    client = connect(tracker.uri)
    rows: dict[int, dict[str, float]] = {}
    try:
        for name in client.get_run(tracker.run_id).data.metrics:
            if name.startswith("train/loss"):
                for point in client.get_metric_history(tracker.run_id, name):
                    rows.setdefault(point.step, {"step": point.step})[name] = point.value
    except MlflowException:
        return []
    return [rows[step] for step in sorted(rows) if "train/loss" in rows[step]]


def _made(folder: Path) -> Path:
    folder.mkdir(parents=True, exist_ok=True)
    return folder
