"""The HTTP API: OpenAI's images API, health, the page. Requests are checked here, and generators generate."""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable, Collection, Mapping
from functools import partial
from pathlib import Path
from typing import Annotated, Any

from fastapi import Body, FastAPI, Request
from fastapi.responses import JSONResponse, Response
from prometheus_client import CONTENT_TYPE_LATEST
from ray import serve
from ray.serve.handle import DeploymentHandle
from starlette.exceptions import HTTPException
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from fewstep_serve.answers import CANCELLED, ignored_fields, image_events, images_json
from fewstep_serve.api_page import api_page
from fewstep_serve.audit import Exchange
from fewstep_serve.config import MetricsReaders, ServeConfig
from fewstep_serve.edits import form_schema, read_edit
from fewstep_serve.errors import ERRORS, add_error_handlers, error_responses
from fewstep_serve.files import PATH
from fewstep_serve.job_routes import add_jobs
from fewstep_serve.job_worker import JobWorker
from fewstep_serve.prometheus import ServiceMetrics
from fewstep_serve.schema import (
    EditRequest,
    Health,
    ImageRequest,
    ImagesResponse,
    ModelEntry,
    ModelList,
    Refusal,
    Refused,
)
from fewstep_serve.service import Service

EDITS = "/v1/images/edits"
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


def build_api(config: ServeConfig, generator: DeploymentHandle) -> FastAPI:
    """The ASGI application of one ingress replica.

    Raises:
        UserError: anybody beyond loopback could use it, and no key is set.
    """
    service = Service(config, generator)
    api = _Api(
        title="fewstep",
        description="Images in a few network evaluations, by OpenAI's images API.",
        version="1",
        license_info={"name": "Apache-2.0"},
        # Its pages of the API take scripts from a public server.
        docs_url=None,
        redoc_url=None,
        lifespan=None if service.jobs is None else lambda api: JobWorker(service.jobs, service).working(),
    )
    limits = config.limits
    api.add_middleware(BodyLimit, limit=limits.max_body_bytes, others={EDITS: limits.max_edit_bytes})
    add_error_handlers(api, service)
    _add_images(api, service)
    add_jobs(api, service)
    _add_files(api, service)
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

    _add_metrics(api, service, config.access.metrics)
    for path, (file, media_type) in PAGE_FILES.items():
        _add_file(api, path, (PAGE / file).read_bytes(), media_type)
    _add_file(api, "/docs", api_page(api.openapi()).encode(), "text/html; charset=utf-8")
    return api


class _Api(FastAPI):
    """The application with a document that describes the form of edits, too, which is read by hand."""

    def openapi(self) -> dict[str, Any]:
        document = super().openapi()
        document["components"]["schemas"][EditRequest.__name__] = form_schema()
        return document


def _add_images(api: FastAPI, service: Service) -> None:
    """`POST /v1/images/generations` and `/v1/images/edits`."""
    ok = {
        "description": "The images; with `stream`, server-sent events.",
        "model": ImagesResponse,
        "content": {"text/event-stream": {"schema": {"type": "string"}}},
    }

    async def answer(
        request: Request, read: Callable[[], Awaitable[tuple[ImageRequest, Collection[str]]]]
    ) -> Response:
        """Answer a request, of which `read` gives the body and the names of fields that it ignores."""
        exchange = Exchange(request.headers.get("x-request-id", ""))  # Serve sets it where the client did not
        try:
            exchange.caller = caller = service.check_key(request)
            body, ignored = await read()
            exchange.request = checked = service.check(body)
            headers = ignored_fields(ignored)
            await service.check_prompt(checked)
            await service.count(caller, checked, exchange.request_id)
            if checked.stream:
                return await image_events(service, exchange, headers)
            exchange.images = await service.generate(checked, caller, exchange.request_id)
            if checked.response_format == "url":
                exchange.images = await service.with_addresses(exchange.images, str(request.base_url))
            return images_json(exchange.images, exchange.begin, headers)
        except Refused as error:
            exchange.refuse(error.refusal)
            raise
        except HTTPException as error:  # of the body's limit, while a form is read
            exchange.code, exchange.status = "invalid_request", error.status_code
            raise
        except asyncio.CancelledError:
            exchange.code, exchange.status = CANCELLED
            raise
        except Exception:  # answered by the handler of last resort
            exchange.code, exchange.status = "internal", 500
            raise
        finally:
            # A stream that has begun counts itself when it ends.
            if exchange.request is None or not exchange.request.stream or exchange.status != 200:
                service.answered(exchange)

    async def generate(request: Request, body: ImageRequest) -> Response:
        async def read() -> tuple[ImageRequest, Collection[str]]:
            return body, body.model_extra or ()

        return await answer(request, read)

    async def edit(request: Request) -> Response:
        return await answer(request, partial(read_edit, request, service.limits, lenient=service.lenient))

    # FastAPI reads which fields a body may have from the annotation.
    generate.__annotations__["body"] = Annotated[service.body, Body()]
    api.post(
        "/v1/images/generations",
        summary="Generate images",
        response_class=Response,  # of our own making: FastAPI would check and copy every image once more
        responses=error_responses(*(code for code in ERRORS if code not in (403, 409))) | {200: ok},
    )(generate)
    form = {"schema": {"$ref": "#/components/schemas/EditRequest"}}
    api.post(
        EDITS,
        summary="Edit images",
        response_class=Response,
        responses=error_responses(*(code for code in ERRORS if code not in (403, 409))) | {200: ok},
        openapi_extra={"requestBody": {"required": True, "content": {"multipart/form-data": form}}},
    )(edit)

    @api.post("/v1/images/variations", include_in_schema=False)
    async def variations(request: Request) -> Response:
        service.check_key(request)
        message = "there are no variations here: send the image with a prompt to /v1/images/edits."
        raise Refused(Refusal(404, message, "not_found"))


def _add_files(api: FastAPI, service: Service) -> None:
    """The images of requests with `response_format: "url"`, where the deployment has them."""
    if (files := service.files) is None:
        return

    @api.get(
        f"{PATH}/{{name}}", summary="An image, by its address", response_class=Response,
        responses=error_responses(403, 404, 500),
    )  # fmt: skip
    async def image(name: str, signature: str = "") -> Response:  # without a key: the address has a signature
        content, media_type = await files.get(name, signature)
        return Response(
            content,
            media_type=media_type,
            headers=SECURITY_HEADERS | {"cache-control": "private, max-age=3600"},
        )


def _add_models(api: FastAPI, service: Service) -> None:
    """`GET /v1/models`, and one of them."""

    @api.get(
        "/v1/models",
        summary="List models",
        response_model=ModelList,
        responses=error_responses(401, 500, 503),
    )
    async def models(request: Request) -> ModelList:
        service.check_key(request)
        return ModelList(data=await service.models(), offer=await service.offer_status())

    @api.get(
        "/v1/models/{model:path}",  # a path, as names may contain slashes
        summary="One model",
        response_model=ModelEntry,
        responses=error_responses(401, 404, 500, 503),
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


def _add_metrics(api: FastAPI, service: Service, readers: MetricsReaders) -> None:
    """`GET /metrics`, where the deployment has it."""
    if readers == "nobody":
        return
    metrics = ServiceMetrics(serve.get_replica_context().app_name)

    @api.get(
        "/metrics", summary="For Prometheus", response_class=Response, responses=error_responses(401, 500)
    )
    async def text(request: Request) -> Response:
        if readers == "keys":
            service.check_key(request)
        return Response(await metrics.text(), headers={"content-type": CONTENT_TYPE_LATEST})


def _add_file(api: FastAPI, path: str, content: bytes, media_type: str) -> None:
    @api.get(path, include_in_schema=False)
    async def page() -> Response:
        return Response(
            content, media_type=media_type, headers=SECURITY_HEADERS | {"cache-control": "no-cache"}
        )


class BodyLimit:
    """ASGI middleware: refuses bodies above a number of bytes, announced or not.

    Args:
        app: the application.
        limit: most bytes.
        others: those of single paths.
    """

    def __init__(self, app: ASGIApp, limit: int, others: Mapping[str, int]) -> None:
        self._app, self._limit, self._others = app, limit, others

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            await self._app(scope, receive, send)
            return
        # Where the application has a prefix, paths begin with it.
        path = scope["path"].removeprefix(scope.get("root_path", ""))
        seen, limit = 0, self._others.get(path, self._limit)

        async def counted() -> Message:
            nonlocal seen
            message = await receive()
            seen += len(message.get("body", b""))
            if seen > limit:
                raise HTTPException(413, f"the body is larger than {limit} bytes: shorten it.")
            return message

        await self._app(scope, counted, send)
