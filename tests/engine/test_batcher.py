"""The dynamic batcher: what shares a batch, what waits, and what is let go."""

from __future__ import annotations

import asyncio

import pytest

from fewstep.engine.batcher import DynamicBatcher, Overloaded, Turn


class Recorder:
    """Runs batches by doubling; remembers them, and can hold them back."""

    def __init__(self) -> None:
        self.batches: list[tuple[str, list[int]]] = []
        self.gate = asyncio.Event()
        self.gate.set()

    async def run(self, key, entries):
        self.batches.append((key, [entry.item for entry in entries]))
        await self.gate.wait()
        return [2 * entry.item for entry in entries]

    def batcher(self, **limits):
        return DynamicBatcher(
            self.run, **{"max_batch_size": 4, "max_wait_s": 0.02, "max_pending": 100} | limits
        )


def test_items_of_one_key_share_batches_up_to_the_limit() -> None:
    async def scenario() -> None:
        recorder = Recorder()
        batcher = recorder.batcher()
        results = await asyncio.gather(*(batcher.submit("a", [i]) for i in range(6)))
        assert results == [[2 * i] for i in range(6)]
        assert recorder.batches == [("a", [0, 1, 2, 3]), ("a", [4, 5])]

    asyncio.run(scenario())


def test_keys_never_mix_and_take_turns() -> None:
    async def scenario() -> None:
        recorder = Recorder()
        batcher = recorder.batcher(max_batch_size=2)
        await asyncio.gather(*(batcher.submit(key, [i]) for i, key in enumerate("ababaa")))
        assert recorder.batches == [("a", [0, 2]), ("b", [1, 3]), ("a", [4, 5])]

    asyncio.run(scenario())


class Countdown:
    """Items are numbers of turns; a result is the sizes of the batches that the item was in."""

    def __init__(self) -> None:
        self.turns: list[tuple[str, list[str]]] = []
        self.sizes: dict[str, list[int]] = {}
        self.second_turn = asyncio.Event()

    async def run(self, key, entries):
        self.turns.append((key, [name for name, _ in (entry.item for entry in entries)]))
        if len(self.turns) == 2:
            self.second_turn.set()
        await asyncio.sleep(0.01)
        results = []
        for name, count in (entry.item for entry in entries):
            sizes = self.sizes.setdefault(name, [])
            sizes.append(len(entries))
            results.append(sizes if len(sizes) == count else Turn.UNFINISHED)
        return results

    def batcher(self):
        return DynamicBatcher(self.run, max_batch_size=2, max_wait_s=0, max_pending=9)


def test_who_arrives_joins_at_the_next_turn_within_the_limit() -> None:
    async def scenario() -> None:
        countdown = Countdown()
        batcher = countdown.batcher()
        early = asyncio.create_task(batcher.submit("a", [("early", 3)]))
        await countdown.second_turn.wait()
        late = asyncio.create_task(batcher.submit("a", [("late", 3), ("last", 1)]))
        assert await early == [[1, 1, 2]]
        assert await late == [[2, 2, 1], [2]]
        assert [items for _, items in countdown.turns[2:]] == [["early", "late"], ["late", "last"], ["late"]]

    asyncio.run(scenario())


def test_a_long_item_and_a_short_one_of_another_key_take_turns() -> None:
    async def scenario() -> None:
        countdown = Countdown()
        batcher = countdown.batcher()
        await asyncio.gather(batcher.submit("a", [("long", 5)]), batcher.submit("b", [("short", 2)]))
        assert [key for key, _ in countdown.turns] == ["a", "b", "a", "b", "a", "a", "a"]

    asyncio.run(scenario())


def test_an_item_whose_caller_left_takes_no_further_turn() -> None:
    async def scenario() -> None:
        countdown = Countdown()
        batcher = countdown.batcher()
        gone = asyncio.create_task(batcher.submit("a", [("gone", 1000)]))
        await countdown.second_turn.wait()
        gone.cancel()
        await batcher.submit("a", [("kept", 2)])
        assert [items for _, items in countdown.turns] == [["gone"], ["gone"], ["kept"], ["kept"]]

    asyncio.run(scenario())


def test_a_call_larger_than_a_batch_is_split_and_answered_in_order() -> None:
    async def scenario() -> None:
        recorder = Recorder()
        assert await recorder.batcher().submit("a", range(10)) == [2 * i for i in range(10)]
        assert [len(items) for _, items in recorder.batches] == [4, 4, 2]

    asyncio.run(scenario())


def test_a_lone_item_waits_no_longer_than_the_limit() -> None:
    async def scenario() -> None:
        begin = asyncio.get_running_loop().time()
        await Recorder().batcher(max_wait_s=0.05).submit("a", [1])
        assert 0.04 < asyncio.get_running_loop().time() - begin < 0.5

    asyncio.run(scenario())


def test_more_than_fits_the_queue_is_refused_whole() -> None:
    async def scenario() -> None:
        recorder = Recorder()
        recorder.gate.clear()
        batcher = recorder.batcher(max_pending=5)
        running = asyncio.create_task(batcher.submit("a", range(4)))
        await asyncio.sleep(0.01)
        waiting = asyncio.create_task(batcher.submit("a", range(4)))
        await asyncio.sleep(0.01)
        with pytest.raises(Overloaded):
            await batcher.submit("a", range(2))
        recorder.gate.set()
        assert len(await running) == len(await waiting) == 4

    asyncio.run(scenario())


def test_a_cancelled_call_leaves_the_queue_and_the_others_are_served() -> None:
    async def scenario() -> None:
        recorder = Recorder()
        recorder.gate.clear()
        batcher = recorder.batcher()
        running = asyncio.create_task(batcher.submit("a", [0]))
        await asyncio.sleep(0.05)
        gone = asyncio.create_task(batcher.submit("a", [1]))
        kept = asyncio.create_task(batcher.submit("a", [2]))
        await asyncio.sleep(0.01)
        gone.cancel()
        await asyncio.sleep(0)
        recorder.gate.set()
        assert [await running, await kept] == [[0], [4]]
        assert recorder.batches == [("a", [0]), ("a", [2])]
        assert batcher.pending == 0

    asyncio.run(scenario())


def test_a_failing_batch_fails_its_own_calls_only() -> None:
    async def run(key, entries):
        if key == "bad":
            raise RuntimeError("out of memory")
        return [entry.item for entry in entries]

    async def scenario() -> None:
        batcher = DynamicBatcher(run, max_batch_size=4, max_wait_s=0.01, max_pending=9)
        bad, good = await asyncio.gather(
            batcher.submit("bad", [1]), batcher.submit("good", [2]), return_exceptions=True
        )
        assert isinstance(bad, RuntimeError)
        assert good == [2]

    asyncio.run(scenario())
