"""Image requests: what a body must say, what the ingress fills in, and what a generator then asks its engine for."""

from __future__ import annotations

import asyncio
import json
import re
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
from fastapi import FastAPI
from fastapi.testclient import TestClient
from pydantic import ValidationError

from fewstep.encoders.labels import LabelEncoder
from fewstep.engine.generation import Generation
from fewstep.errors import UserError
from fewstep.flow import SamplerConfig
from fewstep_serve.config import Limits, ServeConfig
from fewstep_serve.errors import OF_GUIDANCE, SYNONYMS, add_error_handlers
from fewstep_serve.generator import Generator
from fewstep_serve.http import build_api
from fewstep_serve.schema import ImageRequest, Refusal, Refused
from fewstep_serve.service import Service

TRAINED = SamplerConfig(nfe=3, temperature=0.7, h=0.25)


def request(**body: Any) -> ImageRequest:
    return ImageRequest.model_validate(body)


def check(limits: dict[str, Any] | None = None, **body: Any) -> ImageRequest:
    """A body as the ingress passes it on."""
    service = object.__new__(Service)
    service.limits = Limits(**{"max_images": 4, "max_pixels": 1024, "max_teacher_steps": 64} | (limits or {}))
    return service.check(request(**body))


class FakeEngine:
    """Checks captions as the real one does, and remembers what it was asked for."""

    def __init__(self, encoder: str) -> None:
        self.encoder, self.asked, self.max_pending = encoder, [], 8

    async def generate(self, generations: list[Generation]) -> list[SimpleNamespace]:
        self.asked = generations
        if self.encoder.startswith("labels:"):
            LabelEncoder(self.encoder).check([one.caption for one in generations])
        return [SimpleNamespace(seed=one.seed, pixels=np.zeros((2, 2, 3), np.uint8)) for one in generations]


def generations(
    encoder: str, limits: dict[str, Any] | None = None, **body: Any
) -> list[Generation] | Refusal:
    """What a model of this encoder is asked for by a request, or why it is not."""
    generator = object.__new__(Generator.func_or_class)
    pipeline = SimpleNamespace(
        card=SimpleNamespace(text_encoder=encoder),
        sampler_for=lambda shape, **settings: TRAINED.override(**settings),
    )
    model = SimpleNamespace(
        name="m", pipeline=pipeline, size=(16, 16), latent_shape=lambda size: (1, *(size or (16, 16)))
    )

    async def get(name: str) -> SimpleNamespace:
        return model

    generator._store, generator._engine = SimpleNamespace(get=get, default="m"), FakeEngine(encoder)
    generator._max_relative_pixels = 4.0
    generator._response = lambda request, generations, images: generator._engine.asked
    return asyncio.run(generator._generate(check(limits, **body)))


def captions(encoder: str, **body: Any) -> list[str] | Refusal:
    asked = generations(encoder, n=2, **body)
    return asked if isinstance(asked, Refusal) else [one.caption for one in asked]


def test_a_class_by_number_or_name_needs_no_prompt() -> None:
    assert request(class_label=7).class_label == 7
    assert request(class_label="ankle boot").class_label == "ankle boot"
    assert request(class_label=7).prompt is None
    with pytest.raises(ValidationError, match="prompt"):
        request(seed=1)
    for wrong in (-1, "", 1.5, ["bag"]):
        with pytest.raises(ValidationError, match="class_label"):
            request(prompt="x", class_label=wrong)


@pytest.mark.parametrize("body", [{}, {"n": 0}, {"prompt": None}, {"prompt": None, "class_label": None}])
def test_a_body_with_neither_prompt_nor_class_is_told_to_add_a_prompt(body) -> None:
    api, counted = FastAPI(), []
    service = SimpleNamespace(check_key=lambda request: None, answered=lambda *counts: counted.append(counts))
    add_error_handlers(api, service)

    @api.post("/")
    async def accept(body: ImageRequest) -> None: ...

    answer = TestClient(api).post("/", json=body)
    assert answer.status_code == 400
    assert answer.json()["error"] == {
        "message": "prompt: this field is needed; add it.", "type": "invalid_request_error", "param": "prompt",
        "code": "missing_parameter",
    }  # fmt: skip
    assert counted[0][2:] == (400, None, "missing_parameter")


def test_the_api_s_document_defines_all_that_it_refers_to() -> None:
    api = build_api(ServeConfig.model_validate({"access": {"open_to_all": True}}), SimpleNamespace())
    document = api.openapi()
    refers_to = set(re.findall(r"#/components/schemas/(\w+)", json.dumps(document)))
    assert {"ImageRequest", "ImagesResponse", "ImageData", "Timings"} <= refers_to
    assert refers_to <= set(document["components"]["schemas"])
    assert document["paths"]["/v1/images/generations"]["post"]["summary"] == "Generate images"


def test_the_schema_says_that_one_of_prompt_and_class_is_needed() -> None:
    schema = ImageRequest.model_json_schema()
    assert [one["required"] for one in schema["anyOf"]] == [["prompt"], ["class_label"]]
    assert schema["properties"]["h"]["anyOf"][0] == {"minimum": 0, "type": "number"}


@pytest.mark.parametrize(
    ("body", "expected"),
    [
        ({"prompt": "x", "class_label": 7}, "7"),
        ({"class_label": "bag"}, "bag"),
        ({"prompt": "sneaker"}, "sneaker"),
        ({"prompt": "x", "class_label": "bag"}, "bag"),
        ({"class_label": 7}, "7"),
    ],
)
def test_a_class_conditional_model_generates_the_class(body, expected: str) -> None:
    assert captions("labels:fashion-mnist", **body) == [expected] * 2


def test_an_unknown_class_is_refused_where_it_was_said() -> None:
    by_label = captions("labels:fashion-mnist", prompt="x", class_label=10)
    assert (by_label.status, by_label.code, by_label.param) == (400, "invalid_value", "class_label")
    assert "no class '10'" in by_label.message
    by_prompt = captions("labels:fashion-mnist", prompt="sneakers")
    assert (by_prompt.status, by_prompt.param) == (400, "prompt")
    assert "the nearest is 'sneaker'" in by_prompt.message


@pytest.mark.parametrize("prompt", [{"prompt": "owl"}, {}])
def test_a_text_model_takes_no_class(prompt) -> None:
    refusal = captions("minilm", class_label=3, **prompt)
    assert (refusal.status, refusal.param) == (400, "class_label")
    assert "leave class_label out" in refusal.message
    assert captions("minilm", prompt="owl") == ["owl"] * 2


def test_the_ingress_fills_in_what_is_left_out_but_for_the_model_s_own_settings() -> None:
    nulls = {"n": None, "size": None, "output_format": None, "output_compression": None, "seed": None}
    for body in (check(prompt="x"), check(prompt="x", **nulls)):
        assert (body.n, body.size, body.pixels) == (1, "auto", None)
        assert (body.output_format, body.output_compression) == ("png", 100)
        assert 0 <= body.seed < 2**31
        assert (body.num_inference_steps, body.temperature, body.h) == (None, None, None)
    assert check(prompt="x", seed=5, size="24x8").pixels == (8, 24)
    assert check(prompt="x", sampler="teacher").num_inference_steps == 64
    for body, param in (
        ({"n": 5}, "n"),
        ({"size": "64x17"}, "size"),
        ({"num_inference_steps": 17}, "num_inference_steps"),
    ):
        with pytest.raises(Refused) as refused:
            check(prompt="x", **body)
        assert refused.value.refusal.param == param


def test_sampler_settings_are_the_request_s_or_as_trained() -> None:
    [plain] = generations("minilm", prompt="x")
    assert plain.sampler == TRAINED
    [asked] = generations("minilm", prompt="x", num_inference_steps=2, temperature="auto", h=0)
    assert (asked.sampler.nfe, asked.sampler.temperature, asked.sampler.h) == (2, "auto", 0)
    [teacher] = generations("minilm", prompt="x", sampler="teacher", num_inference_steps=8)
    assert (teacher.teacher_steps, teacher.total, teacher.sampler) == (8, 8, TRAINED)


@pytest.mark.parametrize("size", ["32x32", "64x16", "8x100"])
def test_sizes_up_to_a_multiple_of_the_trained_one_are_generated(size: str) -> None:
    assert len(generations("minilm", prompt="x", size=size)) == 1


@pytest.mark.parametrize("size", ["32x34", "384x384", "64x18", "99999x99999"])
def test_a_size_far_beyond_the_trained_one_is_refused_whatever_the_limit_in_pixels(size: str) -> None:
    refusal = generations("minilm", {"max_pixels": None}, prompt="x", size=size)
    assert (refusal.status, refusal.param) == (400, "size")
    assert f"{size} is too large, at most 4 times the 16x16 pixels that 'm' was trained at" in refusal.message


def test_more_than_ever_fits_the_queue_is_no_matter_of_waiting() -> None:
    refusal = generations("minilm", prompt="x", size="32x32", n=3)
    assert (refusal.status, refusal.param) == (400, "n")
    assert "count as 12 images, at most 8 may wait" in refusal.message
    assert len(generations("minilm", prompt="x", size="32x32", n=2)) == 2


@pytest.mark.parametrize(
    ("field", "remedy"),
    [
        ("steps", "did you mean 'num_inference_steps'?"),
        ("numSteps", "did you mean 'num_inference_steps'?"),
        ("num-inference-steps", "did you mean 'num_inference_steps'?"),
        ("inference_step", "did you mean 'num_inference_steps'?"),
        ("num_images", "did you mean 'n'?"),
        ("num_images_per_prompt", "did you mean 'n'?"),
        ("width", "did you mean 'size'?"),
        ("resp_format", "did you mean 'response_format'?"),
        ("random_seed", "did you mean 'seed'?"),
        ("sede", "did you mean 'seed'?"),
        ("scheduler", "did you mean 'sampler'?"),
        ("label", "did you mean 'class_label'?"),
        ("temp", "did you mean 'temperature'?"),
        ("stpes", "did you mean 'num_inference_steps'?"),
        ("setps", "did you mean 'num_inference_steps'?"),
        ("widht", "did you mean 'size'?"),
        ("lable", "did you mean 'class_label'?"),
        ("cfg_scale", "a student generates without guidance"),
        ("guidance_scale", "a student generates without guidance"),
        ("negative_prompt", "a student generates without guidance"),
        ("image", "/docs lists the fields"),
        ("strength", "/docs lists the fields"),
    ],
)
def test_an_unknown_field_leads_to_the_one_that_was_meant(field: str, remedy: str) -> None:
    api = FastAPI()
    add_error_handlers(api, SimpleNamespace(check_key=lambda request: None, answered=lambda *counts: None))

    @api.post("/")
    async def accept(body: ImageRequest) -> None: ...

    error = TestClient(api).post("/", json={"prompt": "x", field: 1}).json()["error"]
    assert (error["code"], error["param"]) == ("unknown_parameter", field)
    assert remedy in error["message"]


def refused(body: bytes) -> dict[str, Any]:
    """The error of a body, and that it was counted."""
    api, counted = FastAPI(), []
    service = SimpleNamespace(check_key=lambda request: None, answered=lambda *counts: counted.append(counts))
    add_error_handlers(api, service)

    @api.post("/")
    async def accept(body: ImageRequest) -> None: ...

    answer = TestClient(api).post("/", content=body, headers={"content-type": "application/json"})
    assert answer.status_code == 400
    error = answer.json()["error"]
    assert [one[2:] for one in counted] == [(400, None, error["code"])]
    return error


@pytest.mark.parametrize(
    ("body", "message"),
    [
        ('{"prompt": "fünf"}'.encode("latin-1"), "the body is not UTF-8: encode it as UTF-8."),
        (b'{"prompt": ' + b"[" * 100_000 + b"]" * 100_000 + b"}", "nested too deeply: send one flat JSON object"),
        (b'{"prompt": "x", "seed": ' + b"7" * 5000 + b"}", "a number of too many digits: write a shorter one"),
        (b"{", "the body is not a JSON object: send one"),
        (b"[]", "the body is not a JSON object: send one"),
    ],
    ids=["latin-1", "deep", "digits", "cut", "list"],
)  # fmt: skip
def test_a_body_that_can_not_be_read_is_told_why(body: bytes, message: str) -> None:
    error = refused(body)
    assert message in error["message"]
    assert (error["code"], error["param"]) == ("invalid_json", None)


@pytest.mark.parametrize("field", ["prompt", "class_label", "size", "sampler", "quality"])
def test_half_a_surrogate_pair_is_told_as_such(field: str) -> None:
    error = refused(json.dumps({"prompt": "x", field: "\ud83d"}).encode())
    assert (error["code"], error["param"]) == ("invalid_value", field)
    assert "half a surrogate pair" in error["message"] or field in ("size", "sampler", "quality")
    assert "integer" not in error["message"]


@pytest.mark.parametrize("written", ["16X24", " 16x24", "16x24 ", "\t16X24\n"])
def test_a_size_may_have_a_capital_x_and_blanks_around(written: str) -> None:
    body = check(prompt="x", size=written)
    assert (body.size, body.pixels) == ("16x24", (24, 16))
    assert request(prompt="x", size=" Auto").pixels is None


@pytest.mark.parametrize(
    "size", ["16*16", "16", "16x", "0x16", "016x16", "16x-1", "16 x 16", "", "١٦x١٦", "100000x1"]
)
def test_a_size_written_otherwise_is_told_how(size: str) -> None:
    error = refused(json.dumps({"prompt": "x", "size": size}).encode())
    assert error["message"].startswith("size: write WIDTHxHEIGHT in pixels, as 512x512, or 'auto';")
    assert (error["code"], error["param"]) == ("invalid_value", "size")


def test_a_size_too_large_is_told_as_such_before_what_the_model_can_not_take(monkeypatch) -> None:
    def latent_shape(size: tuple[int, int] | None) -> None:
        raise UserError("both sides must be multiples of 2")

    generator = object.__new__(Generator.func_or_class)
    generator._max_relative_pixels = 4.0
    model = SimpleNamespace(name="m", size=(16, 16), latent_shape=latent_shape)
    with pytest.raises(Refused, match="99999x99999 is too large"):
        generator._generations(request(prompt="x", size="99999x99999"), model, "x", None)


@pytest.mark.parametrize("value", [True, False, "0.5", "1", float("nan"), 0, 1.5, [0.5]])
def test_a_temperature_is_a_number_or_auto(value: object) -> None:
    with pytest.raises(ValidationError, match="temperature"):
        request(prompt="x", temperature=value)
    for right in (1, 0.5, "auto", None):
        assert request(prompt="x", temperature=right).temperature == right


def test_what_other_apis_call_a_field_is_none_of_ours_and_leads_to_one() -> None:
    fields = set(ImageRequest.model_fields)
    assert not (SYNONYMS.keys() | OF_GUIDANCE) & fields
    assert set(SYNONYMS.values()) <= fields


def test_the_page_of_the_api_names_every_field_and_needs_no_other_server() -> None:
    api = build_api(ServeConfig.model_validate({"access": {"open_to_all": True}}), SimpleNamespace())
    answer = TestClient(api).get("/docs")
    assert answer.headers["content-type"] == "text/html; charset=utf-8"
    assert "default-src 'self'" in answer.headers["content-security-policy"]
    page = answer.text
    # Of the addresses that are in it, all are this service's own.
    assert not re.findall(r"(?:https?:)?//\w", page)
    assert {"page/style.css", "openapi.json"} <= set(re.findall(r"(?:src|href)=[\"']([^\"'#]+)", page))
    document = api.openapi()
    for path in document["paths"]:
        assert path in page
    for name, schema in document["components"]["schemas"].items():
        assert f"id='{name}'" in page
        assert all(f"<code>{field}</code>" in page for field in schema.get("properties", {}))
    assert {link[1:] for link in re.findall(r"href='(#\w+)'", page)} <= set(document["components"]["schemas"])
    # FastAPI's own pages, which need a public server, are gone.
    assert TestClient(api).get("/redoc").status_code == 404


def test_image_i_is_generated_from_seed_plus_i() -> None:
    assert [one.seed for one in generations("minilm", prompt="x", seed=40, n=3)] == [40, 41, 42]


@pytest.mark.parametrize("h", [-0.5, float("nan"), float("inf"), "0.5"])
def test_how_much_noise_is_renewed_is_a_number_from_0(h) -> None:
    with pytest.raises(ValidationError, match="h\n"):
        request(prompt="x", h=h)
    assert request(prompt="x", h=1).h == 1.0
