"""Which requests an engine takes on: a bound on the work under way, shared between callers."""

from __future__ import annotations

import asyncio
from collections import defaultdict
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from dataclasses import dataclass, field

from fewstep.engine.caller import Caller


class Overloaded(Exception):
    """A request does not fit in the bound, and its caller holds as much of it as any other, or more.

    Attributes:
        work: what is under way now.
        limit: the bound.
    """

    def __init__(self, work: float, limit: float) -> None:
        super().__init__(work, limit)
        self.work, self.limit = work, limit


class NotBegun(Exception):
    """A request waited for its first evaluation for as long as its caller allows.

    Attributes:
        waited_s: how long that is.
    """

    def __init__(self, waited_s: float) -> None:
        super().__init__(waited_s)
        self.waited_s = waited_s


@dataclass(eq=False)
class Place:
    """One request that an engine has taken on."""

    caller: Caller
    """Whose it is."""
    work_left: float
    """Its evaluations that are still to come."""
    begun: bool = False
    """Whether its first evaluation has begun."""
    pushed_out: bool = False
    """Whether it had to make room for another caller's request."""
    scope: asyncio.Timeout = field(default_factory=lambda: asyncio.timeout(None), repr=False)
    """Ends the request from outside, as long as it has not begun."""

    def begin(self) -> None:
        """Note that an evaluation begins: from now on the request is neither too late nor pushed out."""
        if not self.begun and not self.pushed_out and not self.scope.expired():
            self.begun = True
            self.scope.reschedule(None)

    def push_out(self) -> None:
        """End the request with `Overloaded`."""
        self.pushed_out = True
        self.scope.reschedule(asyncio.get_running_loop().time())


class Admission:
    """Takes requests on, up to a bound on their work. Belongs to one event loop.

    Where a request does not fit, room is made at the expense of the caller who holds most of the bound (its work
    divided by its weight): of that caller's requests the newest that have not begun are pushed out. So a caller who
    floods the engine is refused itself, and can't keep others out.

    Args:
        max_work: the bound, in the unit of `Generation.work`.
    """

    def __init__(self, max_work: float) -> None:
        self.max_work = max_work
        self._places: dict[Place, None] = {}  # the newest last

    @property
    def work(self) -> float:
        """What is under way: the evaluations that are still to come of all requests that were taken on."""
        return sum(place.work_left for place in self._places)

    @asynccontextmanager
    async def admit(self, caller: Caller, work: float) -> AsyncIterator[Place]:
        """Take a request on for the time of a `with` block, in which it is generated.

        Args:
            caller: who asks.
            work: all that is asked for.

        Raises:
            Overloaded: there is no room, or it had to be made for another caller.
            NotBegun: no evaluation began within the time that the caller allows.
        """
        self._make_room(caller, work)
        place, latest = Place(caller, work), caller.begin_within_s
        self._places[place] = None
        try:
            async with place.scope:
                if latest is not None:
                    place.scope.reschedule(asyncio.get_running_loop().time() + latest)
                yield place
        except TimeoutError:
            if not place.scope.expired():
                raise
            if place.pushed_out:
                raise Overloaded(self.work, self.max_work) from None
            assert latest is not None, "nothing else ends it"
            raise NotBegun(latest) from None
        finally:
            self._places.pop(place, None)

    def _make_room(self, caller: Caller, work: float) -> None:
        """Push out what has to go for a request.

        Raises:
            Overloaded: nobody holds more than its caller would; nothing is pushed out then.
        """
        excess = self.work + work - self.max_work
        # By caller; the one who comes is the first, so that of equals it is refused.
        held = defaultdict(float, {caller.name: work / caller.weight})
        waiting = defaultdict[str, list[Place]](list)
        for place in self._places:
            held[place.caller.name] += place.work_left / place.caller.weight
            if not place.begun:
                waiting[place.caller.name].append(place)
        leaving: list[Place] = []
        while excess > 0:
            most = max(held, key=held.__getitem__)
            if most == caller.name:
                raise Overloaded(self.work, self.max_work)
            if not waiting[most]:  # the rest of what it holds has begun
                del held[most]
                continue
            place = waiting[most].pop()
            leaving.append(place)
            excess -= place.work_left
            held[most] -= place.work_left / place.caller.weight
        for place in leaving:
            place.push_out()
            del self._places[place]
