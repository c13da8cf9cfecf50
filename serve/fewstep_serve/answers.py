"""Answers in the shape of OpenAI's images API: one JSON body, or server-sent events."""

from __future__ import annotations

import asyncio
import json
import logging
import time
from collections.abc import AsyncIterator
from typing import Any
from urllib.parse import quote

from fastapi.responses import Response, StreamingResponse

from fewstep_serve.errors import error_body, failure
from fewstep_serve.schema import ImageRequest, ImagesResponse, PreviewImage, Refused
from fewstep_serve.service import Service

log = logging.getLogger("ray.serve")

NO_USAGE = {
    "input_tokens": 0, "output_tokens": 0, "total_tokens": 0,
    "input_tokens_details": {"image_tokens": 0, "text_tokens": 0},
}  # fmt: skip
"""OpenAI's clients expect the field; nothing is billed here."""
_COMMON = {"background": "opaque", "quality": "auto"}
"""Of every event that has an image."""


def images_json(images: ImagesResponse, begin: float) -> Response:
    """All images in one body; `begin` is when the request came, by `time.perf_counter`."""
    model = quote(f"{images.model}@{images.version}", safe="@:/")  # headers are ASCII, names need not be
    headers = {
        "x-fewstep-model": model,
        "openai-processing-ms": f"{(time.perf_counter() - begin) * 1000:.0f}",
    }
    return Response(images.model_dump_json(), media_type="application/json", headers=headers)


async def image_events(service: Service, request: ImageRequest, request_id: str, begin: float) -> Response:
    """Server-sent events with OpenAI's names.

    Args:
        service: where the images come from; told of the answer when the stream ends.
        request: a checked one.
        request_id: for logs and error messages.
        begin: when the request came, by `time.perf_counter`.

    Raises:
        Refused: before the first event, which makes it an ordinary error response. Later it becomes an event.
    """
    messages = service.generate_stream(request, request_id)
    # Waited for before the response begins, as its status can't be changed afterwards.
    first = await anext(messages)

    async def events() -> AsyncIterator[bytes]:
        message, images, code, status = first, None, None, 200
        try:
            while True:
                if isinstance(message, PreviewImage):
                    yield _partial(message, request)
                else:
                    images = message
                    for index in range(len(images.data)):
                        yield _completed(images, index)
                message = await anext(messages)
        except StopAsyncIteration:  # the ordinary end: the images have been sent
            pass
        except Refused as error:
            code, status = error.refusal.code, error.refusal.status
            yield _event("error", error_body(error.refusal))
        except asyncio.CancelledError:
            code, status = "cancelled", 499  # nginx's status for a client that closed the connection
            raise
        except Exception:
            # The response has begun, so the handler of last resort can no longer answer.
            log.exception("request %s failed", request_id)
            code, status = "internal", 500
            yield _event("error", error_body(failure(request_id)))
        finally:
            await messages.aclose()  # stops the generator where the client has left
            service.answered(request, begin, status, images, code)

    return StreamingResponse(
        events(),
        media_type="text/event-stream",
        # Neither caches nor a proxy's buffer (nginx) may hold events back.
        headers={"cache-control": "no-store", "x-accel-buffering": "no"},
    )


def _partial(preview: PreviewImage, request: ImageRequest) -> bytes:
    fields = {
        "b64_json": preview.b64_json, "index": preview.index, "partial_image_index": preview.step - 1,
        "num_inference_steps": preview.steps, "output_format": "png", "size": request.size,
    }  # fmt: skip
    return _event("image_generation.partial_image", _COMMON | fields)


def _completed(images: ImagesResponse, index: int) -> bytes:
    common = {"index": index, "output_format": images.output_format, "usage": NO_USAGE}
    facts = images.model_dump(include={"size", "model", "version", "num_inference_steps", "sampler"})
    return _event("image_generation.completed", _COMMON | common | images.data[index].model_dump() | facts)


def _event(kind: str, fields: dict[str, Any]) -> bytes:
    data = {"type": kind, "created_at": int(time.time())} | fields
    return f"event: {kind}\ndata: {json.dumps(data)}\n\n".encode()
