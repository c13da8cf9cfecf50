"""The whole distillation: train, measure, register, and say where everything is."""

from __future__ import annotations

import shutil
from functools import partial
from pathlib import Path
from shlex import quote

from fewstep.data.schema import DatasetInfo, read_shard
from fewstep.evaluate.criteria import CriterionResult, check_criteria
from fewstep.evaluate.model_card import PICTURE
from fewstep.evaluate.plots import loss_plot
from fewstep.evaluate.report import Report
from fewstep.student import (
    PYFUNC_MODEL,
    model_code,
    model_requirements,
    read_student_card,
    write_student_card,
)
from fewstep.tracking import Tracker, spool_folder
from fewstep.tracking.promotion import give_alias
from fewstep.tracking.registry import register
from fewstep.train.recipe import DistillRecipe
from fewstep.train.trainer import TrainedModel, fit
from fewstep.workflow.evaluation import evaluate, held_out, summary, training_images, write_page
from fewstep.workflow.training_metrics import training_losses


def distil(recipe: DistillRecipe, run_name: str | None = None) -> None:
    """Train a student on the connected Ray cluster, or continue the run of that name; then measure and register it.

    Args:
        recipe: what to train, and how to measure it.
        run_name: as for `fit`.

    Raises:
        UserError: see `fit` and `evaluate_and_register`.
    """
    evaluate_and_register(recipe, fit(recipe, run_name))


def evaluate_and_register(recipe: DistillRecipe, trained: TrainedModel) -> None:
    """The end of a distillation: measure the student, track, register, and say where everything is.

    Args:
        recipe: with which the student was trained.
        trained: what the training left.

    Raises:
        UserError: MLflow did not take the model version; everything else is done and printed by then.
        Exception: the evaluation failed; the student is registered, without figures.
    """
    results, settings = Path("out") / trained.run_name, recipe.tracking
    # The run that trained, continued: figures and losses stand on one page.
    tracker = Tracker.start(
        uri=settings.uri, experiment=settings.experiment, run_name=trained.run_name,
        params={}, tags={}, spool=spool_folder(), run_id=trained.mlflow_run,
    )  # fmt: skip
    metrics: dict[str, float] = {}
    unmet = ["was not measured (evaluation.enabled: false)"]
    failure: Exception | None = None
    report: Report | None = None
    with tracker:
        if recipe.evaluation.enabled:
            try:
                metrics, outcomes, report = _measure(recipe, trained, results, tracker)
                unmet = [
                    f"misses the criterion {one.criterion!r} ({one.value:.4g} against {one.bound:.4g})"
                    for one in outcomes
                    if not one.met
                ]
            except Exception as error:
                # Raised at the end: a student that took hours to train is registered even if measuring it fails.
                failure, unmet = error, ["could not be measured"]
        results.mkdir(parents=True, exist_ok=True)
        losses = training_losses(tracker.uri, tracker.run_id)
        loss_plot(losses).savefig(results / "loss.png")
        if report is not None:
            write_page(report, recipe.evaluation, results, trained.run_name, losses)
        tracker.log_artifact(results, "results")
    print(
        f"student     {trained.folder.absolute()}\n"
        f"MLflow run  {trained.run_name} ({tracker.run_id})\n"
        f"open MLflow mlflow ui --backend-store-uri {quote(tracker.uri)}   (or: make ui), then visit port 5000",
        flush=True,
    )
    # After the run has ended, so that all that could fail before is printed by then.
    version = register(
        trained.folder,
        settings.model,
        tracker.uri,
        tracker.run_id,
        None,  # the alias comes last, when all of the version is there
        metrics,
        script=PYFUNC_MODEL,
        requirements=model_requirements(),
        code=partial(model_code, trained.folder),
    )
    given = give_alias(version, tracker.uri, settings.alias, None if settings.promote == "always" else unmet)
    model = given.address
    print(f"registered  {version.uri}, now {model}", flush=True)
    if given.alias != settings.alias:
        print(
            f"not served  {given.reason}; to serve it all the same: fewstep promote {quote(settings.model)} "
            f"{version.version}",
            flush=True,
        )
    print(
        f"generate    fewstep generate --model {model} {_example_of(recipe)} --seed 0",
        flush=True,
    )
    if failure is not None:
        raise failure


def _measure(
    recipe: DistillRecipe, trained: TrainedModel, results: Path, tracker: Tracker
) -> tuple[dict[str, float], list[CriterionResult], Report]:
    """Evaluate; write the metrics to MLflow and into the student's card, and print the table."""
    config = recipe.evaluation
    card, data = read_student_card(trained.folder), recipe.data.path
    report = evaluate(
        trained.folder, held_out(card, data, config.captions), config, results,
        training=training_images(card, data, config), gpu=recipe.train.gpu,
    )  # fmt: skip
    metrics, criteria = report.metrics(), recipe.evaluation.criteria
    tracker.log_metrics(metrics, recipe.train.steps, once=next(iter(metrics), None))
    outcomes = check_criteria(report, criteria)
    tracker.set_tags({f"criterion.{one.name}": "met" if one.met else "missed" for one in outcomes})
    text = summary(report, criteria)
    (results / "report.txt").write_text(text)
    write_student_card(card.model_copy(update={"metrics": metrics}), trained.folder)
    shutil.copy(results / PICTURE, trained.folder)  # for its model card, wherever the student goes
    print(f"\n{text}\npicture     {results.absolute() / 'comparison.png'}", flush=True)
    return metrics, outcomes, report


def _example_of(recipe: DistillRecipe) -> str:
    """Options with a caption of the kind that the model was trained on, for the command that is printed."""
    info = DatasetInfo.open(recipe.data.path)
    shard = next(iter(info.buckets("held_out").values()))[0]
    caption = read_shard(info.storage, shard.path)["caption"][0].as_py()
    return f"--prompt {quote(caption)}" + " --image FILE" * info.encoding.references
