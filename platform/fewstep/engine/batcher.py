"""Dynamic batching of items that take one or several turns; an item that arrives joins a batch at its next turn."""

from __future__ import annotations

import asyncio
import time
from collections.abc import Awaitable, Callable, Hashable, Sequence
from dataclasses import dataclass, field
from enum import Enum
from typing import Generic, Literal, TypeVar

from fewstep.engine.caller import ANYBODY, Caller, FairShares

Key = TypeVar("Key", bound=Hashable)
Item = TypeVar("Item")
Result = TypeVar("Result")


class Turn(Enum):
    """What running a batch gives for an item that has no result yet."""

    UNFINISHED = "unfinished"
    """The item needs another turn."""


@dataclass(eq=False)
class Waiting(Generic[Item, Result]):
    """One item of the queue, and the promise of its result."""

    item: Item
    """What is to be computed."""
    result: asyncio.Future[Result]
    """Set when it is computed; cancelled when its caller no longer waits."""
    caller: Caller = ANYBODY
    """Who asked for it."""
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

    A turn of some keys' items takes more work than of others'. Keys take turns, and one whose items take w times as
    much gets one turn where another gets w (weighted fair queueing), so that all waiting items are given equal work and
    none starves. The limit of a batch counts an item as its work, so that a turn is bounded.

    Callers come before keys: the next turn is of a key of the caller who is next by `FairShares`, and the places of its
    batch go to callers in that order, each caller's items by age. So what a caller waits for does not depend on how
    much others ask for, nor on how many kinds of items.

    Args:
        run: computes a batch; gets its key and its items, gives one result per item, or `Turn.UNFINISHED`.
        max_batch_size: most work of a batch of several items; an item of more is a batch by itself.
        max_wait_s: how long an idle worker waits for a first item's batch to fill.
        work: of one turn of an item of this key, at least 1.
    """

    def __init__(
        self,
        run: Callable[
            [Key, list[Waiting[Item, Result]]], Awaitable[Sequence[Result | Literal[Turn.UNFINISHED]]]
        ],
        *,
        max_batch_size: int,
        max_wait_s: float,
        work: Callable[[Key], float] = lambda key: 1.0,
    ) -> None:
        self.max_batch_size, self.max_wait_s = max_batch_size, max_wait_s
        self._run, self._work_of = run, work
        self._queues: dict[Key, list[Waiting[Item, Result]]] = {}
        # The key with the least of these is due: an item's share of all work when the key came, and the work of an
        # item's turns since then and of its next. `_share` is the share of one that had been there always.
        self._due: dict[Key, float] = {}
        self._share = 0.0
        self._shares = FairShares()
        self._running: Key | None = None
        self._arrival = asyncio.Event()
        self._worker: asyncio.Task[None] | None = None

    @property
    def pending(self) -> int:
        """Items that wait for a batch, or for their next turn."""
        return sum(map(len, self._queues.values()))

    async def submit(self, key: Key, items: Sequence[Item], caller: Caller = ANYBODY) -> list[Result]:
        """Results of `items`, in order; they may be computed in different batches.

        Cancelling the call takes items that still wait out of the queue.
        """
        # Not in the constructor: a task needs the event loop that will run it.
        if self._worker is None:
            self._worker = asyncio.create_task(self._work(), name="fewstep-batcher")
        loop = asyncio.get_running_loop()
        entries = [Waiting[Item, Result](item, loop.create_future(), caller) for item in items]
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
        # Due after the work of its first turn: a caller who asks for one thing after the other pays for each of them.
        self._due.setdefault(key, self._share + self._work_of(key))

    def _forget_abandoned(self, key: Key) -> None:
        if key in self._queues:  # a batch that runs has taken its items out
            self._queues[key] = [entry for entry in self._queues[key] if not entry.abandoned]
            if not self._queues[key]:
                del self._queues[key]
                if key != self._running:
                    del self._due[key]

    def _most(self, key: Key) -> int:
        """Most items of a batch of this key."""
        return max(1, int(self.max_batch_size / self._work_of(key)))

    async def _work(self) -> None:
        while True:
            await self._gather()
            # Until all is done no batch waits to fill: what arrives meanwhile joins at the next turn anyway.
            while self._queues:
                key = self._next_key()
                batch = self._take_batch(key)
                self._running = key
                await self._run_turn(key, batch)
                self._running = None
                if key not in self._queues:
                    del self._due[key]

    def _next_key(self) -> Key:
        """Whose turn it is: of the caller who is next, the key that is due."""
        keys: dict[Caller, dict[Key, None]] = {}
        for key, queue in self._queues.items():
            for entry in queue:
                keys.setdefault(entry.caller, {})[key] = None
        self._shares.begin_turn(keys)
        return min(keys[self._shares.next(keys)], key=self._due.__getitem__)

    def _take_batch(self, key: Key) -> list[Waiting[Item, Result]]:
        """Take a key's next batch out of its queue, and count its turn."""
        queue, most, work = self._queues.pop(key), self._most(key), self._work_of(key)
        of_callers: dict[Caller, list[Waiting[Item, Result]]] = {}
        for entry in reversed(queue):  # the oldest last, where it is taken from
            of_callers.setdefault(entry.caller, []).append(entry)
        batch: list[Waiting[Item, Result]] = []
        while of_callers and len(batch) < most:
            caller = self._shares.next(of_callers)
            self._shares.charge(caller, work, turn=most * work)
            batch.append(of_callers[caller].pop())
            if not of_callers[caller]:
                del of_callers[caller]
        self._due[key] += work
        self._share += work / len(self._due)
        taken = set(batch)
        if rest := [entry for entry in queue if entry not in taken]:
            self._enqueue(key, rest)  # last of the keys that are due then
        return batch

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
