"""The generator deployment: models and the batch engine; with torch, which the ingress does without."""

from __future__ import annotations

import asyncio
import contextlib
import hashlib
import json
import logging
import math
import time
from collections.abc import AsyncIterator, Callable
from dataclasses import asdict
from functools import partial
from typing import TYPE_CHECKING, Any, Literal

from pydantic import ValidationError
from ray import serve
from ray.serve.handle import DeploymentHandle

from fewstep.engine.caller import Caller
from fewstep_serve.cluster import living_replicas
from fewstep_serve.config import MAX_ONGOING_REQUESTS, EngineConfig, Offer
from fewstep_serve.edits import edit_of
from fewstep_serve.images import encode_image, resized
from fewstep_serve.safety import SafetyCheck
from fewstep_serve.schema import (
    CanaryEntry,
    EditRequest,
    ImageData,
    ImageRequest,
    ImagesResponse,
    LoRAEntry,
    ModelEntry,
    OfferStatus,
    PreviewImage,
    Refusal,
    Refused,
    Timings,
)
from fewstep_serve.stages import RemoteStages
from fewstep_serve.telemetry import trace_parts

# The ingress imports this module to call the deployment, so what needs torch is imported where it is used.
if TYPE_CHECKING:
    import numpy as np

    from fewstep.engine.edit import Edit
    from fewstep.engine.engine import Engine
    from fewstep.engine.generation import GeneratedImage, Generation, StepPreview
    from fewstep.engine.models import LoadedModel, ModelStore
    from fewstep.engine.source import ModelSource, Track

log = logging.getLogger("ray.serve")
LOAD_AGAIN_S = 30.0
"""An offer that could not be loaded is tried again after this long."""
FORMER_OFFER_S = 10.0
"""How long a replica that can't serve what is configured waits for another to say what it serves."""
GAUGE_EVERY_S = 1.0
"""How often the number of waiting images is reported."""

OtherSize = Literal["refuse", "nearest", "resize"]
"""What becomes of sizes that a model can't generate; see `Clients`."""

Show = Callable[[Callable[[], PreviewImage]], None]
"""Takes a preview that is still to be encoded."""


@serve.deployment(
    max_ongoing_requests=MAX_ONGOING_REQUESTS,
    max_queued_requests=256,  # while there is no replica at all
    max_surge_percent=1,  # one more at a time: a new one takes over before an old one leaves
    health_check_period_s=2,
    graceful_shutdown_wait_loop_s=0.2,
    graceful_shutdown_timeout_s=60,
    max_constructor_retry_count=3,
    ray_actor_options={"num_cpus": 1},
)
class Generator:
    """Generates what an `ImageRequest` asks for, in batches with other requests.

    Args:
        config: an `EngineConfig` as plain data. What is offered comes through `user_config`.
        max_relative_pixels: of `Limits`, checked here because the ingress does not know the sizes of models.
        other_size: of `Clients`, likewise.
        encoder: handle of `Encoder`, where stages are apart.
        decoder: handle of `Decoder`, where stages are apart.
        image_check: of `Safety`, its `image`.
    """

    def __init__(
        self,
        config: dict[str, Any],
        max_relative_pixels: float,
        other_size: OtherSize = "refuse",
        encoder: DeploymentHandle | None = None,
        decoder: DeploymentHandle | None = None,
        image_check: str | None = None,
    ) -> None:
        import torch

        from fewstep.home import enter_home
        from fewstep_serve.metrics import EngineMetrics

        enter_home()  # relative paths mean the same as in the jobs
        self._config, self._max_relative_pixels = EngineConfig.model_validate(config), max_relative_pixels
        self._other_size, self._image_check = other_size, SafetyCheck.of("image", image_check)
        torch.set_num_threads(self._config.threads)  # before any thread of the engine's starts
        self._metrics = EngineMetrics()
        self._stages = RemoteStages(encoder, decoder) if encoder and decoder else None
        # These come with `reconfigure`, which Serve calls before any request.
        self._offer: Offer
        self._store: ModelStore
        self._engine: Engine
        self._tasks: list[asyncio.Task[None]] = []
        self._status = OfferStatus(state="loading", message=None)
        self._replacing: asyncio.Task[None] | None = None

    async def reconfigure(self, offer: dict[str, Any]) -> None:
        """Take models and batch limits (an `Offer` as plain data): at the start, and while serving.

        Raises:
            ValidationError, UserError: the first offer can't be served, and no other replica serves a former one.
        """
        from fewstep.errors import UserError

        if self._tasks:
            self._replace(offer)  # and return: while this method runs, Serve sends the replica no request
            return
        try:
            await self._begin(offer)
        except (ValidationError, UserError) as error:
            # Otherwise none of the replicas that are to be added, or to replace a dead one, could start.
            if (former := await self._former_offer()) is None:
                raise
            log.error("this replica begins with the offer of the others: %s", error)
            await self._begin(former)
            self._replace(offer)

    async def offer_status(self) -> OfferStatus:
        """Whether what was configured last is what this replica serves."""
        return self._status

    async def offer_in_service(self) -> dict[str, Any]:
        """The `Offer` that this replica serves, as plain data."""
        return self._offer.model_dump(mode="json")

    async def work(self, request: ImageRequest, caller: Caller, request_id: str) -> float | Refusal:
        """What the images of a checked request count as, see `Generation.work`, or why there can be none."""
        try:
            return _work(await self._generations(request, caller, request_id))
        except Refused as refused:
            return refused.refusal

    async def generate(
        self, request: ImageRequest, caller: Caller, request_id: str
    ) -> ImagesResponse | Refusal:
        """All images of a checked request. Cancelling the call stops them at their next evaluation."""
        return await self._generate(request, caller, request_id)

    async def generate_stream(
        self, request: ImageRequest, caller: Caller, request_id: str
    ) -> AsyncIterator[PreviewImage | ImagesResponse | Refusal]:
        """Previews as they form, and at the end what `generate` gives."""
        previews: asyncio.Queue[Callable[[], PreviewImage] | None] = asyncio.Queue()
        # Of a preview, nobody could say whether its image will be refused.
        show = previews.put_nowait if self._image_check is None else None
        # A task, because previews are to be sent while the engine goes on.
        generating = asyncio.create_task(self._generate(request, caller, request_id, show))
        generating.add_done_callback(lambda task: previews.put_nowait(None))
        try:
            while (preview := await previews.get()) is not None:
                yield await asyncio.to_thread(preview)  # a large image takes half a second to encode
            yield await generating
        finally:
            generating.cancel()  # without effect where it has ended; the client has left otherwise

    async def models(self) -> list[ModelEntry]:
        """The models on offer, with the versions that requests get now."""
        return [await self._entry(name) for name in self._store.sources]

    async def _generate(
        self, request: ImageRequest, caller: Caller, request_id: str, show: Show | None = None
    ) -> ImagesResponse | Refusal:
        """The images, or why there are none: a refusal is returned, as Ray would wrap an exception in its own."""
        from fewstep.engine.admission import NotBegun, Overloaded
        from fewstep.errors import UserError

        try:
            generations = await self._generations(request, caller, request_id, show)
        except Refused as refused:
            return refused.refusal
        most, work = self._engine.admission.max_work, _work(generations)
        if work > most:
            message = (
                f"n: these images count as {work:g} units of work, at most {most} may be under way: ask for fewer "
                "images, evaluations or pixels."
            )
            return Refusal(400, message, "invalid_value", "n")
        begin_ns = time.time_ns()
        try:
            images = await self._engine.generate(generations, caller)
        except UserError as error:  # the caption's: everything else has been checked
            by_class = _takes_classes(generations[0].model)
            code = "invalid_value" if by_class else "prompt_too_long"
            param = "prompt" if request.class_label is None else "class_label"
            return Refusal(400, str(error), code, param)
        except Overloaded as error:
            message = (
                f"{error.work:g} of {error.limit:g} units of work are under way here, and no key has more of them than "
                "this one: try again later."
            )
            return Refusal(429, message, "overloaded")
        except NotBegun as error:
            message = (
                f"no evaluation began within {error.waited_s:g} s, the longest for this key: try again later."
            )
            return Refusal(429, message, "not_begun")
        except Exception:
            self._metrics.failed(generations[0].model)
            raise
        trace_parts(begin_ns, request_id, images)
        return await asyncio.to_thread(self._answer, request, generations, images)

    async def _model(self, name: str, caller: Caller, request_id: str) -> LoadedModel:
        """The model that a request names, in the version that it names as NAME@VERSION, or else that it gets.

        Raises:
            Refused: there is none, or it can't be loaded.
        """
        from fewstep.engine.models import UnknownModel
        from fewstep.errors import UserError

        try:
            while (source := self._store.sources.get(name)) is not None:
                # Drawn again where the canary is taken back while it loads.
                with contextlib.suppress(UnknownModel):
                    return await self._store.get(name, source.track_for(request_id, caller.name))
            return await self._version(name)
        except UnknownModel:
            known = ", ".join(self._store.sources)
            message = f"there is no model {name!r}: use one of {known}."
            raise Refused(Refusal(404, message, "model_not_found", "model")) from None
        except UserError as error:
            message = f"the model {name!r} can't be loaded now: {error}"
            raise Refused(Refusal(503, message, "model_unavailable", "model")) from None

    async def _version(self, name: str) -> LoadedModel:
        """The model that is named with its version: NAME@stable, NAME@canary, or NAME@ what a response has as version.

        Raises:
            UnknownModel: there is none.
            UserError: it can't be loaded.
        """
        from fewstep.engine.models import UnknownModel

        for source in list(self._store.sources.values()):
            for track in source.tracks:
                if name == f"{source.name}@{track}":
                    return await self._store.get(source.name, track)
                if name.startswith(f"{source.name}@"):
                    model = await self._store.get(source.name, track)
                    if name == model.id:
                        return model
        raise UnknownModel(name)

    async def _generations(
        self, request: ImageRequest, caller: Caller, request_id: str, show: Show | None = None
    ) -> list[Generation]:
        """One per image. Sampler settings that the request leaves out are the model's own.

        Raises:
            Refused: no model makes them.
        """
        from fewstep.engine.generation import Generation
        from fewstep.errors import UserError

        model = await self._model(request.model or self._store.default, caller, request_id)
        caption = _caption(request, model)
        edit = await self._edit(request, model)
        by_teacher, steps = request.sampler == "teacher", request.num_inference_steps
        ask = partial(
            Generation.of,
            model,
            caption,
            size=self._size(request, model) if edit is None else edit.size,
            nfe=None if by_teacher else steps,
            temperature=request.temperature,
            h=request.h,
            teacher_steps=steps if by_teacher else None,
            lora=_styles(request, self._store.sources[model.name]),
            edit=edit,
        )
        try:
            generations = [ask(seed) for seed in request.seeds]
        except UserError as error:
            # The HTTP schema and the limits are narrower than the sampler's own bounds, so it is the size.
            raise Refused(Refusal(400, str(error), "invalid_value", "size")) from None
        for index, generation in enumerate(generations):
            generation.on_preview = _preview(index, generation.total, request.partial_images, show)
        return generations

    async def _edit(self, request: ImageRequest, model: LoadedModel) -> Edit | None:
        """What of an edit the engine is asked for; None for other requests.

        Raises:
            Refused: the model takes another number of images, or see `edit_of`.
        """
        wanted = model.pipeline.card.references
        if not isinstance(request, EditRequest):
            if wanted:
                message = f"the model {model.name!r} edits {wanted} reference images: send them to /v1/images/edits."
                raise Refused(Refusal(400, message, "invalid_value", "model"))
            return None
        if not wanted:
            message = (
                f"the model {model.name!r} takes no reference images: choose another, or leave the image out."
            )
            raise Refused(Refusal(400, message, "invalid_value", "model"))
        if len(request.image) != wanted:
            message = f"image: the model {model.name!r} edits {wanted} at once, not {len(request.image)}: send as many."
            raise Refused(Refusal(400, message, "invalid_value", "image"))
        # In a thread, as decoding a large image takes a while
        return await asyncio.to_thread(edit_of, request, model.pipeline, self._size(request, model))

    def _size(self, request: ImageRequest, model: LoadedModel) -> tuple[int, int] | None:
        """(height, width) to generate at; None: as the model was trained.

        One far beyond what the model was trained at would hold up everybody else with each evaluation.

        Raises:
            Refused: it is beyond the limit, and other sizes are refused.
        """
        if request.pixels is None:
            return None
        height, width = model.size
        if self._other_size != "refuse":
            most = self._max_relative_pixels * height * width
            return model.pipeline.nearest_size(*request.pixels, most)
        # By pixels, so that a size that is both too large and no multiple of what the model takes is told the former.
        if math.prod(request.pixels or model.size) > self._max_relative_pixels * height * width:
            message = (
                f"size: {request.size} is too large, at most {self._max_relative_pixels:g} times the {width}x{height} "
                f"pixels that {model.name!r} was trained at: choose a smaller one."
            )
            raise Refused(Refusal(400, message, "invalid_value", "size"))
        return request.pixels

    def _answer(
        self, request: ImageRequest, generations: list[Generation], images: list[GeneratedImage]
    ) -> ImagesResponse | Refusal:
        """The answer, if the operator's own check refuses none of its images."""
        if self._image_check is not None:
            for image in images:
                if (refusal := self._image_check(image.pixels, generations[0].caption)) is not None:
                    return refusal
        return self._response(request, generations, images)

    def _response(
        self, request: ImageRequest, generations: list[Generation], images: list[GeneratedImage]
    ) -> ImagesResponse:
        """The answer with its image files; encoding takes long enough to want a thread of its own."""
        file_format, quality = request.output_format, request.output_compression
        assert file_format is not None, "the ingress has filled it in"
        assert quality is not None, "the ingress has filled it in"
        model = generations[0].model
        data = []
        for image in images:
            self._metrics.image(model, image)
            timings = {
                f"{name.removesuffix('_s')}_ms": round(seconds * 1000, 3)
                for name, seconds in asdict(image.timings).items()
            }
            facts = self._facts(generations[0], image) if self._config.metadata else None
            file = encode_image(self._resized(image.pixels, request), file_format, quality, facts)
            batch_size = round(image.batch_size, 2)
            data.append(
                ImageData(b64_json=file, seed=image.seed, batch_size=batch_size, timings=Timings(**timings))
            )
        height, width = self._resized(images[0].pixels, request).shape[:2]
        return ImagesResponse(
            created=int(time.time()),
            data=data,
            output_format=file_format,
            size=f"{width}x{height}",
            model=model.name,
            version=model.version,
            num_inference_steps=generations[0].total,
            sampler=request.sampler,
            work=_work(generations),
        )

    def _facts(self, generation: Generation, image: GeneratedImage) -> str:
        """What is written into an image's file."""
        told = {
            "model": generation.model.name,
            "version": generation.model.version,
            "seed": image.seed,
            "num_inference_steps": generation.total,
            "sampler": "student" if generation.teacher_steps is None else "teacher",
            # Not the prompt itself, which may be private: who has it can check it.
            "lora": dict(generation.lora),
            "prompt_sha256": hashlib.sha256(generation.caption.encode()).hexdigest(),
        }
        return json.dumps(told)

    def _resized(self, pixels: np.ndarray, request: ImageRequest) -> np.ndarray:
        """An image (H, W, 3) uint8 in the size that was asked for, where that is what the deployment does."""
        if request.pixels is None or self._other_size != "resize":
            return pixels
        return resized(pixels, *request.pixels)

    async def _begin(self, offer: dict[str, Any]) -> None:
        """Serve the first offer.

        Raises:
            ValidationError, UserError: it is none, or its default can't be loaded.
        """
        self._offer = Offer.model_validate(offer)
        self._store, self._engine = self._start()
        # Loaded before the replica counts as ready, so that no request waits for it.
        for track in self._store.sources[self._store.default].tracks:
            await self._store.get(self._store.default, track)
        self._status = OfferStatus(state="current", message=None)
        self._tasks = [
            asyncio.create_task(self._follow_aliases()), asyncio.create_task(self._report_pending())
        ]  # fmt: skip

    def _replace(self, offer: dict[str, Any]) -> None:
        """Begin to load another offer, which takes the place of what is served when it is whole."""
        if self._replacing is not None:
            self._replacing.cancel()  # what it still loads is dropped
        self._status = OfferStatus(state="loading", message=None)
        self._replacing = asyncio.create_task(self._load_and_take(offer))

    async def _load_and_take(self, offer: dict[str, Any]) -> None:
        from fewstep.errors import UserError

        while True:
            try:
                new = Offer.model_validate(offer)
                await self._store.offer({model.name: model for model in new.models})
                break
            except Exception as error:  # whatever it is, what is served goes on
                why = " ".join(str(error).split())
                log.error(
                    "the new offer is not served, the former one goes on: %s",
                    why,
                    exc_info=not isinstance(error, UserError | ValidationError),
                )
                self._status = OfferStatus(state="failed", message=why)
                if isinstance(
                    error, ValidationError
                ):  # it will never be right; a registry out of reach may come back
                    return
            await asyncio.sleep(LOAD_AGAIN_S)
        self._offer, batching, batcher = new, new.batching, self._engine.batcher
        batcher.max_batch_size, batcher.max_wait_s = batching.max_batch_size, batching.max_wait_ms / 1000
        self._engine.admission.max_work = batching.max_pending_work
        self._status = OfferStatus(state="current", message=None)
        log.info("the new offer is served")

    async def _former_offer(self) -> dict[str, Any] | None:
        """What another replica serves; None where there is none."""
        context = serve.get_replica_context()
        # Asked first, because a call without a living replica would wait for one.
        if await asyncio.to_thread(living_replicas, context.app_name, context.deployment) == 0:
            return None
        handle = serve.get_deployment_handle(context.deployment, context.app_name)
        try:
            async with asyncio.timeout(FORMER_OFFER_S):
                return await handle.offer_in_service.remote()
        except Exception:  # the reason why this is asked is the one to be raised
            log.exception("no other replica says what it serves")
            return None

    def _start(self) -> tuple[ModelStore, Engine]:
        import torch

        from fewstep.engine.engine import Engine
        from fewstep.engine.models import ModelStore

        config, batching = self._config, self._offer.batching
        device = config.device
        if device == "auto":
            device = "cuda" if torch.cuda.is_available() else "cpu"
        store = ModelStore(
            {model.name: model for model in self._offer.models},
            tracking_uri=config.tracking_uri,
            device=device,
            memory_bytes=config.model_memory_mb and config.model_memory_mb * 2**20,
            compile=config.compile,
            precision=config.precision,
            parts=config.parts,
            whole=self._stages is None,
        )
        engine = Engine(
            max_batch_size=batching.max_batch_size,
            max_wait_s=batching.max_wait_ms / 1000,
            max_pending_work=batching.max_pending_work,
            stages=self._stages,
            on_evaluation=self._metrics.evaluation,
        )
        return store, engine

    async def _entry(self, name: str) -> ModelEntry:
        from fewstep.errors import UserError

        source, loaded = self._store.sources[name], self._store.in_memory(name)
        versions: dict[Track, str | None] = {}
        for track in source.tracks:
            # Neither a registry out of reach nor a canary that is taken back now hides what is offered.
            with contextlib.suppress(UserError, KeyError):
                versions[track] = await self._store.version(name, track)
        canary = source.canary and CanaryEntry(
            version=versions.get("canary"),
            stuck=self._store.stuck.get((name, "canary")),
            **source.canary.model_dump(),
        )
        return ModelEntry(
            id=name,
            created=self._store.created,
            version=versions.get("stable"),
            source=source.source,
            stuck=self._store.stuck.get((name, "stable")),
            canary=canary,
            size="{1}x{0}".format(*loaded.size) if loaded else None,
            num_inference_steps=loaded.pipeline.card.sampler.nfe if loaded else None,
            references=loaded.pipeline.card.references if loaded else None,
            max_teacher_steps=0,  # the ingress knows the limit
            loras=[LoRAEntry.model_validate(lora.model_dump()) for lora in source.loras],
            max_loras=source.max_loras,
        )

    async def _follow_aliases(self) -> None:
        while True:
            await asyncio.sleep(self._offer.follow_alias_every_s)
            try:
                for model in await self._store.follow_aliases():
                    log.info("model %s now answers as %s", model.name, model.version)
            except Exception:
                log.exception("following aliases failed; it goes on")

    async def _report_pending(self) -> None:
        while True:
            self._metrics.pending(self._engine.pending, self._engine.admission.work)
            await asyncio.sleep(GAUGE_EVERY_S)


def _work(generations: list[Generation]) -> float:
    return sum(one.work for one in generations)


def _takes_classes(model: LoadedModel) -> bool:
    from fewstep.encoders.labels import is_labels

    return is_labels(model.pipeline.card.text_encoder)


def _caption(request: ImageRequest, model: LoadedModel) -> str:
    """What the model is asked for: the class by label, or else the prompt.

    Raises:
        Refused: the request names a class by label, and the model knows none.
    """
    if request.class_label is not None and not _takes_classes(model):
        message = f"the model {model.name!r} generates from text: leave class_label out."
        raise Refused(Refusal(400, message, "invalid_value", "class_label"))
    return request.caption


def _styles(request: ImageRequest, source: ModelSource) -> list[tuple[str, float]]:
    """The style LoRAs that a request asks for, by name, with their scales.

    Raises:
        Refused: one is not offered or named twice, its scale is too large, or they are too many.
    """

    def refuse(message: str) -> Refused:
        return Refused(Refusal(400, f"lora: {message}", "invalid_value", "lora"))

    asked = request.lora or []
    offered = {lora.name: lora for lora in source.loras}
    if len(asked) > source.max_loras:
        raise refuse(f"{len(asked)} are too many, at most {source.max_loras}: name fewer.")
    if len({one.name for one in asked}) < len(asked):
        raise refuse("one of them is named twice: name it once.")
    for one in asked:
        if one.name not in offered:
            known = f"use one of {', '.join(offered)}" if offered else "it has none, leave lora out"
            raise refuse(f"the model {source.name!r} has no {one.name[:64]!r}: {known}.")
        if abs(one.scale) > (most := offered[one.name].max_scale):
            raise refuse(f"the scale {one.scale:g} of {one.name!r} is too large, at most {most:g}: lower it.")
    return [(one.name, one.scale) for one in asked]


def _preview(
    index: int, steps: int, wanted: int | None, show: Show | None
) -> Callable[[StepPreview], None] | None:
    """What the engine is to call with previews of image `index`; None where none is wanted.

    Args:
        index: of the image in its request.
        steps: evaluations that it takes.
        wanted: how many previews, the last ones before the end; None: one after each evaluation.
        show: takes those, still to be encoded; None: nobody wants any.
    """
    first = 1 if wanted is None else steps - wanted + 1
    if show is None or first > steps:
        return None

    def encoded(preview: StepPreview) -> PreviewImage:
        return PreviewImage(index, preview.step, steps, encode_image(preview.pixels))

    def pass_on(preview: StepPreview) -> None:
        if preview.step >= first:
            show(partial(encoded, preview))

    return pass_on
