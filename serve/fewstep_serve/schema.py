"""Requests and responses of the HTTP API: OpenAI's images API, and what fewstep adds to it.

The same objects travel between the ingress and the generators.
"""

from __future__ import annotations

import re
from dataclasses import dataclass
from typing import Annotated, Any, Literal

from pydantic import (
    BaseModel,
    ConfigDict,
    Field,
    StringConstraints,
    ValidationError,
    field_validator,
    model_validator,
)
from pydantic_core import InitErrorDetails, PydanticCustomError

OutputFormat = Literal["png", "webp", "jpeg"]
Quality = Literal["auto", "standard", "hd", "low", "medium", "high", "xhigh", "max"]
MAX_SEED = 2**53 - 1
"""The largest integer that every JSON reader keeps exact."""


SIZE = "[1-9][0-9]{0,4}x[1-9][0-9]{0,4}|auto"
"""How a size is written."""


class LoRAChoice(BaseModel):
    """A style LoRA that a request asks for."""

    model_config = ConfigDict(extra="forbid", strict=True, frozen=True, use_attribute_docstrings=True)

    name: str
    """One of the model's `loras` in `GET /v1/models`."""
    scale: Annotated[float, Field(allow_inf_nan=False)] = 1.0
    """How strongly it acts; 1 is as it was trained, and a negative one is its opposite."""


class ImageRequest(BaseModel):
    """Body of `POST /v1/images/generations`."""

    model_config = ConfigDict(
        extra="forbid",  # a misspelt field would otherwise be ignored without a word
        strict=True,  # "2" is no number: what is guessed here, another server would guess otherwise
        frozen=True,
        use_attribute_docstrings=True,
        # What the validator below demands, so that a reader of the schema (or a fuzzer) knows.
        json_schema_extra={
            "anyOf": [
                {"required": ["prompt"], "properties": {"prompt": {"type": "string"}}},
                {"required": ["class_label"], "properties": {"class_label": {"type": ["integer", "string"]}}},
            ]
        },
    )

    prompt: Annotated[str, StringConstraints(min_length=1)] | None = None
    """What the images are to show: a text, or for class-conditional models the name or number of a class. May be left
    out where `class_label` says it."""
    model: str | None = None
    """One of `GET /v1/models`; the first of them by default. Where one is served in two versions, NAME@stable,
    NAME@canary and NAME@VERSION, with a response's `version`, name one of them."""
    n: Annotated[int, Field(ge=1)] | None = 1
    """How many images; image i is generated from `seed + i`."""
    size: Annotated[str, StringConstraints(pattern=f"^({SIZE})$")] | None = "auto"
    """WIDTHxHEIGHT in pixels, or "auto": as the model was trained."""
    response_format: Literal["b64_json", "url"] | None = "b64_json"
    """Whether images travel in the response, or are fetched from an address that expires (where the deployment has
    it)."""
    output_format: OutputFormat | None = "png"
    """File format of the images; png and webp are lossless."""
    output_compression: Annotated[int, Field(ge=0, le=100)] | None = 100
    """Quality of jpeg, and of webp below 100; png is always lossless."""
    stream: bool | None = False
    """Answer with server-sent events: previews, then each finished image."""
    partial_images: Annotated[int, Field(ge=0)] | None = None
    """How many previews to stream, the last ones before the end; by default one per evaluation."""
    # OpenAI's client may send these five.
    user: str | None = None
    """The caller's own mark of an end user; accepted for OpenAI's sake, without effect."""
    quality: Quality | None = None
    """Accepted for OpenAI's sake: the deployment may have numbers of evaluations for it, where `num_inference_steps` is
    left out; otherwise without effect."""
    style: Literal["vivid", "natural"] | None = None
    """Accepted for OpenAI's sake, without effect."""
    background: Literal["auto", "opaque"] | None = None
    """Accepted for OpenAI's sake; images have no transparency."""
    moderation: Literal["auto", "low"] | None = None
    """Accepted for OpenAI's sake, without effect."""

    # From here on the fields are fewstep's own.
    seed: Annotated[int, Field(ge=0, le=MAX_SEED)] | None = None
    """Of the noise; drawn at random, and told in the response, if left out."""
    num_inference_steps: Annotated[int, Field(ge=1)] | None = None
    """Network evaluations of the student, as it was trained by default; or steps of the teacher's sampler."""
    temperature: Annotated[float, Field(ge=0.01, le=1)] | Literal["auto"] | None = None
    """Mixture temperature of the student's policy; as the model was trained by default."""
    h: Annotated[float, Field(ge=0, allow_inf_nan=False)] | None = None
    """How much noise the student's sampler renews between evaluations, from the image's own seed; 0 is deterministic.
    As the model was trained by default."""
    class_label: (
        Annotated[int, Field(ge=0)] | Annotated[str, StringConstraints(min_length=1, max_length=200)] | None
    ) = None
    """Number or name of a class, instead of the prompt, for class-conditional models."""
    lora: Annotated[list[LoRAChoice], Field(max_length=64)] | None = None
    """Style LoRAs of the model, each with its scale; they act on student and teacher."""
    sampler: Literal["student", "teacher"] = "student"
    """The few-step student, or its teacher's own guided sampler (where the deployment has it on)."""

    @property
    def pixels(self) -> tuple[int, int] | None:
        """(height, width); None: as the model was trained."""
        if self.size is None or self.size == "auto":
            return None
        width, height = map(int, self.size.split("x"))
        return height, width

    @property
    def caption(self) -> str:
        """What the images are to show: the class by label, or else the prompt."""
        if self.class_label is not None:
            return str(self.class_label)
        assert self.prompt is not None, "a request has one of both"
        return self.prompt

    @property
    def seeds(self) -> range:
        """One per image, of a request whose defaults the ingress has filled in."""
        assert self.seed is not None
        assert self.n is not None
        return range(self.seed, self.seed + self.n)

    @field_validator("size", mode="before")
    @classmethod
    def _size_is_width_x_height(cls, size: Any) -> Any:
        if not isinstance(size, str):
            return size
        plain = size.strip().lower()
        if not re.fullmatch(SIZE, plain):
            # Pydantic's own message would show the regular expression.
            raise PydanticCustomError("size", "write WIDTHxHEIGHT in pixels, as 512x512, or 'auto'")
        return plain

    @model_validator(mode="before")
    @classmethod
    def _prompt_or_class(cls, body: Any) -> Any:
        if isinstance(body, dict) and body.get("prompt") is None and body.get("class_label") is None:
            # The error that a required field has: clients are told which one to add.
            missing = InitErrorDetails(type="missing", loc=("prompt",), input=body)
            raise ValidationError.from_exception_data(cls.__name__, [missing])
        return body


class EditRequest(ImageRequest):
    """Form of `POST /v1/images/edits`."""

    image: tuple[bytes, ...] = ()
    """Files of reference images, png, jpeg or webp; in a form also as `image[]`. As many as the model takes."""
    mask: bytes | None = None
    """A file of the first image's size, whose fully transparent parts say where that image may change; elsewhere it
    stays as it is. The whole image may change if it is left out."""
    input_fidelity: Literal["high", "low"] | None = None
    """Accepted for OpenAI's sake, without effect."""


class LenientImageRequest(ImageRequest):
    """The same with any other fields, which are ignored."""

    model_config = ConfigDict(extra="allow")

    def plain(self) -> ImageRequest:
        """The request without them."""
        return ImageRequest.model_construct(
            **{name: getattr(self, name) for name in ImageRequest.model_fields}
        )


class Timings(BaseModel):
    """Where the time of an image went, in milliseconds. The time of a batch counts in full for each of its images."""

    model_config = ConfigDict(use_attribute_docstrings=True)

    queue_ms: float
    """Waiting for evaluations to begin."""
    encode_ms: float
    """Until the prompt was encoded."""
    network_ms: float
    """In the network."""
    policy_ms: float
    """In rollouts, and in the rest of sampling outside the network."""
    decode_ms: float
    """Until the latent was decoded."""


class ImageData(BaseModel):
    """One image of a response."""

    model_config = ConfigDict(use_attribute_docstrings=True)

    b64_json: str | None = None
    """The image file, base64; None where it is at `url`."""
    url: str | None = None
    """Where the image file is, until the address expires; None where it is in the response."""
    seed: int
    """What its noise was drawn from: the same request with this seed gives the same image."""
    batch_size: float
    """Images that were generated together with this one, itself included: the harmonic mean over its evaluations."""
    timings: Timings
    """Where its time went."""


class ImagesResponse(BaseModel):
    """Answer of `POST /v1/images/generations`."""

    model_config = ConfigDict(use_attribute_docstrings=True)

    created: int
    """Unix time."""
    data: list[ImageData]
    """The images, in the order of their seeds."""
    output_format: OutputFormat
    """File format of the images."""
    size: str
    """WIDTHxHEIGHT in pixels."""
    model: str
    """Name of the model."""
    version: str
    """The exact version that generated them."""
    num_inference_steps: int
    """Evaluations that each of them took."""
    sampler: Literal["student", "teacher"]
    """Which sampler made them."""
    work: float
    """What they count as, all together, where limits are in work: one is one pass of the network over one image of the
    size that it was trained at."""


class CanaryEntry(BaseModel):
    """The second version of a model of `GET /v1/models`."""

    model_config = ConfigDict(use_attribute_docstrings=True)

    version: str | None
    """The exact version; None while its source can't be reached."""
    source: str
    """Where it lies."""
    stuck: str | None = None
    """As of the model."""
    share: float
    """Of the requests that name no version."""
    sticky: bool
    """Whether all requests of a key get the same version."""


class LoRAEntry(BaseModel):
    """One style LoRA of a model."""

    model_config = ConfigDict(use_attribute_docstrings=True)

    name: str
    """What requests call it."""
    source: str
    """Where it lies."""
    max_scale: float
    """Largest scale that a request may give it, positive or negative."""


class ModelEntry(BaseModel):
    """One model of `GET /v1/models`."""

    model_config = ConfigDict(use_attribute_docstrings=True)

    id: str
    """What requests call it."""
    object: Literal["model"] = "model"
    """As OpenAI has it."""
    created: int
    """Unix time at which this replica began to offer models."""
    owned_by: str = "fewstep"
    """As OpenAI has it."""
    version: str | None
    """The exact version that requests get now; None while its source can't be reached."""
    source: str
    """Where it lies."""
    stuck: str | None = None
    """Why it could not follow its alias to another version when it was last looked up; None where it could."""
    canary: CanaryEntry | None = None
    """A second version, which gets a share of the requests; None where there is none."""
    size: str | None
    """WIDTHxHEIGHT it was trained at; None until it is loaded."""
    num_inference_steps: int | None
    """Evaluations it was trained for; None until it is loaded."""
    references: int | None
    """Reference images that it edits, with `/v1/images/edits`; 0: it generates from text alone; None until it is
    loaded."""
    max_teacher_steps: int
    """0: its teacher is not offered."""
    loras: list[LoRAEntry] = []
    """Style LoRAs that requests may ask for."""
    max_loras: int
    """Most of them in one request."""


OfferState = Literal["current", "loading", "failed"]
"""Whether replicas serve what was configured last: they do; it still loads; it can't be loaded. In the last two cases
they go on with what was configured before."""


class OfferStatus(BaseModel):
    """Whether the models on offer are those that were configured last."""

    model_config = ConfigDict(use_attribute_docstrings=True)

    state: OfferState
    """"current": they are. "loading", "failed": they are those that were configured before, because the new ones still
    load or can't be loaded; this is tried again."""
    message: str | None
    """Why they can't be loaded."""


class ModelList(BaseModel):
    """Answer of `GET /v1/models`."""

    model_config = ConfigDict(use_attribute_docstrings=True)

    object: Literal["list"] = "list"
    """As OpenAI has it."""
    data: list[ModelEntry]
    """What is offered; the first is the default."""
    offer: OfferStatus | None
    """Whether that is what was configured last; None where no replica says so."""


class ErrorDetail(BaseModel):
    """What went wrong."""

    model_config = ConfigDict(use_attribute_docstrings=True)

    message: str
    """One sentence with the remedy."""
    type: str
    """OpenAI's class of the error."""
    param: str | None = None
    """The field of the request that is to blame."""
    code: str | None = None
    """A word for programs."""


class ErrorResponse(BaseModel):
    """OpenAI's error shape."""

    error: ErrorDetail


JobStatus = Literal["queued", "running", "succeeded", "failed", "cancelled"]
"""How a job stands; the last three are ends, after which it does not change."""


class Job(BaseModel):
    """A request that is answered later."""

    model_config = ConfigDict(use_attribute_docstrings=True)

    id: str
    """What it is called: `GET /v1/images/jobs/ID` tells how it stands."""
    object: Literal["image.job"] = "image.job"
    """What this is, as OpenAI has it of its objects."""
    status: JobStatus
    """How it stands; the last three are ends, after which it does not change."""
    created: int
    """Unix time."""
    expires: int
    """Unix time at which it is forgotten, its images included."""
    result: ImagesResponse | None = None
    """What `POST /v1/images/generations` would have answered, where it succeeded."""
    error: ErrorDetail | None = None
    """Why there are no images, where it failed."""


class Health(BaseModel):
    """Answer of `GET /healthz`."""

    model_config = ConfigDict(use_attribute_docstrings=True)

    status: Literal["ok", "starting"]
    """Whether any replica can generate."""
    replicas: int
    """Replicas that can generate."""
    offer: OfferState | None
    """Whether they serve what was configured last (`GET /v1/models` says why not); None while there is none."""


@dataclass(frozen=True)
class PreviewImage:
    """A preview of image `index`, on its way from a generator to the ingress."""

    index: int
    """Which image of the request, from 0."""
    step: int
    """Evaluations it has had, from 1."""
    steps: int
    """Evaluations it takes."""
    b64_json: str
    """A png file, base64."""


@dataclass(frozen=True)
class Refusal:
    """Why a request is not answered with images; becomes an error response."""

    status: int
    """Of HTTP."""
    message: str
    """One sentence with the remedy."""
    code: str
    """A word for programs."""
    param: str | None = None
    """The field of the request that is to blame."""
    retry_after_s: int | None = None
    """When to try again; the service's own default if None."""


class Refused(Exception):
    """Ends a request with an error response.

    Attributes:
        refusal: what the response says.
    """

    def __init__(self, refusal: Refusal) -> None:
        super().__init__(refusal.message)
        self.refusal = refusal
