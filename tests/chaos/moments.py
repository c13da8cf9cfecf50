"""Moments of a run, told from outside: by lines that workers print, by files, by what S3 and MLflow are asked."""

from __future__ import annotations

import random
import tempfile
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from clock import now
from site_run import EVERY, STEPS, Driver, Site

from fewstep.train.recipe import DistillRecipe

Reached = Callable[[], bool]

RANDOM_SECONDS = 0.3
"""A fault begins at random up to so long after a step was seen."""


@dataclass(frozen=True)
class Run:
    """A run that is under way."""

    site: Site
    name: str
    """Of the run, its recipe and its MLflow experiment."""
    home: Path
    recipe: DistillRecipe
    driver: Driver
    draw: random.Random
    """For random moments."""


def start(run: Run) -> Reached:
    """The run is in MLflow, and no step is done."""
    return lambda: "if it is ended, --resume" in run.driver.said()


def step(run: Run) -> Reached:
    """A random step after the first checkpoint is reported by a worker."""
    return _step(run, run.draw.randint(EVERY + 1, STEPS - EVERY), run.draw.uniform(0, RANDOM_SECONDS))


def checkpoint(run: Run) -> Reached:
    """A worker has begun to write a checkpoint on its machine."""
    first = run.draw.randint(2, 4)  # of two workers each

    def folders() -> set[Path]:
        return set(Path(tempfile.gettempdir()).glob("fewstep-checkpoint-*"))

    before, known = folders(), set[Path]()  # killed workers leave theirs

    def reached() -> bool:
        known.update(folders() - before)
        return len(known) >= 2 * first

    return reached


def upload(run: Run) -> Reached:
    """A file of a checkpoint after the first is on its way to S3, where the request is held."""
    count = run.draw.randint(2, 4) * EVERY
    return run.site.s3.hold(rf"(PUT|POST) .*/runs/{run.name}/step-{count:07d}-")


def evaluation(run: Run) -> Reached:
    """Training is done, and pictures are generated."""
    last = _step(run, STEPS)
    return lambda: last() and bool(run.site.processes("ray::MapWorker"))


def version(run: Run) -> Reached:
    """MLflow is asked for a new version of the model, and the request is held."""
    return run.site.mlflow.hold("POST .*/model-versions/create")


def model_files(run: Run) -> Reached:
    """Files of the new version are on their way to MLflow, where one request is held."""
    return run.site.mlflow.hold("PUT .*/mlflow-artifacts/.*/student/")


def alias(run: Run) -> Reached:
    """MLflow is asked to move the alias, and the request is held."""
    return run.site.mlflow.hold("POST .*/registered-models/alias")


def _step(run: Run, number: int, later: float = 0.0) -> Reached:
    """A step is reported by a worker, and some seconds have passed since."""

    def reached() -> bool:
        seen = [at for one, at in run.site.workers.look(run.name) if one >= number]
        return bool(seen) and now() > seen[0] + later

    return reached


MOMENTS: dict[str, Callable[[Run], Reached]] = {
    one.__name__: one for one in (start, step, checkpoint, upload, evaluation, model_files, version, alias)
}
