"""Answers in the shape of OpenAI's images API: one JSON body, or server-sent events."""

from __future__ import annotations

import asyncio
import base64
import json
import logging
import time
from collections.abc import AsyncIterator
from typing import Any
from urllib.parse import quote

from fastapi.responses import Response, StreamingResponse

from serve.errors import error_body, failure
from serve.schema import Delivery, Drawn, Order, PreviewImage, Refused
from serve.service import Service

log = logging.getLogger("ray.serve")

NO_USAGE = {
    "input_tokens": 0, "output_tokens": 0, "total_tokens": 0,
    "input_tokens_details": {"image_tokens": 0, "text_tokens": 0},
}  # fmt: skip
"""OpenAI's clients expect the field; nothing is billed here."""


def images_json(delivery: Delivery, order: Order, begin: float) -> Response:
    """All images in one body; `begin` is when the request came, by `time.perf_counter`."""
    answer = {
        "created": int(time.time()),
        "data": [_image(image) for image in delivery.images],
        "output_format": order.output_format,
        **_facts(delivery, order),
    }
    headers = _headers(delivery) | {"openai-processing-ms": f"{(time.perf_counter() - begin) * 1000:.0f}"}
    return Response(json.dumps(answer), media_type="application/json", headers=headers)


async def image_events(service: Service, order: Order, begin: float) -> Response:
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
            yield _event("error", {}, **error_body(error.refusal))
        except asyncio.CancelledError:
            code, status = "cancelled", 499
            raise
        except Exception:
            log.exception("request %s failed", order.request_id)
            code, status = "internal", 500
            yield _event("error", {}, **error_body(failure(order.request_id)))
        finally:
            await messages.aclose()
            service.answered(order, begin, status, delivery, code)

    return StreamingResponse(
        events(),
        media_type="text/event-stream",
        headers={"cache-control": "no-store", "x-accel-buffering": "no"},
    )


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
    return {"x-fewstep-model": quote(f"{delivery.model}@{delivery.version}", safe="@:/")}  # headers are ASCII


def _base64(content: bytes) -> str:
    return base64.b64encode(content).decode("ascii")
