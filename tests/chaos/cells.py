"""The cells of the table: a fault at a moment of a run, what has to come of it, and what is claimed in any case."""

from __future__ import annotations

import random
import re
import shutil
import subprocess
import tempfile
from collections import Counter
from dataclasses import asdict, dataclass, field
from pathlib import Path

import faults
from clock import now
from moments import MOMENTS, Run
from site_run import MODEL, STEPS, Driver, Site
from surroundings import BUCKET, wait

from fewstep.storage import Storage
from fewstep.tracking.address import connect
from fewstep.tracking.registry import resolve
from fewstep.train.checkpoint import saved_checkpoints
from fewstep.train.recovery import RAYS_LIST, _parsed

RUN_SECONDS = 360
"""How long a run may take, with its fault; one that waits for ever is found so."""
SECONDS = faults.SHORT_SECONDS, faults.LONG_SECONDS

FAULTS: dict[str, faults.Fault] = {
    "worker killed": faults.worker_killed,
    "driver killed": faults.driver_killed,
    "driver told to end": faults.driver_told_to_end,
    "controller killed": faults.controller_killed,
    "node killed, another comes": faults.node_killed,
    "node killed, none comes": faults.node_lost,
    "GCS killed and restarted": faults.gcs_killed,
    "head killed and restarted": faults.head_killed,
    "S3 slow": faults.s3("slow", SECONDS[0]),
    "S3 answers 503": faults.s3("503", SECONDS[0]),
    "S3 cuts answers": faults.s3("cut", SECONDS[0]),
    "S3 away 8 s": faults.s3("away", SECONDS[0]),
    "S3 away 40 s": faults.s3("away", SECONDS[1]),
    "MLflow slow": faults.mlflow("slow", SECONDS[0]),
    "MLflow answers 503": faults.mlflow("503", SECONDS[0]),
    "MLflow cuts answers": faults.mlflow("cut", SECONDS[0]),
    "MLflow away 8 s": faults.mlflow("away", SECONDS[0]),
    "MLflow away 40 s": faults.mlflow("away", SECONDS[1]),
    "shard removed": faults.shard("removed"),
    "shard cut": faults.shard("cut"),
    "disk full": faults.disk_full,
}
TRAINING = ("step", "checkpoint", "upload")
REGISTERING = ("model_files", "version", "alias")
PLAN: dict[str, tuple[str, ...]] = {
    "worker killed": TRAINING,
    "driver killed": ("start", *TRAINING, "evaluation", *REGISTERING),
    "driver told to end": ("start", "step", "evaluation", "alias"),
    "controller killed": ("step",),
    "node killed, another comes": TRAINING,
    "node killed, none comes": ("step",),
    "GCS killed and restarted": (*TRAINING, "evaluation", "version"),
    "head killed and restarted": ("step", "alias"),
    "S3 slow": ("step", "upload"),
    "S3 answers 503": ("start", "step", "upload"),
    "S3 cuts answers": ("step", "upload"),
    "S3 away 8 s": ("step", "upload", "evaluation"),
    "S3 away 40 s": ("upload",),
    "MLflow slow": ("step", *REGISTERING[1:]),
    "MLflow answers 503": ("step", *REGISTERING[:2]),
    "MLflow cuts answers": ("step", *REGISTERING[:2]),
    "MLflow away 8 s": ("start", "step", "evaluation", "alias"),
    "MLflow away 40 s": ("step",),
    "shard removed": ("step",),
    "shard cut": ("step",),
    "disk full": ("step", "checkpoint"),
}
"""Fault → the moments at which it happens."""


@dataclass
class Outcome:
    """What came of a cell."""

    fault: str
    moment: str
    seed: int
    outcome: str = ""
    """`goes on`, `resumed`, or `says why, resumed`."""
    seconds: float = 0.0
    """From the beginning of the fault to the next new step, or to the run's end where no step was left, or to the
    sentence with which it ended."""
    said: str = ""
    """The sentence."""
    broken: list[str] = field(default_factory=list)
    """Claims that do not hold."""


class Undisturbed:
    """A run without a fault, with which the others are compared."""

    def __init__(self, site: Site) -> None:
        run = start(site, "undisturbed", 0, evaluates=False)
        wait(lambda: run.driver.ended, RUN_SECONDS, "the undisturbed run")
        assert run.driver.process.exitcode == 0, run.driver.said()[-3000:]
        self.losses = losses(run)
        assert {step: len(values) for step, values in self.losses.items()} == dict.fromkeys(
            range(1, STEPS + 1), 1
        )
        self.student = student(site)


def start(site: Site, name: str, seed: int, evaluates: bool) -> Run:
    """Begin a run in a folder of its own, with an evaluation at its end or without."""
    home = site.folder / name
    home.mkdir(exist_ok=True)
    # Half of a run's time is its evaluation, which only some moments need.
    overrides = [f"evaluation.enabled={evaluates}"]
    if name.startswith("disk-full"):
        (home / "disk").mkdir(exist_ok=True)
        subprocess.run(["mount", "-t", "tmpfs", "-o", "size=48m", "tmpfs", str(home / "disk")], check=True)
        overrides += [f"train.storage={home}/disk/runs"]
        (home / "disk" / "fewstep").mkdir()
        (home / ".fewstep").symlink_to(home / "disk" / "fewstep")
    recipe = site.recipe(name, *overrides)
    return Run(site, name, home, recipe, site.start(recipe, home), random.Random(seed))


def go_on(run: Run) -> Driver:
    """Resume a run."""
    return run.site.start(run.recipe, run.home)


def try_cell(site: Site, fault: str, moment: str, seed: int, undisturbed: Undisturbed) -> Outcome:
    """Let a fault happen to a run at a moment, bring the run to its end, and check what is claimed."""
    outcome = Outcome(fault, moment, seed)
    site.whole()
    run = start(
        site, f"{fault} {moment} {seed}".replace(" ", "-").replace(",", ""), seed, moment == "evaluation"
    )
    again = run.driver
    try:
        reached = MOMENTS[moment](run)
        wait(lambda: reached() or run.driver.ended, RUN_SECONDS, f"{moment} of the run")
        if run.driver.ended:
            outcome.broken.append(f"the run ended before the moment: {run.driver.said()[-300:]}")
            return outcome
        began, known = now(), max((step for step, _ in site.workers.look(run.name)), default=0)
        with FAULTS[fault](run):
            if not fault.startswith(("S3", "MLflow")):
                site.s3.release()
                site.mlflow.release()
            check_alias(run, undisturbed, outcome)
        wait(lambda: ended(run, run.driver), RUN_SECONDS, "the run to end")
        first, status = now(), run.driver.process.exitcode
        recovered = next(
            (at for step, at in site.workers.look(run.name) if step > known and at > began), first
        )
        outcome.outcome, outcome.seconds = "goes on", recovered - began
        if status != 0:
            sentence = run.driver.said().strip().splitlines()[-1]
            if status == 2:
                outcome.said, outcome.seconds = sentence, first - began
            elif "Traceback" in run.driver.said():  # Ray's own handler of SIGTERM exits with status 1, too
                outcome.broken.append(f"it ended with a traceback: {sentence[-200:]}")
            outcome.outcome = "says why, resumed" if status == 2 else "resumed"
            again, began = go_on(run), now()
            wait(lambda: ended(run, again), RUN_SECONDS, "the resumed run to end")
            if status != 2:
                later = (at for step, at in site.workers.look(run.name) if step > known and at > began)
                outcome.seconds = next(later, now()) - began
            if again.process.exitcode != 0:
                outcome.broken.append(
                    f"it could not be resumed: {again.said().strip().splitlines()[-1][-300:]}"
                )
                return outcome
        check(run, undisturbed, outcome)
    except TimeoutError as error:
        outcome.broken.append(f"{error}; last said: {run.driver.said().strip()[-200:]}")
    finally:
        outcome.broken = list(dict.fromkeys(outcome.broken))
        for driver in (run.driver, again):
            driver.process.kill()
        for proxy in (site.s3, site.mlflow):
            proxy.release()
            proxy.set("pass")
        if (run.home / "disk").exists():
            subprocess.run(["umount", "-l", str(run.home / "disk")])
    return outcome


def ended(run: Run, driver: Driver) -> bool:
    """Whether a driver has; notes the run's steps meanwhile."""
    run.site.workers.look(run.name)
    return driver.ended


def losses(run: Run) -> dict[int, list[float]]:
    """Every loss of a run that MLflow has, by step."""
    found: dict[int, list[float]] = {}
    for point in connect(run.site.registry).get_metric_history(mlflow_runs(run)[0], "train/loss"):
        found.setdefault(point.step, []).append(point.value)
    return found


def mlflow_runs(run: Run) -> list[str]:
    """Ids of a run's MLflow runs: there should be one."""
    client = connect(run.site.registry)
    experiment = client.get_experiment_by_name(run.name)
    return [one.info.run_id for one in client.search_runs([experiment.experiment_id])] if experiment else []


def student(site: Site) -> dict[str, bytes]:
    """The files of the version at which the alias points, but for the pictures of an evaluation."""
    with tempfile.TemporaryDirectory() as folder:
        place, _ = resolve(f"models:/{MODEL}@champion", site.registry, Path(folder))
        files = {
            str(one.relative_to(place)): one.read_bytes()
            for one in place.rglob("*")
            if one.is_file() and one.suffix != ".png"
        }
    return files


def check_alias(run: Run, undisturbed: Undisturbed, outcome: Outcome) -> None:
    """The alias points at a whole student."""
    found, wanted = student(run.site), undisturbed.student
    if set(found) != set(wanted):
        outcome.broken.append(f"the alias points at a student without {sorted(set(wanted) - set(found))}")
    elif changed := [
        name for name in wanted if name.endswith(".safetensors") and found[name] != wanted[name]
    ]:
        outcome.broken.append(f"weights of the student differ: {changed}")


def check(run: Run, undisturbed: Undisturbed, outcome: Outcome) -> None:
    """What is claimed of every run that has ended, whatever happened to it."""
    broken, client = outcome.broken, connect(run.site.registry)
    ids = mlflow_runs(run)
    if len(ids) != 1:
        broken.append(f"it has {len(ids)} MLflow runs")
    found = losses(run)
    if set(found) != set(undisturbed.losses):
        broken.append(f"losses of steps {sorted(set(undisturbed.losses) - set(found))} are missing")
    if any(value != undisturbed.losses[step][0] for step, values in found.items() for value in values):
        broken.append("losses differ from the undisturbed run's")
    status = client.get_run(ids[0]).info.status
    if status != "FINISHED":
        broken.append(f"its MLflow run is {status}")
    for name in client.get_run(ids[0]).data.metrics:
        steps = Counter(point.step for point in client.get_metric_history(ids[0], name))
        if double := [step for step, count in steps.items() if count > 1]:
            broken.append(f"{len(double)} points of {name} are there twice")
            break
    folder = run.home / "disk" / "runs" if (run.home / "disk").exists() else f"s3://{BUCKET}/runs"
    place = Storage.at(f"{folder}/{run.name}")
    listed = _parsed(place.read(RAYS_LIST) or b"")
    names = {one.checkpoint_dir_name for one in listed.checkpoint_results} if listed else set()
    whole = {one.name for one in saved_checkpoints(place) if one.fault is None}
    if not names or not names <= whole:
        broken.append(f"Ray Train's list names checkpoints that are not whole: {sorted(names - whole)}")
    check_alias(run, undisturbed, outcome)
    newest = client.get_model_version_by_alias(MODEL, "champion")
    if newest.run_id not in ids:
        broken.append("the alias does not point at this run's version")
    if re.search(r"Traceback", outcome.said):
        broken.append("what it said is no sentence")
    shutil.rmtree(run.home / "out", ignore_errors=True)


def as_json(outcome: Outcome) -> dict[str, object]:
    """A line of the results file."""
    return asdict(outcome)
