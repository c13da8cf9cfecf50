"""Load against a running endpoint, and the bare engine beside it; see `jobs/benchmark_serve.py`."""

from __future__ import annotations

import asyncio
import random
import statistics
import time
from collections import Counter
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np

from serve.client import Answer, Client

SUBJECTS = (
    "red heart",
    "owl",
    "strawberry",
    "umbrella",
    "rocket",
    "green apple",
    "snowman",
    "guitar",
    "fox",
    "moon",
)
STYLES = ("noto", "twemoji", "fluent")


@dataclass(frozen=True)
class Row:
    """One load and what came of it. Latencies are in milliseconds."""

    name: str
    offered_per_s: float | None
    """Requests sent per second; None: the bare engine."""
    images_per_s: float
    p50_ms: float
    p99_ms: float
    mean_batch: float
    outside_engine: float | None
    """Share of the answered requests' time that was spent neither in the queue nor in the engine."""
    refused: int
    """Answered 429."""
    errors: int
    """Answered otherwise than 200 and 429."""


def prompts(count: int, seed: int) -> list[str]:
    """Captions that differ, so that nothing is answered from a cache of prompts."""
    draw = random.Random(seed)
    return [
        f"{draw.choice(SUBJECTS)} {draw.randrange(10**6)}, {draw.choice(STYLES)} style" for _ in range(count)
    ]


async def lone_latency(address: str, *, steps: int, count: int = 20, api_key: str | None = None) -> Row:
    """One request after the other: nobody waits for anybody."""
    async with Client(address, api_key) as client:
        await client.generate(prompt="warm-up", num_inference_steps=steps, decode=False)
        begin, answers = time.perf_counter(), []
        for seed, prompt in enumerate(prompts(count, 1)):
            answers.append(
                await client.generate(prompt=prompt, seed=seed, num_inference_steps=steps, decode=False)
            )
    return _row("alone", None, answers, time.perf_counter() - begin)


async def open_loop(
    address: str, rate: float, seconds: float, *, steps: int, name: str = "", api_key: str | None = None
) -> Row:
    """Send requests at random moments (Poisson), `rate` per second, whether or not earlier ones are answered."""
    draw = random.Random(round(rate * 1000))
    captions = prompts(max(1, round(rate * seconds)), round(rate * 1000) + 1)
    async with Client(address, api_key) as client:
        begin = due = time.perf_counter()
        tasks = []
        for seed, prompt in enumerate(captions):
            due += draw.expovariate(rate)
            await asyncio.sleep(max(0.0, due - time.perf_counter()))
            tasks.append(
                asyncio.create_task(
                    client.generate(prompt=prompt, seed=seed, num_inference_steps=steps, decode=False)
                )
            )
        answers = await asyncio.gather(*tasks)
    return _row(name or f"{rate:.3g} requests/s", rate, answers, time.perf_counter() - begin)


async def saturated(
    address: str,
    clients: int,
    seconds: float,
    *,
    steps: int,
    name: str = "saturated",
    api_key: str | None = None,
) -> Row:
    """`clients` that send their next request as soon as they are answered: what the service can do at most."""
    async with Client(address, api_key) as client:
        answers: list[Answer] = []
        end = time.perf_counter() + seconds

        async def one(number: int) -> None:
            for seed, prompt in enumerate(prompts(10_000, number + 1000)):
                if time.perf_counter() > end:
                    return
                answers.append(
                    await client.generate(prompt=prompt, seed=seed, num_inference_steps=steps, decode=False)
                )

        await asyncio.gather(
            *(one(-1 - number) for number in range(min(clients, 4)))
        )  # warm-up: batches of a few
        answers.clear()
        begin = time.perf_counter()
        end = begin + seconds
        await asyncio.gather(*(one(number) for number in range(clients)))
    return _row(name, None, answers, time.perf_counter() - begin)


def bare_engine(
    source: str, batch_size: int, seconds: float, *, steps: int, threads: int, in_flight: int = 1
) -> Row:
    """The engine in this process: full batches of the same kind, without HTTP and without Ray.

    Args:
        in_flight: batches under way at once; with two, prompts are encoded while the network works.

    Raises:
        UserError: no model lies there.
    """
    import torch

    from fewstep.engine.engine import Engine, ImageTask
    from fewstep.engine.models import ModelStore
    from fewstep.engine.source import ModelSource

    torch.set_num_threads(threads)
    captions = iter(prompts(200_000, 7))
    times: list[float] = []

    async def run() -> float:
        model = await ModelStore({"bare": ModelSource(name="bare", source=source)}).get("bare")
        engine = Engine(max_batch_size=batch_size, max_wait_s=0)

        async def one_batch() -> None:
            start = time.perf_counter()
            tasks = [ImageTask(next(captions), seed) for seed in range(batch_size)]
            await engine.generate(model, tasks, steps=steps)
            times.append(time.perf_counter() - start)

        async def batches() -> None:
            while time.perf_counter() < end:
                await one_batch()

        await one_batch()  # to warm up
        times.clear()
        begin = time.perf_counter()
        end = begin + seconds
        await asyncio.gather(*(batches() for _ in range(in_flight)))
        elapsed = time.perf_counter() - begin
        await engine.close()
        return elapsed

    elapsed = asyncio.run(run())
    milliseconds = np.array(times) * 1000
    return Row(
        name=f"bare engine, batches of {batch_size}" + (f", {in_flight} in flight" if in_flight > 1 else ""),
        offered_per_s=None,
        images_per_s=len(times) * batch_size / elapsed,
        p50_ms=float(np.percentile(milliseconds, 50)),
        p99_ms=float(np.percentile(milliseconds, 99)),
        mean_batch=batch_size,
        outside_engine=None,
        refused=0,
        errors=0,
    )


def table(rows: Sequence[Row]) -> str:
    """The rows as Markdown."""
    lines = [
        "| load | offered/s | images/s | p50 ms | p99 ms | mean batch | outside the engine | refused | errors |",
        "|---|---|---|---|---|---|---|---|---|",
    ]
    for row in rows:
        offered = "" if row.offered_per_s is None else f"{row.offered_per_s:.1f}"
        outside = "" if row.outside_engine is None else f"{row.outside_engine:.0%}"
        lines.append(
            f"| {row.name} | {offered} | {row.images_per_s:.1f} | {row.p50_ms:.0f} | {row.p99_ms:.0f} | "
            f"{row.mean_batch:.1f} | {outside} | {row.refused} | {row.errors} |"
        )
    return "\n".join(lines)


def plot(rows: Sequence[Row], baseline: Row | None, file: Path) -> None:
    """Throughput and latency over the offered rate."""
    import matplotlib

    matplotlib.use("agg")
    from matplotlib import pyplot

    loads = [row for row in rows if row.offered_per_s is not None]
    figure, (left, right) = pyplot.subplots(1, 2, figsize=(11, 4), layout="constrained")
    for limit in dict.fromkeys(row.name.partition(":")[0] for row in loads):
        mine = [row for row in loads if row.name.partition(":")[0] == limit]
        offered = [row.offered_per_s for row in mine]
        left.plot(offered, [row.images_per_s for row in mine], "o-", label=limit)
        line = right.plot(offered, [row.p50_ms for row in mine], "o-", label=f"{limit}, p50")[0]
        right.plot(
            offered, [row.p99_ms for row in mine], "o--", color=line.get_color(), label=f"{limit}, p99"
        )
    if baseline is not None:
        left.axhline(baseline.images_per_s, color="grey", linestyle=":", label=baseline.name)
    left.set(xlabel="requests offered per second", ylabel="images per second", ylim=(0, None))
    right.set(xlabel="requests offered per second", ylabel="latency, ms", yscale="log")
    for axes in (left, right):
        axes.grid(alpha=0.3)
        axes.legend(frameon=False, fontsize=8)
    file.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(file, dpi=130)
    pyplot.close(figure)


def as_metrics(rows: Sequence[Row]) -> dict[str, float]:
    """Figures for MLflow: `serve/<load>/<figure>`."""
    return {
        f"serve/{row.name.replace(':', '').replace(',', '')}/{figure}": float(value)
        for row in rows
        for figure, value in asdict(row).items()
        if isinstance(value, int | float)
    }


def _row(name: str, offered: float | None, answers: list[Answer], elapsed: float) -> Row:
    good = [answer for answer in answers if answer.status == 200]
    statuses = Counter(answer.status for answer in answers)
    images: list[dict[str, Any]] = [image for answer in good for image in answer.body["data"]]
    milliseconds = np.array([answer.seconds * 1000 for answer in good]) if good else np.array([np.nan])
    inside = [sum(answer.body["data"][0]["timings"].values()) for answer in good]
    return Row(
        name=name,
        offered_per_s=offered,
        images_per_s=len(images) / elapsed,
        p50_ms=float(np.percentile(milliseconds, 50)),
        p99_ms=float(np.percentile(milliseconds, 99)),
        # Each evaluation counts once: an image that shared it with b − 1 others stands for 1/b of it.
        mean_batch=len(images) / sum(1 / image["batch_size"] for image in images) if images else 0.0,
        outside_engine=1 - statistics.fmean(inside) / float(milliseconds.mean()) if good else None,
        refused=statuses[429],
        errors=sum(count for status, count in statuses.items() if status not in (200, 429)),
    )
