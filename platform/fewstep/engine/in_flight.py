"""Share one running call among all who ask for the same thing, and keep it running when they stop waiting."""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable, Hashable
from typing import Generic, TypeVar

K = TypeVar("K", bound=Hashable)
V = TypeVar("V")


class InFlight(Generic[K, V]):
    """Runs at most one call per key at a time; everybody who asks for the key meanwhile waits for that call.

    Cancelling a caller (its client disconnected, its time limit passed) does not cancel the call: whoever asks again
    waits for the rest of it, or finds that it has ended. Belongs to one event loop.

    Args:
        call: does the work for a key. It must store the result itself: nothing is remembered here once it has ended.
    """

    def __init__(self, call: Callable[[K], Awaitable[V]]) -> None:
        self._call = call
        self._tasks: dict[K, asyncio.Task[V]] = {}

    async def __call__(self, key: K) -> V:
        """Start the call for `key`, or join the one that runs, and give its result."""
        if key not in self._tasks:
            self._tasks[key] = asyncio.ensure_future(self._call(key))
            self._tasks[key].add_done_callback(lambda task: self._ended(key, task))
        return await asyncio.shield(self._tasks[key])  # a cancelled caller must not cancel the task

    def _ended(self, key: K, task: asyncio.Task[V]) -> None:
        del self._tasks[key]
        if not task.cancelled():
            task.exception()  # reading it keeps asyncio from warning when every caller was cancelled
