"""Load tests of a running endpoint, and of the engine alone beside it; see `fewstep benchmark serve`."""

from __future__ import annotations

import asyncio
import random
import statistics
import time
from collections import Counter
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import numpy as np

from fewstep_loadtest.client import Answer, Client

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
"""What the captions of the load tests show."""
STYLES = ("noto", "twemoji", "fluent")
"""In whose style."""

PARTS = ("client and proxy", "ingress", "queue", "encode", "network", "policy", "decode")
"""Parts of a request's time. The last five are an image's timings as its response tells them. "ingress" is the rest of
what the service took from reading the request to writing the answer: checks, the way to the generator and back, the
image file. "client and proxy" is what its client waited beyond that."""


@dataclass(frozen=True)
class LoadResult:
    """What came of one load. Latencies are in milliseconds."""

    name: str
    """Of the load."""
    offered_per_s: float | None
    """Requests sent per second; None where clients wait for answers, and for the engine alone."""
    images_per_s: float
    """Throughput."""
    p50_ms: float
    """Median latency."""
    p99_ms: float
    """99th percentile of the latency."""
    mean_batch: float
    """Mean number of images per network evaluation."""
    outside_engine: float | None
    """Share of the answered requests' time that was spent neither in the queue nor in the engine."""
    refused: int
    """Answered 429."""
    errors: int
    """Answered otherwise than 200 and 429."""
    parts_ms: dict[str, float] = field(default_factory=dict)
    """Where the answered requests' time went, by the names of `PARTS`: their means, which add up to the mean latency.
    Empty for the engine alone."""


def prompts(count: int, seed: int) -> list[str]:
    """Captions that differ, so that nothing is answered from a cache of prompts."""
    draw = random.Random(seed)
    return [
        f"{draw.choice(SUBJECTS)} {draw.randrange(10**6)}, {draw.choice(STYLES)} style" for _ in range(count)
    ]


async def lone_latency(
    address: str, *, steps: int, count: int = 20, api_key: str | None = None
) -> LoadResult:
    """The latency of requests that are sent one after the other, so that none waits for another.

    Args:
        address: of the endpoint.
        steps: network evaluations per image.
        count: requests.
        api_key: where the endpoint asks for one.
    """
    async with Client(address, api_key) as client:
        # The first request of a connection and of a batch shape is slower than any later one.
        await client.generate(prompt="warm-up", num_inference_steps=steps, decode=False)
        begin, answers = time.perf_counter(), []
        for seed, prompt in enumerate(prompts(count, 1)):
            answers.append(
                await client.generate(prompt=prompt, seed=seed, num_inference_steps=steps, decode=False)
            )
    return summary("alone", None, answers, time.perf_counter() - begin)


async def open_loop(
    address: str, rate: float, seconds: float, *, steps: int, name: str = "", api_key: str | None = None
) -> LoadResult:
    """Send requests at random moments (Poisson), whether or not earlier ones are answered.

    Args:
        address: of the endpoint.
        rate: requests per second.
        seconds: how long.
        steps: network evaluations per image.
        name: of the result.
        api_key: where the endpoint asks for one.
    """
    draw = random.Random(round(rate * 1000))
    captions = prompts(max(1, round(rate * seconds)), round(rate * 1000) + 1)
    async with Client(address, api_key) as client:
        begin = due = time.perf_counter()
        tasks = []
        for seed, prompt in enumerate(captions):
            # Times are absolute, so that a late request does not delay all later ones.
            due += draw.expovariate(rate)
            await asyncio.sleep(max(0.0, due - time.perf_counter()))
            tasks.append(
                asyncio.create_task(
                    client.generate(prompt=prompt, seed=seed, num_inference_steps=steps, decode=False)
                )
            )
        answers = await asyncio.gather(*tasks)
    return summary(name or f"{rate:.3g} requests/s", rate, answers, time.perf_counter() - begin)


async def saturated(
    address: str,
    clients: int,
    seconds: float,
    *,
    steps: int,
    name: str = "saturated",
    api_key: str | None = None,
) -> LoadResult:
    """The most that the service can do: clients that send their next request as soon as they are answered.

    Args:
        address: of the endpoint.
        clients: how many.
        seconds: how long.
        steps: network evaluations per image.
        name: of the result.
        api_key: where the endpoint asks for one.
    """
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

        await asyncio.gather(*(one(-1 - number) for number in range(min(clients, 4))))  # to warm up
        answers.clear()
        begin = time.perf_counter()
        end = begin + seconds
        await asyncio.gather(*(one(number) for number in range(clients)))
    return summary(name, None, answers, time.perf_counter() - begin)


def bare_engine(
    source: str, batch_size: int, seconds: float, *, steps: int, threads: int, in_flight: int = 1
) -> LoadResult:
    """The engine alone, in this process: full batches of the same kind, without HTTP and without Ray.

    Args:
        source: of the model.
        batch_size: images of a batch.
        seconds: how long.
        steps: network evaluations per image.
        threads: torch threads.
        in_flight: batches under way at once; with two, prompts are encoded while the network works.

    Raises:
        UserError: no model lies there.
    """
    import torch  # only here: the load tests themselves need none

    torch.set_num_threads(threads)
    seconds_each, elapsed = asyncio.run(_engine_times(source, batch_size, seconds, steps, in_flight))
    milliseconds = np.array(seconds_each) * 1000
    return LoadResult(
        name=f"bare engine, batches of {batch_size}" + (f", {in_flight} in flight" if in_flight > 1 else ""),
        offered_per_s=None,
        images_per_s=len(seconds_each) * batch_size / elapsed,
        p50_ms=float(np.percentile(milliseconds, 50)),
        p99_ms=float(np.percentile(milliseconds, 99)),
        mean_batch=batch_size,
        outside_engine=None,
        refused=0,
        errors=0,
    )


async def _engine_times(
    source: str, batch_size: int, seconds: float, steps: int, in_flight: int
) -> tuple[list[float], float]:
    """Seconds that each batch took, and seconds of the whole."""
    from fewstep.engine.engine import Engine
    from fewstep.engine.generation import Generation
    from fewstep.engine.models import ModelStore
    from fewstep.engine.source import ModelSource

    captions, times = iter(prompts(200_000, 7)), list[float]()
    model = await ModelStore({"bare": ModelSource(name="bare", source=source)}).get("bare")
    engine = Engine(max_batch_size=batch_size, max_wait_s=0)

    async def one_batch() -> None:
        start = time.perf_counter()
        await engine.generate(
            [Generation.of(model, next(captions), seed, nfe=steps) for seed in range(batch_size)]
        )
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
    return times, elapsed


def table(results: Sequence[LoadResult]) -> str:
    """The results as a Markdown table."""
    lines = [
        "| load | offered/s | images/s | p50 ms | p99 ms | mean batch | outside the engine | refused | errors |",
        "|---|---|---|---|---|---|---|---|---|",
    ]
    for one in results:
        offered = "" if one.offered_per_s is None else f"{one.offered_per_s:.1f}"
        outside = "" if one.outside_engine is None else f"{one.outside_engine:.0%}"
        lines.append(
            f"| {one.name} | {offered} | {one.images_per_s:.1f} | {one.p50_ms:.0f} | {one.p99_ms:.0f} | "
            f"{one.mean_batch:.1f} | {outside} | {one.refused} | {one.errors} |"
        )
    return "\n".join(lines)


def plot(results: Sequence[LoadResult], baseline: LoadResult | None, file: Path) -> None:
    """Plot throughput and latency over the offered rate.

    Args:
        results: those with an offered rate are plotted, a line per batch limit.
        baseline: its throughput becomes a dotted line.
        file: what is written.
    """
    import matplotlib

    # Files only: a window system need not be there.
    matplotlib.use("agg")
    from matplotlib import pyplot

    loads = [one for one in results if one.offered_per_s is not None]
    figure, (left, right) = pyplot.subplots(1, 2, figsize=(11, 4), layout="constrained")
    for limit in dict.fromkeys(one.name.partition(":")[0] for one in loads):
        mine = [one for one in loads if one.name.partition(":")[0] == limit]
        offered = [one.offered_per_s for one in mine]
        left.plot(offered, [one.images_per_s for one in mine], "o-", label=limit)
        line = right.plot(offered, [one.p50_ms for one in mine], "o-", label=f"{limit}, p50")[0]
        right.plot(
            offered, [one.p99_ms for one in mine], "o--", color=line.get_color(), label=f"{limit}, p99"
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


def plot_parts(results: Sequence[LoadResult], file: Path) -> None:
    """Plot where a request's time goes: one bar per load, made of its `parts_ms`.

    Args:
        results: those of an endpoint are plotted, in order from above.
        file: what is written.
    """
    import matplotlib

    matplotlib.use("agg")
    from matplotlib import pyplot

    shown = [one for one in results if one.parts_ms]
    figure, axes = pyplot.subplots(
        len(shown), 1, figsize=(9, 1 + 1.1 * len(shown)), layout="constrained", squeeze=False
    )
    # A scale for each: a request that waits for others takes many times as long as one alone.
    for one, ax in zip(shown, axes[:, 0], strict=True):
        left = 0.0
        for number, part in enumerate(PARTS):
            ax.barh(0, one.parts_ms[part], left=left, color=f"C{number}", label=part)
            left += one.parts_ms[part]
        ax.set(title=f"{one.name}: {one.images_per_s:.1f} images/s", yticks=[], xlim=(0, None))
    axes[-1, 0].set_xlabel("milliseconds of a request, on average")
    figure.legend(
        *axes[0, 0].get_legend_handles_labels(),
        loc="outside lower center",
        ncols=7,
        frameon=False,
        fontsize=8,
    )
    file.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(file, dpi=110)
    pyplot.close(figure)


def as_metrics(results: Sequence[LoadResult]) -> dict[str, float]:
    """Figures for MLflow: `serve/<load>/<figure>`."""
    return {
        f"serve/{one.name.replace(':', '').replace(',', '')}/{figure}": float(value)
        for one in results
        for figure, value in asdict(one).items()
        if isinstance(value, int | float)
    }


def summary(name: str, offered: float | None, answers: list[Answer], elapsed: float) -> LoadResult:
    """What came of a load.

    Args:
        name: of the load.
        offered: requests sent per second; None where clients waited for answers.
        answers: all of them, each to a request for one image.
        elapsed: seconds that it took.
    """
    good = [answer for answer in answers if answer.status == 200]
    statuses = Counter(answer.status for answer in answers)
    images: list[dict[str, Any]] = [image for answer in good for image in answer.body["data"]]
    # Latencies of answered requests alone: a refusal takes a millisecond, and would flatter the percentiles.
    milliseconds = np.array([answer.seconds * 1000 for answer in good]) if good else np.array([np.nan])
    inside = [sum(answer.body["data"][0]["timings"].values()) for answer in good]
    return LoadResult(
        name=name,
        offered_per_s=offered,
        images_per_s=len(images) / elapsed,
        p50_ms=float(np.percentile(milliseconds, 50)),
        p99_ms=float(np.percentile(milliseconds, 99)),
        # Each evaluation is to count once: an image that shared it with b − 1 others stands for 1/b of it.
        mean_batch=len(images) / sum(1 / image["batch_size"] for image in images) if images else 0.0,
        outside_engine=1 - statistics.fmean(inside) / float(milliseconds.mean()) if good else None,
        refused=statuses[429],
        errors=sum(count for status, count in statuses.items() if status not in (200, 429)),
        parts_ms=_parts_ms(good),
    )


def _parts_ms(answers: list[Answer]) -> dict[str, float]:
    """Mean milliseconds of each of `PARTS`; nothing without answers."""
    if not answers:
        return {}
    # As `LoadResult` says of the engine: of a request for several images, those of the first.
    timings = [answer.body["data"][0]["timings"] for answer in answers]
    inside = {name: statistics.fmean(one[f"{name}_ms"] for one in timings) for name in PARTS[2:]}
    service = statistics.fmean(float(answer.headers["openai-processing-ms"]) for answer in answers)
    whole = statistics.fmean(answer.seconds * 1000 for answer in answers)
    return {PARTS[0]: whole - service, PARTS[1]: service - sum(inside.values())} | inside
