"""The engine: generations in, images out, batched by what can share a batch.

Batches are made anew for every network evaluation (continuous batching): an image that arrives while others are
half-way joins them at their next evaluation, whatever its number of steps, and nobody waits for a batch to end.

An image depends on its own seed and caption alone: all its noise comes from its own generator, and captions are
padded together with masked tokens. In float32 a batch moves a latent by rounding only (below 1e-4).
"""

from __future__ import annotations

import asyncio
import time
from collections.abc import Callable, Sequence
from typing import Literal

import torch
from torch import Tensor

from fewstep.engine.admission import Admission
from fewstep.engine.batcher import DynamicBatcher, Turn, Waiting
from fewstep.engine.caller import ANYBODY, Caller
from fewstep.engine.generation import BatchKey, EvaluationReport, GeneratedImage, Generation, StepPreview
from fewstep.engine.models import Abandoned
from fewstep.engine.stages import LocalStages, Stages, tensor_thread
from fewstep.flow import NextStep
from fewstep.models.conditioning import Conditioning


class Engine:
    """Batches generations and runs the network in one worker thread. Belongs to one event loop.

    Args:
        max_batch_size: most images of a batch, of the size that their model was trained at; others count as
            `BatchKey.work` says.
        max_wait_s: how long an idle worker waits for a batch to fill.
        max_pending_work: bound on the work under way, counted as `Generation.work`.
        stages: where captions are encoded and latents decoded; in threads of this process by default.
        on_evaluation: told of each network evaluation, in the worker thread.
    """

    def __init__(
        self,
        *,
        max_batch_size: int = 16,
        max_wait_s: float = 0.0,
        max_pending_work: float = 4096,
        stages: Stages | None = None,
        on_evaluation: Callable[[EvaluationReport], None] = lambda report: None,
    ) -> None:
        self._stages, self._on_evaluation = stages or LocalStages(), on_evaluation
        self.admission = Admission(max_pending_work)
        self._encoding = 0
        self._thread = tensor_thread("network")
        self.batcher: DynamicBatcher[BatchKey, Generation, float] = DynamicBatcher(
            self._run, max_batch_size=max_batch_size, max_wait_s=max_wait_s, work=lambda key: key.work
        )

    @property
    def pending(self) -> int:
        """Images that wait for their caption to be encoded, or for an evaluation."""
        return self._encoding + self.batcher.pending

    async def generate(
        self, generations: Sequence[Generation], caller: Caller = ANYBODY
    ) -> list[GeneratedImage]:
        """Generate images, in order. Cancelling the call stops them at their next evaluation.

        Args:
            generations: fresh ones, of one model and one size, all by the student or all by the teacher.
            caller: who asks; see `Admission` and `FairShares` for what becomes of callers that ask for too much.

        Raises:
            UserError: a caption that the model can't take.
            Overloaded: there is too much work under way.
            NotBegun: no evaluation began within the time that the caller allows.
            ValueError: generations that can't share a batch.
        """
        key, *others = dict.fromkeys(generation.key for generation in generations)
        if others:
            raise ValueError("generations of one call must have one model, one size and one sampler")
        # Before any work is done for them, so that refusing stays cheap when there is too much work.
        async with self.admission.admit(caller, sum(one.work for one in generations)) as place:
            begin = time.perf_counter()
            self._encoding += len(generations)
            try:
                encoded = await self._stages.encode(key.model, [one.caption for one in generations], caller)
                # All images of a request share its edit.
                edits = dict.fromkeys(one.edit for one in generations if one.edit is not None)
                latents = {
                    edit: await self._stages.encode_images(key.model, edit.references) for edit in edits
                }
            finally:
                self._encoding -= len(generations)
            encode_s = time.perf_counter() - begin
            for generation, conditioning in zip(generations, encoded, strict=True):
                references = None if generation.edit is None else latents[generation.edit]
                generation.begin(conditioning, place, references)
            generate_s = await self.batcher.submit(key, generations, caller)
        begin = time.perf_counter()
        # Together, although they may have ended in different batches: one call of the decoder per request.
        pixels = await self._stages.decode(
            key.model, torch.cat([generation.latent for generation in generations])
        )
        decode_s = time.perf_counter() - begin
        return [
            generation.finished(image, encode_s=encode_s, generate_s=seconds, decode_s=decode_s)
            for generation, image, seconds in zip(generations, pixels, generate_s, strict=True)
        ]

    async def close(self) -> None:
        """Stop the worker; whoever still waits for an image is cancelled."""
        await self.batcher.close()
        self._thread.shutdown(wait=False, cancel_futures=True)

    async def _run(
        self, key: BatchKey, batch: list[Waiting[Generation, float]]
    ) -> list[float | Literal[Turn.UNFINISHED]]:
        """One evaluation of a batch; gives, of each image that is finished, the seconds since it was submitted."""
        loop = asyncio.get_running_loop()
        for entry in batch:
            entry.item.place.begin()
        # In a thread: the event loop goes on taking requests while the network works.
        try:
            clean = await loop.run_in_executor(self._thread, self._evaluate, key, batch)
        except Abandoned:  # by all: nobody gets this answer
            return [Turn.UNFINISHED] * len(batch)
        for entry in batch:
            entry.item.place.work_left -= key.work
        if clean is not None:
            watched = [(entry, show) for entry in batch if (show := entry.item.on_preview) is not None]
            pixels = await self._stages.decode(key.model, clean)
            for (entry, show), image in zip(watched, pixels, strict=True):
                if not entry.abandoned:  # its caller may have left while the preview was decoded
                    show(StepPreview(entry.item.done, image))
        return [entry.waited_s if entry.item.done == entry.item.total else Turn.UNFINISHED for entry in batch]

    @torch.inference_mode()
    def _evaluate(self, key: BatchKey, batch: list[Waiting[Generation, float]]) -> Tensor | None:
        """One network evaluation, each image at its own step; x̂_0 of those that have previews, if any has.

        Raises:
            Abandoned: nobody waits for any of them any more.
        """
        generations = [entry.item for entry in batch]
        pipeline, watch = key.model.pipeline, key.model.stopwatch
        begin = time.perf_counter()
        x = torch.cat([one.latent for one in generations]).to(pipeline.device)
        clean = None
        torch.compiler.cudagraph_mark_step_begin()  # what a compiled network gave before may be overwritten now
        # Read from this thread, which is safe: a future that is done stays so.
        wanted = key.model.interruption.unless(lambda: all(entry.abandoned for entry in batch))
        with watch.measuring(), wanted:
            # Of each image once, and alone: what it gets does not depend on the images that it begins with.
            for one in generations:
                if one.done == 0:
                    there = one.conditioning.to(pipeline.device)
                    one.conditioning = pipeline.prepare(there, by_teacher=key.by_teacher)
            conditioning = Conditioning.join([one.conditioning for one in generations])
            if key.by_teacher:
                done, total = torch.tensor([(one.done, one.total) for one in generations]).T
                x = pipeline.sample_teacher_step(x, conditioning, done, total)
            else:
                step = NextStep.join([one.sampler.next_step(one.done) for one in generations])
                # Equal keys have equal shifts and substeps, which is all that is read of this sampler beside `step`.
                sampler, generators = generations[0].sampler, [one.generator for one in generations]
                x, clean = pipeline.sample_step(x, conditioning, step, sampler, generator=generators)
            # To the CPU after every evaluation: at its next one an image may be in another batch.
            x = x.float().cpu()
        elapsed = time.perf_counter() - begin
        share = sum(1 / one.total for one in generations)
        report = EvaluationReport(
            key.model, len(generations), share, watch.network_s, elapsed - watch.network_s
        )
        for one, latent in zip(generations, x.split(1), strict=True):
            one.advance(latent, report)
        self._on_evaluation(report)
        # `clean` evaluates the policy once more, so it is asked only where somebody watches.
        rows = [row for row, one in enumerate(generations) if one.on_preview is not None]
        return clean()[rows].float().cpu() if rows and clean is not None else None
