"""Style LoRAs in requests, over HTTP, with the real generator in this process."""

from __future__ import annotations

import asyncio
import base64
import io
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
from fastapi.testclient import TestClient
from PIL import Image

from fewstep.models.teacher import load_teacher
from fewstep_serve.config import EngineConfig, ServeConfig
from fewstep_serve.generator import Generator
from fewstep_serve.http import build_api
from random_lora import random_lora, write_lora

GENERATE, MODELS = "/v1/images/generations", "/v1/models"


class Remote:
    """A method of a replica in this process, called as by a handle of Serve's."""

    def __init__(self, method: Callable[..., Any]) -> None:
        self._method = method

    def remote(self, *arguments: Any) -> asyncio.Task[Any]:
        return asyncio.ensure_future(self._method(*arguments))


def handle_of(replica: Any) -> Any:
    async def statuses(**_: Any) -> list[Any]:
        return [await replica.offer_status()]

    return SimpleNamespace(
        generate=Remote(replica.generate),
        models=Remote(replica.models),
        broadcast=lambda method: SimpleNamespace(results_async=statuses),
    )


def pixels_of(file: str) -> np.ndarray:
    return np.asarray(Image.open(io.BytesIO(base64.b64decode(file)))).astype(int)


@pytest.fixture(scope="module")
def offer(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    network, *_ = load_teacher("emoji", "qwen_image")
    folder = tmp_path_factory.mktemp("styles")
    loras = [
        {
            "name": name,
            "source": write_lora(folder / f"{name}.safetensors", random_lora(network, ("attn.to_q", "to_v"), seed)),
            "max_scale": 1.5,
        }
        for seed, name in enumerate(("ink", "clay", "pixel"))
    ]  # fmt: skip
    return {"models": [{"name": "m", "source": "emoji-student", "loras": loras, "max_loras": 2}]}


@pytest.fixture(scope="module")
def service(offer: dict[str, Any]) -> Iterator[tuple[TestClient, Any]]:
    """A client of the API, and the replica behind it."""
    replica = Generator.func_or_class(EngineConfig().model_dump(mode="json"), 4.0)
    api = build_api(ServeConfig.model_validate({"access": {"open_to_all": True}}), handle_of(replica))
    with TestClient(api) as client:  # one event loop for all requests, and for the replica
        client.portal.call(replica.reconfigure, offer)
        yield client, replica


def test_requests_of_several_styles_are_answered_together_each_with_its_own(service) -> None:
    client, _ = service

    def ask(lora: Any, **more: Any) -> Any:
        body = {"prompt": "owl, noto style", "seed": 5, "num_inference_steps": 16, "lora": lora, **more}
        return client.post(GENERATE, json=body).json()

    styles = [None, [{"name": "ink"}], [{"name": "ink", "scale": 0.5}, {"name": "clay", "scale": -1}], []]
    with ThreadPoolExecutor(len(styles)) as threads:
        together = list(threads.map(ask, styles))
    teacher = [ask(lora, sampler="teacher", num_inference_steps=2) for lora in styles[:2]]
    none, ink, both, empty = (pixels_of(answer["data"][0]["b64_json"]) for answer in together)
    assert np.abs(none - empty).max() <= 1, "of other batches, so by rounding only"
    assert min(np.abs(one - other).max() for one, other in ((none, ink), (none, both), (ink, both))) > 3
    assert max(answer["data"][0]["batch_size"] for answer in together) > 1
    assert teacher[0]["data"][0]["b64_json"] != teacher[1]["data"][0]["b64_json"]


@pytest.mark.parametrize(
    ("lora", "message"),
    [
        ([{"name": "oil"}], "the model 'm' has no 'oil': use one of ink, clay, pixel."),
        ([{"name": "ink", "scale": 2}], "the scale 2 of 'ink' is too large, at most 1.5"),
        ([{"name": "ink", "scale": -2}], "the scale -2 of 'ink' is too large, at most 1.5"),
        ([{"name": "ink"}, {"name": "clay"}, {"name": "pixel"}], "3 are too many, at most 2"),
        ([{"name": "ink"}, {"name": "ink"}], "one of them is named twice"),
        ([{"name": "ink", "weight": 1}], "lora.0.weight: extra inputs are not permitted"),
        ([{"scale": 1}], "lora.0.name: field required"),
        ("ink", "lora: "),
    ],
)
def test_what_a_model_has_not_or_does_not_allow_is_refused_in_a_sentence(service, lora, message: str) -> None:
    answer = service[0].post(GENERATE, json={"prompt": "x", "lora": lora})
    error = answer.json()["error"]
    assert (answer.status_code, error["param"]) == (400, "lora")
    assert message in error["message"]
    assert "\n" not in error["message"]


def test_the_list_of_models_has_their_styles(service, offer) -> None:
    [entry] = service[0].get(MODELS).json()["data"]
    assert entry["loras"] == offer["models"][0]["loras"]
    assert entry["max_loras"] == 2


def test_a_wrong_style_in_a_changed_offer_leaves_the_service_as_it_was(
    service, offer, tmp_path: Path
) -> None:
    client, replica = service
    (tmp_path / "broken.safetensors").write_bytes(b"no tensors")
    [model] = offer["models"]
    wrong = {"name": "new", "source": str(tmp_path / "broken.safetensors")}
    client.portal.call(replica.reconfigure, {"models": [model | {"loras": [*model["loras"], wrong]}]})

    async def no_longer_loading() -> None:
        async with asyncio.timeout(120):
            while (await replica.offer_status()).state == "loading":
                await asyncio.sleep(0.01)

    client.portal.call(no_longer_loading)
    listed = client.get(MODELS).json()
    assert listed["offer"]["state"] == "failed"
    assert "the style 'new' of the model 'm': lora: " in listed["offer"]["message"]
    assert [lora["name"] for lora in listed["data"][0]["loras"]] == ["ink", "clay", "pixel"]
    answer = client.post(GENERATE, json={"prompt": "x", "lora": [{"name": "ink"}]})
    assert answer.status_code == 200
