"""What `serve/config.yaml` may set: `args` is a `ServeConfig`, and the generator's `user_config` is an `Offer`.

Work is counted in one unit: one pass of a network over one image of the size that it was trained at. An image takes as
many as it has evaluations, twice that where a guided teacher makes it, times its multiple of the trained pixels (at
least 1).
"""

from __future__ import annotations

import os
import re
from collections.abc import Iterable
from typing import Annotated, Any, Literal

from pydantic import Field, StringConstraints, model_validator

from fewstep.assets import expanded
from fewstep.config import Config, PartsConfig, Precision
from fewstep.engine.source import ModelSource
from fewstep.errors import UserError
from fewstep_serve.schema import Quality

FUNCTION = r"^\w+(\.\w+)*:\w+(\.\w+)*$"
"""How a function is named: its module, and its name there."""
MAX_ONGOING_REQUESTS = 100_000
"""Of each deployment, never to be reached: what waits is to wait in an engine. Where Serve's own router has to wait for
a full replica, it goes by back-off, a request per half a second, long after the replica is idle again."""


KEY_NAME = "[A-Za-z0-9][A-Za-z0-9_.-]{0,63}"
"""What a key may be called."""


MetricsReaders = Literal["nobody", "keys", "anybody"]
"""Who may read the metrics."""


def _refuse_former(tree: Any, former: str, remedy: str) -> Any:
    """The settings of a section, as they came, unless they have one that means something else now.

    Raises:
        ValueError: they have it.
    """
    if isinstance(tree, dict) and former in tree:
        raise ValueError(f"{former} is no longer: {remedy}")
    return tree


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
    """Largest request body, but of edits."""
    max_edit_bytes: int = Field(32 * 2**20, ge=1024)
    """Largest body of an edit, with all its images."""
    max_uploads: int = Field(16, ge=1)
    """Most images of an edit, beside the mask."""
    max_upload_pixels: int = Field(16 * 2**20, ge=1)
    """Most pixels of an uploaded image, which is refused by its header, before it is decoded."""
    time_limit_s: float = Field(60.0, gt=0)
    """After this many seconds a request is cancelled and answered 504."""


class Batching(Config):
    """How images are gathered into batches."""

    max_batch_size: int = Field(16, ge=1)
    """Most images of a batch; 1 turns batching off. An image of more pixels than its model was trained at counts as the
    multiple that it is, and one by a guided teacher twice: here, and in the order in which models and sizes take
    turns."""
    max_wait_ms: float = Field(0.0, ge=0)
    """How long an idle replica waits for a batch to fill. 0 is rarely wrong: an image that arrives later joins the
    batch at its next evaluation."""
    max_pending_work: int = Field(4096, ge=1, le=MAX_ONGOING_REQUESTS // 2)
    """Work that may be under way at one replica: the evaluations that are still to come of all its requests. Beyond it
    the requests of the key that holds most are answered 429, the newest first."""

    @model_validator(mode="before")
    @classmethod
    def _max_pending_counted_images(cls, tree: Any) -> Any:
        remedy = "set max_pending_work, where an image of 4 evaluations counts as 4."
        return _refuse_former(tree, "max_pending", remedy)


class Offer(Config):
    """What is served, and how it is batched; a change reaches running replicas without a restart.

    What is new loads beside the old and then takes its place, all at once. If it can't be loaded, replicas go on with
    what they have, try again, and say so in `GET /v1/models` and `/healthz`.
    """

    models: tuple[ModelSource, ...] = Field(
        (ModelSource(name="emoji64-student", source="emoji64-student"),), min_length=1
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
    """Compile the networks: as a whole (on a GPU: minutes at the first request of each shape; not for Qwen-Image, of
    which torch compiles eight shapes and then none), their blocks (seconds), or as a whole with CUDA graphs. The size
    that a model was trained at is compiled before a replica is ready."""
    metadata: bool = False
    """Write into each image file how it came to be: model, version, seed, evaluations and the SHA-256 of its prompt, as
    JSON under `fewstep` in png's text, and in the image description of webp's and jpeg's EXIF."""
    stages: Literal["together", "apart"] = "together"
    """Whether encoder and decoder work inside the generator's replicas, or are deployments of their own, which scale by
    themselves."""


class KeySettings(Config):
    """What holds for the requests of one key."""

    weight: float = Field(1.0, gt=0)
    """Its share of a replica that has more to do than it can: a key of weight 2 gets twice the work of one of 1, and
    may hold twice as much of `batching.max_pending_work`."""
    work_per_minute: int | None = Field(None, ge=1)
    """In place of `access.work_per_minute`."""
    begin_within_s: float | None = Field(None, gt=0)
    """In place of `access.begin_within_s`."""


class Access(Config):
    """Who may generate, and how much."""

    api_keys_file: str | None = None
    """A file with one key per line, `KEY` or `NAME: KEY`; empty lines and lines that begin with # are skipped. It is
    read again when it changes: write the new key beside the old, under the same name, tell its users, and remove the
    old one. Keys of one name count as one; one without a name is called by the beginning of its SHA-256."""
    api_keys_variable: str = "FEWSTEP_API_KEYS"
    """Environment variable of the replicas with keys, written likewise and separated by commas; read where no file is
    given."""
    open_to_all: bool = False
    """Serve without keys although HTTP listens beyond loopback (behind a gateway that checks, say)."""
    work_per_minute: int | None = Field(None, ge=1)
    """Most work that one key may ask for in a minute, or all together where no key is asked for; each replica of the
    ingress counts for itself. No such limit by default."""
    begin_within_s: float | None = Field(None, gt=0)
    """A request whose first evaluation has not begun so long after it came to a replica is answered 429, and not
    computed. By default it waits until `limits.time_limit_s`. Jobs wait until `jobs.time_limit_s` in any case."""
    keys: dict[Annotated[str, StringConstraints(pattern=f"^{KEY_NAME}$")], KeySettings] = Field(
        default_factory=dict
    )
    """Name of a key → what holds for it, as `{studio: {weight: 4}, crawler: {weight: 0.5, begin_within_s: 5}}`."""
    metrics: MetricsReaders = "nobody"
    """Who may read `GET /metrics`: "keys" are whoever has one of the keys. It names keys, models and versions."""

    @model_validator(mode="before")
    @classmethod
    def _rates_counted_images(cls, tree: Any) -> Any:
        remedy = "set work_per_minute, where an image of 4 evaluations counts as 4."
        return _refuse_former(tree, "images_per_minute", remedy)

    def api_keys(self, *, at_start: bool = True) -> dict[str, str | None]:
        """Key → its name, if it has one; none where access is open.

        Args:
            at_start: whether a file without any key is an error; later it means that the last one was removed.

        Raises:
            UserError: the file can't be read, is empty, or holds what can be no key.
        """
        # From the environment of the replicas, as settings are shown on Ray's dashboard.
        if self.api_keys_file is None:
            return _named_keys(os.environ.get(self.api_keys_variable, "").split(","))
        try:
            # Editors of Windows begin a file with a mark, which would be a part of the first key.
            lines = expanded(self.api_keys_file).read_text("utf-8-sig").splitlines()
        except OSError as error:
            raise UserError(
                f"access.api_keys_file: {self.api_keys_file} can't be read ({error.strerror}): correct the path."
            ) from error
        except UnicodeDecodeError as error:
            raise UserError(f"access.api_keys_file: {self.api_keys_file} is no text in UTF-8.") from error
        keys = _named_keys(line for line in lines if not line.strip().startswith("#"))
        if strange := [number for number, key in enumerate(keys, 1) if not key.isascii()]:
            raise UserError(
                f"access.api_keys_file: key {strange[0]} of {self.api_keys_file} has characters that no HTTP header "
                "can carry: use letters, digits and signs of ASCII."
            )
        if not keys and at_start:  # an empty file would otherwise mean: open to all
            raise UserError(f"access.api_keys_file: {self.api_keys_file} holds no key: write one per line.")
        return keys


def _named_keys(lines: Iterable[str]) -> dict[str, str | None]:
    """Key → its name, of lines `KEY` or `NAME: KEY`; empty ones are skipped."""
    keys: dict[str, str | None] = {}
    for line in filter(None, map(str.strip, lines)):
        # A key without a name may have colons, and so a name ends with a space as well.
        named = re.fullmatch(rf"({KEY_NAME}):\s+(.+)", line)
        name, key = named.groups() if named else (None, line)
        keys[key] = name
    return keys


class Clients(Config):
    """What becomes of requests that were written for other services. What is done is told in the response."""

    unknown_fields: Literal["refuse", "ignore"] = "refuse"
    """ignore: fields that there are not are left out, and named in the header `x-fewstep-ignored`."""
    size: Literal["refuse", "nearest", "resize"] = "refuse"
    """A size that a model can't generate, or may not. nearest: the nearest that it can, which the response names.
    resize: that, resampled to the size that was asked for."""
    quality: dict[Quality, int] = Field(default_factory=dict)
    """Quality → network evaluations, as `{low: 2, medium: 4, high: 8}`, where a request says nothing of evaluations.
    Others are as the model was trained."""


class Urls(Config):
    """Images by address (`response_format: "url"`), from a folder or bucket that all replicas of the ingress reach."""

    storage: str
    """Folder or s3:// address of the files."""
    base: str | None = None
    """Public address that clients reach this service at, such as https://images.example.org; by default that of the
    request."""
    expire_minutes: float = Field(60.0, gt=0)
    """An address is good for so long, and its file is deleted some time after."""
    secret_variable: str = "FEWSTEP_URL_SECRET"
    """Environment variable of the replicas with the secret that addresses are signed with: the same for all, 32
    characters or more."""


class Safety(Config):
    """Functions of your own that refuse prompts and images. Each is named as `module:function`, which the nodes' Python
    must find. It gives None, or the reason to refuse, a sentence that the client is told with 400 and
    `content_policy_violation`. Where it raises, or gives anything else, the request ends with 500, and no image leaves.
    """

    prompt: str | None = Field(None, pattern=FUNCTION)
    """Called with each prompt (str), or class, before anything is generated; in the ingress."""
    image: str | None = Field(None, pattern=FUNCTION)
    """Called with the pixels of each image, (H, W, 3) uint8 of numpy, and its prompt, before it leaves a generator.
    There are no previews then."""


class Jobs(Config):
    """Requests that are answered later (`POST /v1/images/jobs`). They lie in a folder or bucket that all replicas of
    the ingress reach, with their prompts and images, and survive a restart of the service."""

    storage: str
    """Folder or s3:// address of the jobs, for them alone."""
    concurrent: int = Field(4, ge=1)
    """Jobs that one replica of the ingress has under way at once; others wait in the storage."""
    max_open: int = Field(1000, ge=1)
    """Jobs that may wait or be under way; beyond them requests are answered 429."""
    time_limit_s: float = Field(600.0, gt=0)
    """After this many seconds of work a job fails; `limits.time_limit_s` does not hold for jobs."""
    expire_minutes: float = Field(1440.0, gt=0)
    """A job is forgotten so long after it was sent, however it stands."""
    lease_s: float = Field(30.0, gt=0)
    """A job whose replica gives no sign of life for so long is run by another."""
    poll_s: float = Field(1.0, gt=0)
    """How often a replica that could run a job looks for one."""


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
    clients: Clients = Clients()
    """What becomes of requests that were written for other services."""
    urls: Urls | None = None
    """Images by address; null: they travel in the response alone."""
    safety: Safety = Safety()
    """Functions of your own that refuse prompts and images."""
    jobs: Jobs | None = None
    """Requests that are answered later; null: there are none."""
    audit_file: str | None = None
    """A file of each node of the ingress to which every image request that is answered, and every job that succeeds or
    fails, appends one line of JSON: when, for whose key, what was asked for and what came of it, with the SHA-256 of
    the prompt in place of the prompt. Where another program has moved the file away (logrotate), a new one is begun.
    None by default."""
    retry_after_s: int = Field(1, ge=1)
    """What `Retry-After` says when the service is full."""
