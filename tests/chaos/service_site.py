"""The service on surroundings of its own, and clients that ask it for images without a pause."""

from __future__ import annotations

import asyncio
import itertools
import json
import subprocess
import sys
import threading
import urllib.error
import urllib.request
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import boto3
from clock import now
from surroundings import BUCKET, Surroundings, free_port

from fewstep.tracking.address import connect
from fewstep_loadtest.client import Answer, Client
from fewstep_loadtest.soak import MODEL, Reference, mixture
from fewstep_loadtest.versions import register_variants

REPLICAS = 2
FACTORS = (1.0, 0.5, 0.75)
"""Of the head's weights, by version."""
TORN = str(len(FACTORS))
"""The version whose weights are cut in half, in the bucket."""
CLIENTS = 8
DIFFERENT = 100
"""Requests that differ: each of their images has to be drawn once more, to compare with."""
AGAIN_SECONDS = 0.5
"""After which a client tries again that got no answer, or one of 429 or 5xx: OpenAI's clients do that, too."""
TRIES = 120
"""After which it gives up."""
BROKEN = 599
"""Stands for a connection that was refused or broke."""


class ServiceSite(Surroundings):
    """Surroundings with the service: two generators on two nodes, two ingresses, proxy and controller on the head.

    What it offers is a registered model behind an alias, whose files lie in the bucket.
    """

    def __init__(self) -> None:
        super().__init__(RAY_SERVE_PROXY_HEALTH_CHECK_PERIOD_S="1")  # as in infra/Dockerfile
        folders = register_variants(
            MODEL, self.registry, self.made("models"), FACTORS, artifacts=f"s3://{BUCKET}/models"
        )
        self._tear()
        self.point("1")
        self.port = free_port()
        self.address = f"http://127.0.0.1:{self.port}"
        self.deploy()
        self.reference = Reference(
            {f"models:/{MODEL}/{number}": one for number, one in enumerate(folders, 1) if str(number) != TORN}
        )

    def deploy(self) -> None:
        """Start the application, and wait until it can generate.

        Raises:
            CalledProcessError: it can't.
        """
        config = {
            "offer": {
                "models": [{"name": MODEL, "source": f"models:/{MODEL}@champion"}], "follow_alias_every_s": 1,
            },
            "limits": {"max_pixels": 1024, "time_limit_s": 30},
            "engine": {"tracking_uri": self.mlflow.address},
        }  # fmt: skip
        program = Path(__file__).with_name("service_app.py")
        subprocess.run(
            [sys.executable, str(program), self.cluster.address, str(self.port), json.dumps(config)],
            check=True, cwd=self.folder, timeout=300,
        )  # fmt: skip

    def point(self, version: str) -> None:
        """Move the alias that the service follows."""
        connect(self.registry).set_registered_model_alias(MODEL, "champion", version)

    def health(self) -> dict[str, Any]:
        """What /healthz says; nothing where it does not answer."""
        try:
            with urllib.request.urlopen(f"{self.address}/healthz", timeout=5) as response:
                return json.load(response)
        except (urllib.error.URLError, OSError, ValueError):
            return {}

    def is_whole(self) -> bool:
        """Whether all replicas can generate, and serve what is configured."""
        # Their processes, as for some seconds the controller does not know of one that was killed.
        if len(self.processes("ray::ServeReplica:fewstep:Generator")) != REPLICAS:
            return False
        health = self.health()
        return health.get("replicas") == REPLICAS and health.get("offer") == "current"

    def _tear(self) -> None:
        client = boto3.client("s3", region_name="us-east-1")
        source = connect(self.registry).get_model_version_download_uri(MODEL, TORN)
        prefix = source.removeprefix(f"s3://{BUCKET}/")
        self.torn = f"/{BUCKET}/{prefix}"
        """How requests for the torn files begin."""
        for one in client.list_objects_v2(Bucket=BUCKET, Prefix=prefix)["Contents"]:
            if one["Key"].endswith(".safetensors"):
                whole = client.get_object(Bucket=BUCKET, Key=one["Key"])["Body"].read()
                client.put_object(Bucket=BUCKET, Key=one["Key"], Body=whole[: len(whole) // 2])


@dataclass(frozen=True)
class Tried:
    """What came of one attempt of a request."""

    at: float
    """When, by `now`."""
    number: int
    """Of the request, which several attempts may share."""
    request: dict[str, Any] | bytes
    """Bytes are malformed."""
    answer: Answer


class Load:
    """Clients in a thread of their own, which ask for images without a pause from `with` to its end.

    Each takes up what was not answered, or answered 429 or 5xx, until it is.

    Args:
        address: of the service.
        seed: of the mixture of requests.
    """

    def __init__(self, address: str, seed: int) -> None:
        self._address = address
        self._requests: Iterator[tuple[int, dict[str, Any] | bytes]] = enumerate(
            itertools.cycle(mixture(DIFFERENT, seed, malformed_share=0.1))
        )
        self.tried: list[Tried] = []
        self._ending = threading.Event()
        self._thread = threading.Thread(target=lambda: asyncio.run(self._work()))

    def __enter__(self) -> Load:
        self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        """Every request that has begun is answered first, or given up."""
        self._ending.set()
        self._thread.join()

    @property
    def answered(self) -> list[Tried]:
        """The last attempt of each request that has one that is not to be repeated."""
        return [one for one in list(self.tried) if not _again(one.answer)]

    async def _work(self) -> None:
        async with Client(self._address, time_limit_s=60) as client:
            await asyncio.gather(*(self._ask(client) for _ in range(CLIENTS)))

    async def _ask(self, client: Client) -> None:
        while not self._ending.is_set():
            number, request = next(self._requests)
            for _ in range(TRIES):
                answer = await (
                    client.post(request) if isinstance(request, bytes) else client.generate(**request)
                )
                self.tried.append(Tried(now(), number, request, answer))
                if not _again(answer):
                    break
                await asyncio.sleep(AGAIN_SECONDS)


def _again(answer: Answer) -> bool:
    return answer.status == 429 or answer.status >= 500  # BROKEN among them
