"""Errors in the shape of OpenAI's API: one sentence with the remedy."""

from __future__ import annotations

import logging
import re
from collections.abc import Mapping
from difflib import get_close_matches
from typing import Any

from fastapi import FastAPI, Request
from fastapi.exceptions import RequestValidationError
from fastapi.responses import JSONResponse, Response
from starlette.exceptions import HTTPException

from fewstep_serve.audit import Exchange
from fewstep_serve.schema import ErrorResponse, ImageRequest, Refusal, Refused
from fewstep_serve.service import Service

log = logging.getLogger("ray.serve")

ERROR_TYPES = {401: "authentication_error", 429: "rate_limit_error"}
"""OpenAI's types of errors by HTTP status; other statuses have a type per hundred."""

SYNONYMS = {
    name: field
    for field, names in {
        "prompt": "text caption input description query",
        "model": "model_id model_name checkpoint engine",
        "n": "num_images num_images_per_prompt num_outputs number_of_images n_images samples num_samples batch_size",
        "size": "width height resolution image_size dimensions aspect_ratio",
        "output_format": "format image_format file_format mime_type",
        "output_compression": "compression output_quality jpeg_quality",
        "stream": "streaming",
        "partial_images": "previews num_partial_images preview_images",
        "seed": "random_seed manual_seed noise_seed seeds generator",
        "num_inference_steps": "steps num_steps n_steps inference_steps sampling_steps ddim_steps nfe",
        "temperature": "temp",
        "h": "eta stochasticity churn",
        "class_label": "label class class_id class_name class_labels",
        "lora": "loras adapters adapter lora_weights lora_name lora_scale",
        "sampler": "scheduler sampler_name sampling_method use_teacher",
    }.items()
    for name in names.split()
}
"""What other APIs call our fields."""
OF_GUIDANCE = {"cfg", "cfg_scale", "guidance", "guidance_scale", "true_cfg_scale", "negative_prompt"}
"""Fields of other APIs that have no counterpart, because guidance has been distilled into the student."""


ERRORS = {
    400: "The request is wrong; the message says what and how to mend it.",
    401: "An API key is needed.",
    403: "The address of an image is not as it was given.",
    404: "No such model or job, or it has expired, as addresses of images do.",
    409: "The `Idempotency-Key` was used with another body before.",
    413: "The body is too large.",
    429: "The service is full; `Retry-After` says when to come back.",
    500: "An error of the service.",
    503: "No replica can generate now.",
    504: "The time limit is over.",
}
"""What the API's document says of errors, by HTTP status."""


def add_error_handlers(api: FastAPI, service: Service) -> None:
    """Answer every request that ends without images: refused, of a wrong body or path, or failed by a fault of ours."""

    def answer(refusal: Refusal, headers: Mapping[str, str] | None = None) -> Response:
        headers = dict(headers or {})
        if refusal.status in (429, 503):
            headers["retry-after"] = str(refusal.retry_after_s or service.retry_after_s)
        if refusal.status == 504:  # OpenAI's clients would by default have the same work done twice more
            headers["x-should-retry"] = "false"
        if refusal.status == 401:
            headers["www-authenticate"] = "Bearer"
        return JSONResponse(error_body(refusal), refusal.status, headers)

    def unreadable(request: Request, refusal: Refusal) -> Response:
        exchange = Exchange(request.headers.get("x-request-id", ""))
        try:
            exchange.caller = service.check_key(request)  # without a key nobody is told what the API takes
        except Refused as unknown:
            refusal = unknown.refusal
        exchange.refuse(refusal)
        service.answered(exchange)
        return answer(refusal)

    @api.exception_handler(Refused)
    async def refused(request: Request, error: Refused) -> Response:
        return answer(error.refusal)

    @api.exception_handler(RequestValidationError)
    async def invalid(request: Request, error: RequestValidationError) -> Response:
        return unreadable(request, explained(error))

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
        elif error.status_code == 400 and isinstance(error.__cause__, (ValueError, RecursionError)):
            # FastAPI's, for a body that Python's JSON reader gives up on.
            return unreadable(request, _explain_body(error.__cause__))
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


def error_responses(*codes: int) -> dict[int | str, dict[str, Any]]:
    """How the API's document describes errors of some statuses."""
    return {code: {"model": ErrorResponse, "description": ERRORS[code]} for code in codes}


def _explain_body(error: Exception) -> Refusal:
    """Why a body can't be read as JSON at all."""
    if isinstance(error, UnicodeDecodeError):
        message = "the body is not UTF-8: encode it as UTF-8."
    elif isinstance(error, RecursionError):
        message = "the body is nested too deeply: send one flat JSON object; /docs lists its fields."
    else:
        message = "the body holds a number of too many digits: write a shorter one; /docs lists the fields."
    return Refusal(400, message, "invalid_json")


def explained(error: RequestValidationError) -> Refusal:
    """The first of pydantic's complaints as one sentence with a remedy."""
    errors = error.errors()
    first = errors[0]  # a client mends one thing at a time
    if "body" in first["loc"] and len(first["loc"]) > 1:
        # Of a field that takes several types, the complaint of the type that was sent.
        same = [one for one in errors if one["loc"][:2] == first["loc"][:2]]
        first = next((one for one in same if not one["type"].endswith(("_type", "literal_error"))), first)
    where = [str(part) for part in first["loc"] if part != "body"]
    if first["type"] == "json_invalid" or not where:
        return Refusal(
            400,
            "the body is not a JSON object: send one, as 'content-type: application/json'.",
            "invalid_json",
        )
    param = where[0]
    nested = any(isinstance(part, int) for part in first["loc"])  # in a list, as lora.0.scale
    if first["type"] == "extra_forbidden" and not nested:
        # Cut short: the name is the client's own, and may be as long as a body.
        return Refusal(
            400, f"{param[:64]}: there is no such field; {_remedy(param)}", "unknown_parameter", param[:64]
        )
    if first["type"] == "missing" and not nested:
        return Refusal(400, f"{param}: this field is needed; add it.", "missing_parameter", param)
    if first["type"] == "string_unicode":
        return Refusal(
            400, f"{param}: it holds half a surrogate pair, an emoji that was cut in two: send whole characters.",
            "invalid_value", param,
        )  # fmt: skip
    reason = first["msg"][0].lower() + first["msg"][1:]
    name = ".".join(where)[:64] if nested else param
    return Refusal(400, f"{name}: {reason}; /docs says what it may be.", "invalid_value", param)


def _remedy(name: str) -> str:
    """What to do about a field that there is not."""
    # As in numSteps, num-steps.
    plain = re.sub(r"(?<=[a-z])(?=[A-Z])|[^a-zA-Z]+", "_", name[:64]).strip("_").lower()
    if plain in OF_GUIDANCE:
        return "leave it out: a student generates without guidance."
    near = get_close_matches(plain, ImageRequest.model_fields, 1, cutoff=0.7)
    # Of other names only slips are understood, as they are many: what is a field there must be one here.
    other = get_close_matches(plain, SYNONYMS, 1, cutoff=0.8)
    meant = SYNONYMS.get(plain) or next(iter(near), None) or next((SYNONYMS[one] for one in other), None)
    return f"did you mean {meant!r}?" if meant else "leave it out; /docs lists the fields."
