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
    two turns instead of waiting for their end. Belongs to one event loop.

    Items of some keys may cost more than others'. Keys take turns, and one whose items cost w times as much gets one
    turn where another gets w (weighted fair queueing), so that all waiting items are given equal work and none starves.
    Both bounds count an item as its cost: so a turn is bounded, and so is the work that an arrival can find before it.

    Args:
        run: computes a batch; gets its key and its items, gives one result per item, or `Turn.UNFINISHED`.
        max_batch_size: largest cost of a batch of several items; an item that costs more is a batch by itself.
        max_wait_s: how long an idle worker waits for a first item's batch to fill.
        max_pending: bound on the cost of waiting items.
        cost: of an item of this key, at least 1.
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
        cost: Callable[[Key], float] = lambda key: 1.0,
    ) -> None:
        self.max_batch_size, self.max_wait_s, self.max_pending = max_batch_size, max_wait_s, max_pending
        self._run, self._cost = run, cost
        self._queues: dict[Key, list[Waiting[Item, Result]]] = {}
        # The key with the least of these has the next turn: an item's share of all work when the key came, and the
        # costs of its turns since then and of the next. `_share` is the share of one that had been there always.
        self._due: dict[Key, float] = {}
        self._share = 0.0
        self._running: Key | None = None
        self._arrival = asyncio.Event()
        self._worker: asyncio.Task[None] | None = None

    @property
    def pending(self) -> int:
        """Items that wait for a batch, or for their next turn."""
        return sum(map(len, self._queues.values()))

    @property
    def pending_cost(self) -> float:
        """Cost of these items."""
        return sum(self._cost(key) * len(queue) for key, queue in self._queues.items())

    async def submit(self, key: Key, items: Sequence[Item]) -> list[Result]:
        """Results of `items`, in order; they may be computed in different batches.

        Cancelling the call takes items that still wait out of the queue.

        Raises:
            Overloaded: they would not all fit in the queue; none is taken then.
        """
        if self.pending_cost + self._cost(key) * len(items) > self.max_pending:
            raise Overloaded(self.pending, self.max_pending)
        # Not in the constructor: a task needs the event loop that will run it.
        if self._worker is None:
            self._worker = asyncio.create_task(self._work(), name="fewstep-batcher")
        loop = asyncio.get_running_loop()
        entries = [Waiting[Item, Result](item, loop.create_future()) for item in items]
        self._enqueue(key, self._queues.get(key, []) + entries)
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

    def _enqueue(self, key: Key, queue: list[Waiting[Item, Result]]) -> None:
        self._queues[key] = queue
        # Due after the cost of its first turn: a caller who asks for one thing after the other pays for each of them.
        self._due.setdefault(key, self._share + self._cost(key))

    def _forget_abandoned(self, key: Key) -> None:
        if key in self._queues:  # a batch that runs has taken its items out
            self._queues[key] = [entry for entry in self._queues[key] if not entry.abandoned]
            if not self._queues[key]:
                del self._queues[key]
                if key != self._running:
                    del self._due[key]

    def _most(self, key: Key) -> int:
        """Most items of a batch of this key."""
        return max(1, int(self.max_batch_size / self._cost(key)))

    async def _work(self) -> None:
        while True:
            await self._gather()
            # Until all is done no batch waits to fill: what arrives meanwhile joins at the next turn anyway.
            while self._queues:
                key = min(self._queues, key=self._due.__getitem__)
                queue, most = self._queues.pop(key), self._most(key)
                batch, rest = queue[:most], queue[most:]
                self._running = key
                self._due[key] += self._cost(key)
                self._share += self._cost(key) / len(self._due)
                if rest:
                    self._enqueue(key, rest)  # last of the keys that are due then
                await self._run_turn(key, batch)
                self._running = None
                if key not in self._queues:
                    del self._due[key]

    async def _gather(self) -> None:
        """Wait, idle, for a first item, and then for its batch to fill or its wait to end."""
        if not self._queues:
            self._arrival.clear()
            await self._arrival.wait()
        give_up = time.monotonic() + self.max_wait_s
        # All queues may have emptied meanwhile, where every caller left.
        while self._queues and all(len(queue) < self._most(key) for key, queue in self._queues.items()):
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
            # They stay ahead of what arrived for their key meanwhile; the key goes behind those that are due with it.
            self._enqueue(key, unfinished + self._queues.pop(key, []))
