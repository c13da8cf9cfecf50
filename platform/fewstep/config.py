"""The base of every settings class (recipes, cards, policies and the service are made of it), and shared defaults.

Free of torch, for processes that only read settings or shards.
"""

from __future__ import annotations

from typing import Literal, get_args

from pydantic import BaseModel, ConfigDict

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
