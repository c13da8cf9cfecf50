"""What `serve/config.yaml` may set: `args` is a `ServeConfig`, and the generator's `user_config` is an `Offer`."""

from __future__ import annotations

import os
from typing import Literal

from pydantic import Field, model_validator

from fewstep.assets import expanded
from fewstep.config import Config, PartsConfig, Precision
from fewstep.engine.source import ModelSource
from fewstep.errors import UserError

MAX_ONGOING_REQUESTS = 10_000
"""Of each deployment, never to be reached: what waits is to wait in an engine. Where Serve's own router has to wait for
a full replica, it goes by back-off, a request per half a second, long after the replica is idle again."""


class Limits(Config):
    """What one request may ask for; checked before any work is done for it."""

    max_images: int = Field(10, ge=1)
    """Most images of one request (`n`)."""
    max_steps: int = Field(16, ge=1, le=128)
    """Most network evaluations of the student."""
    max_teacher_steps: int = Field(64, ge=0, le=1000)
    """Most steps of the teacher's own sampler; 0 turns the teacher off."""
    max_relative_pixels: float = Field(4.0, gt=0, allow_inf_nan=True)
    """Most pixels of one image, as a multiple of those of the size that its model was trained at."""
    max_pixels: int | None = Field(None, ge=1)
    """Most pixels of one image, height times width, whatever its model; no such limit by default."""
    max_prompt_characters: int = Field(1000, ge=1)
    """Longest prompt in characters; besides, each model has its own limit in tokens."""
    max_body_bytes: int = Field(64 * 1024, ge=1024)
    """Largest request body."""
    time_limit_s: float = Field(60.0, gt=0)
    """After this many seconds a request is cancelled and answered 504."""


class Batching(Config):
    """How images are gathered into batches."""

    max_batch_size: int = Field(16, ge=1)
    """Most images of a batch; 1 turns batching off. An image of more pixels than its model was trained at counts as the
    multiple that it is: here, in `max_pending`, and in the order in which sizes take turns."""
    max_wait_ms: float = Field(0.0, ge=0)
    """How long an idle replica waits for a batch to fill. 0 is rarely wrong: an image that arrives later joins the
    batch at its next evaluation."""
    max_pending: int = Field(256, ge=1, le=MAX_ONGOING_REQUESTS // 2)
    """Images that may wait at one replica; beyond them requests are answered 429."""


class Offer(Config):
    """What is served, and how it is batched; a change reaches running replicas without a restart.

    What is new loads beside the old and then takes its place, all at once. If it can't be loaded, replicas go on with
    what they have, try again, and say so in `GET /v1/models` and `/healthz`.
    """

    models: tuple[ModelSource, ...] = Field(
        (ModelSource(name="emoji-student", source="emoji-student"),), min_length=1
    )
    """What is offered; the first is the default."""
    follow_alias_every_s: float = Field(5.0, gt=0)
    """How often aliases of loaded models are looked up."""
    batching: Batching = Batching()
    """How images are gathered into batches."""

    # A second model of one name would silently replace the first.
    @model_validator(mode="after")
    def _names_differ(self) -> Offer:
        names = [model.name for model in self.models]
        if twice := {name for name in names if names.count(name) > 1}:
            raise ValueError(f"models: the name {min(twice)!r} is given twice: rename one.")
        return self


class EngineConfig(Config):
    """How a replica runs; a change replaces the replicas one after another."""

    tracking_uri: str | None = None
    """Where `models:/…` is looked up; `MLFLOW_TRACKING_URI` or ./mlflow.db by default."""
    model_memory_mb: int | None = Field(None, ge=1)
    """Limit on the loaded networks of a replica; the least recently used are dropped first."""
    device: Literal["auto", "cpu", "cuda"] = "auto"
    """Where networks run; "auto" takes the GPU that Ray gave the replica, if any."""
    threads: int = Field(1, ge=1)
    """Torch threads of a replica on a CPU; leave one core of each node to HTTP."""
    precision: Precision = "float32"
    """How networks are held: float32, bfloat16, int8 or int4; all but the first compute in bfloat16."""
    parts: PartsConfig = PartsConfig()
    """How text encoders and autoencoders are loaded."""
    compile: bool | Literal["blocks", "graphs"] = False
    """Compile the networks: as a whole (on a GPU: minutes at the first request of each shape), their blocks (seconds),
    or as a whole with CUDA graphs. The size that a model was trained at is compiled before a replica is ready."""
    stages: Literal["together", "apart"] = "together"
    """Whether encoder and decoder work inside the generator's replicas, or are deployments of their own, which scale by
    themselves."""


class Access(Config):
    """Who may generate."""

    api_keys_file: str | None = None
    """A file with one key per line; empty lines and lines that begin with # are skipped."""
    api_keys_variable: str = "FEWSTEP_API_KEYS"
    """Environment variable of the replicas with keys, separated by commas; read where no file is given."""
    open_to_all: bool = False
    """Serve without keys although HTTP listens beyond loopback (behind a gateway that checks, say)."""

    def api_keys(self) -> tuple[str, ...]:
        """The keys; none where access is open.

        Raises:
            UserError: the file can't be read, or is empty.
        """
        # From the environment of the replicas, as settings are shown on Ray's dashboard.
        if self.api_keys_file is None:
            return tuple(
                key for part in os.environ.get(self.api_keys_variable, "").split(",") if (key := part.strip())
            )
        try:
            lines = expanded(self.api_keys_file).read_text().splitlines()
        except OSError as error:
            raise UserError(
                f"access.api_keys_file: {self.api_keys_file} can't be read ({error.strerror}): correct the path."
            ) from error
        keys = tuple(line.strip() for line in lines if line.strip() and not line.startswith("#"))
        if not keys:  # an empty file would otherwise mean: open to all
            raise UserError(f"access.api_keys_file: {self.api_keys_file} holds no key: write one per line.")
        return keys


class ServeConfig(Config):
    """All settings of the application."""

    offer: Offer = Offer()
    """What is served. For `serve run fewstep_serve.app:build` and for Python; in a configuration file the generator's
    `user_config` has it."""
    limits: Limits = Limits()
    """What one request may ask for."""
    engine: EngineConfig = EngineConfig()
    """How a replica runs."""
    access: Access = Access()
    """Who may generate."""
    retry_after_s: int = Field(1, ge=1)
    """What `Retry-After` says when the service is full."""
