"""The HTTP API: OpenAI's images API, health, the page. Requests are checked here, and generators generate."""

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

from fewstep_serve.answers import image_events, images_json
from fewstep_serve.api_page import api_page
from fewstep_serve.config import ServeConfig
from fewstep_serve.errors import add_error_handlers
from fewstep_serve.schema import (
    ErrorResponse,
    Health,
    ImageRequest,
    ImagesResponse,
    ModelEntry,
    ModelList,
    Refusal,
    Refused,
)
from fewstep_serve.service import Service

PAGE = Path(__file__).with_name("page")
SECURITY_HEADERS = {
    "content-security-policy": "default-src 'self'; img-src 'self' data: blob:; frame-ancestors 'none'",
    "x-content-type-options": "nosniff",
    "referrer-policy": "no-referrer",
}

PAGE_FILES = {
    "/": ("index.html", "text/html; charset=utf-8"),
    "/page/app.js": ("app.js", "text/javascript; charset=utf-8"),
    "/page/style.css": ("style.css", "text/css; charset=utf-8"),
}
"""What the page is made of: path → (file, media type)."""

ERRORS = {
    400: "The request is wrong; the message says what and how to mend it.",
    401: "An API key is needed.",
    404: "No such model.",
    413: "The body is too large.",
    429: "The service is full; `Retry-After` says when to come back.",
    500: "An error of the service.",
    503: "No replica can generate now.",
    504: "The time limit is over.",
}
"""What the API's document says of errors, by HTTP status."""


def build_api(config: ServeConfig, generator: DeploymentHandle) -> FastAPI:
    """The ASGI application of one ingress replica.

    Raises:
        UserError: anybody beyond loopback could use it, and no key is set.
    """
    service = Service(config, generator)
    api = FastAPI(
        title="fewstep",
        description="Images in a few network evaluations, by OpenAI's images API.",
        version="1",
        license_info={"name": "Apache-2.0"},
        # Its pages of the API take scripts from a public server.
        docs_url=None,
        redoc_url=None,
    )
    api.add_middleware(BodyLimit, limit=config.limits.max_body_bytes)
    add_error_handlers(api, service)
    _add_images(api, service)
    _add_models(api, service)

    @api.get(
        "/healthz", summary="Ready to generate?", response_model=Health,
        responses={503: {"model": Health, "description": "No replica can generate now."}},
    )  # fmt: skip
    async def healthz() -> Response:  # without a key: load balancers have none
        health = await service.health()
        return JSONResponse(
            health.model_dump(), 200 if health.replicas else 503, {"cache-control": "no-store"}
        )

    for path, (file, media_type) in PAGE_FILES.items():
        _add_file(api, path, (PAGE / file).read_bytes(), media_type)
    _add_file(api, "/docs", api_page(api.openapi()).encode(), "text/html; charset=utf-8")
    return api


def _add_images(api: FastAPI, service: Service) -> None:
    """`POST /v1/images/generations`."""
    ok = {
        "description": "The images; with `stream`, server-sent events.",
        "model": ImagesResponse,
        "content": {"text/event-stream": {"schema": {"type": "string"}}},
    }

    @api.post(
        "/v1/images/generations",
        summary="Generate images",
        response_class=Response,  # of our own making: FastAPI would check and copy every image once more
        responses=_errors() | {200: ok},
    )
    async def generate(request: Request, body: Annotated[ImageRequest, Body()]) -> Response:
        begin, checked, images, code, status = time.perf_counter(), None, None, None, 200
        request_id = request.headers.get("x-request-id", "")  # Serve sets it where the client did not
        try:
            service.check_key(request)
            checked = service.check(body)
            if checked.stream:
                return await image_events(service, checked, request_id, begin)
            images = await service.generate(checked, request_id)
            return images_json(images, begin)
        except Refused as error:
            code, status = error.refusal.code, error.refusal.status
            raise
        except asyncio.CancelledError:
            code, status = "cancelled", 499  # nginx's status for a client that closed the connection
            raise
        except Exception:  # answered by the handler of last resort
            code, status = "internal", 500
            raise
        finally:
            if not body.stream or status != 200:  # a stream that has begun counts itself when it ends
                service.answered(checked, begin, status, images, code)


def _add_models(api: FastAPI, service: Service) -> None:
    """`GET /v1/models`, and one of them."""

    @api.get("/v1/models", summary="List models", response_model=ModelList, responses=_errors(401, 500, 503))
    async def models(request: Request) -> ModelList:
        service.check_key(request)
        return ModelList(data=await service.models(), offer=await service.offer_status())

    @api.get(
        "/v1/models/{model:path}",  # a path, as names may contain slashes
        summary="One model",
        response_model=ModelEntry,
        responses=_errors(401, 404, 500, 503),
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


def _errors(*codes: int) -> dict[int | str, dict[str, Any]]:
    """How the API's document describes errors: those of some statuses, or all."""
    return {code: {"model": ErrorResponse, "description": ERRORS[code]} for code in codes or ERRORS}
