"""What a training run needs beside its surroundings: data, a teacher, drivers; and what its workers print."""

from __future__ import annotations

import contextlib
import multiprocessing
import os
import re
import signal
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import boto3
from clock import now
from surroundings import BUCKET, Surroundings

import tiny
from fewstep.train.recipe import DistillRecipe

MODEL = "chaos"
STEPS, EVERY = 40, 8
"""Optimizer steps of a run, and between its checkpoints."""
START_SECONDS = 30
"""How long Ray Train waits for its workers to start, before it tries again."""
_PROGRESS = re.compile(r"(?P<run>\S+) \|[█·]*\| (?P<step>\d+)/")


class Site(Surroundings):
    """Surroundings with data and a teacher, where runs are started."""

    def __init__(self) -> None:
        super().__init__(RAY_TRAIN_WORKER_GROUP_START_TIMEOUT_S=str(START_SECONDS))
        self._write_data()
        self._drivers = multiprocessing.get_context("forkserver")
        self._drivers.set_forkserver_preload(["job"])
        self.workers = WorkerOutput(Path(self.cluster.head_node.get_session_dir_path()) / "logs")

    def recipe(self, name: str, *overrides: str) -> DistillRecipe:
        """The recipe of a run of two workers that evaluates and registers, all through the proxies."""
        return tiny.recipe(
            f"s3://{BUCKET}/data", self.folder / "teacher", f"name={name}", f"train.steps={STEPS}", "train.workers=2",
            f"train.checkpoint_every={EVERY}", "train.cpus_per_worker=1.5", f"train.storage=s3://{BUCKET}/runs",
            "train.wait_minutes=1.5", f"tracking.uri={self.mlflow.address}", f"tracking.model={MODEL}",
            "tracking.promote=always", f"tracking.experiment={name}", "evaluation.captions=8",
            "evaluation.reference_steps=8", "evaluation.baseline_steps=[4, 8]", *overrides,
        )  # fmt: skip

    def start(self, recipe: DistillRecipe, home: Path, environment: dict[str, str] | None = None) -> Driver:
        """Begin a run, or continue it, in a folder of its own."""
        home.mkdir(exist_ok=True)
        log = home / "log"
        arguments = (
            recipe.model_dump(mode="json"), recipe.name, self.cluster.address, str(home), str(log), environment or {},
        )  # fmt: skip
        from job import work

        process = self._drivers.Process(target=work, args=arguments)
        process.start()
        return Driver(process, log)

    def _write_data(self) -> None:
        tiny.write_teacher(self.folder / "teacher")
        tiny.write_data(self.made("data"))
        client = boto3.client("s3", region_name="us-east-1")
        for file in (self.folder / "data").rglob("*"):
            if file.is_file():
                client.upload_file(str(file), BUCKET, f"data/{file.relative_to(self.folder / 'data')}")


@dataclass(frozen=True)
class Driver:
    """A run's driver."""

    process: Any
    """Of multiprocessing."""
    log: Path
    """What it prints, and what the workers print while it lives."""

    @property
    def ended(self) -> bool:
        """Whether it has."""
        return self.process.exitcode is not None

    def kill(self, how: signal.Signals) -> None:
        """Send it a signal, if it lives."""
        with contextlib.suppress(ProcessLookupError):
            os.kill(self.process.pid, how)

    def said(self) -> str:
        """All of its log."""
        return self.log.read_text(errors="replace") if self.log.exists() else ""


class WorkerOutput:
    """What workers print, as Ray writes it into its log files: without the second that the driver sees it later.

    Args:
        folder: of the session's logs.
    """

    def __init__(self, folder: Path) -> None:
        self._folder, self._read = folder, dict[Path, int]()
        self.steps: dict[str, list[tuple[int, float]]] = {}

    def look(self, run: str) -> list[tuple[int, float]]:
        """The steps that workers of a run have reported, each with the time at which this was seen."""
        for file in self._folder.glob("worker-*.out"):
            done = self._read.get(file, 0)
            if file.stat().st_size <= done:
                continue
            with file.open("rb") as stream:
                stream.seek(done)
                content = stream.read()
            end = content.rfind(b"\n") + 1
            self._read[file] = done + end
            for line in content[:end].decode(errors="replace").splitlines():
                if progress := _PROGRESS.match(line):
                    self.steps.setdefault(progress["run"], []).append((int(progress["step"]), now()))
        return self.steps.get(run, [])
