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
        self._asked = time.perf_counter()
        self._since = torch.zeros(())
        self._agreed: dist.Work | None = None
        self._told = False

    def arrived(self) -> bool:
        """Whether a notice has come since the last call; once for each. To be called by all workers each step."""
        import ray.train

        # All workers have to ask at the same step, and their clocks differ. They agree on the longest time since they
        # asked last: while a step is computed, so that none waits for it, and by time, as any step may be a long one.
        due = False
        if self._agreed is not None:
            self._agreed.wait()
            due = self._since.item() >= ASK_EVERY_SECONDS
        new = False
        if due:
            coming = ray.train.get_preemption_info() is not None
            new, self._told = coming and not self._told, coming
            self._asked = time.perf_counter()
        self._since = torch.tensor(time.perf_counter() - self._asked)
        self._agreed = dist.all_reduce(self._since, dist.ReduceOp.MAX, group=self._group, async_op=True)
        return new
