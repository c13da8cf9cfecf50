"""Image requests: what a body must say, what the ingress fills in, and what a generator then asks its engine for."""

from __future__ import annotations

import asyncio
import base64
import hashlib
import io
import json
import re
import time
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
from fastapi import FastAPI
from fastapi.testclient import TestClient
from PIL import Image
from pydantic import ValidationError

from fewstep.encoders.labels import LabelEncoder
from fewstep.engine.admission import Admission
from fewstep.engine.caller import ANYBODY, Caller
from fewstep.engine.generation import Generation
from fewstep.engine.source import ModelSource
from fewstep.errors import UserError
from fewstep.flow import SamplerConfig, TeacherSamplerConfig
from fewstep_serve.config import Clients, Limits, ServeConfig, Urls
from fewstep_serve.errors import OF_GUIDANCE, SYNONYMS, add_error_handlers
from fewstep_serve.files import ImageFiles
from fewstep_serve.generator import Generator
from fewstep_serve.http import build_api
from fewstep_serve.images import encode_image, resized
from fewstep_serve.schema import ImageData, ImageRequest, ImagesResponse, Refusal, Refused, Timings
from fewstep_serve.service import Service

TRAINED = SamplerConfig(nfe=3, temperature=0.7, h=0.25)


def request(**body: Any) -> ImageRequest:
    return ImageRequest.model_validate(body)


def check(
    limits: dict[str, Any] | None = None, clients: dict[str, Any] | None = None, **body: Any
) -> ImageRequest:
    """A body as the ingress passes it on."""
    service = object.__new__(Service)
    service._clients, service.files = Clients(**(clients or {})), None
    service.limits = Limits(**{"max_images": 4, "max_pixels": 1024, "max_teacher_steps": 64} | (limits or {}))
    return service.check(service.body.model_validate(body))


class FakeEngine:
    """Checks captions as the real one does, and remembers what it was asked for."""

    def __init__(self, encoder: str) -> None:
        self.encoder, self.asked, self.admission = encoder, [], Admission(24)

    async def generate(self, generations: list[Generation], caller: Caller) -> list[SimpleNamespace]:
        self.asked = generations
        if self.encoder.startswith("labels:"):
            LabelEncoder(self.encoder).check([one.caption for one in generations])
        return [SimpleNamespace(seed=one.seed, pixels=np.zeros((2, 2, 3), np.uint8)) for one in generations]


def generations(
    encoder: str, limits: dict[str, Any] | None = None, other_size: str = "refuse", **body: Any
) -> list[Generation] | Refusal:
    """What a model of this encoder is asked for by a request, or why it is not."""
    generator = object.__new__(Generator.func_or_class)
    pipeline = SimpleNamespace(
        card=SimpleNamespace(text_encoder=encoder, teacher_sampler=TeacherSamplerConfig(), references=0),
        sampler_for=lambda shape, **settings: TRAINED.override(**settings),
        nearest_size=lambda height, width, most: (int(min(height, most**0.5)), int(min(width, most**0.5))),
        style_mix=lambda lora: (),
    )
    model = SimpleNamespace(
        name="m", pipeline=pipeline, size=(16, 16), latent_shape=lambda size: (1, *(size or (16, 16)))
    )

    async def get(name: str, track: str) -> SimpleNamespace:
        return model

    loras = [{"name": name, "source": "x", "max_scale": 1.5} for name in ("ink", "pixel", "clay")]
    sources = {"m": ModelSource.model_validate({"name": "m", "source": "x", "loras": loras})}
    generator._store = SimpleNamespace(get=get, default="m", sources=sources)
    generator._engine, generator._image_check = FakeEngine(encoder), None
    generator._max_relative_pixels, generator._other_size = 4.0, other_size
    generator._response = lambda request, generations, images: generator._engine.asked
    return asyncio.run(generator._generate(check(limits, **body), ANYBODY, "request"))


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
    service = SimpleNamespace(check_key=lambda request: ANYBODY, answered=counted.append)
    add_error_handlers(api, service)

    @api.post("/")
    async def accept(body: ImageRequest) -> None: ...

    answer = TestClient(api).post("/", json=body)
    assert answer.status_code == 400
    assert answer.json()["error"] == {
        "message": "prompt: this field is needed; add it.", "type": "invalid_request_error", "param": "prompt",
        "code": "missing_parameter",
    }  # fmt: skip
    assert (counted[0].status, counted[0].images, counted[0].code) == (400, None, "missing_parameter")


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
    assert "count as 36 units of work, at most 24 may be under way" in refusal.message
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
    add_error_handlers(
        api, SimpleNamespace(check_key=lambda request: ANYBODY, answered=lambda exchange: None)
    )

    @api.post("/")
    async def accept(body: ImageRequest) -> None: ...

    error = TestClient(api).post("/", json={"prompt": "x", field: 1}).json()["error"]
    assert (error["code"], error["param"]) == ("unknown_parameter", field)
    assert remedy in error["message"]


def refused(body: bytes) -> dict[str, Any]:
    """The error of a body, and that it was counted."""
    api, counted = FastAPI(), []
    service = SimpleNamespace(check_key=lambda request: ANYBODY, answered=counted.append)
    add_error_handlers(api, service)

    @api.post("/")
    async def accept(body: ImageRequest) -> None: ...

    answer = TestClient(api).post("/", content=body, headers={"content-type": "application/json"})
    assert answer.status_code == 400
    error = answer.json()["error"]
    assert [(one.status, one.images, one.code) for one in counted] == [(400, None, error["code"])]
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
    generator._max_relative_pixels, generator._other_size = 4.0, "refuse"
    pipeline = SimpleNamespace(card=SimpleNamespace(text_encoder="minilm", references=0))
    model = SimpleNamespace(name="m", size=(16, 16), pipeline=pipeline, latent_shape=latent_shape)

    async def get(name: str, track: str) -> SimpleNamespace:
        return model

    sources = {"m": ModelSource(name="m", source="nowhere")}
    generator._store = SimpleNamespace(get=get, default="m", sources=sources)
    with pytest.raises(Refused, match="99999x99999 is too large"):
        asyncio.run(generator._generations(request(prompt="x", size="99999x99999"), ANYBODY, "request"))


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


def test_work_is_images_times_evaluations_times_pixels_and_passes_of_a_guided_teacher() -> None:
    def work(**body: Any) -> float:
        return sum(one.work for one in generations("minilm", prompt="x", **body))

    assert work() == TRAINED.nfe
    assert work(n=3, num_inference_steps=2) == 6
    assert work(size="32x16") == 2 * TRAINED.nfe
    assert work(size="8x8") == TRAINED.nfe, "small images take as long as ordinary ones"
    assert work(sampler="teacher", num_inference_steps=5) == 10


def test_each_answer_is_a_line_of_the_audit_file_without_its_prompt(tmp_path, monkeypatch) -> None:
    (tmp_path / "keys").write_text("studio: sesame\n")
    settings = {
        "access": {"api_keys_file": str(tmp_path / "keys")},
        "audit_file": str(tmp_path / "new" / "audit"),
    }
    client, _ = serving(tmp_path, monkeypatch, **settings)
    monkeypatch.setattr("fewstep_serve.service.http_options", lambda: SimpleNamespace(host="127.0.0.1"))

    def post(key: str | None, **body: Any) -> int:
        headers = {"x-request-id": "r-1"} | ({"authorization": f"Bearer {key}"} if key else {})
        return client.post("/v1/images/generations", json=body, headers=headers).status_code

    assert post("sesame", prompt="a private owl", seed=5, n=2) == 200
    (tmp_path / "new" / "audit").rename(tmp_path / "rotated")
    assert post("sesame", prompt="a private owl", stream=True) == 200
    assert post("sesame", prompt="a private owl", n=99) == 400
    assert post("sesame", prompt="a private owl", n="many") == 400
    assert post(None, prompt="a private owl") == 401
    text = (tmp_path / "rotated").read_text() + (tmp_path / "new" / "audit").read_text()
    assert "private" not in text
    assert "sesame" not in text
    lines = [json.loads(line) for line in text.splitlines()]
    assert [line["status"] for line in lines] == [200, 200, 400, 400, 401]
    assert [line["key"] for line in lines] == ["studio"] * 4 + [None]
    first = lines[0]
    assert first["prompt_sha256"] == hashlib.sha256(b"a private owl").hexdigest()
    assert (first["request_id"], first["seed"], first["n"], first["work"]) == ("r-1", 5, 2, 4)
    assert (first["model"], first["version"], first["num_inference_steps"]) == ("m", "1", 4)
    assert lines[1]["seed"] is not None, "the one that was drawn"
    assert lines[4]["code"] == "invalid_api_key"


def test_an_audit_file_that_can_not_be_written_is_refused_at_the_start(tmp_path, monkeypatch) -> None:
    (tmp_path / "file").touch()
    with pytest.raises(UserError, match=r"audit_file: .* can't be written"):
        serving(tmp_path, monkeypatch, audit_file=str(tmp_path / "file" / "audit"))


def test_image_i_is_generated_from_seed_plus_i() -> None:
    assert [one.seed for one in generations("minilm", prompt="x", seed=40, n=3)] == [40, 41, 42]


@pytest.mark.parametrize("h", [-0.5, float("nan"), float("inf"), "0.5"])
def test_how_much_noise_is_renewed_is_a_number_from_0(h) -> None:
    with pytest.raises(ValidationError, match="h\n"):
        request(prompt="x", h=h)
    assert request(prompt="x", h=1).h == 1.0


def test_a_quality_is_a_number_of_evaluations_where_the_deployment_says_so() -> None:
    clients = {"quality": {"low": 2, "high": 8}}
    assert check(clients=clients, prompt="x", quality="low").num_inference_steps == 2
    assert check(clients=clients, prompt="x", quality="medium").num_inference_steps is None
    assert check(clients=clients, prompt="x", quality="low", num_inference_steps=3).num_inference_steps == 3
    assert check(prompt="x", quality="low").num_inference_steps is None
    with pytest.raises(Refused, match="16 are too many"):
        check({"max_steps": 8}, {"quality": {"max": 16}}, prompt="x", quality="max")


def test_another_size_is_the_nearest_where_the_deployment_says_so() -> None:
    asked = generations("minilm", {"max_pixels": None}, "nearest", prompt="x", size="1024x1024")
    assert [one.shape for one in asked] == [(1, 32, 32)], "four times the pixels that it was trained at"
    refusal = generations("minilm", {"max_pixels": None}, prompt="x", size="1024x1024")
    assert isinstance(refusal, Refusal)


def serving(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, **settings: Any
) -> tuple[TestClient, list[ImageRequest]]:
    """The API in front of a generator that answers with a white image."""
    asked: list[ImageRequest] = []
    monkeypatch.setenv("FEWSTEP_URL_SECRET", "s" * 32)
    white = encode_image(np.full((2, 2, 3), 255, np.uint8))

    async def generate_stream(
        self: Service, request: ImageRequest, caller: Caller, request_id: str, **how: Any
    ) -> Any:
        asked.append(request)
        timings = Timings(queue_ms=0, encode_ms=0, network_ms=0, policy_ms=0, decode_ms=0)
        data = [ImageData(b64_json=white, seed=seed, batch_size=1, timings=timings) for seed in request.seeds]
        yield ImagesResponse(
            created=0, data=data, output_format="png", size="2x2", model="m", version="1", num_inference_steps=4,
            sampler="student", work=4,
        )  # fmt: skip

    monkeypatch.setattr(Service, "generate_stream", generate_stream)
    config = ServeConfig.model_validate({"access": {"open_to_all": True}, **settings})
    return TestClient(build_api(config, SimpleNamespace())), asked


def test_unknown_fields_are_left_out_and_told_where_the_deployment_says_so(tmp_path, monkeypatch) -> None:
    body = {"prompt": "x", "negative_prompt": "blurry", "é": 1, "seed": 5}
    client, asked = serving(tmp_path, monkeypatch)
    assert client.post("/v1/images/generations", json=body).json()["error"]["code"] == "unknown_parameter"
    client, asked = serving(tmp_path, monkeypatch, clients={"unknown_fields": "ignore"})
    answer = client.post("/v1/images/generations", json=body)
    assert answer.status_code == 200
    assert answer.headers["x-fewstep-ignored"] == "negative_prompt, %C3%A9"
    assert type(asked[0]) is ImageRequest
    assert asked[0].seed == 5
    streamed = client.post("/v1/images/generations", json=body | {"stream": True})
    assert streamed.headers["x-fewstep-ignored"]
    assert "x-fewstep-ignored" not in client.post("/v1/images/generations", json={"prompt": "x"}).headers
    wrong = client.post("/v1/images/generations", json={"prompt": "x", "n": 0, "other": 1})
    assert wrong.json()["error"]["param"] == "n", "what is known is still checked"


def test_images_are_fetched_from_addresses_that_expire(tmp_path, monkeypatch) -> None:
    body = {"prompt": "x", "n": 2, "response_format": "url"}
    client, _ = serving(tmp_path, monkeypatch)
    assert client.post("/v1/images/generations", json=body).json()["error"]["param"] == "response_format"

    client, _ = serving(tmp_path, monkeypatch, urls={"storage": str(tmp_path / "files"), "expire_minutes": 5})
    data = client.post("/v1/images/generations", json=body).json()["data"]
    assert len({one["url"] for one in data}) == 2
    assert all("b64_json" not in one for one in data)
    address = data[0]["url"]
    assert address.startswith("http://testserver/v1/files/")
    answer = client.get(address)
    assert answer.headers["content-type"] == "image/png"
    with Image.open(io.BytesIO(answer.content)) as image:
        assert image.size == (2, 2)

    assert client.get(address[:-1] + ("0" if address[-1] != "0" else "1")).status_code == 403
    assert client.get(address.partition("?")[0]).status_code == 403
    name = address.rpartition("/")[2].partition("?")[0]
    later = f"{int(name[:12]) + 9999:012d}{name[12:]}"
    assert client.get(address.replace(name, later)).status_code == 403, "nobody can prolong an address"
    assert client.get(f"/v1/files/..%2F{name}?signature=x").status_code in (403, 404)

    now = time.time()
    monkeypatch.setattr("fewstep_serve.files.time.time", lambda: now + 301)
    assert client.get(address).json()["error"]["code"] == "expired"
    assert ImageFiles(Urls(storage=str(tmp_path / "files"))).sweep() == 2
    assert not list((tmp_path / "files").iterdir())


def test_addresses_need_a_secret(monkeypatch, tmp_path) -> None:
    monkeypatch.setenv("FEWSTEP_URL_SECRET", "short")
    with pytest.raises(UserError, match="openssl rand"):
        ImageFiles(Urls(storage=str(tmp_path)))


def test_an_image_is_resampled_to_the_size_that_was_asked_for() -> None:
    pixels = np.zeros((4, 4, 3), np.uint8)
    assert resized(pixels, 8, 6).shape == (8, 6, 3)
    assert resized(pixels, 4, 4) is pixels


@pytest.mark.parametrize("file_format", ["png", "webp", "jpeg"])
def test_facts_are_written_into_the_file_and_change_no_pixel(file_format: str) -> None:
    pixels = np.random.default_rng(0).integers(0, 256, (8, 8, 3), dtype=np.uint8)
    generator = object.__new__(Generator.func_or_class)
    asked = SimpleNamespace(
        model=SimpleNamespace(name="m", version="3"),
        total=4,
        teacher_steps=None,
        caption="a cat",
        lora=[("ink", 0.8)],
    )
    facts = generator._facts(asked, SimpleNamespace(seed=7))
    bare, told = (
        Image.open(io.BytesIO(base64.b64decode(encode_image(pixels, file_format, 100, text))))
        for text in (None, facts)
    )
    assert np.array_equal(np.asarray(bare), np.asarray(told))
    found = json.loads(told.info["fewstep"] if file_format == "png" else told.getexif()[0x010E])
    assert (found["model"], found["version"], found["seed"]) == ("m", "3", 7)
    assert found["prompt_sha256"] == hashlib.sha256(b"a cat").hexdigest()
