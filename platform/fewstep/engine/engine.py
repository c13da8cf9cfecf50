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
from typing import Any, Literal, NamedTuple

import numpy as np
import torch
from torch import Tensor

from fewstep.engine.batcher import DynamicBatcher, Waiting
from fewstep.engine.models import LoadedModel
from fewstep.flow import gaussian_noise
from fewstep.models.conditioning import TextConditioning

Sampler = Literal["student", "teacher"]
PROMPT_CACHE = 512
"""Prompts whose token states an engine remembers."""


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
    states: Tensor | None = None
    """Token states (L, D) of the prompt, where another process encodes."""


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
    encode_s: float
    network_s: float
    policy_s: float
    """Rollouts, and the rest of sampling outside the network."""
    decode_s: float


@dataclass(frozen=True)
class GeneratedImage:
    """One image, and how it came about."""

    seed: int
    pixels: np.ndarray | None
    """(H, W, 3) uint8; None where another process decodes."""
    latent: Tensor
    """(C, H, W) float32 on the CPU."""
    queue_s: float
    """Time before its batch began."""
    batch: BatchReport


class Engine:
    """Batches image tasks and runs them in one worker thread. Belongs to one event loop.

    Args:
        max_batch_size: most images of a batch.
        max_wait_s: how long an idle worker waits for a batch to fill.
        max_pending: bound on waiting images.
        decode: whether results carry pixels; False where another process decodes.
        on_batch: told of each finished batch, on the worker thread.
    """

    def __init__(
        self,
        *,
        max_batch_size: int = 16,
        max_wait_s: float = 0.004,
        max_pending: int = 256,
        decode: bool = True,
        on_batch: Callable[[BatchReport], None] = lambda report: None,
    ) -> None:
        self._decode, self._on_batch = decode, on_batch
        self._prompts: OrderedDict[tuple[LoadedModel, str], Tensor] = OrderedDict()
        self._thread = ThreadPoolExecutor(1, thread_name_prefix="fewstep-engine")
        self.batcher: DynamicBatcher[BatchKey, ImageTask, GeneratedImage] = DynamicBatcher(
            self._run, max_batch_size=max_batch_size, max_wait_s=max_wait_s, max_pending=max_pending
        )

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
            UserError: a size that the model can't take.
            Overloaded: the queue is full.
        """
        key = BatchKey(
            model, model.latent_shape(size), steps or model.pipeline.card.nfe, temperature, sampler
        )
        return await self.batcher.submit(key, tasks)

    async def close(self) -> None:
        await self.batcher.close()
        self._thread.shutdown(wait=False, cancel_futures=True)

    async def _run(
        self, key: BatchKey, batch: list[Waiting[ImageTask, GeneratedImage]]
    ) -> list[GeneratedImage]:
        loop = asyncio.get_running_loop()
        return await loop.run_in_executor(self._thread, self._generate, loop, key, batch)

    def _generate(
        self,
        loop: asyncio.AbstractEventLoop,
        key: BatchKey,
        batch: list[Waiting[ImageTask, GeneratedImage]],
    ) -> list[GeneratedImage]:
        queue_s = [entry.waited_s for entry in batch]
        pipeline, watch = key.model.pipeline, key.model.stopwatch
        begin = time.perf_counter()
        conditioning = self._condition(key.model, [entry.item for entry in batch])
        noise = gaussian_noise(
            (len(batch), *key.shape), [torch.Generator().manual_seed(entry.item.seed) for entry in batch]
        )
        encoded = time.perf_counter()

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
        sampled = time.perf_counter()
        pixels = list(pipeline.decode(latents)) if self._decode else [None] * len(batch)
        report = BatchReport(
            model=key.model,
            size=len(batch),
            encode_s=encoded - begin,
            network_s=watch.network_s,
            policy_s=sampled - encoded - watch.network_s,
            decode_s=time.perf_counter() - sampled,
        )
        self._on_batch(report)
        return [
            GeneratedImage(entry.item.seed, image, latent, waited, report)
            for entry, image, latent, waited in zip(batch, pixels, latents, queue_s, strict=True)
        ]

    def _condition(self, model: LoadedModel, tasks: Sequence[ImageTask]) -> TextConditioning:
        """Token states of the tasks' prompts, padded together; remembered ones are not encoded again."""
        missing = {task.prompt for task in tasks if task.states is None}
        missing = [prompt for prompt in sorted(missing) if (model, prompt) not in self._prompts]
        if missing:
            for prompt, states in zip(missing, model.pipeline.text_encoder.encode(missing), strict=True):
                self._prompts[model, prompt] = states
        states = []
        for task in tasks:
            if task.states is None:
                self._prompts.move_to_end((model, task.prompt))
                states.append(self._prompts[model, task.prompt])
            else:
                states.append(task.states)
        while len(self._prompts) > PROMPT_CACHE:
            self._prompts.popitem(last=False)
        return TextConditioning.collate(states).to(model.pipeline.device)

    def _previews(
        self,
        loop: asyncio.AbstractEventLoop,
        key: BatchKey,
        batch: list[Waiting[ImageTask, GeneratedImage]],
    ) -> Callable[[int, Tensor, Tensor], None] | None:
        """Decodes x̂_0 of those who asked, and of nobody else; None where nobody did."""
        rows = [row for row, entry in enumerate(batch) if entry.item.on_preview is not None]
        if not rows:
            return None

        def show(step: int, state: Tensor, clean: Tensor) -> None:
            for row, pixels in zip(rows, key.model.pipeline.decode(clean[rows]), strict=True):
                if not batch[row].abandoned:
                    callback: Any = batch[row].item.on_preview
                    loop.call_soon_threadsafe(callback, Preview(step + 1, pixels))

        return show
