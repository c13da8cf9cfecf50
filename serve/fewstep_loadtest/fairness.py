"""What a flood of one caller costs another's latency, measured at an engine in this process, without HTTP and Ray.

    python -m fewstep_loadtest.fairness --rounds 3

A light caller asks for one image after the other. Beside it the engine is busy with a full batch of somebody else's, or
flooded by somebody who always has more under way than the engine takes on. The conditions take turns. Time is the CPU
time of this process, which other processes of the machine do not lengthen.
"""

from __future__ import annotations

import argparse
import asyncio
import statistics
from collections.abc import Iterator
from time import process_time

import torch

from fewstep.engine.admission import Overloaded
from fewstep.engine.caller import Caller
from fewstep.engine.engine import Engine
from fewstep.engine.generation import Generation
from fewstep.engine.models import LoadedModel, ModelStore
from fewstep.engine.source import ModelSource
from fewstep_loadtest.load import prompts

LIGHT, OTHER = Caller("light"), Caller("other")
MAX_PENDING_WORK = 1024
"""Of the engine; 256 images of the bundled student."""
CONDITIONS = {"busy": 16, "flooded": 256 + 16}
"""Beside what the light caller is measured → requests that the other has under way at a time. A flood is more than the
engine takes on; what it refuses comes back after the light caller's next image."""


class Contest:
    """The two callers at one engine.

    Args:
        model: what generates.
    """

    def __init__(self, model: LoadedModel) -> None:
        self._model, self._engine = model, Engine(max_pending_work=MAX_PENDING_WORK)
        self._light_answered = asyncio.Event()
        self._captions: Iterator[str] = iter(prompts(10**6, 7))

    async def latencies(self, condition: str, seconds: float) -> list[float]:
        """CPU seconds of each request of the light caller.

        Args:
            condition: one of `CONDITIONS`.
            seconds: of CPU time, for which it is measured.
        """
        others = [asyncio.create_task(self._again_and_again()) for _ in range(CONDITIONS[condition])]
        times: list[float] = []
        await self._generate(LIGHT)
        # Until the captions of the first onslaught are encoded, and the queue is as long as it gets
        while self._engine.pending - self._engine.batcher.pending > CONDITIONS["busy"]:
            await self._generate(LIGHT)
        end = process_time() + seconds
        while (begin := process_time()) < end:
            await self._generate(LIGHT)
            times.append(process_time() - begin)
        for other in others:
            other.cancel()
        await asyncio.gather(*others, return_exceptions=True)
        return times

    async def _generate(self, caller: Caller) -> None:
        await self._engine.generate([Generation.of(self._model, next(self._captions), 0)], caller)
        if caller == LIGHT:  # whoever waits for it now
            self._light_answered.set()
            self._light_answered = asyncio.Event()

    async def _again_and_again(self) -> None:
        while True:
            try:
                await self._generate(OTHER)
            except Overloaded:
                await self._light_answered.wait()


async def measure(rounds: int, seconds: float) -> dict[str, list[float]]:
    """Condition → latencies of the light caller, over rounds in which the conditions take turns."""
    store = ModelStore({"student": ModelSource(name="student", source="emoji-student")})
    contest, times = (
        Contest(await store.get("student")),
        {condition: list[float]() for condition in CONDITIONS},
    )
    for _ in range(rounds):
        for condition, known in times.items():
            known += await contest.latencies(condition, seconds)
    return times


def p99(times: list[float]) -> float:
    """The 99th percentile, in the unit of `times`."""
    return statistics.quantiles(times, n=100, method="inclusive")[-1]


def main() -> None:
    """Measure, and print a line per condition and the ratio that counts."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--rounds", type=int, default=3, help="how often each condition is measured")
    parser.add_argument("--seconds", type=float, default=10, help="CPU time of each measurement")
    options = parser.parse_args()
    torch.set_num_threads(1)  # as a replica's
    times = asyncio.run(measure(options.rounds, options.seconds))
    for condition, known in times.items():
        median, last = statistics.median(known) * 1000, p99(known) * 1000
        print(f"{condition:8} {len(known):5} requests   p50 {median:6.1f} ms   p99 {last:6.1f} ms")
    print(f"flooded / busy: p99 {p99(times['flooded']) / p99(times['busy']):.2f}")


if __name__ == "__main__":
    main()
