"""Work that several wait for and nobody's leaving stops."""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable, Hashable
from typing import Generic, TypeVar

K = TypeVar("K", bound=Hashable)
V = TypeVar("V")


class InFlight(Generic[K, V]):
    """One call per key at a time, which all who ask for the key meanwhile share. Belongs to one event loop.

    A caller that is cancelled (its client left, its time was over) does not cancel the call: who comes back finds it
    further on, or done.

    Args:
        call: what is to be done for a key; keeps its result itself.
    """

    def __init__(self, call: Callable[[K], Awaitable[V]]) -> None:
        self._call = call
        self._tasks: dict[K, asyncio.Task[V]] = {}

    async def __call__(self, key: K) -> V:
        if key not in self._tasks:
            self._tasks[key] = asyncio.ensure_future(self._call(key))
            self._tasks[key].add_done_callback(lambda task: self._ended(key, task))
        return await asyncio.shield(self._tasks[key])

    def _ended(self, key: K, task: asyncio.Task[V]) -> None:
        del self._tasks[key]
        if not task.cancelled():
            task.exception()  # asked for, so that asyncio does not complain when everybody has left
