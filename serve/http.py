"""The HTTP API: OpenAI's images API, health, the page. Requests are checked here; generators draw."""

from __future__ import annotations

import asyncio
import base64
import hashlib
import hmac
import ipaddress
import json
import logging
import secrets
import time
from collections.abc import AsyncIterator
from difflib import get_close_matches
from pathlib import Path
from typing import Annotated, Any

from fastapi import Body, FastAPI, Request
from fastapi.exceptions import RequestValidationError
from fastapi.responses import JSONResponse, Response, StreamingResponse
from ray import serve
from ray.exceptions import RayActorError
from ray.serve.context import _get_global_client
from ray.serve.exceptions import BackPressureError, DeploymentUnavailableError, ReplicaUnavailableError
from ray.serve.handle import DeploymentHandle
from starlette.exceptions import HTTPException
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from fewstep.errors import UserError
from serve.metrics import RequestMetrics
from serve.schema import (
    Delivery,
    Drawn,
    ErrorResponse,
    Health,
    ImageRequest,
    ImagesResponse,
    ModelEntry,
    ModelList,
    Order,
    PreviewImage,
    Refusal,
)
from serve.settings import Settings

log = logging.getLogger("ray.serve")
PAGE = Path(__file__).with_name("page")
STATUS_AGE_S = 1.0
"""How old the replica count of /healthz may be."""
DEAD = (RayActorError, ReplicaUnavailableError)
"""A replica died, or went away, before it answered."""
ERROR_TYPES = {401: "authentication_error", 429: "rate_limit_error"}
SECURITY_HEADERS = {
    "content-security-policy": "default-src 'self'; img-src 'self' data: blob:; frame-ancestors 'none'",
    "x-content-type-options": "nosniff",
    "referrer-policy": "no-referrer",
}

# What the page is made of: path → (file, media type).
PAGE_FILES = {
    "/": ("index.html", "text/html; charset=utf-8"),
    "/page/app.js": ("app.js", "text/javascript; charset=utf-8"),
    "/page/style.css": ("style.css", "text/css; charset=utf-8"),
}


class Refused(Exception):
    """Ends a request with an error response."""

    def __init__(self, refusal: Refusal) -> None:
        super().__init__(refusal.message)
        self.refusal = refusal


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


def build_api(settings: Settings, generator: DeploymentHandle) -> FastAPI:
    """The ASGI application of one ingress replica.

    Raises:
        UserError: it would be open to all beyond loopback.
    """
    service = Service(settings, generator)
    api = FastAPI(
        title="fewstep",
        description="Images in a few network evaluations, by OpenAI's images API.",
        version="1",
        license_info={"name": "Apache-2.0"},
    )
    api.add_middleware(BodyLimit, limit=settings.limits.max_body_bytes)
    _add_error_handlers(api, service)
    errors = {
        code: {"model": ErrorResponse, "description": text}
        for code, text in {
            400: "The request is wrong; the message says what and how to mend it.",
            401: "An API key is needed.",
            404: "No such model.",
            413: "The body is too large.",
            429: "The service is full; `Retry-After` says when to come back.",
            500: "An error of the service.",
            503: "No replica can generate now.",
            504: "The time limit is over.",
        }.items()
    }

    @api.post(
        "/v1/images/generations",
        summary="Draw images",
        response_class=Response,
        responses=errors
        | {
            200: {
                "description": "The images; with `stream`, server-sent events.",
                "content": {
                    "application/json": {
                        "schema": ImagesResponse.model_json_schema(
                            ref_template="#/components/schemas/{model}"
                        )
                    },
                    "text/event-stream": {"schema": {"type": "string"}},
                },
            },
        },
    )
    async def generate(request: Request, body: Annotated[ImageRequest, Body()]) -> Response:
        begin, order, delivery, code, status = time.perf_counter(), None, None, None, 200
        try:
            service.check_key(request)
            order = service.order(body, request.headers.get("x-request-id", ""))
            if body.stream:
                return await _stream(service, order, begin)
            delivery = await service.draw(order)
            return _json(delivery, order, begin)
        except Refused as error:
            code, status = error.refusal.code, error.refusal.status
            raise
        except asyncio.CancelledError:
            code, status = "cancelled", 499
            raise
        finally:
            if not body.stream or status != 200:
                service.answered(order, begin, status, delivery, code)

    @api.get(
        "/v1/models", summary="List models", response_model=ModelList, responses=_only(errors, 401, 500, 503)
    )
    async def models(request: Request) -> ModelList:
        service.check_key(request)
        return ModelList(data=await service.models())

    @api.get(
        "/v1/models/{model:path}",
        summary="One model",
        response_model=ModelEntry,
        responses=_only(errors, 401, 404, 500, 503),
    )
    async def model(request: Request, model: str) -> ModelEntry:
        service.check_key(request)
        for entry in await service.models():
            if entry.id == model:
                return entry
        raise Refused(
            Refusal(
                404, f"there is no model {model!r}: GET /v1/models lists them.", "model_not_found", "model"
            )
        )

    @api.get(
        "/healthz", summary="Ready to generate?", response_model=Health,
        responses={503: {"model": Health, "description": "No replica can generate now."}},
    )  # fmt: skip
    async def healthz() -> Response:
        replicas = await service.replicas()
        health = Health(status="ok" if replicas else "starting", replicas=replicas)
        return JSONResponse(health.model_dump(), 200 if replicas else 503, {"cache-control": "no-store"})

    for path, (file, media_type) in PAGE_FILES.items():
        _add_file(api, path, (PAGE / file).read_bytes(), media_type)
    return api


def _add_file(api: FastAPI, path: str, content: bytes, media_type: str) -> None:
    @api.get(path, include_in_schema=False)
    async def page() -> Response:
        return Response(
            content, media_type=media_type, headers=SECURITY_HEADERS | {"cache-control": "no-cache"}
        )


def _json(delivery: Delivery, order: Order, begin: float) -> Response:
    answer = {
        "created": int(time.time()),
        "data": [_image(image) for image in delivery.images],
        "output_format": order.output_format,
        **_facts(delivery, order),
    }
    headers = _headers(delivery) | {"openai-processing-ms": f"{(time.perf_counter() - begin) * 1000:.0f}"}
    return Response(json.dumps(answer), media_type="application/json", headers=headers)


async def _stream(service: Service, order: Order, begin: float) -> Response:
    """Server-sent events of OpenAI's names. What goes wrong before the first one is an ordinary error response."""
    messages = service.draw_stream(order)
    first = await anext(messages)
    common = {"background": "opaque", "quality": "auto"}

    async def events() -> AsyncIterator[bytes]:
        message, delivery, code, status = first, None, None, 200
        try:
            while True:
                if isinstance(message, PreviewImage):
                    yield _event(
                        "image_generation.partial_image", common, b64_json=_base64(message.image), index=message.index,
                        partial_image_index=message.step - 1, num_inference_steps=message.steps, output_format="png",
                        size="{1}x{0}".format(*order.size) if order.size else "auto",
                    )  # fmt: skip
                else:
                    delivery = message
                    for image in delivery.images:
                        yield _event(
                            "image_generation.completed", common, index=image.index, output_format=order.output_format,
                            usage=NO_USAGE, **_image(image), **_facts(delivery, order),
                        )  # fmt: skip
                message = await anext(messages)
        except StopAsyncIteration:
            pass
        except Refused as error:
            code, status = error.refusal.code, error.refusal.status
            yield _event("error", {}, **_error_body(error.refusal))
        except asyncio.CancelledError:
            code, status = "cancelled", 499
            raise
        finally:
            await messages.aclose()
            service.answered(order, begin, status, delivery, code)

    return StreamingResponse(
        events(),
        media_type="text/event-stream",
        headers={"cache-control": "no-store", "x-accel-buffering": "no"},
    )


NO_USAGE = {
    "input_tokens": 0, "output_tokens": 0, "total_tokens": 0,
    "input_tokens_details": {"image_tokens": 0, "text_tokens": 0},
}  # fmt: skip
"""OpenAI's clients expect the field; nothing is billed here."""


def _event(kind: str, common: dict[str, Any], **fields: Any) -> bytes:
    data = {"type": kind, "created_at": int(time.time())} | common | fields
    return f"event: {kind}\ndata: {json.dumps(data)}\n\n".encode()


def _image(image: Drawn) -> dict[str, Any]:
    return {
        "b64_json": _base64(image.image), "seed": image.seed, "batch_size": image.batch_size, "timings": image.timings,
    }  # fmt: skip


def _facts(delivery: Delivery, order: Order) -> dict[str, Any]:
    return {
        "size": f"{delivery.size[1]}x{delivery.size[0]}",
        "model": delivery.model,
        "version": delivery.version,
        "num_inference_steps": delivery.steps,
        "sampler": order.sampler,
    }


def _headers(delivery: Delivery) -> dict[str, str]:
    return {"x-fewstep-model": f"{delivery.model}@{delivery.version}"}


def _base64(content: bytes) -> str:
    return base64.b64encode(content).decode("ascii")


def _error_body(refusal: Refusal) -> dict[str, Any]:
    kind = ERROR_TYPES.get(
        refusal.status, "server_error" if refusal.status >= 500 else "invalid_request_error"
    )
    return {"error": {"message": refusal.message, "type": kind, "param": refusal.param, "code": refusal.code}}


def _add_error_handlers(api: FastAPI, service: Service) -> None:
    def answer(refusal: Refusal, headers: dict[str, str] | None = None) -> Response:
        headers = dict(headers or {})
        if refusal.status in (429, 503):
            headers["retry-after"] = str(refusal.retry_after_s or service.retry_after_s)
        if refusal.status == 401:
            headers["www-authenticate"] = "Bearer"
        return JSONResponse(_error_body(refusal), refusal.status, headers)

    @api.exception_handler(Refused)
    async def refused(request: Request, error: Refused) -> Response:
        return answer(error.refusal)

    @api.exception_handler(RequestValidationError)
    async def invalid(request: Request, error: RequestValidationError) -> Response:
        try:
            service.check_key(request)  # strangers learn nothing of the API
            refusal = _explain(error)
        except Refused as unknown:
            refusal = unknown.refusal
        service.answered(None, time.perf_counter(), refusal.status, None, refusal.code)
        return answer(refusal)

    @api.exception_handler(HTTPException)
    async def http(request: Request, error: HTTPException) -> Response:
        if error.status_code == 404:
            refusal = Refusal(
                404, f"there is nothing at {request.url.path}: /docs lists the API.", "not_found"
            )
        elif error.status_code == 405:
            refusal = Refusal(
                405,
                f"{request.url.path} does not take {request.method}: /docs lists the API.",
                "method_not_allowed",
            )
        else:
            refusal = Refusal(error.status_code, str(error.detail), "invalid_request")
        return answer(refusal, error.headers)

    @api.exception_handler(Exception)
    async def failed(request: Request, error: Exception) -> Response:
        request_id = request.headers.get("x-request-id", "unknown")
        log.error("request %s failed", request_id, exc_info=error)
        return answer(
            Refusal(
                500,
                f"the service failed; its log has request {request_id}: try again, or report it.",
                "internal",
            )
        )


def _explain(error: RequestValidationError) -> Refusal:
    """The first of pydantic's complaints as one sentence with a remedy."""
    first = error.errors()[0]
    where = [str(part) for part in first["loc"] if part != "body"]
    if first["type"] == "json_invalid" or not where:
        return Refusal(
            400,
            "the body is not a JSON object: send one, as 'content-type: application/json'.",
            "invalid_json",
        )
    param = where[0]
    if first["type"] == "extra_forbidden":
        near = get_close_matches(param, ImageRequest.model_fields, 1)
        remedy = f"did you mean {near[0]!r}?" if near else "leave it out; /docs lists the fields."
        return Refusal(
            400, f"{param[:64]}: there is no such field; {remedy}", "unknown_parameter", param[:64]
        )
    if first["type"] == "missing":
        return Refusal(400, f"{param}: this field is needed; add it.", "missing_parameter", param)
    reason = first["msg"][0].lower() + first["msg"][1:]
    return Refusal(400, f"{param}: {reason}; /docs says what it may be.", "invalid_value", param)


class BodyLimit:
    """ASGI middleware: refuses bodies above a number of bytes, announced or not."""

    def __init__(self, app: ASGIApp, limit: int) -> None:
        self._app, self._limit = app, limit

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            await self._app(scope, receive, send)
            return
        seen = 0

        async def counted() -> Message:
            nonlocal seen
            message = await receive()
            seen += len(message.get("body", b""))
            if seen > self._limit:
                raise HTTPException(413, f"the body is larger than {self._limit} bytes: shorten it.")
            return message

        await self._app(scope, counted, send)


def _only(responses: dict[int, Any], *codes: int) -> dict[int, Any]:
    return {code: responses[code] for code in codes}


def _digest(key: str) -> bytes:
    return hashlib.sha256(key.encode()).digest()


def _running_replicas(deployment: str) -> int:
    application = serve.status().applications.get(serve.get_replica_context().app_name)
    if application is None or deployment not in application.deployments:
        return 0
    return application.deployments[deployment].replica_states.get("RUNNING", 0)


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
