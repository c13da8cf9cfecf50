"""The shape of answers: one JSON body, or events; streams that go wrong end with an event that says so."""

from __future__ import annotations

import asyncio
import json
from collections.abc import AsyncGenerator

from fewstep.engine.caller import ANYBODY, Caller
from fewstep_serve.answers import image_events, images_json
from fewstep_serve.audit import Exchange
from fewstep_serve.schema import ImageData, ImageRequest, ImagesResponse, PreviewImage, Timings
from fewstep_serve.service import Service

TIMES = {"queue_ms": 1.5, "encode_ms": 2.0, "network_ms": 3.125, "policy_ms": 0.5, "decode_ms": 1.0}
IGNORED = {"x-fewstep-ignored": "tint"}


class Scripted(Service):
    """A service that gives prepared messages, and remembers what it counts; an exception among them is raised."""

    def __init__(self, *messages: PreviewImage | ImagesResponse | Exception) -> None:
        self.messages, self.counted = messages, []

    async def generate_stream(
        self, request: ImageRequest, caller: Caller, request_id: str, *, previews: bool = True
    ) -> AsyncGenerator[PreviewImage | ImagesResponse]:
        for message in self.messages:
            if isinstance(message, Exception):
                raise message
            yield message

    def answered(self, exchange: Exchange) -> None:
        self.counted.append((exchange.status, exchange.code))


def response(images: int) -> ImagesResponse:
    data = [
        ImageData(b64_json=f"img{index}", seed=7 + index, batch_size=1.33, timings=Timings(**TIMES))
        for index in range(images)
    ]
    return ImagesResponse(
        created=1_700_000_000, data=data, output_format="webp", size="24x8", model="ü", work=4, version="models:/m/3",
        num_inference_steps=4, sampler="student",
    )  # fmt: skip


def events(service: Service) -> list[tuple[str, dict]]:
    """Names and data of the events that a request is answered with."""

    exchange = Exchange("r-1", caller=ANYBODY, request=ImageRequest(prompt="x"))

    async def scenario() -> list[str]:
        answer = await image_events(service, exchange, IGNORED)
        assert answer.headers["x-fewstep-ignored"] == IGNORED["x-fewstep-ignored"]
        return [part.decode() async for part in answer.body_iterator]

    parts = [part.partition("\ndata: ") for part in asyncio.run(scenario())]
    assert all(data.endswith("\n\n") for _, _, data in parts)
    return [(name.removeprefix("event: "), json.loads(data)) for name, _, data in parts]


def test_a_failure_after_the_first_preview_is_an_error_event_and_counted_as_one() -> None:
    service = Scripted(PreviewImage(0, 1, 4, "cG5n"), RuntimeError("out of memory"))
    (preview, _), (error, data) = events(service)
    assert service.counted == [(500, "internal")]
    assert preview == "image_generation.partial_image"
    assert error == "error"
    assert "its log has request r-1" in data["error"]["message"]


def test_events_have_openai_s_fields_and_ours() -> None:
    service = Scripted(PreviewImage(1, 3, 4, "cG5n"), response(2))
    (kind, preview), *completed = events(service)
    assert service.counted == [(200, None)]
    assert kind == preview.pop("type") == "image_generation.partial_image"
    assert preview.pop("created_at") > 1_600_000_000
    assert preview == {
        "background": "opaque", "quality": "auto", "b64_json": "cG5n", "index": 1, "partial_image_index": 2,
        "num_inference_steps": 4, "output_format": "png", "size": "auto",
    }  # fmt: skip
    assert [name for name, _ in completed] == ["image_generation.completed"] * 2
    _, last = completed[1]
    assert last.pop("type") == "image_generation.completed"
    assert last.pop("created_at") > 1_600_000_000
    assert last.pop("usage")["total_tokens"] == 0
    assert last == {
        "background": "opaque", "quality": "auto", "index": 1, "output_format": "webp", "b64_json": "img1",
        "seed": 8, "batch_size": 1.33, "timings": TIMES, "size": "24x8", "model": "ü", "version": "models:/m/3",
        "num_inference_steps": 4, "sampler": "student",
    }  # fmt: skip


def test_a_body_has_openai_s_fields_and_ours() -> None:
    answer = images_json(response(2), 0.0, IGNORED)
    assert answer.headers["content-type"] == "application/json"
    assert answer.headers["x-fewstep-ignored"] == IGNORED["x-fewstep-ignored"]
    assert answer.headers["x-fewstep-model"] == "%C3%BC@models:/m/3"
    assert int(answer.headers["openai-processing-ms"]) >= 0
    body = json.loads(answer.body)
    assert list(body) == [
        "created", "data", "output_format", "size", "model", "version", "num_inference_steps", "sampler",
        "work",
    ]  # fmt: skip
    assert body["data"][0] == {"b64_json": "img0", "seed": 7, "batch_size": 1.33, "timings": TIMES}
