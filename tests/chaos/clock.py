"""Seconds that do not count while this machine stood still: a paused or overloaded one is not the run's fault."""

from __future__ import annotations

import threading
import time

TICK_SECONDS = 0.1
LONGEST_TICK_SECONDS = 2.0
"""A tick that takes longer counts as one."""


class _Clock:
    def __init__(self) -> None:
        self.stood_still = 0.0
        self._last = time.monotonic()
        threading.Thread(target=self._tick, daemon=True).start()

    def _tick(self) -> None:
        while True:
            time.sleep(TICK_SECONDS)
            present = time.monotonic()
            if present - self._last > LONGEST_TICK_SECONDS:
                self.stood_still += present - self._last
            self._last = present


_clock = _Clock()


def now() -> float:
    """Seconds since some moment, without those in which this process did not run."""
    return time.monotonic() - _clock.stood_still
