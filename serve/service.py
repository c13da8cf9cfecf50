"""What stands between HTTP and the generators: checks, retries, time limits, health."""

from __future__ import annotations

import asyncio
import hashlib
import hmac
import ipaddress
import logging
import secrets
import time
from collections.abc import AsyncIterator
from typing import Any

from fastapi import Request
from ray import serve
from ray.exceptions import RayActorError
from ray.serve.context import _get_global_client
from ray.serve.exceptions import BackPressureError, DeploymentUnavailableError, ReplicaUnavailableError
from ray.serve.handle import DeploymentHandle

from fewstep.errors import UserError
from serve.metrics import RequestMetrics
from serve.schema import Delivery, ImageRequest, ModelEntry, Order, PreviewImage, Refusal, Refused
from serve.settings import Settings

log = logging.getLogger("ray.serve")

STATUS_AGE_S = 1.0
"""How old the replica count of /healthz may be."""
DEAD = (RayActorError, ReplicaUnavailableError)
"""A replica died, or went away, before it answered."""


class Service:
    """Between HTTP and the generators: checks, retries, time limits, health.

    Args:
        settings: limits and access.
        generator: handle of the generators.
    """

    def __init__(self, settings: Settings, generator: DeploymentHandle) -> None:
        self.limits, self.retry_after_s = settings.limits, settings.retry_after_s
        self._generator = generator
        self._keys = [_digest(key) for key in settings.access.api_keys()]
        if not self._keys and not settings.access.open_to_all:
            require_loopback(str(_get_global_client().http_config.host))
        self._metrics = RequestMetrics()
        self._replicas, self._replicas_known_at = 0, 0.0
        self._counting = asyncio.Lock()

    def check_key(self, request: Request) -> None:
        """Raises:
        Refused: keys are needed, and this request carries none of them.
        """
        if not self._keys:
            return
        scheme, _, key = request.headers.get("authorization", "").partition(" ")
        given = _digest(key.strip() if scheme.lower() == "bearer" else "")
        matches = [hmac.compare_digest(given, known) for known in self._keys]  # all of them: constant time
        if not any(matches):
            raise Refused(
                Refusal(
                    401,
                    "a valid API key is needed: send it as 'Authorization: Bearer KEY'.",
                    "invalid_api_key",
                )
            )

    def order(self, body: ImageRequest, request_id: str) -> Order:
        """The checked request.

        Raises:
            Refused: it asks for more than the limits allow.
        """
        limits = self.limits
        n, size = body.n or 1, None

        def refuse(param: str, message: str, code: str = "invalid_value") -> Refused:
            return Refused(Refusal(400, f"{param}: {message}", code, param))

        if len(body.prompt) > limits.max_prompt_characters:
            raise refuse(
                "prompt",
                f"{len(body.prompt)} characters are too many, at most {limits.max_prompt_characters}: shorten it.",
                "prompt_too_long",
            )
        if n > limits.max_images:
            raise refuse("n", f"{n} images are too many, at most {limits.max_images}: send several requests.")
        if body.size not in (None, "auto"):
            width, height = map(int, body.size.split("x"))
            if width * height > limits.max_pixels:
                raise refuse(
                    "size",
                    f"{body.size} is too large, at most {limits.max_pixels} pixels: choose a smaller one.",
                )
            size = (height, width)
        steps = body.num_inference_steps
        most = limits.max_steps
        if body.sampler == "teacher":
            most = limits.max_teacher_steps
            if most == 0:
                raise refuse("sampler", "the teacher is not offered here: use 'student'.")
            steps = steps or most
        if steps is not None and steps > most:
            raise refuse("num_inference_steps", f"{steps} are too many, at most {most}: ask for fewer.")
        return Order(
            request_id=request_id,
            model=body.model,
            prompt=body.prompt,
            n=n,
            seed=secrets.randbelow(2**31) if body.seed is None else body.seed,
            size=size,
            steps=steps,
            temperature=body.temperature,
            sampler=body.sampler,
            output_format=body.output_format or "png",
            output_compression=100 if body.output_compression is None else body.output_compression,
            class_label=body.class_label,
            partial_images=body.partial_images,
        )

    async def draw(self, order: Order) -> Delivery:
        """The images of an order, within the time limit; sent once more where a replica dies.

        Raises:
            Refused: they can't be had.
        """
        return await self._last(self.draw_stream(order, previews=False))

    async def draw_stream(
        self, order: Order, *, previews: bool = True
    ) -> AsyncIterator[PreviewImage | Delivery]:
        """Previews, then the images. Leaving the iteration cancels the order.

        Raises:
            Refused: they can't be had.
        """
        shown: set[tuple[int, int]] = set()
        deadline = asyncio.get_running_loop().time() + self.limits.time_limit_s
        for attempt in (1, 2):
            try:
                async for message in self._send(order, previews, deadline):
                    if isinstance(message, Refusal):
                        raise Refused(message)
                    if isinstance(message, PreviewImage):
                        if (message.index, message.step) in shown:
                            continue
                        shown.add((message.index, message.step))
                    yield message
                return
            except DEAD as error:
                log.warning(
                    "a replica died with request %s (attempt %d): %s",
                    order.request_id,
                    attempt,
                    type(error).__name__,
                )
                self._metrics.retried()
            except BackPressureError as error:
                raise Refused(
                    Refusal(429, f"{error.args[0]} requests already wait: try again later.", "overloaded")
                ) from None
            except TimeoutError:
                raise Refused(
                    Refusal(
                        504,
                        f"the images were not ready within {self.limits.time_limit_s:g} s: ask for fewer images or "
                        "steps, or try again later.",
                        "timeout",
                    )
                ) from None
            except DeploymentUnavailableError:
                break
        raise Refused(
            Refusal(
                503, "no replica could finish this request: try again later.", "unavailable", retry_after_s=5
            )
        )

    async def models(self) -> list[ModelEntry]:
        """What is offered.

        Raises:
            Refused: no replica answers.
        """
        for _ in range(2):
            try:
                async with asyncio.timeout(self.limits.time_limit_s):
                    entries = await self._generator.models.remote()
                return [
                    entry.model_copy(update={"max_teacher_steps": self.limits.max_teacher_steps})
                    for entry in entries
                ]
            except DEAD:
                continue
            except (TimeoutError, BackPressureError, DeploymentUnavailableError):
                break
        raise Refused(Refusal(503, "no replica answers: try again later.", "unavailable", retry_after_s=5))

    async def replicas(self) -> int:
        """How many replicas can generate, as the controller knows it."""
        async with self._counting:
            if time.monotonic() - self._replicas_known_at > STATUS_AGE_S:
                self._replicas = await asyncio.to_thread(_running_replicas, self._generator.deployment_name)
                self._replicas_known_at = time.monotonic()
        return self._replicas

    def answered(
        self, order: Order | None, begin: float, status: int, delivery: Delivery | None, code: str | None
    ) -> None:
        """Count a finished request, and write its line to the log (Serve adds the request id)."""
        seconds = time.perf_counter() - begin
        self._metrics.answered(delivery.model if delivery else "", status, seconds, code)
        facts: dict[str, Any] = {"status": status, "milliseconds": round(seconds * 1000, 1)}
        if code is not None:
            facts["code"] = code
        if order is not None:
            facts |= {"n": order.n, "seed": order.seed, "sampler": order.sampler}
        if delivery is not None:
            facts |= {"model": delivery.model, "version": delivery.version, "steps": delivery.steps}
            facts |= {"batch_size": delivery.images[0].batch_size} | delivery.images[0].timings
        log.info("images %s", " ".join(f"{key}={value}" for key, value in facts.items()), extra=facts)

    async def _send(
        self, order: Order, previews: bool, deadline: float
    ) -> AsyncIterator[PreviewImage | Delivery | Refusal]:
        if not previews:
            response = self._generator.draw.remote(order)
            try:
                async with asyncio.timeout_at(deadline):
                    result = await response
            except (asyncio.CancelledError, TimeoutError):
                response.cancel()
                raise
            yield result
            return
        stream = self._generator.options(stream=True).draw_stream.remote(order)
        try:
            while True:
                try:
                    async with asyncio.timeout_at(deadline):
                        message = await anext(stream)
                except StopAsyncIteration:
                    return
                yield message
        finally:
            stream.cancel()

    @staticmethod
    async def _last(messages: AsyncIterator[PreviewImage | Delivery]) -> Delivery:
        return [message async for message in messages][-1]


def require_loopback(host: str) -> None:
    """Refuse to serve everybody by oversight.

    Args:
        host: where HTTP listens, an address or a name.

    Raises:
        UserError: beyond loopback, and no key is set.
    """
    try:
        loopback = host == "localhost" or ipaddress.ip_address(host).is_loopback
    except ValueError:
        loopback = False
    if not loopback:
        raise UserError(
            f"http_options.host is {host}, beyond loopback, and no API key is set: set access.api_keys_file, or "
            "FEWSTEP_API_KEYS where the node starts, or access.open_to_all: true."
        )


def _digest(key: str) -> bytes:
    return hashlib.sha256(key.encode()).digest()


def _running_replicas(deployment: str) -> int:
    application = serve.status().applications.get(serve.get_replica_context().app_name)
    if application is None or deployment not in application.deployments:
        return 0
    return application.deployments[deployment].replica_states.get("RUNNING", 0)
