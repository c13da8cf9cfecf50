"""`POST /v1/images/edits` as clients meet it: OpenAI's own client, real HTTP, the real engine; without Ray between."""

from __future__ import annotations

import io
import json
import zlib
from collections.abc import Callable, Iterator
from typing import Any

import httpx2
import numpy as np
import openai
import pytest
from local_service import serving
from PIL import Image

from fewstep.student import FewStepPipeline
from fewstep_loadtest.client import decode_image
from fewstep_serve.config import Limits
from tiny import write_editor

PROMPT = "in noto style"


@pytest.fixture(scope="module")
def editor(tmp_path_factory: pytest.TempPathFactory) -> FewStepPipeline:
    write_editor(folder := tmp_path_factory.mktemp("editor"))
    return FewStepPipeline.from_pretrained(folder)


@pytest.fixture(scope="module")
def models(editor: FewStepPipeline) -> dict[str, FewStepPipeline]:
    return {"editor": editor, "plain": FewStepPipeline.from_pretrained("emoji-student")}


@pytest.fixture(scope="module")
def address(models: dict[str, FewStepPipeline]) -> Iterator[str]:
    limits = {"max_upload_pixels": 4096, "max_uploads": 3, "max_edit_bytes": 100_000}
    with serving(models, limits=limits) as found:
        yield found


@pytest.fixture(scope="module")
def client(address: str) -> openai.OpenAI:
    return openai.OpenAI(base_url=address, api_key="any", max_retries=0)


def pixels(height: int = 16, width: int = 16, seed: int = 0) -> np.ndarray:
    return np.random.default_rng(seed).integers(0, 256, (height, width, 3), dtype=np.uint8)


def file_of(image: np.ndarray, kind: str = "PNG") -> bytes:
    Image.fromarray(image).save(buffer := io.BytesIO(), kind)
    return buffer.getvalue()


def close(one: Any, other: Any) -> bool:
    """Whether images differ by at most one 8-bit level."""
    return np.abs(np.asarray(one).astype(int) - np.asarray(other).astype(int)).max() <= 1


def test_openai_s_client_edits_an_image(client: openai.OpenAI, editor: FewStepPipeline) -> None:
    result = client.images.edit(
        image=("owl.png", file_of(pixels())), prompt=PROMPT, n=2, size="16x16", model="editor",
        response_format="b64_json", quality="low", input_fidelity="high", extra_body={"seed": 1},
    )  # fmt: skip
    expected = editor([PROMPT] * 2, image=Image.fromarray(pixels()), seed=1).images
    assert all(map(close, (decode_image(image.b64_json) for image in result.data), expected))
    # A list of images is sent as image[], and a path by its file
    again = client.images.edit(image=[("owl.png", file_of(pixels()))], prompt=PROMPT, extra_body={"seed": 1})
    assert again.data[0].b64_json == result.data[0].b64_json


def test_the_result_has_the_image_s_aspect_ratio_unless_a_size_is_asked_for(client: openai.OpenAI) -> None:
    wide = ("wide.webp", file_of(pixels(32, 64), "WEBP"))
    result = client.images.edit(image=wide, prompt=PROMPT)
    assert decode_image(result.data[0].b64_json).shape == (10, 22, 3)
    result = client.images.edit(image=wide, prompt=PROMPT, size="16x8")
    assert decode_image(result.data[0].b64_json).shape == (8, 16, 3)


def test_a_streamed_edit_has_openai_s_events(client: openai.OpenAI) -> None:
    ask: Callable[..., Any] = client.images.edit
    events = list(ask(image=("a.png", file_of(pixels())), prompt=PROMPT, stream=True, partial_images=2))
    kinds = [event.type for event in events]
    assert kinds == ["image_edit.partial_image"] * 2 + ["image_edit.completed"]


@pytest.mark.parametrize("sampler", ["student", "teacher"])
def test_what_the_mask_keeps_stays_to_the_pixel(client: openai.OpenAI, sampler: str) -> None:
    image, alpha = pixels(), np.full((16, 16, 1), 255, np.uint8)
    alpha[4:10, 2:8] = 0  # fully transparent: here it may change
    result = client.images.edit(
        image=("a.png", file_of(image)), mask=("mask.png", file_of(np.concatenate([image, alpha], axis=2))),
        prompt=PROMPT, extra_body={"seed": 1, "sampler": sampler, "num_inference_steps": 3},
    )  # fmt: skip
    edited = decode_image(result.data[0].b64_json)
    kept = alpha[..., 0] > 0
    assert np.array_equal(edited[kept], image[kept])
    assert not close(edited[~kept], image[~kept])


def post(address: str, fields: dict[str, Any], files: list[tuple[str, Any]]) -> httpx2.Response:
    return httpx2.post(f"{address}/images/edits", data=fields, files=files, timeout=60)


IMAGE = ("image", ("a.png", file_of(pixels()), "image/png"))


def bomb() -> bytes:
    """A png whose header promises 60,000 × 60,000 pixels."""

    def chunk(kind: bytes, content: bytes) -> bytes:
        return len(content).to_bytes(4) + kind + content + zlib.crc32(kind + content).to_bytes(4)

    header = (60_000).to_bytes(4) * 2 + bytes([8, 2, 0, 0, 0])
    return (
        b"\x89PNG\r\n\x1a\n"
        + chunk(b"IHDR", header)
        + chunk(b"IDAT", zlib.compress(b"\0"))
        + chunk(b"IEND", b"")
    )


TRANSPARENT = np.zeros((16, 16, 4), np.uint8)


@pytest.mark.parametrize(
    ("fields", "files", "param", "message"),
    [
        ({"prompt": PROMPT}, [("other", ("a.txt", b"x"))], "other", "it is a file"),
        ({"prompt": PROMPT, "n": "1"}, [("mask", IMAGE[1])], "image", "this field is needed"),
        ({}, [IMAGE], "prompt", "add it"),
        ({"prompt": PROMPT, "n": "many"}, [IMAGE], "n", "valid integer"),
        ({"prompt": PROMPT, "n": "11"}, [IMAGE], "n", "at most 10"),
        ({"prompt": PROMPT, "size": "15x16"}, [IMAGE], "size", "multiples of 2"),
        ({"prompt": PROMPT, "size": "160x160"}, [IMAGE], "size", "too large"),
        ({"prompt": PROMPT, "lora": "ink"}, [IMAGE], "lora", "it is no JSON"),
        ({"prompt": PROMPT, "lora": "[" * 60_000}, [IMAGE], "lora", "it is no JSON"),
        ({"prompt": PROMPT, "lora": '[{"name": "ink", "scale": 0.5}]'}, [IMAGE], "lora", "has no 'ink'"),
        ({"prompt": PROMPT, "lora": '[{"scale": 1}]'}, [IMAGE], "lora", "field required"),
        ({"prompt": PROMPT, "strength": "1"}, [IMAGE], "strength", "no such field"),
        ({"prompt": [PROMPT, PROMPT]}, [IMAGE], "prompt", "has it twice"),
        ({"prompt": PROMPT, "image": "a.png"}, [("mask", IMAGE[1])], "image", "send the image as a file"),
        ({"prompt": PROMPT}, [("image", ("a.gif", file_of(pixels(), "GIF")))], "image", "png, jpeg or webp"),
        ({"prompt": PROMPT}, [("image", ("a.png", b"no image"))], "image", "not an image"),
        ({"prompt": PROMPT}, [("image", ("a.png", bomb()))], "image", "at most 4096 are allowed"),
        ({"prompt": PROMPT}, [("image", ("a.png", file_of(pixels(64, 65))))], "image", "at most 4096 are allowed"),
        ({"prompt": PROMPT}, [("image", ("a.png", file_of(pixels())[:300]))], "image", "can't be decoded"),
        ({"prompt": PROMPT}, [IMAGE] * 2, "image", "edits 1 at once, not 2"),
        ({"prompt": PROMPT}, [IMAGE] * 4, "image", "at most 3"),
        ({"prompt": PROMPT}, [IMAGE, ("mask", IMAGE[1])], "mask", "no transparent part"),
        (
            {"prompt": PROMPT}, [IMAGE, ("mask", ("m.png", file_of(TRANSPARENT[:8])))], "mask",
            "16x8 pixels, and the image 16x16",
        ),
        ({"prompt": PROMPT, "model": "plain"}, [IMAGE], "model", "takes no reference images"),
    ],
)  # fmt: skip
def test_what_can_not_be_edited_is_refused_in_a_sentence(
    address: str, fields: dict[str, Any], files: list[tuple[str, Any]], param: str, message: str
) -> None:
    answer = post(address, fields, files)
    assert answer.status_code == 400
    error = answer.json()["error"]
    assert (error["type"], error["param"]) == ("invalid_request_error", param)
    assert message in error["message"]


def test_bodies_are_bounded_and_forms_of_another_kind_refused(address: str) -> None:
    large = ("image", ("a.png", file_of(pixels(600, 600)), "image/png"))
    assert post(address, {"prompt": PROMPT}, [large]).status_code == 413
    answer = httpx2.post(f"{address}/images/edits", json={"prompt": PROMPT}, timeout=60)
    assert (answer.status_code, answer.json()["error"]["code"]) == (400, "invalid_form")
    broken = {"content-type": "multipart/form-data; boundary=x"}
    answer = httpx2.post(f"{address}/images/edits", content=b"--x\r\nno form", headers=broken, timeout=60)
    assert answer.status_code == 400


def test_a_large_form_is_read_where_the_application_has_a_prefix(
    models: dict[str, FewStepPipeline],
) -> None:
    large = file_of(pixels(200, 200))
    with serving(models, prefix="/pictures", limits={"max_edit_bytes": 200_000}) as address:
        assert len(large) > Limits().max_body_bytes  # that of other requests
        answer = post(address, {"prompt": PROMPT}, [("image", ("a.png", large))])
        assert answer.status_code == 200, answer.text
        assert post(address, {"prompt": PROMPT}, [("image", ("a.png", large + large))]).status_code == 413


def test_generations_and_variations_of_an_editor_are_told_the_way(
    address: str, client: openai.OpenAI
) -> None:
    with pytest.raises(openai.BadRequestError, match="send them to /v1/images/edits"):
        client.images.generate(prompt=PROMPT, model="editor")
    with pytest.raises(openai.NotFoundError, match="there are no variations here"):
        client.post("/images/variations", cast_to=object)
    assert client.images.generate(prompt="red heart, noto style", model="plain").data


def test_unknown_fields_of_a_form_are_ignored_where_the_deployment_says_so(
    models: dict[str, FewStepPipeline],
) -> None:
    with serving(models, clients={"unknown_fields": "ignore"}) as address:
        answer = post(address, {"prompt": PROMPT, "strength": "1"}, [IMAGE])
    assert answer.status_code == 200, answer.text
    assert answer.headers["x-fewstep-ignored"] == "strength"


def test_the_api_s_document_describes_the_form(address: str) -> None:
    document = json.loads(httpx2.get(address.removesuffix("/v1") + "/openapi.json", timeout=60).text)
    form = document["components"]["schemas"]["EditRequest"]
    assert form["required"] == ["image", "prompt"]
    assert form["properties"]["image"]["items"] == {"type": "string", "format": "binary"}
    assert "multipart/form-data" in document["paths"]["/v1/images/edits"]["post"]["requestBody"]["content"]


def test_what_took_too_long_is_not_tried_again_by_openai_s_client(models: dict[str, FewStepPipeline]) -> None:
    answers: list[httpx2.Response] = []
    with serving(models, limits={"time_limit_s": 0.001}) as address:
        hooks = {"response": [answers.append]}
        client = openai.OpenAI(
            base_url=address, api_key="any", http_client=openai.DefaultHttpxClient(event_hooks=hooks)
        )
        with pytest.raises(openai.InternalServerError, match="not ready within"):
            client.images.generate(prompt="owl", model="plain")
    assert [answer.status_code for answer in answers] == [504]
