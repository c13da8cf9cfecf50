"""Figures of a training run for Prometheus, at the metrics port of each Ray node (names there begin with `ray_`)."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from ray.util.metrics import Gauge

# Any, because Ray annotates tag keys as tuples of length one.
_BY_RUN: Any = ("run",)


class RunGauges:
    """What a run has come to; MLflow has the same figures for every step.

    Args:
        run: its name.
    """

    def __init__(self, run: str) -> None:
        self._tags = {"run": run}
        self._step = Gauge("fewstep_train_step", "Optimizer steps done.", tag_keys=_BY_RUN)
        self._gauges = {
            "train/loss": Gauge("fewstep_train_loss", "Mean loss since the last reading.", tag_keys=_BY_RUN),
            "train/samples_per_second": Gauge(
                "fewstep_train_samples_per_second",
                "Trajectories of all workers per second.",
                tag_keys=_BY_RUN,
            ),
            "train/seconds_waiting_for_data": Gauge(
                "fewstep_train_data_wait_seconds",
                "Seconds of a step spent waiting for data.",
                tag_keys=_BY_RUN,
            ),
        }

    def show(self, step: int, metrics: Mapping[str, float]) -> None:
        """Take a reading.

        Args:
            step: optimizer steps done.
            metrics: those of `LossMeter.read`.
        """
        self._step.set(step, self._tags)
        for name, gauge in self._gauges.items():
            if name in metrics:
                gauge.set(metrics[name], self._tags)
