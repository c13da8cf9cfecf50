"""The health of a run: which readings of the training loop are as they should be, and which mean that it diverges.

Everything here is arithmetic on numbers that the loop has read anyway, so that a run can be judged, and an old one
judged again, without a model.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from statistics import median
from typing import Any, Literal

from pydantic import Field

from fewstep.config import Config

WINDOW_STEPS = 10
"""Least optimizer steps whose mean is compared with a band: single steps vary too much."""

PATIENCE = 3
"""Windows in a row that must lie outside of a band before a run is said to diverge. With readings at least every 50
steps (`train.log_every`) that is within 200 steps."""

HISTORY = 20
"""Windows that a band is made of."""

YOUNG = 5
"""Windows that a band needs before its own spread counts; until then `START_RATIO` does."""

START_RATIO = 6.0
"""How far above its lowest value a series may rise while its band is young, as a factor."""

LEAST_RATIO = 3.0
"""How far above its median a series may always rise, as a factor."""

MOST_RATIO = 10.0
"""How far above its median a series may rise at most, however widely it spreads."""

SLOW_RATIO = 20.0
"""How far above its lowest median a series may rise at most, however slowly it does."""

DEVIATIONS = 6.0
"""Standard deviations (of logarithms, from the median deviation) that a band is wide."""

LARGEST_RMS = 10.0
"""Root mean square at which a latent or a state is no latent any more: data and noise have about 1."""

NOISE = 1.0
"""Roughness above which a picture is noise, if none of those before were nearly as rough."""

NOISE_RATIO = 1.7
"""How many times rougher than all before it a picture of noise is."""

GRID_LIMITS = {"contrast": (5.0, 5.0), "roughness": (5.0, 2.5)}
"""Statistic of a sample grid → how many times smaller and larger than all before it may be. White noise has a roughness
of 1.1, photographs about 0.3; what has no contrast left is one colour."""

RANGES = ("health/data_rms", "health/state_rms")
"""Series that are maxima: over the training latents, and over the states that rollouts reach."""

NORM = "train/gradient_norm"
"""The series that is only told of: a large gradient is scaled down, and alone does no harm."""

WORDS = {
    "train/loss": "the loss",
    NORM: "the gradient norm",
    "health/data_rms": "the largest root mean square of a training latent",
    "health/state_rms": "the largest root mean square of a state that the student's rollouts reach",
}
"""Series → what messages call it."""

LOSS_OF_TIME = "train/loss_t"
"""Beginning of the names of losses by quarter of raw time."""


class HealthConfig(Config):
    """What is watched while a run trains, and what happens when it turns to noise."""

    on_divergence: Literal["stop", "go_back", "warn"] = "go_back"
    """What happens when a run diverges. go_back: the run goes on from its last good checkpoint with a lower learning
    rate and other random numbers, a limited number of times, and then stops; the default, as most runs train
    unattended. stop: it ends, and its last good checkpoint is kept. warn: it is told, and the run goes on, unless a
    loss or gradient is infinite or NaN, after which there is nothing to go on with."""
    go_back_times: int = Field(2, ge=1)
    """How often a run goes back before it stops."""
    lr_factor: float = Field(0.5, gt=0, le=1)
    """Factor on all learning rates each time that a run goes back."""


@dataclass(frozen=True)
class HealthFinding:
    """Something about a run that is not as it should be."""

    step: int
    """The optimizer step at which it was found."""
    message: str
    """One sentence without its full stop, with step and figures."""
    diverged: bool
    """Whether the run turns to noise; otherwise it is only told."""


class Band:
    """The running band of a series of positive numbers: what it may rise to, from its last windows."""

    def __init__(self) -> None:
        self.first: float | None = None
        self.logs: list[float] = []
        self.lowest = math.inf
        self.outside = 0

    def top(self) -> float:
        """The largest value inside of the band; infinite before there is any value."""
        if len(self.logs) < YOUNG:
            known = [*self.logs, *([] if self.first is None else [_log(self.first)])]
            # Of the lowest: of the last, it would follow a run that diverges from its first steps.
            return START_RATIO * math.exp(min(known)) if known else math.inf
        middle = median(self.logs)
        # Median deviation: one window that is far away, which is kept if it is alone, widens nothing.
        spread = 1.4826 * median(abs(value - middle) for value in self.logs)
        ratio = min(max(math.exp(min(DEVIATIONS * spread, 50.0)), LEAST_RATIO), MOST_RATIO)
        return min(ratio * math.exp(middle), SLOW_RATIO * math.exp(self.lowest))

    def take(self, value: float) -> bool:
        """Take in the value of a window, unless it lies outside of the band; returns whether it does.

        Values outside of the band don't move it, so that it can't follow a run that diverges.
        """
        if value > self.top():
            self.outside += 1
            return True
        self.outside = 0
        self.logs = [*self.logs, _log(value)][-HISTORY:]
        if len(self.logs) >= YOUNG:
            self.lowest = min(self.lowest, median(self.logs))
        return False


class _Window:
    """The mean of a series over the readings of a window; of series that are maxima, their maximum."""

    def __init__(self) -> None:
        self.sum, self.steps, self.largest = 0.0, 0, 0.0

    def add(self, value: float, steps: int) -> None:
        self.sum, self.steps = self.sum + value * steps, self.steps + steps
        self.largest = max(self.largest, value)

    def value(self, name: str) -> float:
        return self.largest if name.endswith("_rms") else self.sum / self.steps


class HealthMonitor:
    """Judges the readings of a run; its state is a part of every checkpoint, so that a resumed run judges alike.

    Args:
        unjudged_steps: in the beginning, as of scheduled trajectory mixing: until then the student is asked for more
            and more, so that its loss rises, and says nothing; the ranges of what it is trained on do.

    Attributes:
        suspicious: whether a series that tells of divergence lies outside of its band now, so that this is no time for
            a checkpoint to go back to.
    """

    def __init__(self, unjudged_steps: int = 0) -> None:
        self._unjudged_steps = unjudged_steps
        self.suspicious = False
        self._bands: dict[str, Band] = {}
        self._windows: dict[str, _Window] = {}
        self._read = 0  # the step of the last reading
        self._began = 0  # the step before the window
        self._grids: list[dict[str, float]] = []
        self._huge: list[str] = []  # series that are out of every range now

    def read(self, step: int, metrics: Mapping[str, float]) -> list[HealthFinding]:
        """Judge a reading.

        Args:
            step: optimizer steps done.
            metrics: means since the last reading, as `LossMeter.read` gives them.

        Returns:
            What is newly wrong; a series that stays outside of its band is told once.
        """
        steps, self._read = max(1, step - self._read), step
        if metrics.get("train/non_finite"):
            return [HealthFinding(step, _non_finite(step, metrics), diverged=True)]
        watched = {name: value for name, value in metrics.items() if _words(name) is not None}
        # Far too large, whatever came before; told once until it is over.
        huge = [name for name, value in watched.items() if name in RANGES and value > LARGEST_RMS]
        new, self._huge = [name for name in huge if name not in self._huge], huge
        if huge:
            self.suspicious = True
            return [HealthFinding(step, _far_out(step, name, watched[name]), diverged=True) for name in new]
        if step <= self._unjudged_steps:
            watched = {name: value for name, value in watched.items() if name in RANGES}
        for name, value in watched.items():
            band = self._bands.setdefault(name, Band())
            if band.first is None and name == "train/loss":
                # Of the untrained student, before a learning rate that is too high can do any harm. Only of the whole
                # loss: a quarter of raw time has few samples in one step.
                band.first = value
            self._windows.setdefault(name, _Window()).add(value, steps)
        values = {name: window.value(name) for name, window in self._windows.items()}
        findings = self._close(step, values) if step - self._began >= WINDOW_STEPS else []
        self.suspicious = any(
            self._bands[name].outside
            or max(watched.get(name, 0.0), values.get(name, 0.0)) > self._bands[name].top()
            for name in self._bands
            if name != NORM
        )
        return findings

    def look(self, step: int, statistics: Mapping[str, float]) -> list[HealthFinding]:
        """Judge a sample grid by its statistics against those of the grids and pictures before.

        Args:
            step: optimizer steps done.
            statistics: as `preview.grid_statistics` gives them; the first ones are what others are compared with.
        """
        known, found = self._grids, []
        for name, value in statistics.items():
            noise = name == "roughness" and value > NOISE
            # Pictures may differ much from the data's, and a grid less from the one before.
            if name not in GRID_LIMITS or not known or (len(known) < 2 and not noise):
                continue
            down, up = GRID_LIMITS[name]
            least, most = min(grid[name] for grid in known), max(grid[name] for grid in known)
            low, high = least / down, most * (NOISE_RATIO if noise else up)
            if not low <= value <= high:
                found.append(
                    HealthFinding(
                        step,
                        f"the {name} of the sample grid is {value:.4g} at step {step}, and was {least:.4g} to "
                        f"{most:.4g} before",
                        diverged=True,
                    )
                )
        if not found:
            self._grids = [*known, dict(statistics)][-HISTORY:]
        return found

    def compares(self) -> bool:
        """Whether there are pictures that sample grids are compared with."""
        return bool(self._grids)

    def top(self) -> float:
        """The top of the loss's band, for a plot; infinite before the first reading."""
        return self._bands["train/loss"].top() if "train/loss" in self._bands else math.inf

    def _close(self, step: int, values: Mapping[str, float]) -> list[HealthFinding]:
        """End the window; returns the series that have now been outside of their bands for long enough."""
        findings, begins = [], self._began + 1
        for name, value in values.items():
            band = self._bands[name]
            top = band.top()
            # Once for each time that it leaves its band.
            if band.take(value) and band.outside == PATIENCE:
                message = (
                    f"{_words(name)} was {value:.4g} in the steps {begins} to {step}, the {PATIENCE}rd mean in a row "
                    f"above its band, which ends at {top:.4g}"
                )
                findings.append(HealthFinding(step, message, diverged=name != NORM))
        self._began = step
        self._windows.clear()
        return findings

    def state(self) -> dict[str, Any]:
        """All that the judgement of coming readings depends on, for JSON."""
        return {
            "bands": {
                name: {
                    "first": band.first,
                    "logs": band.logs,
                    "lowest": band.lowest if math.isfinite(band.lowest) else None,
                    "outside": band.outside,
                }
                for name, band in self._bands.items()
            },
            "windows": {name: [w.sum, w.steps, w.largest] for name, w in self._windows.items()},
            "read": self._read,
            "began": self._began,
            "grids": self._grids,
            "huge": self._huge,
        }

    def load(self, state: Mapping[str, Any]) -> None:
        """Go on from what `state` gave; an empty one, as of checkpoints of older versions, is a new beginning."""
        for name, saved in state.get("bands", {}).items():
            band = self._bands[name] = Band()
            band.first, band.logs, band.outside = saved["first"], list(saved["logs"]), saved["outside"]
            band.lowest = math.inf if saved["lowest"] is None else saved["lowest"]
        for name, (total, steps, largest) in state.get("windows", {}).items():
            window = self._windows[name] = _Window()
            window.sum, window.steps, window.largest = total, steps, largest
        self._read, self._began = state.get("read", 0), state.get("began", 0)
        self._grids = [dict(grid) for grid in state.get("grids", [])]
        self._huge = list(state.get("huge", []))


def _log(value: float) -> float:
    """The logarithm, of zero that of a number below all losses."""
    return math.log(max(value, 1e-12))


def _words(name: str) -> str | None:
    """What messages call a series; None for one that is not watched."""
    if name.startswith(LOSS_OF_TIME):
        quarter, _, quarters = name.removeprefix(LOSS_OF_TIME).partition("of")
        return f"the loss of raw times in quarter {quarter} of {quarters}"
    return WORDS.get(name)


def _far_out(step: int, name: str, value: float) -> str:
    """The message about latents or states out of every range."""
    return f"{WORDS[name]} is {value:.4g} at step {step}, and latents as large as noise have about 1"


def _non_finite(step: int, metrics: Mapping[str, float]) -> str:
    """The message about a loss or gradient that is not finite."""
    return (
        f"loss or gradient became infinite or NaN at or before step {step} (last loss {metrics['train/loss']:.4g}, "
        f"gradient norm {metrics['train/gradient_norm']:.4g})"
    )
