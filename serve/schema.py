"""Requests and responses: OpenAI's images API, and what fewstep adds to it."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Annotated, Any, Literal

from pydantic import BaseModel, ConfigDict, Field, StringConstraints, model_validator

OutputFormat = Literal["png", "webp", "jpeg"]
MAX_SEED = 2**53 - 1
"""The largest integer that every JSON reader keeps exact."""


class ImageRequest(BaseModel):
    """Body of `POST /v1/images/generations`."""

    model_config = ConfigDict(extra="forbid", strict=True, use_attribute_docstrings=True)

    prompt: Annotated[str, StringConstraints(min_length=1)]
    """What to draw; may be left out where `class_label` says it."""
    model: str | None = None
    """One of `GET /v1/models`; the first of them by default."""
    n: Annotated[int, Field(ge=1)] | None = 1
    """How many images; image i is drawn from `seed + i`."""
    size: Annotated[str, StringConstraints(pattern=r"^([1-9][0-9]{0,4}x[1-9][0-9]{0,4}|auto)$")] | None = (
        "auto"
    )
    """WIDTHxHEIGHT in pixels, or "auto": as the model was trained."""
    response_format: Literal["b64_json"] | None = "b64_json"
    """Images travel in the response; there are no URLs."""
    output_format: OutputFormat | None = "png"
    """File format of the images; png and webp are lossless."""
    output_compression: Annotated[int, Field(ge=0, le=100)] | None = 100
    """Quality of jpeg, and of webp below 100; png is always lossless."""
    stream: bool | None = False
    """Answer with server-sent events: previews, then each finished image."""
    partial_images: Annotated[int, Field(ge=0)] | None = None
    """How many previews to stream, the last ones before the end; by default one per evaluation."""
    user: str | None = None
    """The caller's own mark of an end user; accepted for OpenAI's sake, without effect."""
    quality: Literal["auto", "standard", "hd", "low", "medium", "high", "xhigh", "max"] | None = None
    """Accepted for OpenAI's sake, without effect: `num_inference_steps` decides."""
    style: Literal["vivid", "natural"] | None = None
    """Accepted for OpenAI's sake, without effect."""
    background: Literal["auto", "opaque"] | None = None
    """Accepted for OpenAI's sake; images have no transparency."""
    moderation: Literal["auto", "low"] | None = None
    """Accepted for OpenAI's sake, without effect."""

    seed: Annotated[int, Field(ge=0, le=MAX_SEED)] | None = None
    """Of the noise; drawn at random, and told in the response, if left out."""
    num_inference_steps: Annotated[int, Field(ge=1)] | None = None
    """Network evaluations; as the model was trained by default."""
    temperature: Annotated[float, Field(ge=0.01, le=1, strict=False)] | Literal["auto"] | None = None
    """Mixture temperature of the policy; as the model was trained by default."""
    class_label: (
        Annotated[int, Field(ge=0)] | Annotated[str, StringConstraints(min_length=1, max_length=200)] | None
    ) = None
    """Number or name of a class, instead of the prompt, for class-conditional models."""
    sampler: Literal["student", "teacher"] = "student"
    """The few-step student, or its teacher's own guided sampler (where the deployment has it on)."""

    @model_validator(mode="before")
    @classmethod
    def _class_is_prompt_enough(cls, body: Any) -> Any:
        if isinstance(body, dict) and "prompt" not in body and body.get("class_label") is not None:
            return {**body, "prompt": "a class"}
        return body


class Timings(BaseModel):
    """Where the time of an image went, in milliseconds. What a batch took, all its images took."""

    queue_ms: float
    encode_ms: float
    network_ms: float
    policy_ms: float
    decode_ms: float


class ImageData(BaseModel):
    b64_json: str
    seed: int
    batch_size: float
    """Images that were drawn together with this one, itself included: the harmonic mean over its evaluations."""
    timings: Timings


class ImagesResponse(BaseModel):
    """Answer of `POST /v1/images/generations`."""

    created: int
    """Unix time."""
    data: list[ImageData]
    output_format: OutputFormat
    size: str
    model: str
    version: str
    """The exact version that drew it."""
    num_inference_steps: int
    sampler: Literal["student", "teacher"]


class ModelEntry(BaseModel):
    """One model of `GET /v1/models`."""

    id: str
    object: Literal["model"] = "model"
    created: int
    owned_by: str = "fewstep"
    version: str | None
    """The exact version that requests get now; None while its source can't be reached."""
    source: str
    size: str | None
    """WIDTHxHEIGHT it was trained at; None until it is loaded."""
    num_inference_steps: int | None
    """Evaluations it was trained for; None until it is loaded."""
    max_teacher_steps: int
    """0: its teacher is not offered."""


class ModelList(BaseModel):
    object: Literal["list"] = "list"
    data: list[ModelEntry]


class ErrorDetail(BaseModel):
    message: str
    type: str
    param: str | None = None
    code: str | None = None


class ErrorResponse(BaseModel):
    """OpenAI's error shape."""

    error: ErrorDetail


class Health(BaseModel):
    status: Literal["ok", "starting"]
    replicas: int
    """Replicas that can generate."""


# Between ingress and generator. Plain dataclasses: they cross a process boundary on every request.


@dataclass(frozen=True)
class Order:
    """A checked request."""

    request_id: str
    model: str | None
    prompt: str
    n: int
    seed: int
    size: tuple[int, int] | None
    """(height, width) in pixels."""
    steps: int | None
    temperature: float | Literal["auto"] | None
    sampler: Literal["student", "teacher"]
    output_format: OutputFormat
    output_compression: int
    class_label: int | str | None = None
    partial_images: int | None = None


@dataclass(frozen=True)
class Drawn:
    """One finished image."""

    index: int
    seed: int
    image: bytes
    """A file in the format that was asked for."""
    batch_size: float
    timings: dict[str, float]


@dataclass(frozen=True)
class Delivery:
    """All images of an order."""

    model: str
    version: str
    size: tuple[int, int]
    steps: int
    images: list[Drawn]


@dataclass(frozen=True)
class PreviewImage:
    """A preview of image `index` after `step` of `steps` evaluations."""

    index: int
    step: int
    steps: int
    image: bytes


@dataclass(frozen=True)
class Refusal:
    """Why an order is not carried out; becomes an error response."""

    status: int
    message: str
    code: str
    param: str | None = None
    retry_after_s: int | None = None


class Refused(Exception):
    """Ends a request with an error response."""

    def __init__(self, refusal: Refusal) -> None:
        super().__init__(refusal.message)
        self.refusal = refusal
