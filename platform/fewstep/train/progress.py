"""Metrics of the training loop, which are summed on the device and read every few steps, and its progress line."""

from __future__ import annotations

import time

import torch
import torch.distributed as dist
from torch import Tensor

from fewstep.distill import LossResult
from fewstep.train.health import LARGEST_RMS, RANGES

QUARTILES = 4
"""Parts of raw time for which losses are also averaged separately."""


class LossMeter:
    """Sums losses on the device and reads them rarely, so that the host doesn't wait for the device at each step."""

    def __init__(self, device: torch.device) -> None:
        self._sums = torch.zeros(QUARTILES, device=device)
        self._counts = torch.zeros(QUARTILES, device=device)
        self._norm = torch.zeros((), device=device)
        self._finite = torch.ones((), dtype=torch.bool, device=device)
        self._largest = torch.zeros(len(RANGES), device=device)
        self._rows: list[tuple[list[str], Tensor]] = []
        self._read_rows = self._rows
        self._steps = 0
        self._since = time.perf_counter()

    def data(self, keys: list[str], rms: Tensor) -> None:
        """Add the root mean squares (B,) of the latents of a micro-batch, whose rows have these keys."""
        self._widen(0, rms)
        self._rows.append((keys, rms))

    def _widen(self, place: int, rms: Tensor) -> None:
        # NaN would be lost in a comparison, on the way to other workers at the latest.
        largest = rms.detach().nan_to_num(nan=torch.inf).max()
        self._largest[place] = torch.maximum(self._largest[place], largest)

    def suspect_rows(self) -> list[str]:
        """Keys of this worker's rows in the last reading whose latents are no latents: NaN, or far too large."""
        return [
            key
            for keys, rms in self._read_rows
            for key, value in zip(keys, rms.tolist(), strict=True)
            if not value <= LARGEST_RMS
        ]

    def add(self, result: LossResult) -> None:
        """Add the losses of one micro-batch, by quarter of raw time."""
        # Rounded up, as raw times are in (0, 1].
        raw = result.raw_t.to(self._sums.device)
        quartile = (raw * QUARTILES).ceil().long().clamp(1, QUARTILES) - 1
        self._sums.index_add_(0, quartile, result.per_sample)
        self._counts.index_add_(0, quartile, torch.ones_like(result.per_sample))
        self._finite &= result.per_sample.isfinite().all()
        if result.state_rms is not None:
            self._widen(1, result.state_rms)

    def norm(self, gradient_norm: Tensor) -> None:
        """Add the gradient norm of one optimizer step, before clipping."""
        self._norm = self._norm + gradient_norm
        self._finite &= gradient_norm.isfinite()
        self._steps += 1

    def sum_over_workers(self, world_size: int) -> None:
        """Add up the losses since the last call of `read` of all workers, which all have to call this."""
        if world_size > 1:
            broken = (~self._finite).float().view(1)
            sums = torch.cat([self._sums, self._counts, broken])
            dist.all_reduce(sums)
            self._sums, self._counts, broken = sums.split([QUARTILES, QUARTILES, 1])
            self._finite = broken[0] == 0
            dist.all_reduce(self._largest, dist.ReduceOp.MAX)

    def read(self, batch_size: int, seconds_waited: float) -> dict[str, float]:
        """Means since the last call, as MLflow metrics.

        Args:
            batch_size: samples per optimizer step, of all workers.
            seconds_waited: seconds that the loop has waited for data since the last call.
        """
        now = time.perf_counter()
        seconds, steps = now - self._since, self._steps
        sums, counts = self._sums.tolist(), self._counts.tolist()
        metrics = {
            "train/loss": sum(sums) / sum(counts),
            "train/gradient_norm": float(self._norm) / steps,
            "train/non_finite": 0.0 if bool(self._finite) else 1.0,
            "train/seconds_per_step": seconds / steps,
            "train/samples_per_second": batch_size * steps / seconds,
            "train/seconds_waiting_for_data": seconds_waited / steps,
        }
        # A quarter without any sample since the last call has no point in the plot.
        for index, (total, count) in enumerate(zip(sums, counts, strict=True)):
            if count:
                metrics[f"train/loss_t{index + 1}of{QUARTILES}"] = total / count
        # What the loss does not look at has no point: data of prompts alone, states of a teacher's training.
        for name, largest in zip(RANGES, self._largest.tolist(), strict=True):
            if largest:
                metrics[name] = largest
        self._sums.zero_()
        self._counts.zero_()
        self._largest.zero_()
        self._read_rows, self._rows = self._rows, []
        self._norm = torch.zeros_like(self._norm)
        self._steps, self._since = 0, now
        return metrics


def progress_line(
    name: str, step: int, done_before: int, steps: int, started: float, metrics: dict[str, float]
) -> str:
    """A line of progress: bar, step, loss, throughput, and remaining time.

    Args:
        name: of the recipe.
        step: optimizer steps done.
        done_before: how many of them were done before the run was resumed.
        steps: of the whole run.
        started: `time.perf_counter()` when the run began or was resumed.
        metrics: as `LossMeter.read` gives them, with the learning rate.
    """
    filled = round(20 * step / steps)
    seconds = time.perf_counter() - started
    # Only from steps of this process: the time before a run was resumed is unknown.
    left = seconds / max(1, step - done_before) * (steps - step)
    return (
        f"{name} |{'█' * filled}{'·' * (20 - filled)}| {step}/{steps}  loss {metrics['train/loss']:.4f}  "
        f"grad {metrics['train/gradient_norm']:.2f}  lr {metrics['train/learning_rate']:.1e}  "
        f"{metrics['train/samples_per_second']:.1f} samples/s  "
        f"data {metrics['train/seconds_waiting_for_data'] * 1e3:.0f} ms  eta {_clock(left)}"
    )


def _clock(seconds: float) -> str:
    """A duration as m:ss or h:mm:ss."""
    minutes, seconds = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours}:{minutes:02d}:{seconds:02d}" if hours else f"{minutes}:{seconds:02d}"
