"""What an offered model is called and where it lies; free of torch, for those who only configure."""

from __future__ import annotations

import hashlib
from typing import Literal

from pydantic import Field, model_validator

from fewstep.config import Config

Track = Literal["stable", "canary"]
"""Which of the two versions of a model that may be served at once."""


class Canary(Config):
    """A second version of a model, which is tried on a share of its requests before it takes the place of the first."""

    source: str
    """Where it lies, as `source` of the model."""
    share: float = Field(ge=0, le=1)
    """Of the requests that name no version: 0.1 is one in ten. A larger share keeps those of a smaller one."""
    sticky: bool = False
    """Whether all requests of an API key get the same version. Otherwise each is drawn by its `x-request-id`."""


class LoRASource(Config):
    """One style LoRA that requests may ask for."""

    name: str = Field(min_length=1)
    """What requests call it."""
    source: str
    """A safetensors file or a folder with one, here or `s3://`; a hub id; or `models:/name@alias` of MLflow's. It is
    read when the model is loaded."""
    max_scale: float = Field(2.0, gt=0, allow_inf_nan=False)
    """Largest scale that a request may give it, positive or negative."""


class ModelSource(Config):
    """One model that is offered."""

    name: str
    """What requests call it."""
    source: str
    """A bundled name, an exported folder, `s3://bucket/folder`, a hub id, or MLflow's `models:/name@alias`,
    `models:/name/3`, `models:/name/latest`."""
    teacher: str | None = None
    """Where its teacher lies here, if not where the student's card says: a folder, a hub id or `s3://`."""

    canary: Canary | None = None
    """A second version, which gets a share of the requests."""
    loras: tuple[LoRASource, ...] = Field((), max_length=64)
    """Style LoRAs for the teacher's network that requests may ask for."""
    max_loras: int = Field(2, ge=1)
    """Most of them in one request."""
    max_lora_memory_mb: int = Field(1024, ge=1)
    """Most memory that they may take together; it counts in `model_memory_mb`."""

    # A second one of one name would silently replace the first.
    @model_validator(mode="after")
    def _names_differ(self) -> ModelSource:
        names = [lora.name for lora in self.loras]
        if twice := {name for name in names if names.count(name) > 1}:
            raise ValueError(f"loras: the name {min(twice)!r} is given twice: rename one.")
        return self

    @property
    def tracks(self) -> dict[Track, ModelSource]:
        """What is served under its name, each version as a source without canary."""
        stable = self.model_copy(update={"canary": None})
        if self.canary is None:
            return {"stable": stable}
        return {"stable": stable, "canary": stable.model_copy(update={"source": self.canary.source})}

    def track_for(self, request_id: str, caller: str) -> Track:
        """Which version a request gets that names none: always the same one.

        Args:
            request_id: of the request.
            caller: name of who sends it.
        """
        if self.canary is None:
            return "stable"
        text = f"{self.name} {caller if self.canary.sticky else request_id}"
        drawn = int.from_bytes(hashlib.sha256(text.encode()).digest()[:8], "big") / 2**64
        return "canary" if drawn < self.canary.share else "stable"

    @property
    def follows_alias(self) -> bool:
        """Whether its version may change while it is served."""
        return self.source.startswith("models:/") and (
            "@" in self.source or self.source.lower().endswith("/latest")
        )
