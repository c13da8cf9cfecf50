"""Settings of the application: `args`, and the generator's `user_config`, of `serve/config.yaml`."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Literal

from pydantic import BaseModel, ConfigDict, Field, model_validator

from fewstep.engine.source import ModelSource
from fewstep.errors import UserError


class Section(BaseModel):
    model_config = ConfigDict(extra="forbid", frozen=True, use_attribute_docstrings=True)


class Limits(Section):
    """What one request may ask for; checked before any work is done for it."""

    max_images: int = Field(10, ge=1)
    """Most images of one request (`n`)."""
    max_steps: int = Field(16, ge=1, le=128)
    """Most network evaluations of the student."""
    max_teacher_steps: int = Field(64, ge=0, le=1000)
    """Most steps of the teacher's own sampler; 0 turns the teacher off."""
    max_pixels: int = Field(1024 * 1024, ge=1)
    """Most pixels of one image, height times width."""
    max_prompt_characters: int = Field(1000, ge=1)
    """Longest prompt; a model's own limit in tokens holds besides."""
    max_body_bytes: int = Field(64 * 1024, ge=1024)
    """Largest request body."""
    time_limit_s: float = Field(60.0, gt=0)
    """After this long a request is given up and answered 504."""


class Batching(Section):
    """How images are gathered into batches."""

    max_batch_size: int = Field(16, ge=1)
    """Most images of a batch; 1 turns batching off."""
    max_wait_ms: float = Field(0.0, ge=0)
    """How long an idle replica waits for a batch to fill; arrivals join at the next evaluation anyway."""
    max_pending: int = Field(256, ge=1)
    """Images that may wait at one replica; beyond them requests are answered 429."""


class Offer(Section):
    """What is served, and how it is batched; a change reaches running replicas without a restart."""

    models: tuple[ModelSource, ...] = Field(
        (ModelSource(name="emoji-student", source="emoji-student"),), min_length=1
    )
    """What is offered; the first is the default."""
    follow_alias_every_s: float = Field(5.0, gt=0)
    """How often aliases of loaded models are looked up."""
    batching: Batching = Batching()

    @model_validator(mode="after")
    def _names_differ(self) -> Offer:
        names = [model.name for model in self.models]
        if twice := {name for name in names if names.count(name) > 1}:
            raise ValueError(f"models: the name {min(twice)!r} is given twice: rename one.")
        return self


class EngineSettings(Section):
    """How a replica runs; a change replaces the replicas one after another."""

    tracking_uri: str | None = None
    """Where `models:/…` is looked up; `MLFLOW_TRACKING_URI` or ./mlflow.db by default."""
    model_memory_mb: int | None = Field(None, ge=1)
    """Limit on the loaded networks of a replica; the least recently used leave first."""
    device: Literal["auto", "cpu", "cuda"] = "auto"
    """Where networks run; "auto" takes the GPU that Ray gave the replica, if any."""
    threads: int = Field(1, ge=1)
    """Torch threads of a replica on a CPU; leave a core per node to HTTP."""
    compile: bool = False
    """Compile the networks (on a GPU: minutes at the first request of each shape)."""
    stages: Literal["together", "apart"] = "together"
    """Whether encoder and decoder work inside the generator's replicas, or are deployments that scale apart."""


class Access(Section):
    """Who may generate."""

    api_keys_file: str | None = None
    """A file with one key per line; empty lines and lines that begin with # don't count."""
    api_keys_variable: str = "FEWSTEP_API_KEYS"
    """Environment variable of the replicas with keys, separated by commas; read where no file is given."""
    open_to_all: bool = False
    """Serve without keys although HTTP listens beyond loopback (behind a gateway that checks, say)."""

    def api_keys(self) -> tuple[str, ...]:
        """The keys; none where access is open.

        Raises:
            UserError: the file can't be read, or is empty.
        """
        if self.api_keys_file is None:
            return tuple(
                key for part in os.environ.get(self.api_keys_variable, "").split(",") if (key := part.strip())
            )
        try:
            lines = Path(self.api_keys_file).expanduser().read_text().splitlines()
        except OSError as error:
            raise UserError(
                f"access.api_keys_file: {self.api_keys_file} can't be read ({error.strerror}): correct the path."
            ) from error
        keys = tuple(line.strip() for line in lines if line.strip() and not line.startswith("#"))
        if not keys:
            raise UserError(f"access.api_keys_file: {self.api_keys_file} holds no key: write one per line.")
        return keys


class Settings(Section):
    """All of it."""

    offer: Offer = Offer()
    """For `serve run serve.app:build` and for Python; in a configuration file the generator's `user_config` has it."""
    limits: Limits = Limits()
    engine: EngineSettings = EngineSettings()
    access: Access = Access()
    retry_after_s: int = Field(1, ge=1)
    """What `Retry-After` says when the service is full."""
