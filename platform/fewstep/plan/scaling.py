"""How long an optimizer step takes on more and more GPUs: a plan's operations, and the messages between the GPUs.

A step is followed message by message, as the trainer's FSDP sends them (`fewstep.train.parallel`): every block's
weights are gathered before it computes, in the student's forward, in the teacher's and in the student's backward, and
its gradients are reduced after its backward. The weights outside of blocks are gathered once per micro-batch. Messages
go one after the other while GPUs compute: one block ahead, which is the memory that a plan counts as gathered.

Left out: the optimizer's update and the norm of the gradients (some milliseconds), the host's own work, and that the
network between nodes may be shared with others.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from itertools import chain
from typing import Literal, get_args

from torch import nn

from fewstep.errors import UserError
from fewstep.models.network import PolicyNetwork
from fewstep.models.planned import lower_on_meta
from fewstep.models.precision import LIBRARIES, held_bytes
from fewstep.plan.memory import standing_memory
from fewstep.plan.training import Machine, Pass, latent_shape, measure, new_student, planned_references
from fewstep.train.passes import passes_of
from fewstep.train.recipe import DistillRecipe
from fewstep.train.share import BatchShare

GPUS = (8, 16, 32, 64, 128, 256)
"""Numbers of GPUs that are planned where none are named."""

Layout = Literal["fsdp", "hybrid", "ddp"]
"""How GPUs hold the weights. fsdp: each a share of all. hybrid: each a share of its node's copy. ddp: each all of them.
The trainer has fsdp and ddp (`train.parallel`); hybrid is planned only, to tell what it would gain."""

LAYOUTS: tuple[Layout, ...] = get_args(Layout)


@dataclass(frozen=True)
class Links:
    """What connects the GPUs: NVLink inside a node, InfiniBand between nodes, with an adapter for each GPU."""

    node: int = 8
    """GPUs of a node."""
    nvlink_gb: float = 450.0
    """What a GPU sends and receives at a time inside its node, 10⁹ bytes per second each; by default an H100's."""
    infiniband_gb: float = 50.0
    """The same between nodes, of each GPU's adapter; by default 400 Gbit/s."""
    utilisation: float = 0.8
    """Share of these rates that messages reach."""
    memory_tb: float = 3.35
    """Of each GPU's memory, 10¹² bytes per second: what was received is copied to its place there."""
    nvlink_hop: float = 3.4e-6
    """Seconds from one GPU to the next in a node, whatever the size; the defaults of both are NCCL's own estimates."""
    infiniband_hop: float = 14e-6
    """Seconds from a GPU to one in the next node."""

    def ring(self, size: int, nodes: int, per_node: int) -> float:
        """Seconds in which every GPU of a ring receives all parts of a message; of a reduction, the same.

        Each GPU receives all but its own part, most of it from its neighbour in the node. Every node receives what
        other nodes hold through all its adapters at once. Both go on at the same time, and the slower one counts.

        Args:
            size: bytes of all parts together.
            nodes: how many take part.
            per_node: GPUs of each that take part.
        """
        gpus = nodes * per_node
        if gpus == 1 or size == 0:
            return 0.0
        inside = size * (1 - 1 / gpus) / (self.nvlink_gb * 1e9) if per_node > 1 else 0.0
        across = size * (1 - 1 / nodes) / (per_node * self.infiniband_gb * 1e9)
        hops = (nodes - 1) * self.infiniband_hop + (gpus - nodes) * self.nvlink_hop
        return max(inside, across) / self.utilisation + hops

    def messages(self, layout: Layout, gpus: int) -> Messages:
        """What the messages of a layout take on so many GPUs; a lone one has none.

        Raises:
            UserError: they are more than a node and don't fill their nodes.
        """
        if gpus > self.node and gpus % self.node:
            raise UserError(f"{gpus} GPUs don't fill nodes of {self.node}: give a multiple.")
        if gpus == 1:
            return Messages(nothing, nothing, nothing, nothing)
        nodes = -(-gpus // self.node)
        per_node = gpus // nodes

        def everywhere(size: int) -> float:
            return self.ring(size, nodes, per_node)

        if layout == "fsdp":
            return Messages(everywhere, everywhere, nothing, self.copy)
        if layout == "ddp":
            return Messages(nothing, nothing, lambda size: 2 * everywhere(size), nothing)

        def reduce(size: int) -> float:
            # In the node first, then each GPU's share of it with the same share in the other nodes.
            return self.ring(size, 1, per_node) + 2 * self.ring(size // per_node, nodes, 1)

        return Messages(lambda size: self.ring(size, 1, per_node), reduce, nothing, self.copy)

    def copy(self, size: int) -> float:
        """Seconds in which a GPU copies so many bytes: reads and writes them."""
        return 2 * size / (self.memory_tb * 1e12)


@dataclass(frozen=True)
class Messages:
    """Seconds of each kind of message, by its bytes."""

    gather: Callable[[int], float]
    """A group's weights, before it computes."""
    reduce: Callable[[int], float]
    """A group's gradients, after its backward."""
    average: Callable[[int], float]
    """All gradients, once per step."""
    copy: Callable[[int], float]
    """The GPU's own work for a message of FSDP, during which it computes nothing else: weights are copied out of the
    buffer that received them, and gradients into the one that is sent."""


def nothing(_: int) -> float:
    """The time of a kind of message that a layout does not have."""
    return 0.0


@dataclass(frozen=True)
class Group:
    """The weights that FSDP gathers in one message: a block, or all that is outside of blocks."""

    gathered: int
    """Bytes of its weights, as they are held."""
    reduced: int
    """Bytes of the gradients of those that are trained, float32."""
    share: float
    """Of the operations of a pass through its network, taken to be as its share of the weights."""


@dataclass(frozen=True)
class Workload:
    """What a step of a recipe computes for one sample, and what GPUs exchange for it."""

    outside: Group
    """What belongs to no block."""
    student: tuple[Group, ...]
    """Blocks in the order of the forward pass."""
    teacher: tuple[Group, ...]
    """The same ones, but for a student that is a full copy."""
    forward: int
    """Operations of the student's forward, of one sample and segment."""
    queries: int
    """Of all teacher's queries, which are one pass of a larger batch."""
    backward: int
    """Of the student's backward, with what it computes again."""
    segments: float
    """Of a micro-batch: the student's evaluations without data, and otherwise one."""

    @property
    def operations(self) -> int:
        """Of one sample and segment."""
        return self.forward + self.queries + self.backward

    @property
    def reduced(self) -> int:
        """Bytes of all gradients."""
        return sum(group.reduced for group in (self.outside, *self.student))

    @classmethod
    def of(cls, network: PolicyNetwork, recipe: DistillRecipe, passed: Pass, samples: int) -> Workload:
        """What a recipe's step computes and exchanges.

        Args:
            network: of the recipe, on the meta device, with frozen weights as they are held.
            recipe: what is trained.
            passed: what `measure` says of a micro-batch.
            samples: of that micro-batch.
        """
        blocks = [network.family.blocks(part) for part in network.transformers()]
        everything = _numbers(network) / len(blocks)
        student, *other = ([_group(block, _numbers(block) / everything) for block in part] for part in blocks)
        inside = [*student, *chain(*other)]
        trained = sum(p.nbytes for p in network.trainable().values())
        outside = Group(
            network.nbytes - sum(group.gathered for group in inside),
            trained - sum(group.reduced for group in inside),
            1 - sum(group.share for group in student),
        )
        return cls(
            outside, tuple(student), tuple(other[0] if other else student),
            passed.forward // samples, passed.teacher // samples, (passed.student - passed.forward) // samples,
            passes_of(recipe).student,
        )  # fmt: skip


def _group(block: nn.Module, share: float) -> Group:
    return Group(held_bytes(block), sum(p.nbytes for p in block.parameters() if p.requires_grad), share)


def _numbers(module: nn.Module) -> int:
    return sum(p.numel() for p in module.parameters())


@dataclass(frozen=True)
class Stage:
    """A part of a micro-batch: what is gathered, computed, and reduced, in seconds each."""

    gather: float
    compute: float
    reduce: float = 0.0


def stages(work: Workload, samples: int, rate: float, messages: Messages) -> list[Stage]:
    """The parts of a micro-batch of one segment, in order.

    Args:
        work: what is computed for each sample.
        samples: of the micro-batch.
        rate: operations that a GPU does per second.
        messages: between the GPUs.
    """
    forward, queries, backward = (
        operations * samples / rate for operations in (work.forward, work.queries, work.backward)
    )
    outside = work.outside

    def forward_stage(group: Group, operations: float) -> Stage:
        return Stage(
            messages.gather(group.gathered), messages.copy(group.gathered) + operations * group.share
        )

    def backward_stage(group: Group) -> Stage:
        again = forward_stage(group, backward)
        return Stage(
            again.gather, again.compute + messages.copy(group.reduced), messages.reduce(group.reduced)
        )

    return [
        *(forward_stage(group, forward) for group in (outside, *work.student)),
        # What is outside of blocks stays gathered from the student's forward until its backward is done.
        Stage(0.0, queries * outside.share),
        *(forward_stage(group, queries) for group in work.teacher),
        *(backward_stage(group) for group in reversed(work.student)),
        Stage(
            0.0, messages.copy(outside.reduced) + backward * outside.share, messages.reduce(outside.reduced)
        ),
    ]


def elapsed(parts: Iterable[Stage], overlap: bool = True) -> float:
    """Seconds that the parts of a micro-batch take.

    Args:
        parts: in order.
        overlap: whether messages go while a GPU computes; otherwise, as on CPUs, everything waits for everything.
    """
    if not overlap:
        return sum(part.gather + part.compute + part.reduce for part in parts)
    sent = begun = computed = reduce = 0.0
    for part in parts:
        if part.gather:  # one block ahead: it sets out when the block before begins to compute
            sent = max(sent, begun) + part.gather
        begun = max(computed, sent) if part.gather else computed
        if reduce:  # of the block before, behind the weights that set out earlier
            sent = max(sent, computed) + reduce
        computed, reduce = begun + part.compute, part.reduce
    return max(sent, computed) + reduce


@dataclass(frozen=True)
class ScaledStep:
    """An optimizer step on some number of GPUs."""

    gpus: int
    """How many."""
    batch: int
    """Samples of all GPUs together."""
    micro_batches: int
    """Of each GPU."""
    samples: int
    """Of the largest micro-batch."""
    computing: float
    """Seconds that a GPU computes if all have equal shares of the batch."""
    seconds: dict[Layout, float]
    """That the step takes in each layout."""
    memory: dict[Layout, int]
    """Bytes on each GPU in each layout."""

    def share(self, layout: Layout) -> float:
        """Share of the step in which GPUs compute; the rest they wait for messages, copy, or have unequal shares."""
        return self.computing / self.seconds[layout]


def step_seconds(
    work: Workload, samples: Sequence[int], rate: float, messages: Messages, overlap: bool = True
) -> float:
    """Seconds of an optimizer step.

    Args:
        work: what it computes.
        samples: of each of a GPU's micro-batches.
        rate: operations that a GPU does per second.
        messages: between the GPUs.
        overlap: as for `elapsed`.
    """
    times = {count: elapsed(stages(work, count, rate, messages), overlap) for count in set(samples)}
    return work.segments * sum(times[count] for count in samples) + messages.average(work.reduced)


class Scaling:
    """A recipe's steps on any number of GPUs of a kind.

    Args:
        recipe: what is trained; its micro-batches are kept, or smaller ones where a GPU's share is less.
        machine: the kind of GPU; how many of them does not matter.
        side, tokens, references: as for `make_plan`.

    Attributes:
        work: what a step computes and exchanges.

    Raises:
        UserError: the teacher's architecture can't be found, FSDP would have to shard quantised weights, or the
            recipe's objective is not π-ID.
    """

    def __init__(
        self,
        recipe: DistillRecipe,
        machine: Machine,
        *,
        side: int | None = None,
        tokens: int = 256,
        references: int | None = None,
    ) -> None:
        if recipe.objective != "imitation":
            raise UserError(
                f"--scaling knows the steps of objective=imitation alone, not of {recipe.objective}: leave --scaling "
                "out, and --dry-run counts its operations and memory on one node."
            )
        self.recipe, self.machine = recipe, machine
        network = self._network = new_student(recipe)
        shape = latent_shape(recipe, network, side)
        images = planned_references(recipe, network, references)
        lower_on_meta(network, recipe.train.precision)
        if recipe.train.activation_checkpointing:
            network.transformer.enable_gradient_checkpointing()
        self._measured = functools.cache(
            lambda samples: measure(network, recipe, samples, shape, tokens, images)
        )
        self.work = Workload.of(network, recipe, self._measured(recipe.micro_batch), recipe.micro_batch)

    @property
    def layouts(self) -> tuple[Layout, ...]:
        """Those that are possible: FSDP does not shard quantised weights."""
        return ("ddp",) if self.recipe.train.precision in LIBRARIES else LAYOUTS

    def step(self, gpus: int, links: Links, batch: int | None = None) -> ScaledStep:
        """The step on so many GPUs.

        Args:
            gpus: how many.
            links: between them.
            batch: samples of all GPUs together; None for those of the recipe.

        Raises:
            UserError: the batch can't be spread over them.
        """
        recipe, machine = self.recipe, self.machine
        batch = batch or recipe.data.batch_size
        # The last GPU's share: where a batch can't be spread evenly, the last have the larger ones.
        samples = [len(part) for part in BatchShare.of(batch, recipe.micro_batch, gpus - 1, gpus).parts]
        rate = machine.tflops * 1e12 * machine.utilisation
        return ScaledStep(
            gpus, batch, len(samples), max(samples),
            computing=batch / gpus * self.work.segments * self.work.operations / rate,
            seconds={
                layout: step_seconds(self.work, samples, rate, links.messages(layout, gpus))
                for layout in self.layouts
            },
            memory={layout: self._memory(layout, gpus, links, max(samples)) for layout in self.layouts},
        )  # fmt: skip

    def _memory(self, layout: Layout, gpus: int, links: Links, samples: int) -> int:
        train = self.recipe.train.model_copy(update={"parallel": "ddp" if layout == "ddp" else "fsdp"})
        recipe = self.recipe.model_copy(update={"train": train})
        sharing = min(gpus, links.node) if layout == "hybrid" else gpus
        return standing_memory(self._network, recipe, sharing).total + self._measured(samples).activations


def scaling_table(scaling: Scaling, links: Links, numbers: Sequence[int] = GPUS) -> str:
    """Step time, share of computing and memory by number of GPUs, as plain text: for one batch, and for one per GPU.

    Args:
        scaling: of a recipe.
        links: between its GPUs.
        numbers: of GPUs.

    Raises:
        UserError: the recipe's batch can't be spread over them.
    """
    recipe, machine = scaling.recipe, scaling.machine
    each = recipe.data.batch_size // recipe.train.fewest_workers
    head = f"{'GPUs':>5}{'batch':>8}{'on each':>10}" + "".join(
        f"{layout + ' s':>11}{'computing':>11}{'GB':>8}" for layout in scaling.layouts
    )
    return "\n".join(
        [
            f"{recipe.name} on GPUs of {machine.tflops:g} TFLOPS at {machine.utilisation:.0%}, {links.node} in a node; "
            f"NVLink {links.nvlink_gb:g} GB/s,",
            f"InfiniBand {links.infiniband_gb:g} GB/s for each GPU, of which messages reach {links.utilisation:.0%}",
            "",
            f"batch {recipe.data.batch_size} of all GPUs together",
            head,
            *(_row(scaling.step(gpus, links)) for gpus in numbers),
            "",
            f"{each} samples on each GPU",
            head,
            *(_row(scaling.step(gpus, links, each * gpus)) for gpus in numbers),
            "",
            "fsdp: weights shared by all GPUs; hybrid: by those of a node (planned only); ddp: whole on each "
            "(train.parallel)",
            "computing: share of the step in which GPUs compute; the rest they copy, or wait for messages or larger "
            "shares",
        ]
    )


def _row(step: ScaledStep) -> str:
    columns = (
        f"{step.seconds[layout]:>11.3f}{step.share(layout):>11.1%}{step.memory[layout] / 1e9:>8.1f}"
        for layout in step.seconds
    )
    return f"{step.gpus:>5}{step.batch:>8}{f'{step.micro_batches} x {step.samples}':>10}" + "".join(columns)
