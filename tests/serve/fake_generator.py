"""A generator deployment without network or Ray, for tests of what stands before it."""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable
from types import SimpleNamespace
from typing import Any

from fewstep.engine.caller import Caller
from fewstep_serve.schema import ImageData, ImageRequest, ImagesResponse, Refusal, Timings

Answer = Callable[[ImageRequest], Awaitable[ImagesResponse | Refusal]]


async def answer(request: ImageRequest) -> ImagesResponse:
    """An image for each seed; it is the seed."""
    timings = Timings(queue_ms=0, encode_ms=0, network_ms=0, policy_ms=0, decode_ms=0)
    data = [
        ImageData(b64_json=f"{seed:08d}", seed=seed, batch_size=1, timings=timings) for seed in request.seeds
    ]
    return ImagesResponse(
        created=0, data=data, output_format="png", size="2x2", model="m", version="1", num_inference_steps=4,
        sampler="student", work=4.0 * len(data),
    )  # fmt: skip


async def work(request: ImageRequest, caller: Caller, request_id: str) -> float:
    """What its images count as: four evaluations each."""
    return 4.0 * len(request.seeds)


async def never(request: ImageRequest) -> ImagesResponse:
    """Goes on until it is cancelled."""
    await asyncio.Event().wait()
    raise AssertionError


class FakeGenerator:
    """The handle of such a deployment.

    Attributes:
        asked: every request, with its caller and its id.
        cancelled: how many were cancelled.
    """

    def __init__(self, answer: Answer = answer) -> None:
        self._answer = answer
        self.asked: list[tuple[ImageRequest, Caller, str]] = []
        self.cancelled = 0
        self.work = SimpleNamespace(remote=work)

    @property
    def generate(self) -> FakeGenerator:
        return self

    def remote(self, request: ImageRequest, caller: Caller, request_id: str) -> asyncio.Task[Any]:
        self.asked.append((request, caller, request_id))
        return asyncio.create_task(self._counted(request))

    async def _counted(self, request: ImageRequest) -> ImagesResponse | Refusal:
        try:
            return await self._answer(request)
        except asyncio.CancelledError:
            self.cancelled += 1
            raise
