"""Dynamic batching of items that take one or several turns; an item that arrives joins a batch at its next turn."""

from __future__ import annotations

import asyncio
import time
from collections.abc import Awaitable, Callable, Hashable, Sequence
from dataclasses import dataclass, field
from enum import Enum
from typing import Generic, Literal, TypeVar

Key = TypeVar("Key", bound=Hashable)
Item = TypeVar("Item")
Result = TypeVar("Result")


class Turn(Enum):
    """What running a batch gives for an item that has no result yet."""

    UNFINISHED = "unfinished"
    """The item needs another turn."""


class Overloaded(Exception):
    """More items would wait than the bound allows.

    Attributes:
        pending: items that wait now.
        limit: the bound.
    """

    def __init__(self, pending: int, limit: int) -> None:
        super().__init__(pending, limit)
        self.pending, self.limit = pending, limit


@dataclass(eq=False)
class Waiting(Generic[Item, Result]):
    """One item of the queue, and the promise of its result."""

    item: Item
    """What is to be computed."""
    result: asyncio.Future[Result]
    """Set when it is computed; cancelled when its caller no longer waits."""
    arrived: float = field(default_factory=time.monotonic)
    """When it was submitted."""

    @property
    def abandoned(self) -> bool:
        """Whether nobody waits for the result any more."""
        return self.result.done()

    @property
    def waited_s(self) -> float:
        """Seconds since it was submitted."""
        return time.monotonic() - self.arrived


class DynamicBatcher(Generic[Key, Item, Result]):
    """Gathers items of one key into batches, and runs one batch at a time.

    While a batch runs, arrivals gather for the next one; an idle worker waits up to `max_wait_s` for others to share
    the first item's batch. Items that need several turns keep their places in the queue, and arrivals join them between
    two turns instead of waiting for their end. Keys take turns, so that none starves. Belongs to one event loop.

    Args:
        run: computes a batch; gets its key and its items, gives one result per item, or `Turn.UNFINISHED`.
        max_batch_size: most items of a batch.
        max_wait_s: how long an idle worker waits for a first item's batch to fill.
        max_pending: bound on waiting items.
    """

    def __init__(
        self,
        run: Callable[
            [Key, list[Waiting[Item, Result]]], Awaitable[Sequence[Result | Literal[Turn.UNFINISHED]]]
        ],
        *,
        max_batch_size: int,
        max_wait_s: float,
        max_pending: int,
    ) -> None:
        self.max_batch_size, self.max_wait_s, self.max_pending = max_batch_size, max_wait_s, max_pending
        self._run = run
        self._queues: dict[Key, list[Waiting[Item, Result]]] = {}  # in the order of their turns
        self._arrival = asyncio.Event()
        self._worker: asyncio.Task[None] | None = None

    @property
    def pending(self) -> int:
        """Items that wait for a batch, or for their next turn."""
        return sum(map(len, self._queues.values()))

    async def submit(self, key: Key, items: Sequence[Item]) -> list[Result]:
        """Results of `items`, in order; they may be computed in different batches.

        Cancelling the call takes items that still wait out of the queue.

        Raises:
            Overloaded: they would not all fit in the queue; none is taken then.
        """
        if self.pending + len(items) > self.max_pending:
            raise Overloaded(self.pending, self.max_pending)
        # Not in the constructor: a task needs the event loop that will run it.
        if self._worker is None:
            self._worker = asyncio.create_task(self._work(), name="fewstep-batcher")
        loop = asyncio.get_running_loop()
        entries = [Waiting[Item, Result](item, loop.create_future()) for item in items]
        self._queues.setdefault(key, []).extend(entries)
        self._arrival.set()
        try:
            return list(await asyncio.gather(*(entry.result for entry in entries)))
        finally:
            # One of them may have failed, or the caller left: nobody waits for the rest then.
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
        if key in self._queues:  # a batch that runs has taken its items out
            self._queues[key] = [entry for entry in self._queues[key] if not entry.abandoned]
            if not self._queues[key]:
                del self._queues[key]

    async def _work(self) -> None:
        while True:
            await self._gather()
            # Until all is done no batch waits to fill: what arrives meanwhile joins at the next turn anyway.
            while self._queues:
                key = next(iter(self._queues))
                queue = self._queues.pop(key)
                batch, rest = queue[: self.max_batch_size], queue[self.max_batch_size :]
                if rest:
                    self._queues[key] = rest  # after all other keys
                await self._run_turn(key, batch)

    async def _gather(self) -> None:
        """Wait, idle, for a first item, and then for its batch to fill or its wait to end."""
        if not self._queues:
            self._arrival.clear()
            await self._arrival.wait()
        give_up = time.monotonic() + self.max_wait_s
        # All queues may have emptied meanwhile, where every caller left.
        while self._queues and all(len(queue) < self.max_batch_size for queue in self._queues.values()):
            self._arrival.clear()
            try:
                await asyncio.wait_for(self._arrival.wait(), give_up - time.monotonic())
            except TimeoutError:
                break

    async def _run_turn(self, key: Key, batch: list[Waiting[Item, Result]]) -> None:
        try:
            results = await self._run(key, batch)
        except Exception as error:  # the worker must outlive it, for the other keys
            for entry in batch:
                if not entry.abandoned:
                    entry.result.set_exception(error)
            return
        unfinished = []
        for entry, result in zip(batch, results, strict=True):
            if entry.abandoned:  # its future is done: setting it again would raise
                continue
            if result is Turn.UNFINISHED:
                unfinished.append(entry)
            else:
                entry.result.set_result(result)
        if unfinished:
            # They stay ahead of what arrived for their key meanwhile; the key itself goes to the end of the turns.
            self._queues[key] = unfinished + self._queues.pop(key, [])
