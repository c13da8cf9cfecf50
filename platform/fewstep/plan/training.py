"""Planning a distillation: what it will cost, measured on one micro-batch that takes no memory.

The network is built at full size on the meta device, whose tensors have shapes and no data, and goes through one
micro-batch there: student forward, teacher forward, student backward. A meter follows the life of every tensor and
counts operations as they are dispatched, so the estimate comes from the training step itself and not from formulas.

What it leaves out: workspaces of kernels, fragments of the allocator, and the CUDA context (about 1 GB). Leave room.
Nor does it count the host's memory, where each worker needs room for its share of a checkpoint (its own weights, their
EMA, and the optimizer's averages) while that is being written, and for the EMA itself with `optimizer.ema_offload`.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from fewstep.config import Shape
from fewstep.data.schema import DatasetInfo
from fewstep.errors import UserError
from fewstep.models.architecture import build_on_meta
from fewstep.models.conditioning import ClassConditioning, Conditioning, TextConditioning
from fewstep.models.family_code import use_module
from fewstep.models.network import PolicyNetwork
from fewstep.models.planned import lower_on_meta
from fewstep.models.teacher import check_guidance, read_card
from fewstep.plan.memory import Memory, standing_memory
from fewstep.plan.meter import DispatchMeter, fused_attention
from fewstep.train.parallel import check_sharding
from fewstep.train.passes import passes_of
from fewstep.train.recipe import DistillRecipe

FULL_SIZE = 128
"""Latent cells per side of a one-megapixel image, where neither data nor a card says otherwise."""

LABEL_BYTES = 4
"""Of a class in a shard (int32)."""


@dataclass(frozen=True)
class Machine:
    """What the run is planned for."""

    gpus: int
    """How many GPUs."""
    memory_gb: float
    """Memory of each, in 10⁹ bytes."""
    tflops: float = 989.0
    """Peak rate of each in the compute precision, 10¹² operations per second; the default is an H100's in bfloat16."""
    utilisation: float = 0.4
    """Share of the peak rate that training reaches."""


@dataclass(frozen=True)
class Pass:
    """What one micro-batch costs on one GPU."""

    activations: int
    """Largest number of bytes alive at a time beside weights and their gradients."""
    student: int
    """Operations of the student's forward and backward (a multiply-add is two)."""
    forward: int
    """Those of its forward alone."""
    teacher: int
    """Operations of those of the teacher's queries that are one batch."""


@dataclass(frozen=True)
class Plan:
    """What a run costs."""

    recipe: DistillRecipe
    """What is trained."""
    machine: Machine
    """What it is trained on."""
    shape: Shape
    """(C, H, W) of the latents."""
    tokens: int
    """Token states per caption."""
    references: int
    """Reference images per caption."""
    micro_batch: int
    """Samples of a GPU's largest micro-batch."""
    parameters: int
    """Of the frozen teacher."""
    trained: int
    """Parameters of the student's own."""
    memory: Memory
    """As the recipe says."""
    otherwise: Memory
    """With the other choice of `train.activation_checkpointing`."""
    student_operations: int
    """Of the student, and of a fake score, per optimizer step, all GPUs together."""
    teacher_operations: int
    """Of the teacher per optimizer step, all GPUs together."""
    captions: int
    """In the dataset; where it is not prepared, as many as the run takes."""
    cache: int
    """Bytes of the dataset's shards: token states or classes, and latents where training needs them."""

    @property
    def operations(self) -> int:
        """Of an optimizer step, all GPUs together."""
        return self.student_operations + self.teacher_operations

    @property
    def hours(self) -> float:
        """How long all steps take at the machine's rate."""
        rate = self.machine.gpus * self.machine.tflops * 1e12 * self.machine.utilisation
        return self.recipe.train.steps * self.operations / rate / 3600


def make_plan(
    recipe: DistillRecipe,
    machine: Machine,
    *,
    side: int | None = None,
    tokens: int = 256,
    references: int | None = None,
) -> Plan:
    """Plan a run.

    Args:
        recipe: what to train; its batch is spread over the machine's GPUs, whatever `train.workers` says.
        machine: what to train it on.
        side: latent cells per side; by default those of the prepared data or the teacher's card, or 128.
        tokens: token states per caption.
        references: reference images per caption; by default those of the prepared data, or none.

    Raises:
        UserError: the teacher's architecture can't be found, the batch can't be spread, or FSDP would have to shard
            quantised weights.
    """
    train = recipe.train
    check_sharding(train, machine.gpus)
    alone = train.model_copy(update={"workers": machine.gpus})
    micro = recipe.model_copy(update={"train": alone}).share(0, machine.gpus).largest
    network = new_student(recipe)
    shape = latent_shape(recipe, network, side)
    references = planned_references(recipe, network, references)
    parameters = count_parameters(network)
    trained = sum(p.numel() for p in network.trainable().values())
    lower_on_meta(network, train.precision)
    standing = standing_memory(network, recipe, machine.gpus)
    if recipe.objective == "dmd2":  # its fake score is a copy of the teacher that is trained like the student
        standing = standing.twice()

    chosen = other = measure(network, recipe, micro, shape, tokens, references)
    try:
        network.transformer.enable_gradient_checkpointing()  # second, because it can't be switched off again
        thrifty = measure(network, recipe, micro, shape, tokens, references)
        chosen, other = (thrifty, chosen) if train.activation_checkpointing else (chosen, thrifty)
    except UserError:  # a network of one's own may have none
        if train.activation_checkpointing:
            raise

    passes, times = passes_of(recipe), recipe.data.batch_size / micro
    own = passes.with_gradient * chosen.student + passes.forward * chosen.forward
    taught = passes.teacher / passes.teacher_at_once * chosen.teacher
    captions = _captions(recipe)
    latents = references + (0 if recipe.data_free else 1)
    per_caption = _condition_bytes(network, tokens) + latents * 4 * math.prod(shape)
    return Plan(
        recipe, machine, shape, tokens, references, micro,
        parameters=parameters,
        trained=trained,
        memory=replace(standing, activations=chosen.activations),
        otherwise=replace(standing, activations=other.activations),
        student_operations=int(own * times),
        teacher_operations=int(taught * times),
        captions=captions,
        cache=captions * per_caption,
    )  # fmt: skip


def new_student(recipe: DistillRecipe) -> PolicyNetwork:
    """The recipe's teacher with its student at full size, on the meta device: it takes no memory.

    Raises:
        UserError: its architecture can't be found, or the recipe's guidance does not suit it.
    """
    teacher, student = recipe.teacher, recipe.student
    if teacher.module is not None:
        use_module(teacher.module)
    transformer, family = build_on_meta(teacher.path, teacher.family, teacher.embedded_guidance_scale)
    check_guidance(family, transformer, teacher.guidance_scale, "teacher.guidance_scale")
    with torch.device("meta"):
        return PolicyNetwork(
            transformer, family, student.policy, student.lora, recipe.train.seed, student.full
        )


def count_parameters(network: PolicyNetwork) -> int:
    """Number of parameters of the frozen teacher."""
    # Where the student is a full copy, the teacher stands beside it; otherwise they share the base.
    teacher = network.transformer if network.teacher is None else network.teacher
    return sum(p.numel() for p in teacher.parameters() if not p.requires_grad)


def measure(
    network: PolicyNetwork, recipe: DistillRecipe, batch: int, shape: Shape, tokens: int, references: int = 0
) -> Pass:
    """Run one micro-batch on the meta device, and say what it costs.

    Args:
        network: on the meta device.
        recipe: says how often the teacher is asked, and whether of GPUs.
        batch: samples.
        shape: (C, H, W) of their latents.
        tokens: token states of each.
        references: reference images of each, of the same shape.
    """
    queries = passes_of(recipe).teacher_at_once
    # FSDP reduces a block's gradients as soon as they are there, and frees them.
    hooks = [p.register_post_accumulate_grad_hook(_drop_gradient) for p in network.trainable().values()]
    meter = DispatchMeter([*network.parameters(), *network.buffers()])
    try:
        with torch.device("meta"), fused_attention(meter, on_cpu=not recipe.train.gpu), meter:
            x, t = torch.empty(batch, *shape), torch.empty(batch)
            conditioning = any_conditioning(network, batch, tokens, [shape] * references)
            packed = network(x, t, conditioning, student=True)
            predicted = network.head.parameters_of(packed, network._unpack(packed, x))
            student = meter.operations
            # While the student's graph is alive, as in training, where the teacher is asked at the states it visits.
            network.velocity(x.repeat(queries, 1, 1, 1), t.repeat(queries), conditioning.repeat(queries))
            teacher = meter.operations - student
            loss = torch.stack([value.float().mean() for value in predicted.values()]).sum()
            del packed, predicted  # nothing but the graph may hold them during backward, as in training
            loss.backward()
    finally:
        for hook in hooks:
            hook.remove()
    return Pass(meter.peak, meter.operations - teacher, student, teacher)


def any_conditioning(
    network: PolicyNetwork, batch: int, tokens: int, references: Sequence[Shape] = ()
) -> Conditioning:
    """Captions or classes as the family takes them, on the default device.

    Args:
        network: whose family it is.
        batch: samples.
        tokens: token states of each caption.
        references: (C, H, W) of each caption's reference images, as latents.
    """
    family, transformer = network.family, network.transformer
    if family.classes(transformer) is not None:
        return ClassConditioning(torch.zeros(batch, dtype=torch.long))
    states = torch.empty(batch, tokens, family.condition_width(transformer))
    pooled = family.pooled_width(transformer)
    vectors = None if pooled is None else torch.empty(batch, pooled)
    images = tuple(torch.empty(batch, *shape) for shape in references)
    return TextConditioning(states, torch.ones(batch, tokens, dtype=torch.bool), vectors, images)


def _condition_bytes(network: PolicyNetwork, tokens: int) -> int:
    """Bytes of one caption's (or class's) condition in a shard, which keeps token states in float16."""
    if network.family.classes(network.transformer) is not None:
        return LABEL_BYTES
    return 2 * tokens * network.family.condition_width(network.transformer)


def _drop_gradient(parameter: Tensor) -> None:
    parameter.grad = None


def latent_shape(recipe: DistillRecipe, network: PolicyNetwork, side: int | None) -> Shape:
    """Shape (C, H, W) of the latents that a recipe is planned for.

    Args:
        recipe: says which data and teacher.
        network: on the meta device.
        side: latent cells per side; None for those of the prepared data or of the teacher's card, or `FULL_SIZE`.

    Raises:
        UserError: the network can't take that side.
    """
    if side is None:
        if (data := _dataset(recipe)) is not None:
            return next(iter(data.buckets("train")))
        if (card := read_card(recipe.teacher.path)) is not None:
            return card.latent_shape
    return square(network, side or FULL_SIZE)


def square(network: PolicyNetwork, side: int) -> Shape:
    """Shape (C, side, side) of a network's latents; of a video, (C, T·side, side) of all its frames.

    Raises:
        UserError: the side can't be cut into its patches, or is larger than it has positions for.
    """
    if side % (patch := network.family.patch(network.transformer)):
        raise UserError(
            f"--latent-size {side} can't be cut into the network's {patch}-cell patches: give a multiple."
        )
    if (most := network.family.largest_side(network.transformer)) is not None and side > most:
        raise UserError(
            f"--latent-size {side} is more than the network's {most} positions: give at most {most}."
        )
    return network.channels, network.family.frames * side, side


def planned_references(recipe: DistillRecipe, network: PolicyNetwork, asked: int | None) -> int:
    """Reference images of each row of the recipe's data; where it is not prepared yet, as many as asked for, or none.

    Raises:
        UserError: as `agreed_references`.
    """
    data = _dataset(recipe)
    return agreed_references(network, None if data is None else data.encoding.references, asked)


def agreed_references(network: PolicyNetwork, known: int | None, asked: int | None) -> int:
    """How many reference images a plan is for.

    Args:
        network: that takes them.
        known: of the data or the student; None where there is none yet.
        asked: by an option.

    Raises:
        UserError: the two differ, or the network takes none.
    """
    if None not in (known, asked) and known != asked:
        raise UserError(f"--references {asked}: the data or the student has {known}: leave the option out.")
    number = (asked if known is None else known) or 0
    if number and not network.family.takes_references:
        raise UserError(
            f"--references {number}: this network takes none (qwen_image and flux2 do): leave it out."
        )
    return number


def _captions(recipe: DistillRecipe) -> int:
    data = _dataset(recipe)
    return recipe.train.steps * recipe.data.batch_size if data is None else data.rows("train")


def _dataset(recipe: DistillRecipe) -> DatasetInfo | None:
    """The prepared data; a plan needs none."""
    try:
        return DatasetInfo.open(recipe.data.path)
    except UserError:
        return None
