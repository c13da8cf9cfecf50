"""One image from noise to pixels: what is asked for, how far it is, and what came of it."""

from __future__ import annotations

import math
import statistics
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Literal, NamedTuple

import numpy as np
import torch
from torch import Tensor

from fewstep.engine.admission import Place
from fewstep.engine.edit import Edit, KeptPart
from fewstep.engine.models import LoadedModel
from fewstep.flow import SamplerConfig, gaussian_noise
from fewstep.models.conditioning import Conditioning


class StepPreview(NamedTuple):
    """The clean image that is predicted after one network evaluation."""

    step: int
    """Evaluations done, from 1."""
    pixels: np.ndarray
    """(H, W, 3) uint8."""


class BatchKey(NamedTuple):
    """What images must have in common to share a network evaluation."""

    model: LoadedModel
    """The network; another version of the same model is another one."""
    shape: tuple[int, int, int]
    """(C, H, W) of the latent."""
    by_teacher: bool
    """Whether the teacher's own sampler makes it."""
    shift: float | Literal["dynamic"]
    """Time shift of the student's sampler: one evaluation has one warp of time."""
    substeps: int
    """Substeps of the student's rollouts: they are walked together."""

    @property
    def work(self) -> float:
        """Of one evaluation of an image, in passes of the network over an image of the size that the model was trained
        at: as many as it has times their pixels, but at least one; twice that where a teacher is guided. (Attention
        grows faster, but a network's other layers, and its memory, don't.)"""
        passes = self.model.pipeline.card.teacher_sampler.passes if self.by_teacher else 1
        return passes * max(1.0, relative_pixels(self.model, self.shape))


def relative_pixels(model: LoadedModel, shape: tuple[int, int, int]) -> float:
    """How many times the pixels of the size its model was trained at an image of a latent (C, H, W) has."""
    return math.prod(shape[1:]) / math.prod(model.latent_shape(None)[1:])


@dataclass(frozen=True)
class EvaluationReport:
    """What one network evaluation of a batch took, in seconds."""

    model: LoadedModel
    """What was evaluated."""
    size: int
    """Images in the batch."""
    share: float
    """Of how many whole images it did the work: an image of n evaluations counts 1/n."""
    network_s: float
    """Time in the network."""
    policy_s: float
    """Time in rollouts, and in the rest of sampling outside the network."""


@dataclass(frozen=True)
class ImageTimings:
    """Where one image's time went, in seconds."""

    encode_s: float
    """Until its caption was encoded."""
    queue_s: float
    """Waiting for its evaluations to begin."""
    network_s: float
    """Its batches' time in the network."""
    policy_s: float
    """Its batches' time in rollouts, and in the rest of sampling outside the network."""
    decode_s: float
    """Until its latent was decoded."""


@dataclass(frozen=True)
class GeneratedImage:
    """One finished image."""

    seed: int
    """What its noise was drawn from."""
    pixels: np.ndarray
    """(H, W, 3) uint8."""
    latent: Tensor
    """(C, H, W) float32 on the CPU."""
    batch_size: float
    """Images that shared its evaluations, itself included: their harmonic mean, so that 1/batch_size is its share."""
    timings: ImageTimings
    """Where its time went."""


# Compared by identity: two requests for the same image are two images.
@dataclass(eq=False)
class Generation:
    """One image that is asked for, and its state on the way from noise to data.

    The first fields are the request, which `Generation.of` fills in with the model's defaults. The others belong to
    the engine. An object is generated once: ask again with a new one.
    """

    model: LoadedModel
    """What makes it."""
    caption: str
    """What it is to show: a text, or the name or number of a class."""
    seed: int
    """Of its noise, and of the noise that a stochastic sampler renews."""
    shape: tuple[int, int, int]
    """(C, H, W) of its latent."""
    sampler: SamplerConfig
    """How the student is sampled, as `FewStepPipeline.sampler_for` resolves it."""
    teacher_steps: int | None = None
    """Steps of the teacher's own guided Euler sampler, which makes the image then; None: the student makes it."""
    on_preview: Callable[[StepPreview], None] | None = None
    """Called on the engine's event loop after each evaluation of the student."""
    lora: Sequence[tuple[str, float]] = ()
    """Names of its style LoRAs, with their scales."""
    edit: Edit | None = None
    """What it is made from, by a model that takes reference images; None for others."""

    conditioning: Conditioning = field(init=False, repr=False)
    """Its encoded caption, B = 1, beside its references; from its first evaluation on, what the network has prepared of
    it."""
    place: Place = field(init=False, repr=False)
    """Of its request, among all that the engine has taken on."""
    latent: Tensor = field(init=False, repr=False)
    """x at the next evaluation, (1, C, H, W) float32 on the CPU; the clean latent at the end."""
    generator: torch.Generator = field(init=False, repr=False)
    """Its own source of noise, so that no other image of its batch can change what it gets."""
    _kept_part: KeptPart | None = field(default=None, init=False, repr=False)
    evaluations: list[EvaluationReport] = field(default_factory=list, init=False, repr=False)
    """The evaluations it has had."""

    @classmethod
    def of(
        cls,
        model: LoadedModel,
        caption: str,
        seed: int,
        *,
        size: tuple[int, int] | None = None,
        nfe: int | None = None,
        temperature: float | Literal["auto"] | None = None,
        h: float | None = None,
        teacher_steps: int | None = None,
        on_preview: Callable[[StepPreview], None] | None = None,
        lora: Sequence[tuple[str, float]] = (),
        edit: Edit | None = None,
    ) -> Generation:
        """Ask a model for an image; what is left out is as the student was trained.

        Args:
            model: what makes it.
            caption: what it is to show.
            seed: of its noise.
            size: (height, width) in pixels.
            nfe: network evaluations of the student.
            temperature: mixture temperature of the student's policy.
            h: how much noise the student's sampler renews between evaluations; 0 is deterministic.
            teacher_steps: let the teacher make it, in this many steps of its own sampler.
            on_preview: called after each evaluation of the student.
            lora: names of the model's style LoRAs, with their scales.
            edit: as many reference images of this size as the model takes, and what of them has to stay.

        Raises:
            UserError: a size or a sampler setting that the model can't take, or a style LoRA that it has not.
        """
        shape = model.latent_shape(size)  # first, as a dynamic shift depends on it
        sampler = model.pipeline.sampler_for(shape, nfe=nfe, temperature=temperature, h=h)
        model.pipeline.style_mix(lora)  # refuses what it can't take before anything is done for it
        return cls(model, caption, seed, shape, sampler, teacher_steps, on_preview, lora, edit)

    @property
    def key(self) -> BatchKey:
        """Generations of equal keys can share a network evaluation."""
        by_teacher = self.teacher_steps is not None
        return BatchKey(self.model, self.shape, by_teacher, self.sampler.shift, self.sampler.substeps)

    @property
    def total(self) -> int:
        """How many evaluations it takes."""
        return self.sampler.nfe if self.teacher_steps is None else self.teacher_steps

    @property
    def work(self) -> float:
        """Of all its evaluations, in the unit of `BatchKey.work`."""
        return self.key.work * self.total

    @property
    def done(self) -> int:
        """How many evaluations it has had."""
        return len(self.evaluations)

    @property
    def sigma(self) -> float:
        """σ at which its next evaluation begins; 0 after the last."""
        if self.done == self.total:
            return 0.0
        if self.teacher_steps is None:
            return float(self.sampler.next_step(self.done).sigma_src)
        return float(self.model.pipeline.teacher_sigmas(self.shape, self.teacher_steps)[self.done])

    def begin(self, conditioning: Conditioning, place: Place, references: Tensor | None = None) -> None:
        """Take the encoded caption (B = 1) and draw the noise; the first evaluation may follow.

        Args:
            conditioning: of the caption.
            place: of its request, among all that the engine has taken on.
            references: latents (N, C, h, w) of the images of its edit; None without one.
        """
        self.place = place
        # On the CPU, where a seed gives the same numbers on every machine. It goes on to draw what the sampler renews.
        self.generator = torch.Generator().manual_seed(self.seed)
        self.latent = gaussian_noise((1, *self.shape), self.generator)
        pipeline = self.model.pipeline
        if self.edit is not None and references is not None:
            conditioning = pipeline.beside(conditioning, references)
            if self.edit.changes is not None:
                self._kept_part = KeptPart(self.edit.changes, references[:1], self.latent)
        self.conditioning = pipeline.styled(conditioning, self.lora)

    def advance(self, latent: Tensor, report: EvaluationReport) -> None:
        """Take the state (1, C, H, W) after one more evaluation."""
        self.evaluations.append(report)
        self.latent = latent if self._kept_part is None else self._kept_part.put_into(latent, self.sigma)

    def finished(
        self, pixels: np.ndarray, *, encode_s: float, generate_s: float, decode_s: float
    ) -> GeneratedImage:
        """The result, after the last evaluation.

        Args:
            pixels: (H, W, 3) uint8, decoded from `latent`.
            encode_s: seconds until the caption was encoded.
            generate_s: seconds from then to the end of the last evaluation, waiting included.
            decode_s: seconds from then until the pixels were there.
        """
        network_s = sum(report.network_s for report in self.evaluations)
        policy_s = sum(report.policy_s for report in self.evaluations)
        # What a batch took counts in full for each of its images: that is how long each of them waited for it.
        return GeneratedImage(
            seed=self.seed,
            pixels=pixels if self.edit is None else self.edit.kept(pixels),
            latent=self.latent[0],
            batch_size=statistics.harmonic_mean(report.size for report in self.evaluations),
            timings=ImageTimings(encode_s, generate_s - network_s - policy_s, network_s, policy_s, decode_s),
        )
