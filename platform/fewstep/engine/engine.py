"""The engine: image tasks in, pixels out, batched by what can share a batch.

Batches are made anew for every network evaluation: an image that arrives while others are half-way joins them at
their next evaluation, whatever its number of steps, and nobody waits for a batch to end (continuous batching).

An image depends on its own seed and prompt alone: its noise comes from its own generator, and prompts are
padded together with masked tokens. In float32 a batch moves a latent by rounding only (below 1e-4).
"""

from __future__ import annotations

import asyncio
import statistics
import time
from collections import OrderedDict
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from typing import Literal, NamedTuple, Protocol

import numpy as np
import torch
from torch import Tensor

from fewstep.data.encoder import CaptionEncoder
from fewstep.engine.batcher import DynamicBatcher, Overloaded, Turn, Waiting
from fewstep.engine.models import LoadedModel
from fewstep.flow import NextStep, gaussian_noise
from fewstep.models.conditioning import TextConditioning

Sampler = Literal["student", "teacher"]
REMEMBERED_BYTES = 64 * 2**20
"""Of token states of the latest prompts; a caption of FLUX.1's encoder takes 8 MiB, of a small one 100 kB."""
PROMPTS_TOGETHER = 8
"""Most prompts encoded together; on a CPU more of them gain nothing."""


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


class BatchKey(NamedTuple):
    """What images must have in common to share a batch."""

    model: LoadedModel
    shape: tuple[int, int, int]
    """(C, H, W) of the latent."""
    sampler: Sampler


@dataclass(frozen=True)
class EvaluationReport:
    """What one network evaluation of a batch took, in seconds."""

    model: LoadedModel
    size: int
    """Images in the batch."""
    share: float
    """Of how many whole images it did the work: an image of n evaluations counts 1/n."""
    network_s: float
    policy_s: float
    """Rollouts, and the rest of sampling outside the network."""


@dataclass(eq=False)
class Drawing:
    """An image on its way from noise to data."""

    task: ImageTask
    text: TextConditioning
    """Its encoded prompt, B = 1."""
    latent: Tensor
    """x at the next evaluation, (1, C, H, W) float32; the clean latent at the end."""
    steps: int
    """Evaluations it takes."""
    temperature: float | Literal["auto"] | None
    """As for `Engine.generate`."""
    evaluations: list[EvaluationReport] = field(default_factory=list)
    """Those it has had."""

    @property
    def done(self) -> int:
        """How many evaluations it has had."""
        return len(self.evaluations)


@dataclass(frozen=True)
class Timings:
    """Where one image's time went, in seconds."""

    encode_s: float
    """Until its prompt was encoded."""
    queue_s: float
    """Waiting for its turns."""
    network_s: float
    policy_s: float
    """Of its batches, rollouts and the rest of sampling outside the network."""
    decode_s: float


@dataclass(frozen=True)
class GeneratedImage:
    """One image, and how it came about."""

    seed: int
    pixels: np.ndarray
    """(H, W, 3) uint8."""
    latent: Tensor
    """(C, H, W) float32 on the CPU."""
    batch_size: float
    """Images that shared its evaluations, itself included: their harmonic mean, so that 1/batch_size is its share."""
    timings: Timings


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


class PromptEncoder:
    """Encodes prompts in a thread of its own, those that wait together.

    The latest are remembered, if they were encoded alone: what company did to their last digits must not come back to
    a lone request.
    """

    def __init__(self) -> None:
        self._thread = tensor_thread("encoder")
        self._remembered: OrderedDict[tuple[str, str], TextConditioning] = OrderedDict()
        self._remembered_bytes = 0
        self._batcher: DynamicBatcher[CaptionEncoder, str, TextConditioning] = DynamicBatcher(
            self._encode_batch, max_batch_size=PROMPTS_TOGETHER, max_wait_s=0, max_pending=1 << 30
        )

    async def encode(self, encoder: CaptionEncoder, prompts: Sequence[str]) -> list[TextConditioning]:
        """Each prompt encoded, B = 1, on the CPU.

        Raises:
            UserError: a prompt that the encoder can't take.
        """
        encoder.check(prompts)
        texts = {prompt: self._remembered.get((encoder.name, prompt)) for prompt in prompts}
        missing = [prompt for prompt, known in texts.items() if known is None]
        if missing:
            texts |= zip(missing, await self._batcher.submit(encoder, missing), strict=True)
        for prompt in texts:
            if (key := (encoder.name, prompt)) in self._remembered:
                self._remembered.move_to_end(key)
        return [texts[prompt] for prompt in prompts]

    async def _encode_batch(
        self, encoder: CaptionEncoder, entries: list[Waiting[str, TextConditioning]]
    ) -> list[TextConditioning]:
        loop = asyncio.get_running_loop()
        prompts = [entry.item for entry in entries]
        texts = await loop.run_in_executor(self._thread, encoder.each, prompts)
        if len(prompts) == 1:
            self._remember((encoder.name, prompts[0]), texts[0])
        return texts

    def _remember(self, key: tuple[str, str], text: TextConditioning) -> None:
        if (known := self._remembered.pop(key, None)) is not None:
            self._remembered_bytes -= known.states.nbytes
        self._remembered[key] = text
        self._remembered_bytes += text.states.nbytes
        while self._remembered_bytes > REMEMBERED_BYTES:
            _, oldest = self._remembered.popitem(last=False)
            self._remembered_bytes -= oldest.states.nbytes


class LocalStages:
    """Encodes and decodes in threads of this process, while the network works in another."""

    def __init__(self) -> None:
        self._encoder, self._decoder = PromptEncoder(), tensor_thread("decoder")

    async def encode(self, model: LoadedModel, prompts: Sequence[str]) -> list[TextConditioning]:
        return await self._encoder.encode(model.pipeline.text_encoder, prompts)

    async def decode(self, model: LoadedModel, latents: Tensor) -> np.ndarray:
        loop = asyncio.get_running_loop()
        return await loop.run_in_executor(self._decoder, model.pipeline.decode, latents)


class Engine:
    """Batches image tasks and runs the network in one worker thread. Belongs to one event loop.

    Args:
        max_batch_size: most images of a batch.
        max_wait_s: how long an idle worker waits for a batch to fill.
        max_pending: bound on waiting images.
        stages: where prompts are encoded and latents decoded; in threads of this process by default.
        on_evaluation: told of each network evaluation.
    """

    def __init__(
        self,
        *,
        max_batch_size: int = 16,
        max_wait_s: float = 0.0,
        max_pending: int = 256,
        stages: Stages | None = None,
        on_evaluation: Callable[[EvaluationReport], None] = lambda report: None,
    ) -> None:
        self.max_pending = max_pending
        self._stages, self._on_evaluation = stages or LocalStages(), on_evaluation
        self._encoding = 0
        self._thread = tensor_thread("network")
        self.batcher: DynamicBatcher[BatchKey, Drawing, float] = DynamicBatcher(
            self._run, max_batch_size=max_batch_size, max_wait_s=max_wait_s, max_pending=1 << 30
        )

    @property
    def pending(self) -> int:
        """Images that wait for their prompt, or for a turn."""
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
        """Images of `tasks`, in order. Cancelling the call stops them at their next evaluation.

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
        key = BatchKey(model, model.latent_shape(size), sampler)
        if self.pending + len(tasks) > self.max_pending:
            raise Overloaded(self.pending, self.max_pending)
        begin = time.perf_counter()
        self._encoding += len(tasks)
        try:
            texts = await self._stages.encode(model, [task.prompt for task in tasks])
        finally:
            self._encoding -= len(tasks)
        encode_s = time.perf_counter() - begin
        drawings = [
            Drawing(task, text, _noise(task, key), steps, temperature)
            for task, text in zip(tasks, texts, strict=True)
        ]
        drawing_s = await self.batcher.submit(key, drawings)
        begin = time.perf_counter()
        latents = torch.cat([drawing.latent for drawing in drawings])
        pixels = await self._stages.decode(model, latents)
        decode_s = time.perf_counter() - begin
        return [
            _finished(drawing, image, encode_s, elapsed, decode_s)
            for drawing, image, elapsed in zip(drawings, pixels, drawing_s, strict=True)
        ]

    async def close(self) -> None:
        await self.batcher.close()
        self._thread.shutdown(wait=False, cancel_futures=True)

    async def _run(
        self, key: BatchKey, batch: list[Waiting[Drawing, float]]
    ) -> list[float | Literal[Turn.UNFINISHED]]:
        loop = asyncio.get_running_loop()
        drawings = [entry.item for entry in batch]
        clean = await loop.run_in_executor(self._thread, self._evaluate, key, drawings)
        if clean is not None:
            shown = [entry for entry in batch if entry.item.task.on_preview is not None]
            pixels = await self._stages.decode(key.model, clean)
            for entry, image in zip(shown, pixels, strict=True):
                if not entry.abandoned:
                    entry.item.task.on_preview(Preview(entry.item.done, image))
        return [entry.waited_s if entry.item.done == entry.item.steps else Turn.UNFINISHED for entry in batch]

    @torch.inference_mode()
    def _evaluate(self, key: BatchKey, drawings: list[Drawing]) -> Tensor | None:
        """One network evaluation of a batch, each image at its own step; x̂_0 of those who asked for previews."""
        pipeline, watch = key.model.pipeline, key.model.stopwatch
        begin = time.perf_counter()
        conditioning = TextConditioning.join([drawing.text for drawing in drawings]).to(pipeline.device)
        x = torch.cat([drawing.latent for drawing in drawings]).to(pipeline.device)
        clean = None
        with watch.measuring():
            if key.sampler == "teacher":
                step, steps = torch.tensor([(drawing.done, drawing.steps) for drawing in drawings]).T
                x = pipeline.sample_teacher_step(x, conditioning, step, steps)
            else:
                nexts = [pipeline.next_step(d.done, d.steps, d.temperature) for d in drawings]
                x, clean = pipeline.sample_step(x, conditioning, NextStep.join(nexts))
            x = x.float().cpu()
        elapsed = time.perf_counter() - begin
        share = sum(1 / drawing.steps for drawing in drawings)
        report = EvaluationReport(key.model, len(drawings), share, watch.network_s, elapsed - watch.network_s)
        for drawing, latent in zip(drawings, x.split(1), strict=True):
            drawing.latent = latent
            drawing.evaluations.append(report)
        self._on_evaluation(report)
        rows = [row for row, drawing in enumerate(drawings) if drawing.task.on_preview is not None]
        return clean()[rows].float().cpu() if rows and clean is not None else None


def tensor_thread(name: str) -> ThreadPoolExecutor:
    """One thread for tensor work, told how many threads that may use: MKL's first product would not know otherwise."""
    return ThreadPoolExecutor(
        1, f"fewstep-{name}", initializer=torch.set_num_threads, initargs=(torch.get_num_threads(),)
    )


def _noise(task: ImageTask, key: BatchKey) -> Tensor:
    return gaussian_noise((1, *key.shape), torch.Generator().manual_seed(task.seed))


def _finished(
    drawing: Drawing, pixels: np.ndarray, encode_s: float, drawing_s: float, decode_s: float
) -> GeneratedImage:
    network_s = sum(report.network_s for report in drawing.evaluations)
    policy_s = sum(report.policy_s for report in drawing.evaluations)
    return GeneratedImage(
        seed=drawing.task.seed,
        pixels=pixels,
        latent=drawing.latent[0],
        batch_size=statistics.harmonic_mean(report.size for report in drawing.evaluations),
        timings=Timings(encode_s, drawing_s - network_s - policy_s, network_s, policy_s, decode_s),
    )
