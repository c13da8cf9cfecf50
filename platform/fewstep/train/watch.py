"""Watching a run's health while it trains: all workers come to the same judgement at the same step."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from typing import TYPE_CHECKING, Any

import numpy as np
import torch.distributed as dist

from fewstep.encoders import load_autoencoder
from fewstep.evaluate.grid import sample_grid
from fewstep.storage import Storage
from fewstep.tracking.run import Tracker
from fewstep.train.health import HealthConfig, HealthFinding, HealthMonitor
from fewstep.train.preview import BEST, BestStudent, PairedDistance, grid_statistics, takes_place

if TYPE_CHECKING:
    from pathlib import Path

    from torch import Tensor

ROWS_TOLD = 4
"""Most keys of rows that a message lists."""


class TrainingStopped(Exception):
    """Training can't go on; the message is for the user."""


class Diverged(TrainingStopped):
    """The run turns to noise.

    Attributes:
        step: at which it was found.
    """

    def __init__(self, step: int, message: str) -> None:
        super().__init__(message)
        self.step = step


class HealthWatch:
    """The monitor of a run, its sample grids, and its best student. Only rank 0 judges; the others are told.

    Every rank has to call every method at the same steps.

    Args:
        config: what happens when the run diverges.
        group: a process group of all ranks, on CPUs.
        tracker: of rank 0; None on other ranks.
        unjudged_steps: see `HealthMonitor`.
    """

    def __init__(
        self, config: HealthConfig, group: Any, tracker: Tracker | None, unjudged_steps: int = 0
    ) -> None:
        self._config, self._group, self._tracker = config, group, tracker
        self._ranks = dist.get_world_size(group)
        self._monitor = HealthMonitor(unjudged_steps)
        self._paired: PairedDistance | None = None
        self._looked: tuple[list[HealthFinding], bool] = ([], False)  # findings, and whether it is the best
        self.best: BestStudent | None = None
        self.good = True
        """Whether a checkpoint of now is one to go back to."""

    def read(
        self, step: int, metrics: dict[str, float], suspect_rows: Callable[[], list[str]]
    ) -> dict[str, float]:
        """Judge a reading.

        Args:
            step: optimizer steps done.
            metrics: those of `LossMeter.read`, which are the same on all ranks.
            suspect_rows: gives the keys of this rank's rows that are no latents; called if the run diverges.

        Returns:
            The metrics that are finite, as no JSON can hold others.

        Raises:
            Diverged: the run turns to noise, and may not go on; the message ends without a remedy.
        """
        findings: list[HealthFinding] = []
        finite = {name: value for name, value in metrics.items() if math.isfinite(value)}
        if self._tracker is not None:
            findings = self._monitor.read(step, metrics)
            top = self._monitor.top()
            band = {"health/loss_band_top": top} if math.isfinite(top) else {}
            # Once: a run that goes on from a checkpoint takes the steps after it again.
            once = "train/loss" if "train/loss" in finite else None
            self._tracker.log_metrics(finite | band, step, once=once)
        self._agree(findings, suspect_rows, hopeless=bool(metrics.get("train/non_finite")))
        return finite

    def look(
        self, step: int, latents: Tensor, autoencoder: str, *, show: bool, measure: bool, last: bool
    ) -> None:
        """Judge and measure a sample grid on rank 0; `agree_on_look` then tells the others.

        Args:
            step: optimizer steps done.
            latents: (B, C, H, W) of the grid's captions.
            autoencoder: name of what decodes them.
            show: whether the grid goes to MLflow.
            measure: whether the student is compared with the teacher's pictures.
            last: whether this is the run's last step: then its student is the best, unless another is clearly better.
        """
        if self._tracker is None:
            return
        pixels = load_autoencoder(autoencoder).decode(latents).numpy()
        statistics = grid_statistics(pixels)
        findings = self._monitor.look(step, statistics)
        tracked = {f"samples/{name}": value for name, value in statistics.items()}
        now = BestStudent(step, self._paired.of(pixels)) if measure and self._paired is not None else None
        if now is not None:
            tracked["held_out/paired_distance"] = now.distance
        self._tracker.log_metrics(tracked, step, once="samples/contrast")
        if show:
            self._tracker.log_image(sample_grid(pixels, columns=8), f"samples/step-{step:06d}.png")
        self._looked = findings, now is not None and self._is_best(now, last)

    def _is_best(self, now: BestStudent, last: bool) -> bool:
        """Whether a student takes the place of the best so far; tracks it if so."""
        if not takes_place(now, self.best, last):
            return False
        self.best = now
        if self._tracker is not None:
            self._tracker.set_tags({"best.step": now.step, "best.paired_distance": f"{now.distance:.6g}"})
        return True

    def agree_on_look(self) -> bool:
        """Tell all ranks what rank 0 saw in a sample grid; returns whether it is the best student so far.

        Raises:
            Diverged: as `read`.
        """
        (findings, best), self._looked = self._looked, ([], False)
        return self._agree(findings, best=best)

    def compares(self) -> bool:
        """Whether there are pictures that coming grids are compared with."""
        return self._monitor.compares()

    def known_pictures(self, pixels: np.ndarray) -> None:
        """Take in what coming grids are compared with: pictures (N, H, W, 3) uint8 of the same captions."""
        self._monitor.look(0, grid_statistics(pixels))

    def compare_with(self, teacher: np.ndarray) -> None:
        """Measure coming grids against the teacher's pictures of the same captions and noise, (N, H, W, 3) uint8."""
        self._paired = PairedDistance(teacher)

    def state(self) -> dict[str, Any]:
        """Fields of a checkpoint's `TrainState`."""
        best = None if self.best is None else self.best.as_dict()
        return {"health": self._monitor.state(), "best": best}

    def load(self, health: Mapping[str, Any], best: dict[str, Any] | None) -> None:
        """Go on from what `state` gave."""
        self._monitor.load(health)
        self.best = BestStudent.of(best)

    def _agree(
        self,
        findings: list[HealthFinding],
        suspect_rows: Callable[[], list[str]] = list,
        hopeless: bool = False,
        best: bool = False,
    ) -> bool:
        """Tell all ranks what rank 0 found; prints and tracks it there.

        Args:
            findings: of rank 0.
            suspect_rows: see `read`.
            hopeless: whether the run can't go on, whatever the recipe says.
            best: what rank 0 returns on all ranks.

        Raises:
            Diverged: as `read`.
        """
        told: list[Any] = [(findings, self._monitor.suspicious, best)]
        if self._ranks > 1:
            dist.broadcast_object_list(told, src=0, group=self._group)
        findings, suspicious, best = told[0]
        self.good = not suspicious or self._config.on_divergence == "warn"
        if not findings:
            return best
        worst = next((one for one in findings if one.diverged), findings[0])
        message = worst.message
        if worst.diverged and (rows := self._gathered(suspect_rows())):
            message += f"; rows of the data that are no latents: {', '.join(rows[:ROWS_TOLD])}"
        if self._tracker is not None:
            for one in findings:
                print(f"health: {message if one is worst else one.message}", flush=True)
            self._tracker.set_tags({"health.finding": message})
        if worst.diverged and (hopeless or self._config.on_divergence != "warn"):
            raise Diverged(worst.step, message)
        return best

    def _gathered(self, keys: list[str]) -> list[str]:
        """The keys of all ranks."""
        everywhere: list[list[str]] = [keys] * self._ranks
        if self._ranks > 1:
            dist.all_gather_object(everywhere, keys, group=self._group)
        return sorted({key for some in everywhere for key in some})


def keep_best(run: Storage, exported: Path, best: BestStudent, others: set[str]) -> None:
    """Put an exported student into the run's storage as its best.

    Args:
        run: the run's folder.
        exported: the student's folder, on this machine.
        best: which student it is.
        others: names of folders of earlier ones that checkpoints may still refer to; all others are deleted.
    """
    for file in sorted(exported.rglob("*")):
        if file.is_file():
            run.write(f"{best.folder}/{file.relative_to(exported).as_posix()}", file.read_bytes())
    kept = others | {best.folder}
    run.delete([path for path in run.list() if path.startswith(BEST) and path.split("/")[0] not in kept])
