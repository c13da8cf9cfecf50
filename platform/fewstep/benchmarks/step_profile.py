"""Where the time of one training step goes: by part of the step, and by kind of operation; as a plot."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any
from unittest.mock import patch

from torch.profiler import ProfilerActivity, profile, record_function

if TYPE_CHECKING:
    from matplotlib.figure import Figure

    from fewstep.train.learner import Learner

PARTS = ("teacher", "student forward", "student backward", "rollouts and loss", "optimizer and EMA")
"""Parts of a step, in the order of the plot."""

KINDS: dict[str, tuple[str, ...]] = {
    "products": ("addmm", "mm", "bmm", "linear", "mkldnn", "_Linear", "convolution", "baddbmm", "matmul"),
    "attention": ("scaled_dot_product", "softmax"),
    "GELU": ("gelu", "_GELU", "sigmoid", "addcmul", "tanh"),
    "norms": ("layer_norm", "rms_norm", "rsqrt"),
    "copies": ("copy_", "cat", "contiguous", "clone", "stack"),
    "rollout kernels": ("_MeanVelocity",),
    "sums and scalings": ("add", "mul", "div", "sub", "sum", "neg", "silu", "mean"),
}
"""Kinds of operations → what the names of the profiler's events of that kind contain; the first kind that fits."""

OTHER = "all else, and Python"
INKS = ("#0b6bcb", "#5ba3d9", "#9ecae9", "#2f855a", "#d69e2e", "#805ad5", "#a0aec0", "#e5e7eb")

Seconds = dict[str, dict[str, float]]
"""Part of a step → kind of operation → seconds per step."""


def kind_of(event: str) -> str:
    """The kind of operation that an event of torch's profiler is, by its name."""
    name = event.rpartition("::")[2]
    fits = (kind for kind, names in KINDS.items() if any(one in name for one in names))
    return next(fits, OTHER)


def profiled(learner: Learner, step: Callable[[], None], steps: int) -> Seconds:
    """Seconds of a step's operations, without those of the operations that they call, on a CPU.

    The profiler itself takes some microseconds per operation, which is part of them.

    Args:
        learner: takes the steps.
        step: takes one.
        steps: how many to average over.
    """
    with _named_parts(learner), profile(activities=[ProfilerActivity.CPU]) as recorded:
        for _ in range(steps):
            with record_function("step"):
                step()
    seconds: defaultdict[str, defaultdict[str, float]] = defaultdict(lambda: defaultdict(float))
    for event in recorded.events() or ():
        if (part := _part_of(event)) is not None:
            seconds[part][kind_of(event.name)] += event.self_cpu_time_total / 1e6 / steps
    return {part: dict(seconds[part]) for part in PARTS}


@contextmanager
def _named_parts(learner: Learner) -> Iterator[None]:
    """A context in which the profiler's events lie inside events that have the names of `PARTS`."""
    forward, update = learner.objective.model.forward, learner.update

    def named_forward(*args: Any, student: bool, **named: Any) -> Any:
        with record_function(PARTS[1] if student else PARTS[0]):
            return forward(*args, student=student, **named)

    def named_update(*args: Any) -> None:
        with record_function(PARTS[4]):
            update(*args)

    with (
        patch.object(learner.objective.model, "forward", named_forward),
        patch.object(learner, "update", named_update),
    ):
        yield


def _part_of(event: Any) -> str | None:
    """The part of the step that an event belongs to; None for what is outside of a step."""
    part = None
    while event is not None:
        if event.name in PARTS:
            return event.name
        if event.name.startswith("autograd::engine"):
            # The kernel of the loss is not the network's.
            part = PARTS[3] if "_MeanVelocity" in event.name else PARTS[2]
        elif event.name == "step":
            return part or PARTS[3]
        event = event.cpu_parent
    return part


def step_plot(seconds: Mapping[str, Mapping[str, float]], title: str) -> Figure:
    """One bar per part of the step, as long as its milliseconds, made of its kinds of operations.

    Args:
        seconds: as `profiled` gives them.
        title: what was measured, and on what.
    """
    # Matplotlib is imported where it is used: it takes a second.
    from matplotlib.figure import Figure

    figure = Figure(figsize=(9.6, 3.6), dpi=150, layout="constrained")
    axes = figure.subplots()
    ends = dict.fromkeys(PARTS, 0.0)
    for kind, ink in zip((*KINDS, OTHER), INKS, strict=True):
        widths = [1e3 * seconds[part].get(kind, 0.0) for part in PARTS]
        axes.barh(PARTS, widths, left=list(ends.values()), color=ink, label=kind, height=0.7)
        ends = {part: ends[part] + width for part, width in zip(PARTS, widths, strict=True)}
    for part, end in ends.items():
        axes.annotate(
            f"{end:.0f} ms", (end, part), (4, 0), textcoords="offset points", va="center", fontsize=8
        )
    axes.invert_yaxis()
    axes.margins(x=0.08)
    axes.set_xlabel("milliseconds of one step")
    axes.set_title(title, fontsize=9, loc="left")
    axes.spines[["top", "right"]].set_visible(False)
    axes.legend(frameon=False, fontsize=8, loc="lower right")
    return figure
