"""Tools of the benchmarks: times taken in turns, peak memory, and what the machine can do at best."""

from __future__ import annotations

import os
import statistics
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

import torch
from torch.utils.mkldnn import to_mkldnn

WARM_UPS = 2
"""Rounds that are not counted."""

os.environ.setdefault("KINETO_LOG_LEVEL", "6")  # otherwise torch's profiler reports each start and stop


def interleaved(
    runs: Mapping[str, Callable[[], object]],
    repeats: int,
    device: torch.device,
    before: Callable[[], object] = lambda: None,
) -> dict[str, float]:
    """Median seconds of each run, taken in turns, so that a drifting machine biases no ratio.

    Args:
        runs: what to time, by name.
        repeats: rounds; two more come first and are not counted.
        device: whose work has to be finished before the clock is read.
        before: what is done before each run, and not timed.
    """
    seconds: dict[str, list[float]] = {name: [] for name in runs}
    for turn in range(WARM_UPS + repeats):
        for name, run in runs.items():
            before()
            wait(device)  # GPUs work behind the host's back; the clock must not start on the work before
            began = time.perf_counter()
            run()
            wait(device)
            if turn >= WARM_UPS:
                seconds[name].append(time.perf_counter() - began)
    return {name: statistics.median(values) for name, values in seconds.items()}


def device_time(run: Callable[[], object], repeats: int, device: torch.device) -> float:
    """Seconds that a GPU works for one `run`, without the time that it waits for the host; nan for a CPU.

    This is what the work costs a program that queues work ahead, as a network with its policy does.

    Args:
        run: what to time.
        repeats: calls to average over.
        device: which.
    """
    if device.type != "cuda":
        return float("nan")
    run()
    torch.cuda.synchronize()
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CUDA]) as profile:
        for _ in range(repeats):
            run()
        torch.cuda.synchronize()
    return sum(event.self_device_time_total for event in profile.key_averages()) / repeats / 1e6


def peak_memory(run: Callable[[], object], device: torch.device) -> int:
    """Largest number of bytes that `run` holds at one time, beyond what was held before.

    Args:
        run: what to measure; it is called twice.
        device: whose memory. On the CPU, what torch's profiler records is counted.
    """
    run()  # whatever is allocated once and kept (tables, workspaces) must not count
    if device.type == "cuda":
        torch.cuda.synchronize()
        before = torch.cuda.memory_allocated()
        torch.cuda.reset_peak_memory_stats()
        run()
        return torch.cuda.max_memory_allocated() - before
    with torch.profiler.profile(
        activities=[torch.profiler.ProfilerActivity.CPU], profile_memory=True
    ) as profile:
        run()
    # torch keeps no statistics of CPU memory; its profiler's raw events have every allocation with its time.
    events = [event for event in profile.profiler.kineto_results.events() if event.name() == "[memory]"]
    held, peak = 0, 0
    for event in sorted(events, key=lambda event: event.start_ns()):
        held += event.nbytes()
        peak = max(peak, held)
    return peak


@dataclass(frozen=True)
class Rates:
    """What a machine can do at best, by measurement."""

    copy: float
    """Bytes read and written per second, by a copy of 256 MB."""
    matrix: float
    """Floating-point operations per second, of a float32 matrix product by torch's fastest library."""

    @classmethod
    def measured(cls, device: torch.device) -> Rates:
        """Measure a device with torch's current number of threads."""
        source = torch.ones(64 * 2**20, device=device)
        target = torch.empty_like(source)
        size = 1024 if device.type == "cpu" else 8192
        left = torch.randn(size, size, device=device)
        product = torch.empty_like(left)
        runs = {"copy": lambda: target.copy_(source), "matrix": lambda: torch.mm(left, left, out=product)}
        if device.type == "cpu" and torch.backends.mkldnn.is_available():
            # MKL, which torch.mm uses, leaves half of an AMD processor's arithmetic units idle.
            layer, rows = to_mkldnn(torch.nn.Linear(size, size, bias=False).eval()), left.to_mkldnn()
            runs["oneDNN"] = lambda: layer(rows)
        with torch.no_grad():
            seconds = interleaved(runs, 7, device)
        copy = seconds.pop("copy")
        return cls(2 * source.nbytes / copy, 2 * size**3 / min(seconds.values()))

    def floor(self, moved: int, operations: int) -> float:
        """Seconds that no implementation can undercut, given bytes moved and operations."""
        return max(moved / self.copy, operations / self.matrix)


def machine(device: torch.device) -> str:
    """One line: processor or GPU, threads, torch."""
    if device.type == "cuda":
        return f"{torch.cuda.get_device_name()}, torch {torch.__version__}"
    from fewstep.tracking.version import processor

    return f"{processor()}, {torch.get_num_threads()} threads, torch {torch.__version__}"


def aligned(header: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    """A table as text: the first column is aligned to the left, the others to the right."""
    widths = [max(len(line[i]) for line in (header, *rows)) for i in range(len(header))]
    lines = [
        "  ".join(
            cell.ljust(w) if i == 0 else cell.rjust(w)
            for i, (cell, w) in enumerate(zip(line, widths, strict=True))
        )
        for line in (header, *rows)
    ]
    return "\n".join(lines)


def log_to_mlflow(uri: str, name: str, description: str, table: str, metrics: Mapping[str, float]) -> None:
    """One finished MLflow run of the experiment "benchmarks" with a table and its numbers.

    Args:
        uri: tracking address.
        name: of the run.
        description: of the machine; becomes a tag.
        table: logged as the artifact table.txt.
        metrics: MLflow metrics.
    """
    # MLflow takes seconds to import, and few calls log anything.
    from fewstep.tracking import Tracker, spool_folder

    with Tracker.start(uri, "benchmarks", name, {}, {"machine": description}, spool_folder()) as tracker:
        tracker.log_metrics(metrics, 0)
        tracker.log_text(table, "table.txt")


def wait(device: torch.device) -> None:
    """Have the host wait until a device has done its work."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)
