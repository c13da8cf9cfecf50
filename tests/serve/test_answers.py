"""Streams that go wrong end with an event that says so."""

from __future__ import annotations

import asyncio
import json
from collections.abc import AsyncIterator

from serve.answers import image_events
from serve.schema import ImageRequest, Order, PreviewImage
from serve.service import Service


class Broken(Service):
    """A service whose generator fails after the first preview; it remembers what it counts."""

    def __init__(self) -> None:
        self.counted: list[tuple[int, str | None]] = []

    async def draw_stream(self, order: Order, *, previews: bool = True) -> AsyncIterator[PreviewImage]:
        yield PreviewImage(0, 1, 4, b"png")
        raise RuntimeError("out of memory")

    def answered(self, order, begin, status, delivery, code) -> None:
        self.counted.append((status, code))


def test_a_failure_after_the_first_preview_is_an_error_event_and_counted_as_one() -> None:
    async def scenario() -> list[str]:
        service = Broken()
        fields = ImageRequest(prompt="x").model_dump()
        order = Order(
            request_id="r-1", model=None, prompt="x", n=1, seed=0, size=None, steps=4, temperature=None,
            sampler="student", output_format="png", output_compression=100, class_label=None,
            partial_images=fields["partial_images"],
        )  # fmt: skip
        response = await image_events(service, order, 0.0)
        events = [part async for part in response.body_iterator]
        assert service.counted == [(500, "internal")]
        return [event.decode() for event in events]

    preview, error = asyncio.run(scenario())
    assert preview.startswith("event: image_generation.partial_image")
    assert error.startswith("event: error")
    assert "its log has request r-1" in json.loads(error.partition("data: ")[2])["error"]["message"]
