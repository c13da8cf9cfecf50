"""What stands between HTTP and the generators: checks, retries, time limits, health."""

from __future__ import annotations

import asyncio
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

from fewstep.engine.caller import Caller
from fewstep_serve.access import AccessControl, require_loopback
from fewstep_serve.audit import AuditLog, Exchange
from fewstep_serve.cluster import http_options, living_replicas
from fewstep_serve.config import ServeConfig
from fewstep_serve.files import ImageFiles
from fewstep_serve.jobs import JobQueue
from fewstep_serve.metrics import RequestMetrics
from fewstep_serve.safety import SafetyCheck
from fewstep_serve.schema import (
    Health,
    ImageRequest,
    ImagesResponse,
    LenientImageRequest,
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
        UserError: anybody beyond loopback could use it, and no key is set; or a setting of it can't be used.
    """

    def __init__(self, config: ServeConfig, generator: DeploymentHandle) -> None:
        self.limits, self.retry_after_s = config.limits, config.retry_after_s
        self._clients = config.clients
        self.files = None if config.urls is None else ImageFiles(config.urls)
        self._prompt_check = SafetyCheck.of("prompt", config.safety.prompt)
        self.jobs = None if config.jobs is None else JobQueue(config.jobs)
        self._generator = generator
        self._access = AccessControl(config.access)
        if self._access.open and not config.access.open_to_all:
            options = http_options()
            assert options is not None, "an ingress runs inside Serve"
            require_loopback(str(options.host))
        self._metrics = RequestMetrics()
        self._audit = None if config.audit_file is None else AuditLog(config.audit_file)
        self._health, self._health_known_at = Health(status="starting", replicas=0, offer=None), 0.0
        self._asking = asyncio.Lock()

    def check_key(self, request: Request) -> Caller:
        """By whose key a request comes, see `AccessControl.who`.

        Raises:
            Refused: keys are set, and this request carries none of them.
        """
        return self._access.who(request)

    def caller(self, name: str) -> Caller:
        """What holds for the key of a name now, see `AccessControl.caller`."""
        return self._access.caller(name)

    async def count(self, caller: Caller, checked: ImageRequest, request_id: str) -> None:
        """Count the work of a checked request, see `AccessControl.count`.

        Raises:
            Refused: it is more than its key may ask for now, or can't be had at all.
        """
        if not self._access.has_rate(caller):
            return
        # Asked of a replica, because sizes and evaluations that a request leaves out are the model's own.
        work = await self._ask("work", checked, caller, request_id)
        if isinstance(work, Refusal):
            raise Refused(work)
        self._access.count(caller, work)

    def check(self, body: ImageRequest) -> ImageRequest:
        """The request with its defaults filled in, ready for a generator.

        Settings of the student's sampler that are left out stay so: each model has its own.

        Raises:
            Refused: it asks for more than the limits allow.
        """
        limits = self.limits
        n, steps = body.n or 1, body.num_inference_steps
        if steps is None and body.sampler == "student" and body.quality is not None:
            steps = self._clients.quality.get(body.quality)

        def refuse(param: str, message: str, code: str = "invalid_value") -> Refused:
            return Refused(Refusal(400, f"{param}: {message}", code, param))

        if body.prompt is not None and len(body.prompt) > limits.max_prompt_characters:
            raise refuse(
                "prompt",
                f"{len(body.prompt)} characters are too many, at most {limits.max_prompt_characters}: shorten it.",
                "prompt_too_long",
            )
        if body.response_format == "url" and self.files is None:
            raise refuse("response_format", "images have no addresses here: ask for b64_json.")
        if body.response_format == "url" and body.stream:
            raise refuse("response_format", "a stream has its images in its events: ask for b64_json.")
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
        plain = body.plain() if isinstance(body, LenientImageRequest) else body
        return plain.model_copy(update=defaults)

    async def check_prompt(self, checked: ImageRequest) -> None:
        """Ask the operator's own check, if there is one, about the prompt and the class of a checked request.

        Raises:
            Refused: it refuses one of them, or fails.
        """
        if self._prompt_check is None:
            return
        for text in (checked.prompt, checked.class_label):
            if text is not None and (refusal := await asyncio.to_thread(self._prompt_check, str(text))):
                raise Refused(refusal)

    @property
    def lenient(self) -> bool:
        """Whether fields that there are not are ignored."""
        return self._clients.unknown_fields == "ignore"

    @property
    def body(self) -> type[ImageRequest]:
        """What a request's body may be."""
        return LenientImageRequest if self.lenient else ImageRequest

    async def with_addresses(self, images: ImagesResponse, base: str) -> ImagesResponse:
        """The images with addresses in place of their files.

        Args:
            images: with their files.
            base: address of the service as the client wrote it.
        """
        assert self.files is not None, "`check` has refused such a request"
        data = []
        for image in images.data:
            assert image.b64_json is not None
            url = await self.files.put(image.b64_json, images.output_format, base)
            data.append(image.model_copy(update={"b64_json": None, "url": url}))
        return images.model_copy(update={"data": data})

    async def generate(
        self, request: ImageRequest, caller: Caller, request_id: str, *, time_limit_s: float | None = None
    ) -> ImagesResponse:
        """The images of a checked request, within the time limit; sent once more where a replica dies.

        Args:
            request: what `check` gave.
            caller: who asks.
            request_id: of the request, or of the job.
            time_limit_s: in place of that of requests.

        Raises:
            Refused: they can't be had.
        """
        messages = self.generate_stream(
            request, caller, request_id, previews=False, time_limit_s=time_limit_s
        )
        images = [message async for message in messages][-1]
        assert isinstance(images, ImagesResponse)
        return images

    async def generate_stream(
        self,
        request: ImageRequest,
        caller: Caller,
        request_id: str,
        *,
        previews: bool = True,
        time_limit_s: float | None = None,
    ) -> AsyncGenerator[PreviewImage | ImagesResponse]:
        """Previews, then the images. Leaving the iteration cancels the request.

        Args:
            request: what `check` gave.
            caller: who asks.
            request_id: of the request, or of the job.
            previews: whether to ask for previews.
            time_limit_s: in place of that of requests.

        Raises:
            Refused: they can't be had.
        """
        shown: set[tuple[int, int]] = set()
        time_limit_s = time_limit_s or self.limits.time_limit_s
        # One deadline for both attempts: the client's patience does not begin anew.
        deadline = asyncio.get_running_loop().time() + time_limit_s
        for attempt in (1, 2):
            try:
                async for message in self._send(request, caller, request_id, previews, deadline):
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
                        f"the images were not ready within {time_limit_s:.3g} s: ask for fewer images or "
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
        entries: list[ModelEntry] = await self._ask("models")
        return [
            entry.model_copy(update={"max_teacher_steps": self.limits.max_teacher_steps}) for entry in entries
        ]

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

    def answered(self, exchange: Exchange) -> None:
        """Count an image request that has been answered, and write its line to the log (Serve adds the request id)."""
        seconds = time.perf_counter() - exchange.begin
        self._metrics.answered(exchange, seconds)
        if self._audit is not None:
            self._audit.write(exchange)
        request, images = exchange.request, exchange.images
        facts: dict[str, Any] = {"status": exchange.status, "milliseconds": round(seconds * 1000, 1)}
        if exchange.code is not None:
            facts["code"] = exchange.code
        if exchange.caller is not None:
            facts["key"] = exchange.key
        if request is not None:
            facts |= {"n": request.n, "seed": request.seed, "sampler": request.sampler}
        if images is not None:
            facts |= {"model": images.model, "version": images.version, "steps": images.num_inference_steps}
            facts |= {"work": images.work, "batch_size": images.data[0].batch_size}
            facts |= images.data[0].timings.model_dump()
        log.info("images %s", " ".join(f"{key}={value}" for key, value in facts.items()), extra=facts)

    async def _ask(self, method: str, *arguments: Any) -> Any:
        """What a generator's method answers.

        Raises:
            Refused: no replica answers.
        """
        for _ in range(2):
            try:
                async with asyncio.timeout(self.limits.time_limit_s):
                    return await getattr(self._generator, method).remote(*arguments)
            except DEAD:
                continue
            except (TimeoutError, BackPressureError, DeploymentUnavailableError):
                break
        raise Refused(Refusal(503, "no replica answers: try again later.", "unavailable", retry_after_s=5))

    async def _send(
        self, request: ImageRequest, caller: Caller, request_id: str, previews: bool, deadline: float
    ) -> AsyncIterator[PreviewImage | ImagesResponse | Refusal]:
        """What a generator gives for a request; it is told to stop where the iteration is left early."""
        if not previews:
            response = self._generator.generate.remote(request, caller, request_id)
            try:
                async with asyncio.timeout_at(deadline):
                    result = await response
            except (asyncio.CancelledError, TimeoutError):
                response.cancel()  # Ray would let the generator go on
                raise
            yield result
            return
        stream: Any = self._generator.options(stream=True).generate_stream.remote(request, caller, request_id)
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
