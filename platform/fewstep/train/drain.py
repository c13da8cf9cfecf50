"""Notices that a node of the run is about to go, as spot machines get one."""

from __future__ import annotations

import time

import torch
import torch.distributed as dist

ASK_EVERY_SECONDS = 5.0
"""Time between two questions to Ray, about: a notice comes half a minute or more before a node goes."""


class DrainNotice:
    """Tells all workers at the same step that a node which some of them are on is being drained.

    Ray knows from the cloud's own notice through its autoscaler, or from `ray drain-node`. After the node has gone, Ray
    Train starts the workers again, on what is left, from the last checkpoint.

    Args:
        group: a process group of all workers, on CPUs.
    """

    def __init__(self, group: dist.ProcessGroup) -> None:
        self._group = group
        self._every, self._steps = 1, 0
        self._since = time.perf_counter()
        self._told = False

    def arrived(self) -> bool:
        """Whether a notice has come since the last call; once for each. To be called by all workers each step."""
        import ray.train

        self._steps += 1
        if self._steps < self._every:
            return False
        coming = ray.train.get_preemption_info() is not None
        # All workers have to ask at the same steps: they agree on the slowest one's time.
        seconds = torch.tensor((time.perf_counter() - self._since) / self._steps)
        dist.all_reduce(seconds, dist.ReduceOp.MAX, group=self._group)
        self._every = max(1, int(ASK_EVERY_SECONDS / max(seconds.item(), 1e-3)))
        self._steps, self._since = 0, time.perf_counter()
        new, self._told = coming and not self._told, coming
        return new
