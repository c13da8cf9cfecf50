"""Errors in the shape of OpenAI's API: one sentence with the remedy."""

from __future__ import annotations

import logging
import time
from collections.abc import Mapping
from difflib import get_close_matches
from typing import Any

from fastapi import FastAPI, Request
from fastapi.exceptions import RequestValidationError
from fastapi.responses import JSONResponse, Response
from starlette.exceptions import HTTPException

from fewstep_serve.schema import ImageRequest, Refusal, Refused
from fewstep_serve.service import Service

log = logging.getLogger("ray.serve")

ERROR_TYPES = {401: "authentication_error", 429: "rate_limit_error"}
"""OpenAI's types of errors by HTTP status; other statuses have a type per hundred."""


def add_error_handlers(api: FastAPI, service: Service) -> None:
    """Answer every request that ends without images: refused, of a wrong body or path, or failed by a fault of ours."""

    def answer(refusal: Refusal, headers: Mapping[str, str] | None = None) -> Response:
        headers = dict(headers or {})
        if refusal.status in (429, 503):
            headers["retry-after"] = str(refusal.retry_after_s or service.retry_after_s)
        if refusal.status == 401:
            headers["www-authenticate"] = "Bearer"
        return JSONResponse(error_body(refusal), refusal.status, headers)

    @api.exception_handler(Refused)
    async def refused(request: Request, error: Refused) -> Response:
        return answer(error.refusal)

    @api.exception_handler(RequestValidationError)
    async def invalid(request: Request, error: RequestValidationError) -> Response:
        try:
            service.check_key(request)  # without a key nobody is told what the API takes
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
        return answer(failure(request_id))


def failure(request_id: str) -> Refusal:
    """The answer where the service itself failed; `request_id` leads to the traceback in its log."""
    return Refusal(
        500, f"the service failed; its log has request {request_id}: try again, or report it.", "internal"
    )


def error_body(refusal: Refusal) -> dict[str, Any]:
    """A refusal as OpenAI's API writes it."""
    kind = ERROR_TYPES.get(
        refusal.status, "server_error" if refusal.status >= 500 else "invalid_request_error"
    )
    return {"error": {"message": refusal.message, "type": kind, "param": refusal.param, "code": refusal.code}}


def _explain(error: RequestValidationError) -> Refusal:
    """The first of pydantic's complaints as one sentence with a remedy."""
    first = error.errors()[0]  # a client mends one thing at a time
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
        # Cut short: the name is the client's own, and may be as long as a body.
        return Refusal(
            400, f"{param[:64]}: there is no such field; {remedy}", "unknown_parameter", param[:64]
        )
    if first["type"] == "missing":
        return Refusal(400, f"{param}: this field is needed; add it.", "missing_parameter", param)
    reason = first["msg"][0].lower() + first["msg"][1:]
    return Refusal(400, f"{param}: {reason}; /docs says what it may be.", "invalid_value", param)
