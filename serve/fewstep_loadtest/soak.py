"""A long trial: mixed requests while replicas are killed and an alias moves; see `fewstep benchmark soak`."""

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

from fewstep_loadtest.client import Answer, Client

MODEL = "soak"
"""Name of the registered model that is served."""
PROMPTS = [
    f"{subject}, {style} style"
    for subject in ("red heart", "owl", "strawberry", "a flag with three stripes")
    for style in ("noto", "twemoji", "fluent")
]
"""Few enough that every image's reference is needed many times."""
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
    b'{"prompt": "x", "h": -0.1}',
    b'{"prompt": "x", "h": Infinity}',
    b'{"prompt": "x", "model": "no such model"}',
    b'{"prompt": "x", "nonsense": true}',
    b'{"prompt": "x", "class_label": 3}',
    b'{"prompt": "\\ud800"}',
    json.dumps({"prompt": "x " * 400}).encode(),
    json.dumps({"prompt": "x" * 100_000}).encode(),
)
"""Bodies that have to be refused with a status of 400 to 499."""


@dataclass
class Tally:
    """What came of a trial."""

    requests: int = 0
    """Requests that were answered for good, retries after a 429 not counted."""
    images: int = 0
    """Images that were checked."""
    malformed: int = 0
    """How many of the requests were malformed."""
    statuses: Counter[int] = field(default_factory=Counter)
    """Responses by HTTP status."""
    versions: Counter[str] = field(default_factory=Counter)
    """Responses by the version that made their images."""
    kills: int = 0
    """Replicas that were killed."""
    accepted_malformed: list[str] = field(default_factory=list)
    """Malformed requests that were not refused with a status of 400 to 499."""
    failed: list[str] = field(default_factory=list)
    """Well-formed requests that were not answered 200 in the end, and why."""
    wrong: list[str] = field(default_factory=list)
    """Images that are missing, or differ from their reference by more than one level."""
    largest_difference: int = 0
    """Between an image and its reference, in levels of 255."""
    seconds: float = 0.0
    """How long the trial took."""

    @property
    def server_errors(self) -> int:
        """Responses of status 500 and above."""
        return sum(count for status, count in self.statuses.items() if status >= 500)

    def report(self) -> str:
        """All of it in a few lines."""
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
        """Whether every well-formed request got its right images, and at most 0.1 % of responses were server errors."""
        return not (self.wrong or self.accepted_malformed or self.failed) and (
            self.server_errors < 0.001 * self.requests
        )


class Reference:
    """Makes the same images in this process, once each.

    Args:
        folders: version → the student's folder.
    """

    def __init__(self, folders: dict[str, Path]) -> None:
        from fewstep.student import FewStepPipeline

        self._pipelines = {
            version: FewStepPipeline.from_pretrained(folder) for version, folder in folders.items()
        }
        self._known: dict[tuple[Any, ...], np.ndarray] = {}

    def image(self, version: str, prompt: str, seed: int, **settings: Any) -> np.ndarray:
        """The image as (H, W, 3) uint8; `settings` are the pipeline's, as `num_inference_steps`."""
        key = (version, prompt, seed, *sorted(settings.items()))
        if key not in self._known:
            [image] = self._pipelines[version](prompt, seed=seed, **settings).images
            self._known[key] = np.asarray(image)
        return self._known[key]


def mixture(count: int, seed: int, malformed_share: float) -> list[bytes | dict[str, Any]]:
    """Random requests of all kinds; those that are bytes are malformed.

    Args:
        count: how many.
        seed: of the choice.
        malformed_share: how many of them are malformed, from 0 to 1.
    """
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
        if draw.random() < 0.2:
            body["h"] = 0.5
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
        address: of the endpoint.
        requests: how many.
        folders: exact version → the student's folder, for references.
        tracking_uri: of the registry that holds the alias.
        application: name of the application, whose replicas are killed.
        kill_every_s: a generator replica is killed (SIGKILL) this often.
        clients: how many send requests at a time.
        malformed_share: how many of the requests are malformed, from 0 to 1.
        seed: of the mixture.
    """
    from fewstep.tracking.address import connect

    tally, begin = Tally(), time.perf_counter()
    waiting = list(enumerate(mixture(requests, seed, malformed_share)))[::-1]  # `pop` takes the last
    answered: dict[int, tuple[dict[str, Any], Answer]] = {}

    async def killer() -> None:
        while True:
            await asyncio.sleep(kill_every_s)
            victims = await asyncio.to_thread(replica_pids, application)
            if len(victims) > 1:  # the last one alone could serve no retry
                os.kill(victims[tally.kills % len(victims)], signal.SIGKILL)
                tally.kills += 1

    async def one(client: Client) -> None:
        while waiting:
            number, request = waiting.pop()
            if number == requests // 2:
                await asyncio.to_thread(
                    connect(tracking_uri).set_registered_model_alias, MODEL, "champion", "2"
                )
            answer = await _ask(client, request, tally)
            if answer.status == 200 and not isinstance(request, bytes):
                answered[number] = (request, answer)

    killing = asyncio.create_task(killer())
    async with Client(address) as client:
        await asyncio.gather(*(one(client) for _ in range(clients)))
    killing.cancel()
    tally.seconds = time.perf_counter() - begin
    # Images are compared at the end: references would take the service's cores during the trial.
    reference = Reference(folders)
    for request, answer in answered.values():
        _check(request, answer, reference, tally)
    return tally


async def _ask(client: Client, request: bytes | dict[str, Any], tally: Tally) -> Answer:
    """Send a request until it is answered other than 429, and count what came of it."""
    while True:
        answer = await (client.post(request) if isinstance(request, bytes) else client.generate(**request))
        tally.statuses[answer.status] += 1
        if answer.status != 429:
            break
        await asyncio.sleep(float(answer.headers.get("retry-after", 1)))
    tally.requests += 1
    if isinstance(request, bytes):
        tally.malformed += 1
        if not 400 <= answer.status < 500:
            tally.accepted_malformed.append(f"{request[:60]!r} was answered {answer.status}")
    elif answer.status != 200:
        tally.failed.append(f"{request} was answered {answer.status}: {answer.message}")
    return answer


def _check(request: dict[str, Any], answer: Answer, reference: Reference, tally: Tally) -> None:
    version = answer.body["version"]
    tally.versions[version] += 1
    tally.images += len(answer.images)
    if len(answer.images) != request["n"]:
        tally.wrong.append(f"{request} was answered with {len(answer.images)} images")
    for index, image in enumerate(answer.images):
        settings = {
            key: request[key] for key in ("num_inference_steps", "temperature", "h") if key in request
        }
        expected = reference.image(version, request["prompt"], request["seed"] + index, **settings)
        difference = int(np.abs(image.astype(int) - expected).max())
        tally.largest_difference = max(tally.largest_difference, difference)
        # Rounding in a batch may move a value across the boundary between two levels.
        if difference > 1:
            tally.wrong.append(f"{request}, image {index}, version {version}: {difference} levels off")


def replica_pids(application: str, deployment: str = "Generator") -> list[int]:
    """Process ids of the living replicas of an application's deployment."""
    import ray
    from ray.util.state import list_actors

    address = ray.get_runtime_context().gcs_address  # others may run on this machine
    actors = list_actors(address, filters=[("state", "=", "ALIVE")], limit=1000)
    name = f"{application}#{deployment}#"
    return sorted(actor.pid for actor in actors if actor.pid is not None and name in (actor.name or ""))
