"""The base of every settings class (recipes, cards, policies and the service are made of it), and shared defaults.

Free of torch, for processes that only read settings or shards.
"""

from __future__ import annotations

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
