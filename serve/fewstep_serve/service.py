"""What stands between HTTP and the generators: checks, retries, time limits, health."""

from __future__ import annotations

import asyncio
import hashlib
import hmac
import ipaddress
import logging
import secrets
import time
from collections.abc import AsyncGenerator, AsyncIterator
from typing import Any, get_args

from fastapi import Request
from ray import serve
from ray.exceptions import RayActorError
from ray.serve.exceptions import BackPressureError, DeploymentUnavailableError, ReplicaUnavailableError
from ray.serve.handle import DeploymentHandle

from fewstep.errors import UserError
from fewstep_serve.cluster import http_options, living_replicas
from fewstep_serve.config import ServeConfig
from fewstep_serve.metrics import RequestMetrics
from fewstep_serve.schema import (
    Health,
    ImageRequest,
    ImagesResponse,
    ModelEntry,
    OfferState,
    OfferStatus,
    PreviewImage,
    Refusal,
    Refused,
)

log = logging.getLogger("ray.serve")

STATUS_AGE_S = 1.0
"""How old the answer of /healthz may be."""
OFFER_STATUS_S = 5.0
"""How long replicas may take to say whether they serve what was configured last."""
DEAD = (RayActorError, ReplicaUnavailableError)
"""What Ray raises where a replica died, or was taken away, before it answered."""


class Service:
    """Between HTTP and the generators: checks, retries, time limits, health.

    Args:
        config: limits and access.
        generator: handle of the generators.

    Raises:
        UserError: anybody beyond loopback could use it, and no key is set.
    """

    def __init__(self, config: ServeConfig, generator: DeploymentHandle) -> None:
        self.limits, self.retry_after_s = config.limits, config.retry_after_s
        self._generator = generator
        self._keys = [_digest(key) for key in config.access.api_keys()]
        if not self._keys and not config.access.open_to_all:
            options = http_options()
            assert options is not None, "an ingress runs inside Serve"
            require_loopback(str(options.host))
        self._metrics = RequestMetrics()
        self._health, self._health_known_at = Health(status="starting", replicas=0, offer=None), 0.0
        self._asking = asyncio.Lock()

    def check_key(self, request: Request) -> None:
        """Let a request pass that carries one of the keys, or any where none is set.

        Raises:
            Refused: keys are set, and this request carries none of them.
        """
        if not self._keys:
            return
        scheme, _, key = request.headers.get("authorization", "").partition(" ")
        given = _digest(key.strip() if scheme.lower() == "bearer" else "")
        # All are compared, and each in constant time: how long it takes tells nothing of the keys.
        matches = [hmac.compare_digest(given, known) for known in self._keys]
        if not any(matches):
            raise Refused(
                Refusal(
                    401,
                    "a valid API key is needed: send it as 'Authorization: Bearer KEY'.",
                    "invalid_api_key",
                )
            )

    def check(self, body: ImageRequest) -> ImageRequest:
        """The request with its defaults filled in, ready for a generator.

        Settings of the student's sampler that are left out stay so: each model has its own.

        Raises:
            Refused: it asks for more than the limits allow.
        """
        limits = self.limits
        n, steps = body.n or 1, body.num_inference_steps

        def refuse(param: str, message: str, code: str = "invalid_value") -> Refused:
            return Refused(Refusal(400, f"{param}: {message}", code, param))

        if body.prompt is not None and len(body.prompt) > limits.max_prompt_characters:
            raise refuse(
                "prompt",
                f"{len(body.prompt)} characters are too many, at most {limits.max_prompt_characters}: shorten it.",
                "prompt_too_long",
            )
        if n > limits.max_images:
            raise refuse("n", f"{n} images are too many, at most {limits.max_images}: send several requests.")
        most = (
            limits.max_pixels
        )  # those of the model, as a multiple of its own size, are the generator's to check
        if most is not None and body.pixels is not None and body.pixels[0] * body.pixels[1] > most:
            raise refuse("size", f"{body.size} is too large, at most {most} pixels: choose a smaller one.")
        most = limits.max_steps
        if body.sampler == "teacher":
            most = limits.max_teacher_steps
            if most == 0:
                raise refuse("sampler", "the teacher is not offered here: use 'student'.")
            steps = steps or most
        if steps is not None and steps > most:
            raise refuse("num_inference_steps", f"{steps} are too many, at most {most}: ask for fewer.")
        defaults = {
            "n": n,
            # Short enough to be typed again; the full range is for those who choose one.
            "seed": secrets.randbelow(2**31) if body.seed is None else body.seed,
            "size": body.size or "auto",
            "num_inference_steps": steps,
            "output_format": body.output_format or "png",
            "output_compression": 100 if body.output_compression is None else body.output_compression,
        }
        return body.model_copy(update=defaults)

    async def generate(self, request: ImageRequest, request_id: str) -> ImagesResponse:
        """The images of a checked request, within the time limit; sent once more where a replica dies.

        Args:
            request: what `check` gave.
            request_id: for the log.

        Raises:
            Refused: they can't be had.
        """
        messages = self.generate_stream(request, request_id, previews=False)
        images = [message async for message in messages][-1]
        assert isinstance(images, ImagesResponse)
        return images

    async def generate_stream(
        self, request: ImageRequest, request_id: str, *, previews: bool = True
    ) -> AsyncGenerator[PreviewImage | ImagesResponse]:
        """Previews, then the images. Leaving the iteration cancels the request.

        Args:
            request: what `check` gave.
            request_id: for the log.
            previews: whether to ask for previews.

        Raises:
            Refused: they can't be had.
        """
        shown: set[tuple[int, int]] = set()
        # One deadline for both attempts: the client's patience does not begin anew.
        deadline = asyncio.get_running_loop().time() + self.limits.time_limit_s
        for attempt in (1, 2):
            try:
                async for message in self._send(request, previews, deadline):
                    if isinstance(message, Refusal):
                        raise Refused(message)
                    if isinstance(message, PreviewImage):
                        if (message.index, message.step) in shown:
                            continue  # the second attempt begins anew
                        shown.add((message.index, message.step))
                    yield message
                return
            # Sending it again is safe: a request has no effect but its images, which depend on its seed alone.
            except DEAD as error:
                log.warning(
                    "a replica died with request %s (attempt %d): %s",
                    request_id,
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
            except DeploymentUnavailableError:  # it failed to start: another attempt would fail, too
                break
        raise Refused(
            Refusal(
                503, "no replica could finish this request: try again later.", "unavailable", retry_after_s=5
            )
        )

    async def models(self) -> list[ModelEntry]:
        """The models on offer.

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

    async def health(self) -> Health:
        """How many replicas can generate, as the controller knows it, and whether they serve what was set last."""
        # One question at a time, remembered for a moment: health checks must not burden the controller.
        async with self._asking:
            if time.monotonic() - self._health_known_at > STATUS_AGE_S:
                application, deployment = (
                    serve.get_replica_context().app_name,
                    self._generator.deployment_name,
                )
                replicas = await asyncio.to_thread(living_replicas, application, deployment)
                replicas = self._health.replicas if replicas is None else replicas
                offer = await self.offer_status() if replicas else None
                self._health = Health(
                    status="ok" if replicas else "starting", replicas=replicas, offer=offer and offer.state
                )
                self._health_known_at = time.monotonic()
        return self._health

    async def offer_status(self) -> OfferStatus | None:
        """Whether all replicas serve what was configured last; None where none of them answers."""
        try:
            async with asyncio.timeout(OFFER_STATUS_S):
                # Of every replica: one may have what another can't load. What died meanwhile gives an exception.
                answers = await self._generator.broadcast("offer_status").results_async(
                    return_exceptions=True
                )
        except (TimeoutError, DeploymentUnavailableError):
            return None
        known = [answer for answer in answers if isinstance(answer, OfferStatus)]
        return max(known, key=lambda one: get_args(OfferState).index(one.state), default=None)

    def answered(
        self,
        request: ImageRequest | None,
        begin: float,
        status: int,
        images: ImagesResponse | None,
        code: str | None,
    ) -> None:
        """Count an answered request, and write its line to the log (Serve adds the request id).

        Args:
            request: what `check` gave; None where the request did not come so far.
            begin: when it came, by `time.perf_counter`.
            status: of HTTP.
            images: what it was answered with; None where it was not.
            code: of the error, if it was one.
        """
        seconds = time.perf_counter() - begin
        self._metrics.answered(images.model if images else "", status, seconds, code)
        facts: dict[str, Any] = {"status": status, "milliseconds": round(seconds * 1000, 1)}
        if code is not None:
            facts["code"] = code
        if request is not None:
            facts |= {"n": request.n, "seed": request.seed, "sampler": request.sampler}
        if images is not None:
            facts |= {"model": images.model, "version": images.version, "steps": images.num_inference_steps}
            facts |= {"batch_size": images.data[0].batch_size} | images.data[0].timings.model_dump()
        log.info("images %s", " ".join(f"{key}={value}" for key, value in facts.items()), extra=facts)

    async def _send(
        self, request: ImageRequest, previews: bool, deadline: float
    ) -> AsyncIterator[PreviewImage | ImagesResponse | Refusal]:
        """What a generator gives for a request; it is told to stop where the iteration is left early."""
        if not previews:
            response = self._generator.generate.remote(request)
            try:
                async with asyncio.timeout_at(deadline):
                    result = await response
            except (asyncio.CancelledError, TimeoutError):
                response.cancel()  # Ray would let the generator go on
                raise
            yield result
            return
        stream: Any = self._generator.options(stream=True).generate_stream.remote(request)
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


def require_loopback(host: str) -> None:
    """Refuse to serve the whole network unless somebody has decided so.

    Args:
        host: where HTTP listens, an address or a name.

    Raises:
        UserError: it is not this machine's loopback.
    """
    try:
        loopback = host == "localhost" or ipaddress.ip_address(host).is_loopback
    except ValueError:  # a name: where it leads can't be told here
        loopback = False
    if not loopback:
        raise UserError(
            f"http_options.host is {host}, beyond loopback, and no API key is set: set access.api_keys_file, or "
            "FEWSTEP_API_KEYS where the node starts, or access.open_to_all: true."
        )


def _digest(key: str) -> bytes:
    # Digests have one length, which the comparison in constant time needs.
    return hashlib.sha256(key.encode()).digest()
