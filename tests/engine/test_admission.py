"""Which requests an engine takes on: who is refused, who is pushed out for whom, and what is given up as too late."""

from __future__ import annotations

import asyncio

import pytest

from fewstep.engine.admission import Admission, NotBegun, Overloaded, Place
from fewstep.engine.caller import Caller

FLOOD, LIGHT = Caller("flood"), Caller("light")


class Requests:
    """Requests that stay under way until they are told to end."""

    def __init__(self, max_work: float) -> None:
        self.admission = Admission(max_work)
        self._end = asyncio.Event()
        self._tasks: list[asyncio.Task[str]] = []

    async def send(self, caller: Caller, work: float, *, begin: bool = False) -> None:
        """Send one, and let it be taken on or refused."""
        self._tasks.append(asyncio.create_task(self._request(caller, work, begin)))
        await self.settle()

    async def settle(self) -> None:
        """Let everything happen that is due."""
        for _ in range(5):
            await asyncio.sleep(0)

    async def _request(self, caller: Caller, work: float, begin: bool) -> str:
        try:
            async with self.admission.admit(caller, work) as place:
                if begin:
                    place.begin()
                await self._end.wait()
        except Overloaded:
            return "refused"
        except NotBegun:
            return "too late"
        return "done"

    def now(self) -> list[str]:
        """What has become of each, in the order of their sending."""
        return [task.result() if task.done() else "under way" for task in self._tasks]

    async def end(self) -> list[str]:
        """Let all end; what became of each."""
        self._end.set()
        await self.settle()
        assert self.admission.work == 0
        return self.now()


def test_the_bound_counts_work_and_refuses_a_request_whole() -> None:
    async def scenario() -> None:
        requests = Requests(10)
        for work in (4, 4, 3, 2):
            await requests.send(FLOOD, work)
        assert requests.admission.work == 10
        assert await requests.end() == ["done", "done", "refused", "done"]

    asyncio.run(scenario())


def test_work_that_is_done_makes_room() -> None:
    async def scenario() -> None:
        admission = Admission(10)
        async with admission.admit(FLOOD, 8) as place:
            place.work_left -= 6
            async with admission.admit(FLOOD, 8):
                assert admission.work == 10

    asyncio.run(scenario())


def test_a_flood_is_pushed_out_newest_first_for_who_holds_less() -> None:
    async def scenario() -> None:
        requests = Requests(10)
        for _ in range(5):
            await requests.send(FLOOD, 2)
        await requests.send(LIGHT, 3)
        assert requests.now() == ["under way"] * 3 + ["refused"] * 2 + ["under way"]
        await requests.send(FLOOD, 2)
        assert await requests.end() == ["done"] * 3 + ["refused"] * 2 + ["done", "refused"]

    asyncio.run(scenario())


def test_nobody_takes_more_than_half_from_another() -> None:
    async def scenario() -> None:
        requests = Requests(10)
        for _ in range(10):
            await requests.send(FLOOD, 1)
        for _ in range(10):
            await requests.send(LIGHT, 1)
        assert await requests.end() == ["done"] * 5 + ["refused"] * 5 + ["done"] * 5 + ["refused"] * 5

    asyncio.run(scenario())


def test_who_has_a_larger_weight_may_hold_more() -> None:
    async def scenario() -> None:
        requests = Requests(10)
        for _ in range(10):
            await requests.send(FLOOD, 1)
        for _ in range(10):
            await requests.send(Caller("paid", weight=4), 1)
        assert requests.now().count("under way") == 10
        assert (await requests.end())[10:].count("done") == 8

    asyncio.run(scenario())


def test_what_has_begun_is_not_pushed_out() -> None:
    async def scenario() -> None:
        requests = Requests(10)
        await requests.send(FLOOD, 6, begin=True)
        await requests.send(FLOOD, 4)
        await requests.send(LIGHT, 4)
        await requests.send(Caller("third"), 4)
        assert await requests.end() == ["done", "refused", "done", "refused"]

    asyncio.run(scenario())


def test_a_request_that_would_be_refused_anyway_pushes_nothing_out() -> None:
    async def scenario() -> None:
        requests = Requests(10)
        await requests.send(FLOOD, 8)
        await requests.send(LIGHT, 2)
        await requests.send(LIGHT, 10)
        assert await requests.end() == ["done", "done", "refused"]

    asyncio.run(scenario())


def test_what_has_not_begun_in_time_is_given_up_and_what_has_is_not() -> None:
    async def scenario() -> None:
        requests = Requests(10)
        hasty = Caller("hasty", begin_within_s=0)
        await requests.send(hasty, 1)
        await requests.send(hasty, 1, begin=True)
        await requests.send(Caller("patient", begin_within_s=600), 1)
        assert requests.now() == ["too late", "under way", "under way"]
        assert await requests.end() == ["too late", "done", "done"]

    asyncio.run(scenario())


def test_a_time_limit_of_the_request_s_own_stays_one() -> None:
    async def scenario() -> None:
        async with asyncio.timeout(0), Admission(10).admit(Caller("hasty", begin_within_s=600), 1):
            await asyncio.sleep(600)

    with pytest.raises(TimeoutError):
        asyncio.run(scenario())


def test_a_request_that_is_pushed_out_begins_no_more() -> None:
    places = []

    async def scenario() -> None:
        places.append(place := Place(FLOOD, 1))
        async with place.scope:
            place.push_out()
            place.begin()  # a batch may take it before it has noticed
            await asyncio.sleep(600)

    with pytest.raises(TimeoutError):
        asyncio.run(scenario())
    assert not places[0].begun
