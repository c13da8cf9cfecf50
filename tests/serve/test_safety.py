"""The operator's own checks: what they refuse is told and counted, and where they fail no image leaves."""

from __future__ import annotations

import asyncio
import sys
from types import ModuleType, SimpleNamespace
from typing import Any

import numpy as np
import pytest
from fake_generator import FakeGenerator
from fastapi.testclient import TestClient

from fewstep.engine.caller import ANYBODY, Caller
from fewstep.errors import UserError
from fewstep_serve.config import ServeConfig
from fewstep_serve.generator import Generator
from fewstep_serve.http import build_api
from fewstep_serve.safety import SafetyCheck
from fewstep_serve.schema import ImageRequest, Refusal


@pytest.fixture
def checks(monkeypatch: pytest.MonkeyPatch) -> None:
    """A module of the operator's."""
    module = ModuleType("our_checks")

    def prompt(text: str) -> str | None:
        if text == "broken":
            raise ConnectionError("a secret of the operator's")
        return "this prompt is about weapons: ask for something else." if "gun" in text else None

    def image(pixels: np.ndarray, prompt: str) -> str | None:
        assert pixels.dtype == np.uint8
        if prompt == "broken":
            raise ConnectionError("a secret of the operator's")
        return f"an image of {prompt!r} is too bright." if pixels.max() == 255 else None

    async def later(text: str) -> None: ...

    module.prompt, module.image, module.later = prompt, image, later
    module.always = lambda *arguments: True
    monkeypatch.setitem(sys.modules, "our_checks", module)


def serving(generator: FakeGenerator, **safety: str) -> TestClient:
    config = ServeConfig.model_validate({"access": {"open_to_all": True}, "safety": safety})
    return TestClient(build_api(config, generator))


def test_a_prompt_is_refused_before_anything_is_generated(checks, monkeypatch) -> None:
    generator, counted = FakeGenerator(), []
    monkeypatch.setattr(
        "fewstep_serve.metrics.RequestMetrics.answered",
        lambda self, exchange, seconds: counted.append(exchange),
    )
    client = serving(generator, prompt="our_checks:prompt")
    for body in (
        {"prompt": "a gun"},
        {"prompt": "a gun", "stream": True},
        {"prompt": "owl", "class_label": "gun"},
    ):
        refused = client.post("/v1/images/generations", json=body)
        assert refused.status_code == 400
        assert refused.json()["error"] == {
            "message": "this prompt is about weapons: ask for something else.", "type": "invalid_request_error",
            "param": None, "code": "content_policy_violation",
        }  # fmt: skip
        exchange = counted.pop()
        assert (exchange.status, exchange.code) == (400, "content_policy_violation")
    assert generator.asked == []
    assert client.post("/v1/images/generations", json={"prompt": "owl"}).status_code == 200


@pytest.mark.parametrize("function", ["our_checks:prompt", "our_checks:always"])
def test_a_check_that_fails_lets_no_image_leave(checks, function: str) -> None:
    generator = FakeGenerator()
    failed = serving(generator, prompt=function).post("/v1/images/generations", json={"prompt": "broken"})
    assert (failed.status_code, failed.json()["error"]["code"]) == (500, "safety_check_failed")
    assert "secret" not in failed.text
    assert generator.asked == []


class OneImage:
    """An engine that gives one image."""

    admission = SimpleNamespace(max_work=8)

    def __init__(self, brightness: int) -> None:
        self._brightness = brightness

    async def generate(self, generations: list[Any], caller: Caller) -> list[SimpleNamespace]:
        for one in generations:
            if one.on_preview is not None:
                one.on_preview(SimpleNamespace(step=1, pixels=np.zeros((2, 2, 3), np.uint8)))
        return [SimpleNamespace(seed=1, pixels=np.full((2, 2, 3), self._brightness, np.uint8))]


def streamed(brightness: int, prompt: str, check: str | None) -> list[Any]:
    """What a generator with a check answers a request for a stream with."""
    replica = object.__new__(Generator.func_or_class)
    replica._engine, replica._image_check = OneImage(brightness), SafetyCheck.of("image", check)

    async def generations(
        request: ImageRequest, caller: Caller, request_id: str, show: Any
    ) -> list[SimpleNamespace]:
        on_preview = show and (lambda _: show(dict))
        return [SimpleNamespace(work=1, caption=request.caption, on_preview=on_preview)]

    replica._generations = generations
    replica._response = lambda request, generations, images: "images"

    async def answers() -> list[Any]:
        request = ImageRequest(prompt=prompt, stream=True)
        return [one async for one in replica.generate_stream(request, ANYBODY, "request")]

    return asyncio.run(answers())


def test_an_image_is_refused_before_it_leaves_and_has_no_previews(checks) -> None:
    assert streamed(255, "owl", None) == [{}, "images"]
    assert streamed(254, "owl", "our_checks:image") == ["images"]
    [refused] = streamed(255, "owl", "our_checks:image")
    assert refused == Refusal(400, "an image of 'owl' is too bright.", "content_policy_violation")
    for prompt, check in (("broken", "our_checks:image"), ("owl", "our_checks:always")):
        [failed] = streamed(0, prompt, check)
        assert (failed.status, failed.code) == (500, "safety_check_failed")


@pytest.mark.parametrize(
    ("function", "message"),
    [
        ("our_checks:nothing", "our_checks:nothing can't be imported"),
        ("no_such_module:check", "No module named 'no_such_module'"),
        ("our_checks:__name__", "is no plain function"),
        ("our_checks:later", "is no plain function"),
    ],
)
def test_a_check_that_there_is_not_ends_the_start(checks, function: str, message: str) -> None:
    with pytest.raises(UserError, match=message):
        serving(FakeGenerator(), prompt=function)


def test_a_check_is_named_by_module_and_function() -> None:
    with pytest.raises(ValueError, match="safety"):
        serving(FakeGenerator(), prompt="our_checks.prompt")
