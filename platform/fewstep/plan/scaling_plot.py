"""The picture of a scaling: `fewstep distill --dry-run --scaling --plot FILE`."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import TYPE_CHECKING

import numpy as np

from fewstep.evaluate.plots import BASELINE, DPI, INK, STUDENT, dress
from fewstep.plan.scaling import Layout, Links, Scaling

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

STYLES: dict[Layout, tuple[str, str]] = {
    "fsdp": (STUDENT, "o"),
    "hybrid": ("#d97706", "s"),
    "ddp": (INK, "^"),
}
"""Colour and marker of each layout."""

RATES = np.geomspace(0.5, 100, 40)
"""Of InfiniBand for each GPU, 10⁹ bytes per second: from a tenth of 40 Gbit/s to twice the fastest."""


def scaling_plot(scaling: Scaling, links: Links, numbers: Sequence[int]) -> Figure:
    """Step time of one batch by number of GPUs; and, on the largest number, by the rate between nodes.

    Args:
        scaling: of a recipe.
        links: between its GPUs.
        numbers: of GPUs.
    """
    from matplotlib.figure import Figure

    figure = Figure(figsize=(9.6, 4.2), dpi=DPI, layout="constrained")
    left, right = figure.subplots(1, 2)
    steps = [scaling.step(gpus, links) for gpus in numbers]
    left.plot(
        numbers, [step.computing for step in steps], color=BASELINE, lw=1, ls="--", label="computing alone"
    )
    slower = [scaling.step(max(numbers), replace(links, infiniband_gb=rate)) for rate in RATES]
    for layout in scaling.layouts:
        ink, marker = STYLES[layout]
        style = {"color": ink, "lw": 1.6, "alpha": 0.85}
        left.plot(numbers, [step.seconds[layout] for step in steps], marker=marker, label=layout, **style)
        right.plot(RATES, [100 * step.share(layout) for step in slower], **style)
    right.axvline(links.infiniband_gb, color=BASELINE, lw=1, ls=":")
    left.set(yscale="log", xlabel="GPUs")
    _number_ticks(left, numbers, [step.computing for step in steps])
    right.set(xscale="log", xlabel="InfiniBand for each GPU, GB/s (dotted: as on the left)", ylim=(0, 103))
    ticks = [rate for rate in (1, 3, 12.5, 50) if RATES[0] <= rate <= RATES[-1]]
    right.set_xticks(ticks, [f"{tick:g}" for tick in ticks])
    right.minorticks_off()
    figure.legend(loc="outside lower center", ncols=4, frameon=False, fontsize=9, labelcolor=INK)
    dress(left, f"Seconds per step of {scaling.recipe.data.batch_size} samples")
    dress(right, f"% of the step computing, on {max(numbers)} GPUs")
    return figure


def _number_ticks(axes: Axes, across: Sequence[int], upwards: Sequence[float]) -> None:
    """Logarithmic axes with ticks at these values alone."""
    axes.set_xscale("log", base=2)
    axes.set_xticks(list(across), [str(number) for number in across])
    axes.set_yticks(list(upwards), [f"{value:.3g}" for value in upwards])
    axes.minorticks_off()
