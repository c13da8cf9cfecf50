"""The base of every settings class (recipes, cards, policies and the service are made of it), and shared defaults.

Free of torch, for processes that only read settings or shards.
"""

from __future__ import annotations

import difflib
from collections.abc import Iterator
from typing import Any, Literal, TypeVar, get_args

from pydantic import BaseModel, ConfigDict, ValidationError

from fewstep.errors import UserError

Settings = TypeVar("Settings", bound=BaseModel)

Shape = tuple[int, int, int]
"""Latent shape (C, H, W)."""

MAX_TOKENS = 64
"""Default limit on a caption's length, in tokens with the encoder's start and end marks."""


class Config(BaseModel):
    """Typed settings that do not change: unknown keys are errors, and docstrings under fields document them."""

    # No setting is infinite or NaN but the few that allow it. "constants": such a one (the sampler's h) stays a number
    # in JSON instead of becoming null.
    model_config = ConfigDict(
        extra="forbid",
        frozen=True,
        use_attribute_docstrings=True,
        allow_inf_nan=False,
        ser_json_inf_nan="constants",
    )


def checked_settings(kind: type[Settings], tree: Any, what: str, keys: str) -> Settings:
    """Settings of class `kind` from what a file says.

    Args:
        kind: their class.
        tree: as read from YAML or JSON.
        what: the place of the settings, for error messages.
        keys: where all keys are listed, for error messages.

    Raises:
        UserError: a key is unknown, or a value is not allowed.
    """
    try:
        return kind.model_validate(tree)
    except ValidationError as error:
        first = error.errors()[0]  # messages are one sentence; the others come up once this one is corrected
    key = ".".join(map(str, first["loc"]))
    if first["type"] == "extra_forbidden":
        known = [name for name, _, _ in document(kind)]
        near = difflib.get_close_matches(key, known, 1, cutoff=0.4)
        hint = f"did you mean {near[0]!r}?" if near else f"{keys}."
        raise UserError(f"{what}: unknown key {key!r}; {hint}")
    message = first["msg"].removeprefix("Value error, ")
    value = "" if isinstance(first["input"], dict) else f" (got {first['input']!r})"
    raise UserError(f"{what}: {key or kind.__name__}: {message}{value}.")


def document(kind: type[BaseModel], prefix: str = "") -> Iterator[tuple[str, str, str]]:
    """Key (with dots), default and documentation of every field, for help pages."""
    for name, field in kind.model_fields.items():
        # A field whose default is settings is a section, whose fields are listed in its place.
        default = field.get_default(call_default_factory=True)
        if isinstance(default, BaseModel):
            yield from document(type(default), f"{prefix}{name}.")
        else:
            yield f"{prefix}{name}", str(default), field.description or ""


Precision = Literal["float32", "bfloat16", "int8", "int4"]
"""How weights are held: in floating point; as integers of 8 bits with a scale per row (torchao); or as 4-bit
NormalFloat numbers with a scale per 64 (bitsandbytes)."""

PRECISIONS: tuple[Precision, ...] = get_args(Precision)
"""All of them, the most exact first."""

Offload = bool | Literal["auto"]
"""Whether a text encoder waits on the host and visits the device for each batch; "auto" where memory is short."""


class PartsConfig(Config):
    """How a pipeline's other parts, text encoder and autoencoder, are loaded."""

    text_encoder_precision: Precision | None = None
    """Of the text encoder's weights; null: float32, but bfloat16 for large language models on a GPU."""
    text_encoder_offload: Offload = "auto"
    """Whether the text encoder waits on the host and visits the GPU for each batch; "auto" where the GPU has less
    memory left than it takes."""
    autoencoder_precision: Literal["float32", "bfloat16"] | None = None
    """Of the autoencoder's weights; null: float32."""
    autoencoder_tiling: bool | None = None
    """Whether images above half a megapixel are decoded in tiles, whose contrast differs; null: where the GPU has too
    little memory left to decode them whole."""
