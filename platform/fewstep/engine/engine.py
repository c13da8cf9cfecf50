"""The engine: image tasks in, pixels out, batched by what can share a batch.

An image depends on its own seed and prompt alone: its noise comes from its own generator, and prompts are
padded together with masked tokens. In float32 a batch moves a latent by rounding only (below 1e-4).
"""

from __future__ import annotations

import asyncio
import time
from collections import OrderedDict
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from typing import Any, Literal, NamedTuple, Protocol

import numpy as np
import torch
from torch import Tensor

from fewstep.engine.batcher import DynamicBatcher, Overloaded, Waiting
from fewstep.engine.models import LoadedModel
from fewstep.flow import gaussian_noise
from fewstep.models.conditioning import TextConditioning

Sampler = Literal["student", "teacher"]
REMEMBERED_PROMPTS = 512
"""Prompts whose token states are remembered."""


class Abandoned(Exception):
    """Everyone who waited for a running batch has gone."""


class Preview(NamedTuple):
    """The predicted clean image after one network evaluation."""

    step: int
    """Evaluations done, from 1."""
    pixels: np.ndarray
    """(H, W, 3) uint8."""


@dataclass(frozen=True)
class ImageTask:
    """One image to make."""

    prompt: str
    seed: int
    on_preview: Callable[[Preview], None] | None = None
    """Called on the engine's event loop after each evaluation."""


@dataclass(frozen=True)
class Encoded:
    """A task with its encoded prompt."""

    task: ImageTask
    text: TextConditioning
    """B = 1, on the CPU."""


class BatchKey(NamedTuple):
    """What images must have in common to share a batch."""

    model: LoadedModel
    shape: tuple[int, int, int]
    """(C, H, W) of the latent."""
    steps: int
    temperature: float | Literal["auto"] | None
    sampler: Sampler


@dataclass(frozen=True)
class BatchReport:
    """What one batch took, in seconds."""

    model: LoadedModel
    size: int
    network_s: float
    policy_s: float
    """Rollouts, and the rest of sampling outside the network."""


@dataclass(frozen=True)
class Drawn:
    """What the network gives for one image."""

    latent: Tensor
    queue_s: float
    batch: BatchReport


@dataclass(frozen=True)
class GeneratedImage:
    """One image, and how it came about."""

    seed: int
    pixels: np.ndarray
    """(H, W, 3) uint8."""
    latent: Tensor
    """(C, H, W) float32 on the CPU."""
    encode_s: float
    """Until its prompt was encoded."""
    queue_s: float
    """From then until its batch began."""
    decode_s: float
    batch: BatchReport


class Stages(Protocol):
    """Where prompts are encoded and latents decoded: here, or in other processes."""

    async def encode(self, model: LoadedModel, prompts: Sequence[str]) -> list[TextConditioning]:
        """Each prompt encoded, B = 1, on the CPU.

        Raises:
            UserError: a prompt is too long.
        """
        ...

    async def decode(self, model: LoadedModel, latents: Tensor) -> np.ndarray:
        """(B, C, H, W) latents → (B, H', W', 3) uint8."""
        ...


class LocalStages:
    """Encodes in a thread of its own, while the network works in another.

    Prompts that arrive while others are being encoded are encoded together; the latest are remembered.
    """

    def __init__(self) -> None:
        self._encoder = ThreadPoolExecutor(1, thread_name_prefix="fewstep-encoder")
        self._decoder = ThreadPoolExecutor(1, thread_name_prefix="fewstep-decoder")
        self._remembered: OrderedDict[tuple[str, str], TextConditioning] = OrderedDict()
        self._batcher: DynamicBatcher[LoadedModel, str, TextConditioning] = DynamicBatcher(
            self._encode_batch, max_batch_size=64, max_wait_s=0, max_pending=1 << 30
        )

    async def encode(self, model: LoadedModel, prompts: Sequence[str]) -> list[TextConditioning]:
        model.pipeline.text_encoder.check(prompts)
        name = model.pipeline.card.text_encoder  # texts depend on nothing else of the model
        texts = {prompt: self._remembered.get((name, prompt)) for prompt in prompts}
        missing = [prompt for prompt, known in texts.items() if known is None]
        if missing:
            texts |= zip(missing, await self._batcher.submit(model, missing), strict=True)
        for prompt, known in texts.items():
            self._remembered[name, prompt] = known
            self._remembered.move_to_end((name, prompt))
        while len(self._remembered) > REMEMBERED_PROMPTS:
            self._remembered.popitem(last=False)
        return [texts[prompt] for prompt in prompts]

    async def decode(self, model: LoadedModel, latents: Tensor) -> np.ndarray:
        loop = asyncio.get_running_loop()
        return await loop.run_in_executor(self._decoder, model.pipeline.decode, latents)

    async def _encode_batch(
        self, model: LoadedModel, entries: list[Waiting[str, TextConditioning]]
    ) -> list[TextConditioning]:
        loop = asyncio.get_running_loop()
        prompts = [entry.item for entry in entries]
        return await loop.run_in_executor(self._encoder, model.pipeline.text_encoder.each, prompts)


class Engine:
    """Batches image tasks and runs the network in one worker thread. Belongs to one event loop.

    Args:
        max_batch_size: most images of a batch.
        max_wait_s: how long an idle worker waits for a batch to fill.
        max_pending: bound on waiting images.
        stages: where prompts are encoded and latents decoded; in threads of this process by default.
        on_batch: told of each finished batch.
    """

    def __init__(
        self,
        *,
        max_batch_size: int = 16,
        max_wait_s: float = 0.004,
        max_pending: int = 256,
        stages: Stages | None = None,
        on_batch: Callable[[BatchReport], None] = lambda report: None,
    ) -> None:
        self.max_pending = max_pending
        self._stages, self._on_batch = stages or LocalStages(), on_batch
        self._encoding = 0
        self._thread = ThreadPoolExecutor(1, thread_name_prefix="fewstep-network")
        self.batcher: DynamicBatcher[BatchKey, Encoded, Drawn] = DynamicBatcher(
            self._run, max_batch_size=max_batch_size, max_wait_s=max_wait_s, max_pending=1 << 30
        )

    @property
    def pending(self) -> int:
        """Images that wait for their batch."""
        return self._encoding + self.batcher.pending

    async def generate(
        self,
        model: LoadedModel,
        tasks: Sequence[ImageTask],
        *,
        size: tuple[int, int] | None = None,
        steps: int | None = None,
        temperature: float | Literal["auto"] | None = None,
        sampler: Sampler = "student",
    ) -> list[GeneratedImage]:
        """Images of `tasks`, in order. Cancelling the call stops what has not begun, and what runs for it alone.

        Args:
            size: (height, width) in pixels; as trained by default.
            steps: network evaluations; as trained by default.
            temperature: mixture temperature; as trained by default.
            sampler: the student, or the teacher's own guided Euler sampler.

        Raises:
            UserError: a size or a prompt that the model can't take.
            Overloaded: the queue is full.
        """
        steps = steps or model.pipeline.card.nfe
        key = BatchKey(model, model.latent_shape(size), steps, temperature, sampler)
        if self.pending + len(tasks) > self.max_pending:
            raise Overloaded(self.pending, self.max_pending)
        begin = time.perf_counter()
        self._encoding += len(tasks)
        try:
            texts = await self._stages.encode(model, [task.prompt for task in tasks])
        finally:
            self._encoding -= len(tasks)
        encode_s = time.perf_counter() - begin
        drawn = await self.batcher.submit(key, list(map(Encoded, tasks, texts)))
        begin = time.perf_counter()
        pixels = await self._stages.decode(model, torch.stack([one.latent for one in drawn]))
        decode_s = time.perf_counter() - begin
        return [
            GeneratedImage(task.seed, image, one.latent, encode_s, one.queue_s, decode_s, one.batch)
            for task, image, one in zip(tasks, pixels, drawn, strict=True)
        ]

    async def close(self) -> None:
        await self.batcher.close()
        self._thread.shutdown(wait=False, cancel_futures=True)

    async def _run(self, key: BatchKey, batch: list[Waiting[Encoded, Drawn]]) -> list[Drawn]:
        loop = asyncio.get_running_loop()
        return await loop.run_in_executor(self._thread, self._draw, loop, key, batch)

    def _draw(
        self, loop: asyncio.AbstractEventLoop, key: BatchKey, batch: list[Waiting[Encoded, Drawn]]
    ) -> list[Drawn]:
        queue_s = [entry.waited_s for entry in batch]
        pipeline, watch = key.model.pipeline, key.model.stopwatch
        begin = time.perf_counter()
        conditioning = TextConditioning.join([entry.item.text for entry in batch]).to(pipeline.device)
        generators = [torch.Generator().manual_seed(entry.item.task.seed) for entry in batch]
        noise = gaussian_noise((len(batch), *key.shape), generators)

        def stop_if_abandoned() -> None:
            if all(entry.abandoned for entry in batch):
                raise Abandoned

        with watch.measuring(stop_if_abandoned):
            if key.sampler == "teacher":
                latents = pipeline.sample_teacher(noise, conditioning, key.steps)
            else:
                latents = pipeline.sample(
                    noise, conditioning, key.steps, temperature=key.temperature,
                    on_step=self._previews(loop, key, batch),
                )  # fmt: skip
            latents = latents.float().cpu()
        elapsed = time.perf_counter() - begin
        report = BatchReport(key.model, len(batch), watch.network_s, elapsed - watch.network_s)
        self._on_batch(report)
        return [Drawn(latent, waited, report) for latent, waited in zip(latents, queue_s, strict=True)]

    def _previews(
        self, loop: asyncio.AbstractEventLoop, key: BatchKey, batch: list[Waiting[Encoded, Drawn]]
    ) -> Callable[[int, Tensor, Tensor], None] | None:
        """Decodes x̂_0 of those who asked, and of nobody else; None where nobody did."""
        rows = [row for row, entry in enumerate(batch) if entry.item.task.on_preview is not None]
        if not rows:
            return None

        def show(step: int, state: Tensor, clean: Tensor) -> None:
            for row, pixels in zip(rows, key.model.pipeline.decode(clean[rows]), strict=True):
                if not batch[row].abandoned:
                    callback: Any = batch[row].item.task.on_preview
                    loop.call_soon_threadsafe(callback, Preview(step + 1, pixels))

        return show
