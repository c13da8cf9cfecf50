"""The dynamic batcher: what shares a batch, what waits, and what is let go."""

from __future__ import annotations

import asyncio
import statistics

from fewstep.engine.batcher import DynamicBatcher, Turn
from fewstep.engine.caller import Caller


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
        return DynamicBatcher(self.run, **{"max_batch_size": 4, "max_wait_s": 0.02} | limits)


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


def test_keys_of_costly_items_get_fewer_turns_and_smaller_batches() -> None:
    """Four images of 4 beside eight of 1: each gets equal work, so the small ones have four turns for one."""

    async def scenario() -> None:
        countdown = Countdown()
        batcher = countdown.batcher(max_batch_size=8, work={"huge": 4.0, "small": 1.0}.__getitem__)
        await asyncio.gather(
            batcher.submit("huge", [(f"h{i}", 2) for i in range(4)]),
            batcher.submit("small", [(f"s{i}", 8) for i in range(8)]),
        )
        turns = [(key, len(items)) for key, items in countdown.turns]
        assert turns[:10] == [("small", 8)] * 3 + [("huge", 2)] + [("small", 8)] * 4 + [
            ("huge", 2),
            ("small", 8),
        ]
        assert turns.count(("huge", 2)) == 4

    asyncio.run(scenario())


def test_a_queue_of_many_costly_keys_delays_a_cheap_one_by_one_of_them_at_most() -> None:
    async def scenario() -> None:
        countdown = Countdown()
        batcher = countdown.batcher(max_batch_size=8, work=lambda key: 1.0 if key == "small" else 16.0)
        huge = [asyncio.create_task(batcher.submit(f"huge {i}", [(f"h{i}", 4)])) for i in range(20)]
        await countdown.second_turn.wait()
        await batcher.submit("small", [("s", 4)])
        assert len(countdown.turns) <= 2 + 1 + 4 + 1
        for one in huge:
            one.cancel()

    asyncio.run(scenario())


def test_a_caller_who_comes_again_and_again_with_costly_items_does_not_overtake() -> None:
    async def scenario() -> None:
        countdown = Countdown()
        batcher = countdown.batcher(max_batch_size=8, work={"huge": 4.0, "small": 1.0}.__getitem__)
        small = asyncio.create_task(batcher.submit("small", [("s", 40)]))
        for i in range(5):
            await batcher.submit("huge", [(f"h{i}", 1)])
        keys = [key for key, _ in countdown.turns]
        assert 3 * keys.count("huge") <= keys.count("small")
        small.cancel()

    asyncio.run(scenario())


def test_a_costly_key_has_its_turn_while_cheap_ones_come_without_end() -> None:
    async def scenario() -> None:
        countdown = Countdown()
        batcher = countdown.batcher(max_batch_size=8, work=lambda key: 4.0 if key == "huge" else 1.0)
        huge = asyncio.create_task(batcher.submit("huge", [("h", 1)]))

        async def one_after_the_other(client: int) -> None:
            for i in range(20):
                await batcher.submit(f"small {client} {i}", [(f"s {client} {i}", 1)])

        clients = [asyncio.create_task(one_after_the_other(client)) for client in range(3)]
        await huge
        assert not any(client.done() for client in clients)
        await asyncio.gather(*clients)

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

    def batcher(self, **limits):
        return DynamicBatcher(self.run, **{"max_batch_size": 2, "max_wait_s": 0} | limits)


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
        batcher = DynamicBatcher(run, max_batch_size=4, max_wait_s=0.01)
        bad, good = await asyncio.gather(
            batcher.submit("bad", [1]), batcher.submit("good", [2]), return_exceptions=True
        )
        assert isinstance(bad, RuntimeError)
        assert good == [2]

    asyncio.run(scenario())


class Turns:
    """Items take one turn; the batches are remembered, and begin when all items have been submitted."""

    def __init__(self, max_batch_size: int, **limits) -> None:
        self.batches: list[str] = []
        self._batcher = DynamicBatcher(self._run, max_batch_size=max_batch_size, max_wait_s=0, **limits)

    async def _run(self, key, entries):
        self.batches.append("".join(entry.caller.name for entry in entries))
        for entry in entries:
            entry.item[0] -= 1
        return [Turn.UNFINISHED if entry.item[0] else None for entry in entries]

    async def run(self, *asked: tuple[Caller, str, int], turns: int = 1) -> list[str]:
        """The callers of each batch's items, where all of these wait: (caller, key, how many items)."""
        calls = (self._batcher.submit(key, [[turns] for _ in range(n)], who) for who, key, n in asked)
        await asyncio.gather(*calls)
        await self._batcher.close()
        return self.batches


A, B = Caller("a"), Caller("b")


def test_callers_share_a_batch_equally_whatever_they_ask_for() -> None:
    batches = asyncio.run(Turns(4).run((A, "k", 20), (B, "k", 4)))
    assert [sorted(batch) for batch in batches] == [list("aabb")] * 2 + [list("aaaa")] * 4


def test_who_asks_for_little_is_in_each_batch_until_it_is_done() -> None:
    batches = asyncio.run(Turns(4).run((A, "k", 20), (B, "k", 1), turns=3))
    assert ["b" in batch for batch in batches[:4]] == [True] * 3 + [False]
    assert all(len(batch) == 4 for batch in batches[:10])


def test_callers_get_work_by_their_weights() -> None:
    heavy = Caller("w", weight=3)
    batches = asyncio.run(Turns(4).run((A, "k", 40), (heavy, "k", 40)))
    assert all(sorted(batch) == list("awww") for batch in batches[:13])


def test_a_caller_gets_no_more_by_asking_for_many_kinds() -> None:
    many = [(A, f"kind {i}", 1) for i in range(8)]
    batches = asyncio.run(Turns(4).run(*many, (B, "k", 16)))
    before = batches[: batches.index("bbbb", 3)]
    assert before.count("a") <= 4 * (before.count("bbbb") + 1)


def test_a_caller_of_costly_items_gets_the_same_work_as_one_of_cheap_ones() -> None:
    turns = Turns(4, work=lambda key: 4.0 if key == "huge" else 1.0)
    batches = asyncio.run(turns.run((A, "huge", 4), (B, "small", 16)))
    assert [sorted(batches[i : i + 2]) for i in range(0, 8, 2)] == [["a", "bbbb"]] * 4


def test_what_a_caller_got_while_nobody_else_wanted_it_is_not_held_against_it() -> None:
    """A long item of b beside many of a: b gets all that it wants, and then no more than half."""

    async def scenario() -> list[str]:
        turns = Turns(4)
        long = asyncio.create_task(turns._batcher.submit("k", [[100]], B))
        await turns._batcher.submit("k", [[30] for _ in range(12)], A)
        turns.batches.clear()
        await turns.run((A, "k", 40), (B, "k", 40))
        await long
        return turns.batches

    batches = asyncio.run(scenario())
    assert "a" in "".join(batches[:2])
    assert all(3 <= "".join(batches[i : i + 2]).count("a") <= 5 for i in range(2, 16, 2))


class Contest:
    """A light caller who asks for one item after the other, beside another who has many under way."""

    def __init__(self, others: int, *, fair: bool = True) -> None:
        self._others, self._other = others, B if fair else A
        self._batcher = DynamicBatcher(self._run, max_batch_size=16, max_wait_s=0)
        self._clock = 0.0

    async def _run(self, key, entries):
        self._clock += 3 + len(entries)  # a batch takes a fixed time, and more for each item
        for entry in entries:
            entry.item[0] -= 1
        await asyncio.sleep(0)
        return [Turn.UNFINISHED if entry.item[0] else None for entry in entries]

    async def _again_and_again(self) -> None:
        while True:
            await self._batcher.submit("k", [[4]], self._other)

    async def latencies(self, count: int) -> list[float]:
        """Those of the light caller, by a clock that advances with the batches' sizes."""
        others = [asyncio.create_task(self._again_and_again()) for _ in range(self._others)]
        times = []
        for _ in range(count):
            await asyncio.sleep(0)
            begin = self._clock
            await self._batcher.submit("k", [[4]], A)
            times.append(self._clock - begin)
        for other in others:
            other.cancel()
        await self._batcher.close()
        return times


def p99(times: list[float]) -> float:
    return statistics.quantiles(times, n=100, method="inclusive")[-1]


def test_a_flood_costs_another_caller_no_more_than_a_busy_service_does() -> None:
    busy, flooded, unfair = (
        p99(asyncio.run(Contest(others, fair=fair).latencies(count)))
        for others, fair, count in ((16, True, 100), (400, True, 100), (400, False, 5))
    )
    assert flooded <= 1.5 * busy
    assert unfair > 10 * busy, "as it is where callers are not told apart"
