"""Faults of the service while clients ask it for images; `page.py` makes the table of service.jsonl.

`make chaos ARGS="-k 'service and controller'"` repeats a row.
"""

from __future__ import annotations

import json
import os
import statistics
from collections import Counter
from collections.abc import Iterator
from dataclasses import asdict, dataclass, field
from pathlib import Path

import numpy as np
import pytest
from clock import now
from service_faults import FAULTS, MOVING
from service_site import BROKEN, Load, ServiceSite, Tried
from surroundings import has_redis, wait

from fewstep_loadtest.soak import MODEL

pytestmark = pytest.mark.chaos

RESULTS = Path(os.environ.get("CHAOS_SERVICE_RESULTS", Path(__file__).with_name("service.jsonl")))
SEED = int(os.environ.get("CHAOS_SEED", "1"))
REQUESTS = 500
"""At least so many of each fault: 10,000 of all of them."""
CALM_SECONDS = 3.0
"""So long there was no trouble, where it is over."""
RECOVERY_SECONDS = 180.0
LEVELS = 1
"""By how much a value of an image may differ from its reference: rounding in a batch moves some across a boundary."""


@dataclass
class Outcome:
    """What came of a fault."""

    fault: str
    seed: int
    requests: int = 0
    """That were answered for good."""
    images: int = 0
    """That were compared with their reference."""
    server_errors: int = 0
    """Answers of status 500 and above, those that a client tries again among them."""
    full: int = 0
    """Answers of 429."""
    broken_connections: int = 0
    """Connections that were refused or broke, which clients tried again."""
    trouble_seconds: float = 0.0
    """From the fault's beginning to the last answer that shows it: an error, or a version that the alias had left."""
    whole_seconds: float = 0.0
    """From the fault's beginning until all replicas could generate."""
    median_ms: float = 0.0
    """Of the answers with images."""
    p99_ms: float = 0.0
    """Of the answers with images."""
    broken: list[str] = field(default_factory=list)
    """Claims that do not hold."""


@pytest.fixture(scope="module")
def site() -> Iterator[ServiceSite]:
    site = ServiceSite()
    yield site
    site.close()


@pytest.mark.parametrize("fault", FAULTS)
def test_the_service_stands(fault: str, site: ServiceSite) -> None:
    if fault.endswith("restarted") and not has_redis():
        pytest.skip("the head's state needs redis-server")
    outcome = try_fault(site, fault)
    lines = [json.loads(line) for line in RESULTS.read_text().splitlines()] if RESULTS.exists() else []
    kept = {one["fault"]: one for one in lines} | {fault: asdict(outcome)}
    RESULTS.write_text("".join(json.dumps(kept[name]) + "\n" for name in FAULTS if name in kept))
    print(json.dumps(asdict(outcome)), flush=True)
    assert not outcome.broken


def try_fault(site: ServiceSite, fault: str) -> Outcome:
    """Let a fault happen to a service under load, wait until it is over, and check every answer."""
    outcome = Outcome(fault, SEED)
    site.whole()
    site.point("1")
    wait(site.is_whole, RECOVERY_SECONDS, "the service to be whole before the fault")
    with Load(site.address, SEED) as load:
        wait(lambda: is_over(load, version_of("1")), RECOVERY_SECONDS, "calm before the fault")
        begin = now()
        with FAULTS[fault](site):
            pass
        version = version_of("2" if fault in MOVING else "1")
        try:
            wait(site.is_whole, RECOVERY_SECONDS, "the service to be whole again")
            outcome.whole_seconds = now() - begin
            wait(lambda: is_over(load, version), RECOVERY_SECONDS, "calm after the fault")
        except TimeoutError as error:
            outcome.broken.append(f"{error}: {site.health()}")
        last = max(
            (one.at for one in load.tried if one.at > begin and is_trouble(one, version)), default=begin
        )
        outcome.trouble_seconds = last - begin
        wait(lambda: len(load.answered) >= REQUESTS, RECOVERY_SECONDS, f"{REQUESTS} answers")
    check(site, load, outcome)
    return outcome


def is_trouble(one: Tried, version: str) -> bool:
    """Whether an attempt shows that the fault is not over: it failed, or another version answered it."""
    return one.answer.status >= 500 or one.answer.body.get("version", version) != version


def is_over(load: Load, version: str) -> bool:
    """Whether there have been answers for some time, and nothing was in trouble."""
    recent = [one for one in list(load.tried) if one.at > now() - CALM_SECONDS]
    begun = bool(load.tried) and load.tried[0].at <= now() - CALM_SECONDS
    return begun and bool(recent) and not any(is_trouble(one, version) for one in recent)


def version_of(number: str) -> str:
    """How answers name a version."""
    return f"models:/{MODEL}/{number}"


def check(site: ServiceSite, load: Load, outcome: Outcome) -> None:
    """What is claimed of every answer, whatever happens."""
    statuses = Counter(one.answer.status for one in load.tried)
    outcome.broken_connections, outcome.full = statuses.pop(BROKEN, 0), statuses[429]
    outcome.server_errors = sum(count for status, count in statuses.items() if status >= 500)
    outcome.requests = len(load.answered)
    numbers = Counter(one.number for one in load.answered)
    if twice := [number for number, count in numbers.items() if count > 1]:
        outcome.broken.append(f"{len(twice)} requests were answered twice")
    if lost := {one.number for one in load.tried} - set(numbers):
        outcome.broken.append(f"{len(lost)} requests were never answered")
    wrong: list[str] = []
    good = [one for one in load.answered if one.answer.status == 200]
    for one in load.answered:
        if isinstance(one.request, bytes):
            if not 400 <= one.answer.status < 500:
                wrong.append(f"malformed {one.request[:40]!r} was answered {one.answer.status}")
        elif one.answer.status != 200:
            wrong.append(f"{one.request} was answered {one.answer.status}: {one.answer.message}")
        else:
            outcome.images += len(one.answer.images)
            wrong += differences(site, one)
    outcome.broken += wrong[:3] + ([f"and {len(wrong) - 3} more"] if len(wrong) > 3 else [])
    times = sorted(one.answer.seconds * 1000 for one in good)
    outcome.median_ms = round(statistics.median(times), 1)
    outcome.p99_ms = round(times[int(0.99 * len(times))], 1)


def differences(site: ServiceSite, one: Tried) -> list[str]:
    """What is wrong with the images of an answer."""
    request, version = one.request, one.answer.body["version"]
    assert isinstance(request, dict)
    if len(one.answer.images) != request["n"]:
        return [f"{request} was answered with {len(one.answer.images)} images"]
    settings = {key: request[key] for key in ("num_inference_steps", "temperature", "h") if key in request}
    found = []
    for index, image in enumerate(one.answer.images):
        expected = site.reference.image(version, request["prompt"], request["seed"] + index, **settings)
        if (levels := int(np.abs(image.astype(int) - expected).max())) > LEVELS:
            found.append(f"{request}, image {index}, {version}: {levels} levels off")
    return found
