"""Who asks for images, as far as the engine needs to know, and how the engine's work is shared between them."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass


@dataclass(frozen=True)
class Caller:
    """Somebody whose requests share a replica's work with those of others. Equal names are one caller."""

    name: str = "anybody"
    """Tells callers apart in queues, metrics and logs; never a secret."""
    weight: float = 1.0
    """Its share of the work, where there is more than can be done: one of weight 2 gets twice as much as one of 1."""
    begin_within_s: float | None = None
    """How long its requests may wait until their first evaluation begins; None: as long as it takes."""


ANYBODY = Caller()
"""Whoever asks where callers are not told apart."""


class FairShares:
    """Who is next, so that callers who wait get work in proportion to their weights: start-time fair queueing (Goyal,
    Vin and Cheng, 1996).

    Each caller has a virtual time, the work that was done for it divided by its weight, and the least is next. Who
    comes begins at the least of those who wait, so nobody saves up by staying away. Nobody falls further behind than by
    one turn: what somebody got while others wanted less was at nobody's expense.
    """

    def __init__(self) -> None:
        self._times: dict[str, float] = {}
        self._least = 0.0

    def begin_turn(self, waiting: Iterable[Caller]) -> None:
        """Take up those who wait now; `next` and `charge` are then asked about them."""
        names = {caller.name for caller in waiting}
        for name in names:
            self._times[name] = max(self._times.get(name, 0.0), self._least)
        self._least = min(self._times[name] for name in names)
        # Whoever is absent and not ahead would begin at the least anyway.
        self._times = {
            name: time for name, time in self._times.items() if name in names or time > self._least
        }

    def next(self, waiting: Iterable[Caller]) -> Caller:
        """Who of these is next; the first of them where several are."""
        return min(waiting, key=lambda caller: self._times[caller.name])

    def charge(self, caller: Caller, work: float, *, turn: float) -> None:
        """Note the work that is done for a caller in a turn.

        Args:
            caller: for whom.
            work: what is done.
            turn: the work of a whole turn.
        """
        now, latest = self._times[caller.name], self._least + turn / caller.weight
        self._times[caller.name] = max(now, min(now + work / caller.weight, latest))
