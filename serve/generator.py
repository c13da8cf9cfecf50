"""The generator deployment: models and the batch engine; with torch, which the ingress does without."""

from __future__ import annotations

import asyncio
import contextlib
import logging
from collections.abc import AsyncIterator, Callable
from dataclasses import asdict
from functools import partial
from typing import TYPE_CHECKING, Any

from ray import serve
from ray.serve.handle import DeploymentHandle

from serve.images import encode_image
from serve.schema import Delivery, Drawn, ModelEntry, Order, PreviewImage, Refusal
from serve.settings import EngineSettings, Offer
from serve.stages import RemoteStages

if TYPE_CHECKING:
    from fewstep.engine.engine import Engine, GeneratedImage, Preview
    from fewstep.engine.models import LoadedModel, ModelStore

log = logging.getLogger("ray.serve")
GAUGE_EVERY_S = 1.0


@serve.deployment(
    # More than an engine lets wait (`max_pending`, beyond which it answers 429): where Serve's own router has to wait
    # for a full replica it goes by back-off, a request per half a second, long after the replica is idle again.
    max_ongoing_requests=10_000,
    max_queued_requests=256,  # while there is no replica at all
    health_check_period_s=2,
    graceful_shutdown_wait_loop_s=0.2,
    graceful_shutdown_timeout_s=60,
    max_constructor_retry_count=3,
    ray_actor_options={"num_cpus": 1},
)
class Generator:
    """Draws what an `Order` asks for, in batches with other orders.

    Args:
        settings: an `EngineSettings` as plain data. What is offered comes through `user_config`.
        encoder: handle of `Encoder`, where stages are apart.
        decoder: handle of `Decoder`, where stages are apart.
    """

    def __init__(
        self,
        settings: dict[str, Any],
        encoder: DeploymentHandle | None = None,
        decoder: DeploymentHandle | None = None,
    ) -> None:
        import torch

        from fewstep.cli import enter_home
        from serve.metrics import EngineMetrics

        enter_home()  # relative paths, as in the jobs
        self._settings = EngineSettings.model_validate(settings)
        torch.set_num_threads(self._settings.threads)
        self._metrics = EngineMetrics()
        self._stages = RemoteStages(encoder, decoder) if encoder and decoder else None
        self._offer: Offer
        self._store: ModelStore | None = None
        self._engine: Engine
        self._tasks: list[asyncio.Task[None]] = []

    async def reconfigure(self, offer: dict[str, Any]) -> None:
        """Take models and batch limits (an `Offer` as plain data): at the start, and while serving."""
        self._offer = Offer.model_validate(offer)
        sources = {model.name: model for model in self._offer.models}
        if self._store is None:
            self._store, self._engine = self._start(sources)
            self._tasks = [
                asyncio.create_task(self._follow_aliases()), asyncio.create_task(self._report_pending())
            ]  # fmt: skip
        else:
            await self._store.offer(sources)
            batching, batcher = self._offer.batching, self._engine.batcher
            batcher.max_batch_size, self._engine.max_pending = batching.max_batch_size, batching.max_pending
            batcher.max_wait_s = batching.max_wait_ms / 1000
        await self._store.get(self._store.default)

    async def draw(self, order: Order) -> Delivery | Refusal:
        """All images of an order. Cancelling takes back what has not begun."""
        return await self._draw(order)

    async def draw_stream(self, order: Order) -> AsyncIterator[PreviewImage | Delivery | Refusal]:
        """Previews as they form, and at the end what `draw` gives."""
        previews: asyncio.Queue[Callable[[], PreviewImage] | None] = asyncio.Queue()
        drawing = asyncio.create_task(self._draw(order, previews.put_nowait))
        drawing.add_done_callback(lambda task: previews.put_nowait(None))
        try:
            while (preview := await previews.get()) is not None:
                yield await asyncio.to_thread(preview)  # a large picture takes half a second to encode
            yield await drawing
        finally:
            drawing.cancel()

    async def models(self) -> list[ModelEntry]:
        """What is offered, with the versions that requests get now."""
        return [await self._entry(name) for name in self._store.sources]

    async def _draw(
        self, order: Order, show: Callable[[Callable[[], PreviewImage]], None] | None = None
    ) -> Delivery | Refusal:
        from fewstep.data.labels import is_labels
        from fewstep.engine.batcher import Overloaded
        from fewstep.engine.engine import ImageTask
        from fewstep.engine.models import UnknownModel
        from fewstep.errors import UserError

        try:
            model = await self._store.get(order.model or self._store.default)
        except UnknownModel:
            known = ", ".join(self._store.sources)
            return Refusal(
                404, f"there is no model {order.model!r}: use one of {known}.", "model_not_found", "model"
            )
        except UserError as error:
            return Refusal(
                503, f"the model {order.model!r} can't be loaded now: {error}", "model_unavailable", "model"
            )
        steps = order.steps or model.pipeline.card.nfe
        by_class, labelled = is_labels(model.pipeline.card.text_encoder), order.class_label is not None
        if labelled and not by_class:
            return Refusal(
                400,
                f"the model {model.name!r} draws from text: leave class_label out.",
                "invalid_value",
                "class_label",
            )
        try:
            model.latent_shape(order.size)
        except UserError as error:
            return Refusal(400, str(error), "invalid_value", "size")
        prompt = str(order.class_label) if labelled else order.prompt
        tasks = [
            ImageTask(prompt, order.seed + index, self._preview(order, index, steps, show))
            for index in range(order.n)
        ]
        how = {"steps": steps, "temperature": order.temperature, "sampler": order.sampler}
        try:
            images = await self._engine.generate(model, tasks, size=order.size, **how)
        except UserError as error:
            code = "invalid_value" if by_class else "prompt_too_long"
            return Refusal(400, str(error), code, "class_label" if labelled else "prompt")
        except Overloaded as error:
            return Refusal(429, f"{error.pending} images already wait here: try again later.", "overloaded")
        return await asyncio.to_thread(self._deliver, order, model, steps, images)

    def _preview(
        self, order: Order, index: int, steps: int, show: Callable[[Callable[[], PreviewImage]], None] | None
    ) -> Callable[[Preview], None] | None:
        """What the engine calls with previews of image `index`: those wanted are passed on, still to be encoded."""
        wanted = steps if order.partial_images is None else order.partial_images
        if show is None or wanted == 0:
            return None

        def encoded(preview: Preview) -> PreviewImage:
            return PreviewImage(index, preview.step, steps, encode_image(preview.pixels))

        def pass_on(preview: Preview) -> None:
            if preview.step > steps - wanted:
                show(partial(encoded, preview))

        return pass_on

    def _deliver(
        self, order: Order, model: LoadedModel, steps: int, images: list[GeneratedImage]
    ) -> Delivery:
        encode = partial(encode_image, output_format=order.output_format, quality=order.output_compression)
        drawn = []
        for index, image in enumerate(images):
            self._metrics.image(model, image)
            timings = {
                f"{name.removesuffix('_s')}_ms": round(seconds * 1000, 3)
                for name, seconds in asdict(image.timings).items()
            }
            drawn.append(Drawn(index, image.seed, encode(image.pixels), round(image.batch_size, 2), timings))
        return Delivery(model.name, model.version, images[0].pixels.shape[:2], steps, drawn)

    def _start(self, sources: dict[str, Any]) -> tuple[ModelStore, Engine]:
        import torch

        from fewstep.engine.engine import Engine
        from fewstep.engine.models import ModelStore

        settings, batching = self._settings, self._offer.batching
        device = settings.device
        if device == "auto":
            device = "cuda" if torch.cuda.is_available() else "cpu"
        store = ModelStore(
            sources,
            tracking_uri=settings.tracking_uri,
            device=device,
            memory_bytes=settings.model_memory_mb and settings.model_memory_mb * 2**20,
            compile=settings.compile,
            whole=self._stages is None,
        )
        engine = Engine(
            max_batch_size=batching.max_batch_size,
            max_wait_s=batching.max_wait_ms / 1000,
            max_pending=batching.max_pending,
            stages=self._stages,
            on_evaluation=self._metrics.evaluation,
        )
        return store, engine

    async def _entry(self, name: str) -> ModelEntry:
        from fewstep.errors import UserError

        source = self._store.sources[name]
        loaded = next((model for model in self._store.loaded if model.name == name), None)
        version = None
        with contextlib.suppress(UserError):
            version = await self._store.version(name)
        return ModelEntry(
            id=name,
            created=self._store.created,
            version=version,
            source=source.source,
            size=loaded and "{1}x{0}".format(*loaded.size),
            num_inference_steps=loaded and loaded.pipeline.card.nfe,
            max_teacher_steps=0,
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
            self._metrics.pending(self._engine.pending)
            await asyncio.sleep(GAUGE_EVERY_S)
