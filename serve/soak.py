"""A long trial: mixed requests while replicas are killed and an alias moves; see `jobs/soak_serve.py`."""

from __future__ import annotations

import asyncio
import json
import os
import random
import signal
import time
from collections import Counter
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np

from serve.client import Answer, Client

MODEL = "soak"
PROMPTS = [
    f"{subject}, {style} style"
    for subject in ("red heart", "owl", "strawberry", "a flag with three stripes")
    for style in ("noto", "twemoji", "fluent")
]
MALFORMED: tuple[bytes, ...] = (
    b"",
    b"{",
    b"[1, 2]",
    b"\xff\xfe\x00",
    b'{"prompt": 5}',
    b'{"prompt": ""}',
    b'{"n": 1}',
    b'{"prompt": "x", "n": 0}',
    b'{"prompt": "x", "n": 999}',
    b'{"prompt": "x", "size": "0x0"}',
    b'{"prompt": "x", "size": "17x16"}',
    b'{"prompt": "x", "size": "99999x99999"}',
    b'{"prompt": "x", "num_inference_steps": 0}',
    b'{"prompt": "x", "num_inference_steps": 100000}',
    b'{"prompt": "x", "seed": -1}',
    b'{"prompt": "x", "temperature": NaN}',
    b'{"prompt": "x", "model": "no such model"}',
    b'{"prompt": "x", "nonsense": true}',
    b'{"prompt": "x", "class_label": 3}',
    b'{"prompt": "\\ud800"}',
    json.dumps({"prompt": "x " * 400}).encode(),
    json.dumps({"prompt": "x" * 100_000}).encode(),
)


@dataclass
class Tally:
    """What came of a trial."""

    requests: int = 0
    images: int = 0
    malformed: int = 0
    statuses: Counter[int] = field(default_factory=Counter)
    versions: Counter[str] = field(default_factory=Counter)
    kills: int = 0
    accepted_malformed: list[str] = field(default_factory=list)
    failed: list[str] = field(default_factory=list)
    """Well-formed requests that were not answered 200 in the end, and why."""
    wrong: list[str] = field(default_factory=list)
    largest_difference: int = 0
    """Between an image and its reference, in levels of 255."""
    seconds: float = 0.0

    @property
    def server_errors(self) -> int:
        return sum(count for status, count in self.statuses.items() if status >= 500)

    def report(self) -> str:
        statuses = ", ".join(f"{status}: {count}" for status, count in sorted(self.statuses.items()))
        versions = ", ".join(f"{version}: {count}" for version, count in sorted(self.versions.items()))
        lines = [
            f"{self.requests} requests in {self.seconds:.0f} s ({self.malformed} malformed), {self.images} images, "
            f"{self.kills} replicas killed",
            f"statuses    {statuses}",
            f"versions    {versions}",
            f"5xx         {self.server_errors} ({self.server_errors / max(1, self.requests):.3%}; at most 0.1 %)",
            f"malformed   {len(self.accepted_malformed)} not refused with 4xx",
            f"lost        {len(self.failed)}",
            f"wrong       {len(self.wrong)} images (largest difference from the reference: "
            f"{self.largest_difference} of 255 levels)",
        ]
        samples = (self.accepted_malformed + self.failed + self.wrong)[:10]
        return "\n".join(lines + [f"  {sample}" for sample in samples])

    @property
    def passed(self) -> bool:
        return not (self.wrong or self.accepted_malformed or self.failed) and (
            self.server_errors < 0.001 * self.requests
        )


class Reference:
    """The same images drawn in this process, once each.

    Args:
        folders: version → the student's folder.
    """

    def __init__(self, folders: dict[str, Path]) -> None:
        from fewstep.export import FewStepPipeline

        self._pipelines = {
            version: FewStepPipeline.from_pretrained(folder) for version, folder in folders.items()
        }
        self._drawn: dict[tuple[Any, ...], np.ndarray] = {}

    def image(
        self, version: str, prompt: str, seed: int, steps: int, temperature: float | None
    ) -> np.ndarray:
        key = (version, prompt, seed, steps, temperature)
        if key not in self._drawn:
            [self._drawn[key]] = self._pipelines[version](
                prompt, seed=seed, num_inference_steps=steps, temperature=temperature, output_type="np"
            ).images
        return self._drawn[key]


def mixture(count: int, seed: int, malformed_share: float) -> list[bytes | dict[str, Any]]:
    """Requests of all kinds; bytes are malformed ones."""
    draw = random.Random(seed)
    requests: list[bytes | dict[str, Any]] = []
    for _ in range(count):
        if draw.random() < malformed_share:
            requests.append(draw.choice(MALFORMED))
            continue
        body: dict[str, Any] = {
            "model": MODEL, "prompt": draw.choice(PROMPTS), "seed": draw.randrange(8),
            "n": draw.choice((1, 1, 1, 2, 3)), "num_inference_steps": draw.choice((2, 4, 4, 4)),
        }  # fmt: skip
        if draw.random() < 0.2:
            body["temperature"] = 0.5
        requests.append(body)
    return requests


async def soak(
    address: str,
    *,
    requests: int,
    folders: dict[str, Path],
    tracking_uri: str,
    application: str = "fewstep",
    kill_every_s: float = 20.0,
    clients: int = 16,
    malformed_share: float = 0.1,
    seed: int = 0,
) -> Tally:
    """Send a mixture of requests from `clients` that never pause, and check every answer.

    Half-way the alias `champion` of the model moves from version 1 to 2. Answers of 429 are tried again after
    their `Retry-After`, as a client should; nothing else is.

    Args:
        folders: exact version → the student's folder, for references.
        tracking_uri: of the registry that holds the alias.
        kill_every_s: a generator replica is killed (SIGKILL) this often.
    """
    from fewstep.tracking.address import connect

    tally, begin = Tally(), time.perf_counter()
    waiting = list(enumerate(mixture(requests, seed, malformed_share)))[::-1]
    answered: dict[int, tuple[dict[str, Any], Answer]] = {}

    async def killer() -> None:
        while True:
            await asyncio.sleep(kill_every_s)
            victims = await asyncio.to_thread(replica_pids, application)
            if len(victims) > 1:
                os.kill(victims[tally.kills % len(victims)], signal.SIGKILL)
                tally.kills += 1

    async def one(client: Client) -> None:
        while waiting:
            number, request = waiting.pop()
            if number == requests // 2:
                await asyncio.to_thread(
                    connect(tracking_uri).set_registered_model_alias, MODEL, "champion", "2"
                )
            while True:
                is_malformed = isinstance(request, bytes)
                answer = await (client.post(request) if is_malformed else client.generate(**request))
                tally.statuses[answer.status] += 1
                if answer.status != 429:
                    break
                await asyncio.sleep(float(answer.headers.get("retry-after", 1)))
            tally.requests += 1
            if is_malformed:
                tally.malformed += 1
                if not 400 <= answer.status < 500:
                    tally.accepted_malformed.append(f"{request[:60]!r} was answered {answer.status}")
            elif answer.status != 200:
                tally.failed.append(f"{request} was answered {answer.status}: {answer.message}")
            else:
                answered[number] = (request, answer)

    killing = asyncio.create_task(killer())
    async with Client(address) as client:
        await asyncio.gather(*(one(client) for _ in range(clients)))
    killing.cancel()
    tally.seconds = time.perf_counter() - begin
    reference = Reference(folders)
    for request, answer in answered.values():
        _check(request, answer, reference, tally)
    return tally


def _check(request: dict[str, Any], answer: Answer, reference: Reference, tally: Tally) -> None:
    version = answer.body["version"]
    tally.versions[version] += 1
    tally.images += len(answer.images)
    if len(answer.images) != request["n"]:
        tally.wrong.append(f"{request} was answered with {len(answer.images)} images")
    for index, image in enumerate(answer.images):
        expected = reference.image(
            version, request["prompt"], request["seed"] + index, request["num_inference_steps"],
            request.get("temperature"),
        )  # fmt: skip
        difference = int(np.abs(image.astype(int) - expected).max())
        tally.largest_difference = max(tally.largest_difference, difference)
        if difference > 1:
            tally.wrong.append(f"{request}, image {index}, version {version}: {difference} levels off")


def replica_pids(application: str, deployment: str = "Generator") -> list[int]:
    """Process ids of the living replicas of a deployment on this machine."""
    import ray
    from ray.util.state import list_actors

    address = ray.get_runtime_context().gcs_address  # others may run on this machine
    actors = list_actors(address, filters=[("state", "=", "ALIVE")], limit=1000)
    return sorted(actor.pid for actor in actors if f"{application}#{deployment}#" in (actor.name or ""))
