"""Dynamic batching: items wait until their batch is full, their time is up, or the worker is free."""

from __future__ import annotations

import asyncio
import time
from collections.abc import Awaitable, Callable, Hashable, Sequence
from dataclasses import dataclass, field
from typing import Generic, TypeVar

Key = TypeVar("Key", bound=Hashable)
Item = TypeVar("Item")
Result = TypeVar("Result")


class Overloaded(Exception):
    """More items wait than the bound allows.

    Attributes:
        pending: items that wait now.
        limit: the bound.
    """

    def __init__(self, pending: int, limit: int) -> None:
        super().__init__(pending, limit)
        self.pending, self.limit = pending, limit


@dataclass(eq=False)
class Waiting(Generic[Item, Result]):
    """One item on its way through the batcher."""

    item: Item
    result: asyncio.Future[Result]
    arrived: float = field(default_factory=time.monotonic)

    @property
    def abandoned(self) -> bool:
        """Nobody waits for the result any more."""
        return self.result.done()

    @property
    def waited_s(self) -> float:
        return time.monotonic() - self.arrived


class DynamicBatcher(Generic[Key, Item, Result]):
    """Gathers items of one key into batches, and runs one batch at a time.

    The oldest item decides whose turn it is, so no key starves. While a batch runs, arrivals gather for the
    next one; an idle worker waits `max_wait_s` from the oldest arrival for others to share its batch.
    Belongs to one event loop.

    Args:
        run: computes a batch; gets its key and its items, gives one result per item.
        max_batch_size: most items of a batch.
        max_wait_s: how long an item waits for company while the worker is idle.
        max_pending: bound on waiting items.
    """

    def __init__(
        self,
        run: Callable[[Key, list[Waiting[Item, Result]]], Awaitable[Sequence[Result]]],
        *,
        max_batch_size: int,
        max_wait_s: float,
        max_pending: int,
    ) -> None:
        self.max_batch_size, self.max_wait_s, self.max_pending = max_batch_size, max_wait_s, max_pending
        self._run = run
        self._queues: dict[Key, list[Waiting[Item, Result]]] = {}
        self._arrival = asyncio.Event()
        self._worker: asyncio.Task[None] | None = None

    @property
    def pending(self) -> int:
        """Items that wait for a batch."""
        return sum(map(len, self._queues.values()))

    async def submit(self, key: Key, items: Sequence[Item]) -> list[Result]:
        """Results of `items`, in order; they may be computed in different batches.

        Cancelling the call takes back what still waits.

        Raises:
            Overloaded: they would not all fit in the queue; none was taken.
        """
        if self.pending + len(items) > self.max_pending:
            raise Overloaded(self.pending, self.max_pending)
        if self._worker is None:
            self._worker = asyncio.create_task(self._work(), name="fewstep-batcher")
        loop = asyncio.get_running_loop()
        entries = [Waiting[Item, Result](item, loop.create_future()) for item in items]
        self._queues.setdefault(key, []).extend(entries)
        self._arrival.set()
        try:
            return list(await asyncio.gather(*(entry.result for entry in entries)))
        finally:
            for entry in entries:
                entry.result.cancel()
            self._forget_abandoned(key)

    async def close(self) -> None:
        """Stop the worker; items that wait are cancelled."""
        if self._worker is not None:
            self._worker.cancel()
            await asyncio.gather(self._worker, return_exceptions=True)
        for queue in self._queues.values():
            for entry in queue:
                entry.result.cancel()

    def _forget_abandoned(self, key: Key) -> None:
        if key in self._queues:
            self._queues[key] = [entry for entry in self._queues[key] if not entry.abandoned]
            if not self._queues[key]:
                del self._queues[key]

    async def _work(self) -> None:
        while True:
            self._arrival.clear()
            if not self._queues:
                await self._arrival.wait()
            if key := await self._next_key():
                batch = self._queues[key][: self.max_batch_size]
                self._queues[key] = self._queues[key][self.max_batch_size :]
                self._forget_abandoned(key)
                await self._finish(key, batch)

    async def _next_key(self) -> Key | None:
        """The oldest item's key, once its batch is full or its wait is over; None if it left meanwhile."""
        if not self._queues:
            return None
        key = min(self._queues, key=lambda key: self._queues[key][0].arrived)
        give_up = self._queues[key][0].arrived + self.max_wait_s
        while key in self._queues and len(self._queues[key]) < self.max_batch_size:
            left = give_up - time.monotonic()
            if left <= 0:
                break
            self._arrival.clear()
            try:
                await asyncio.wait_for(self._arrival.wait(), left)
            except TimeoutError:
                break
        return key if key in self._queues else None

    async def _finish(self, key: Key, batch: list[Waiting[Item, Result]]) -> None:
        try:
            results = await self._run(key, batch)
        except Exception as error:
            for entry in batch:
                if not entry.abandoned:
                    entry.result.set_exception(error)
            return
        for entry, result in zip(batch, results, strict=True):
            if not entry.abandoned:
                entry.result.set_result(result)
