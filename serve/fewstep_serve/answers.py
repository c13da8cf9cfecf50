"""Answers in the shape of OpenAI's images API: one JSON body, or server-sent events."""

from __future__ import annotations

import asyncio
import json
import logging
import time
from collections.abc import AsyncIterator, Collection, Mapping
from typing import Any
from urllib.parse import quote

from fastapi.responses import Response, StreamingResponse

from fewstep_serve.audit import Exchange
from fewstep_serve.errors import error_body, failure
from fewstep_serve.schema import EditRequest, ImageRequest, ImagesResponse, PreviewImage, Refused
from fewstep_serve.service import Service

log = logging.getLogger("ray.serve")

CANCELLED = ("cancelled", 499)
"""Code and status of a request whose client closed the connection; the status is nginx's."""
MOST_IGNORED = 16
"""Names of ignored fields that are told."""
NO_USAGE = {
    "input_tokens": 0, "output_tokens": 0, "total_tokens": 0,
    "input_tokens_details": {"image_tokens": 0, "text_tokens": 0},
}  # fmt: skip
"""OpenAI's clients expect the field; nothing is billed here."""
_COMMON = {"background": "opaque", "quality": "auto"}
"""Of every event that has an image."""


def ignored_fields(names: Collection[str]) -> dict[str, str]:
    """A header with the names of fields that a request has and that were ignored; none where there are none."""
    if not names:
        return {}
    # The names are the client's own, and may be long and of any characters.
    return {"x-fewstep-ignored": ", ".join(quote(name[:64]) for name in sorted(set(names))[:MOST_IGNORED])}


def images_json(images: ImagesResponse, begin: float, extra: Mapping[str, str]) -> Response:
    """All images in one body.

    Args:
        images: what it has.
        begin: when the request came, by `time.perf_counter`.
        extra: further headers.
    """
    model = quote(f"{images.model}@{images.version}", safe="@:/")  # headers are ASCII, names need not be
    headers = {
        "x-fewstep-model": model,
        "openai-processing-ms": f"{(time.perf_counter() - begin) * 1000:.0f}",
    }
    body = images.model_dump_json(exclude_none=True)
    return Response(body, media_type="application/json", headers={**headers, **extra})


async def image_events(service: Service, exchange: Exchange, extra: Mapping[str, str]) -> Response:
    """Server-sent events with OpenAI's names.

    Args:
        service: where the images come from; told of the answer when the stream ends.
        exchange: with a checked request; what comes of it is noted there.
        extra: further headers.

    Raises:
        Refused: before the first event, which makes it an ordinary error response. Later it becomes an event.
    """
    request, caller = exchange.request, exchange.caller
    assert request is not None, "it has been checked"
    assert caller is not None, "so has its key"
    messages = service.generate_stream(request, caller, exchange.request_id)
    # Waited for before the response begins, as its status can't be changed afterwards.
    first = await anext(messages)

    async def events() -> AsyncIterator[bytes]:
        message = first
        try:
            while True:
                if isinstance(message, PreviewImage):
                    yield _partial(message, request)
                else:
                    exchange.images = message
                    for index in range(len(message.data)):
                        yield _completed(message, index, request)
                message = await anext(messages)
        except StopAsyncIteration:  # the ordinary end: the images have been sent
            pass
        except Refused as error:
            exchange.refuse(error.refusal)
            yield _event("error", error_body(error.refusal))
        except asyncio.CancelledError:
            exchange.code, exchange.status = CANCELLED
            raise
        except Exception:
            # The response has begun, so the handler of last resort can no longer answer.
            log.exception("request %s failed", exchange.request_id)
            refusal = failure(exchange.request_id)
            exchange.refuse(refusal)
            yield _event("error", error_body(refusal))
        finally:
            await messages.aclose()  # stops the generator where the client has left
            service.answered(exchange)

    return StreamingResponse(
        events(),
        media_type="text/event-stream",
        # Neither caches nor a proxy's buffer (nginx) may hold events back.
        headers={"cache-control": "no-store", "x-accel-buffering": "no", **extra},
    )


def _partial(preview: PreviewImage, request: ImageRequest) -> bytes:
    fields = {
        "b64_json": preview.b64_json, "index": preview.index, "partial_image_index": preview.step - 1,
        "num_inference_steps": preview.steps, "output_format": "png", "size": request.size,
    }  # fmt: skip
    return _event(f"{_kind(request)}.partial_image", _COMMON | fields)


def _completed(images: ImagesResponse, index: int, request: ImageRequest) -> bytes:
    common = {"index": index, "output_format": images.output_format, "usage": NO_USAGE}
    facts = images.model_dump(include={"size", "model", "version", "num_inference_steps", "sampler"})
    return _event(
        f"{_kind(request)}.completed",
        _COMMON | common | images.data[index].model_dump(exclude_none=True) | facts,
    )


def _kind(request: ImageRequest) -> str:
    """What the names of a request's events begin with."""
    return "image_edit" if isinstance(request, EditRequest) else "image_generation"


def _event(kind: str, fields: dict[str, Any]) -> bytes:
    data = {"type": kind, "created_at": int(time.time())} | fields
    return f"event: {kind}\ndata: {json.dumps(data)}\n\n".encode()
