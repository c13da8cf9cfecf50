"""Planning a service: what a student takes on a device in each precision, measured without memory and weights.

As for trainings (see `training.py`), the network is built on the meta device. There it is evaluated once, and latents
are decoded, under a meter that follows the life of every tensor.

What it leaves out: workspaces of kernels, fragments of the allocator, the CUDA context (about 1 GB), and what a text
encoder computes with. Leave room.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import cache
from pathlib import Path

import torch

from fewstep.config import PRECISIONS, Precision, Shape
from fewstep.data.schema import DatasetInfo
from fewstep.encoders.autoencoders import PIXELS_DECODED, KLAutoencoder
from fewstep.encoders.base import usual_precision
from fewstep.errors import UserError
from fewstep.flow import SamplerConfig
from fewstep.models.network import PolicyNetwork
from fewstep.models.planned import lower_on_meta
from fewstep.models.precision import held_bytes
from fewstep.models.teacher import read_card
from fewstep.plan.meter import DispatchMeter, fused_attention
from fewstep.plan.parts import autoencoder_on_meta, text_encoder_bytes, usual_parts
from fewstep.plan.training import FULL_SIZE, agreed_references, any_conditioning, new_student, square
from fewstep.student.card import StudentCard, read_student_card
from fewstep.student.weights import student_on_meta
from fewstep.train.recipe import DistillRecipe

CAPTION_TOKENS = 512
"""Longest caption in tokens, where no card says otherwise."""


NO_FIT = "does not fit"
"""The verdict on a student that is too large for a device."""


@dataclass(frozen=True)
class GPU:
    """What the student is served on."""

    memory_gb: float
    """Its memory, in 10⁹ bytes."""
    tflops: float = 989.0
    """Peak rate in bfloat16, 10¹² operations per second; the default is an H100's."""
    float32_tflops: float = 67.0
    """Peak rate in float32."""
    bandwidth_tb: float = 3.35
    """Rate at which its memory is read, in 10¹² bytes per second."""
    utilisation: float = 0.4
    """Share of the peak rate that a network reaches."""
    on_cpu: bool = False
    """Whether it is a CPU, which computes attention in float32."""


@dataclass(frozen=True)
class Served:
    """What is served: a student, or one that a recipe would make."""

    name: str
    """Of the student or recipe."""
    text_encoder: str
    """Name of its encoder (`load_encoder`)."""
    autoencoder: str
    """Name of its autoencoder (`load_autoencoder`)."""
    latent_shape: Shape | None
    """(C, H, W) of the latents that it is trained on; None where that is not known."""
    sampler: SamplerConfig
    """Its sampler."""
    max_tokens: int
    """Longest caption in tokens."""
    source: Path | DistillRecipe
    """The student's folder, or the recipe."""
    references: int | None = None
    """Reference images that it edits; None where that is not known."""

    @classmethod
    def student(cls, folder: Path, name: str | None = None) -> Served:
        """An exported student.

        Raises:
            UserError: there is none in that folder.
        """
        card: StudentCard = read_student_card(folder)
        return cls(
            name or str(folder), card.text_encoder, card.autoencoder, card.latent_shape, card.sampler,
            card.max_tokens, folder, card.references,
        )  # fmt: skip

    @classmethod
    def recipe(cls, recipe: DistillRecipe) -> Served:
        """The student of a recipe that need not have run: its encoders are those of its data or its teacher's."""
        shape, tokens, references = None, CAPTION_TOKENS, None
        encoder, autoencoder = usual_parts(recipe.teacher.family, recipe.teacher.path)
        try:
            info = DatasetInfo.open(recipe.data.path)
            encoder, autoencoder = info.encoding.text_encoder, info.encoding.autoencoder
            shape, tokens = next(iter(info.buckets("train"))), info.encoding.max_tokens
            references = info.encoding.references
        except UserError:  # not prepared: the teacher's card tells, if it has one
            if (card := read_card(recipe.teacher.path)) is not None:
                encoder, autoencoder, shape = card.text_encoder, card.autoencoder, card.latent_shape
        return cls(recipe.name, encoder, autoencoder, shape, recipe.sampler, tokens, recipe, references)

    def network(self, precision: Precision) -> PolicyNetwork:
        """Its network as a pipeline holds it, on the meta device."""
        if isinstance(self.source, Path):
            return student_on_meta(self.source, precision)
        network = new_student(self.source).eval().requires_grad_(False)
        lower_on_meta(network, precision)
        network.keep_folded()
        return network


@dataclass(frozen=True)
class ServingMemory:
    """Bytes on one device, by part; None for what is not known."""

    weights: int
    """The network with adapters and head, as it is held."""
    text_encoder: int | None
    """Its weights."""
    autoencoder: int | None
    """Its weights."""
    evaluation: int
    """The most that is alive at a time besides, in one evaluation of a batch."""
    decoding: int | None
    """The most that is alive at a time besides, while latents are decoded whole."""
    tiled: int | None
    """The same while they are decoded in tiles; as `decoding` where images are too small for that."""

    @property
    def total(self) -> int:
        """The peak: weights of all parts, and the larger of what evaluating and decoding take."""
        held = self.weights + (self.text_encoder or 0) + (self.autoencoder or 0)
        return held + max(self.evaluation, self.decoding or 0)

    @property
    def in_tiles(self) -> int:
        """The peak where images are decoded in tiles."""
        return replace(self, decoding=self.tiled).total

    @property
    def least(self) -> int:
        """The peak where, besides, the text encoder is on the device only while it works."""
        visits = max(self.evaluation, self.tiled or 0, self.text_encoder or 0)
        return self.weights + (self.autoencoder or 0) + visits


@dataclass(frozen=True)
class ServingPlan:
    """What a student takes in one precision."""

    served: Served
    """The student."""
    gpu: GPU
    """What it is served on."""
    precision: Precision
    """Of the network's frozen weights."""
    encoder_precision: Precision
    """Of the text encoder's weights."""
    autoencoder_precision: Precision
    """Of the autoencoder's weights."""
    shape: Shape
    """(C, H, W) of the latents."""
    batch: int
    """Images of a batch."""
    tokens: int
    """Token states per caption."""
    references: int
    """Reference images per caption."""
    memory: ServingMemory
    """On the device."""
    operations: int
    """Of one evaluation of the batch (a multiply-add is two)."""

    @property
    def verdict(self) -> str:
        """Whether and how it fits the device's memory."""
        limit = self.gpu.memory_gb * 1e9
        if self.memory.total <= limit:
            return "fits"
        if self.memory.in_tiles <= limit:
            return "fits, decoding in tiles"
        return (
            "fits, with the text encoder on the host between batches"
            if self.memory.least <= limit
            else NO_FIT
        )

    @property
    def seconds(self) -> float:
        """Of the evaluations per image, at the device's rates; without encoding captions and decoding latents."""
        peak = self.gpu.float32_tflops if self.precision == "float32" else self.gpu.tflops
        computing = self.operations / (peak * 1e12 * self.gpu.utilisation)
        reading = self.memory.weights / (self.gpu.bandwidth_tb * 1e12)
        return self.served.sampler.nfe * max(computing, reading) / self.batch


def plan_serving(
    served: Served,
    gpu: GPU,
    *,
    side: int | None = None,
    batch: int = 1,
    tokens: int | None = None,
    references: int | None = None,
    encoder_precision: Precision | None = None,
    autoencoder_precision: Precision = "float32",
    precisions: Sequence[Precision] = PRECISIONS,
) -> list[ServingPlan]:
    """Plan a student in each precision.

    Args:
        served: the student.
        gpu: what serves it.
        side: latent cells per side; by default as trained, or 128.
        batch: images of a batch.
        tokens: token states per caption; by default as many as a caption may have.
        references: reference images per caption; by default as trained, or none.
        encoder_precision: of the text encoder; by default as it is loaded where none is asked for.
        autoencoder_precision: of the autoencoder, "float32" or "bfloat16".
        precisions: of the network's frozen weights.

    Raises:
        UserError: the teacher's architecture can't be found, or the size can't be cut into its patches.
    """
    held_in = encoder_precision or usual_precision(served.text_encoder, gpu.on_cpu)
    encoder = text_encoder_bytes(served.text_encoder, held_in)
    tokens, plans = tokens or served.max_tokens, []
    for precision in precisions:
        network = served.network(precision)
        shape = _latent_shape(served, network, side)
        images = agreed_references(network, served.references, references)
        evaluation, operations = _evaluation(network, shape, batch, tokens, images, gpu.on_cpu)
        held, whole, tiled = _autoencoder_bytes(served.autoencoder, autoencoder_precision, shape, batch)
        memory = ServingMemory(network.nbytes, encoder, held, evaluation, whole, tiled)
        plans.append(
            ServingPlan(
                served,
                gpu,
                precision,
                held_in,
                autoencoder_precision,
                shape,
                batch,
                tokens,
                images,
                memory,
                operations,
            )
        )
    return plans


def _latent_shape(served: Served, network: PolicyNetwork, side: int | None) -> Shape:
    if side is None and served.latent_shape is not None:
        return served.latent_shape
    return square(network, side or FULL_SIZE)


@torch.no_grad()
def _evaluation(
    network: PolicyNetwork, shape: Shape, batch: int, tokens: int, references: int, on_cpu: bool
) -> tuple[int, int]:
    """Most bytes alive beside the weights in one evaluation of a batch, and its operations."""
    meter = DispatchMeter([*network.parameters(), *network.buffers()])
    with torch.device("meta"), fused_attention(meter, on_cpu), meter:
        x = torch.empty(batch, *shape)
        conditioning = any_conditioning(network, batch, tokens, [shape] * references)
        policy = network.policy(x, torch.empty(batch), conditioning)
        # The rollout is a single kernel, which takes what the policy holds.
        policy.with_temperature(torch.ones(batch))
    return meter.peak, meter.operations


@cache  # the same for every precision of the network
def _autoencoder_bytes(
    name: str, precision: Precision, shape: Shape, batch: int
) -> tuple[int | None, int | None, int | None]:
    """Bytes of an autoencoder's weights, and the most that decoding takes besides, whole and in tiles; or None."""
    try:
        autoencoder = autoencoder_on_meta(name, precision)
    except LookupError:
        return None, None, None
    if autoencoder is None:
        return 0, 0, 0
    height, width = autoencoder.image_size(*shape[1:])
    # As `KLAutoencoder.decode` splits a batch.
    together = min(batch, max(1, PIXELS_DECODED // (height * width)))
    whole = _decoding(autoencoder, together, shape, tiled=False)
    tiled = whole if height * width <= PIXELS_DECODED else _decoding(autoencoder, 1, shape, tiled=True)
    return held_bytes(autoencoder._model), whole, tiled


@torch.no_grad()
def _decoding(autoencoder: KLAutoencoder, batch: int, shape: Shape, tiled: bool) -> int:
    """Most bytes alive beside the weights while a batch of latents is decoded."""
    model = autoencoder._model
    meter = DispatchMeter([*model.parameters(), *model.buffers()])
    autoencoder._tiling = tiled
    with fused_attention(meter), meter:
        autoencoder._whole_or_tiled(torch.empty(batch, *shape, device="meta", dtype=model.dtype))
    return meter.peak
