"""The HTTP API: OpenAI's images API, health, the page. Requests are checked here; generators draw."""

from __future__ import annotations

import asyncio
import time
from pathlib import Path
from typing import Annotated, Any

from fastapi import Body, FastAPI, Request
from fastapi.responses import JSONResponse, Response
from ray.serve.handle import DeploymentHandle
from starlette.exceptions import HTTPException
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from serve.answers import image_events, images_json
from serve.errors import add_error_handlers
from serve.schema import (
    ErrorResponse,
    Health,
    ImageRequest,
    ImagesResponse,
    ModelEntry,
    ModelList,
    Refusal,
    Refused,
)
from serve.service import Service
from serve.settings import Settings

PAGE = Path(__file__).with_name("page")
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
    add_error_handlers(api, service)
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
                return await image_events(service, order, begin)
            delivery = await service.draw(order)
            return images_json(delivery, order, begin)
        except Refused as error:
            code, status = error.refusal.code, error.refusal.status
            raise
        except asyncio.CancelledError:
            code, status = "cancelled", 499
            raise
        except Exception:  # answered by the handler of last resort
            code, status = "internal", 500
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
