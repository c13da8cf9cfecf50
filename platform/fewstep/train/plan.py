"""What a distillation will cost, before it starts: parameters, memory, operations, storage, hours.

The network is built at full size on the meta device, whose tensors have shapes and no data, and goes through one
micro-batch there: student forward, teacher forward, student backward. A meter follows the life of every tensor
and counts operations as they are dispatched, so the estimate is the training step itself, without arithmetic.

What it leaves out: kernels' own workspaces, the allocator's fragments, and the CUDA context (about 1 GB). Leave room.
"""

from __future__ import annotations

import json
import math
import statistics
import weakref
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from torch.utils.flop_counter import flop_registry
from torch.utils.weak import WeakIdKeyDictionary

from fewstep.assets import asset
from fewstep.data.schema import DatasetInfo
from fewstep.errors import UserError
from fewstep.models.conditioning import TextConditioning
from fewstep.models.family_code import use_module
from fewstep.models.network import PolicyNetwork
from fewstep.models.registry import get_family
from fewstep.models.teacher import check_guidance, locate, read_card, told_guidance
from fewstep.train.optimizers import muon_parameters
from fewstep.train.recipe import DistillRecipe, TrainSection

GB = 1e9
NETWORKS = {
    "Qwen/Qwen-Image": "qwen_image",
    "black-forest-labs/FLUX.1-dev": "flux_dev",
    "facebook/DiT-XL-2-256": "dit_xl_2",
}
"""Hub ids whose architecture is known without a network connection → file in `assets/networks`."""

FULL_SIZE = 128
"""Latent cells per side of a one-megapixel image, where neither data nor a card says otherwise."""

ADAM_BYTES = 8
"""Two float32 averages per parameter that Adam trains (Muon keeps one)."""

CHARACTERS_PER_TOKEN = 4
"""Of English text, about."""

FLASH_BACKWARD = 2.5
"""Operations of attention's backward per operation of its forward: it recomputes the scores (five products for two)."""


@dataclass(frozen=True)
class Machine:
    """What the run is planned for."""

    gpus: int
    memory_gb: float
    """Of each, in 10⁹ bytes."""
    tflops: float = 989.0
    """Peak rate of each in the compute precision, 10¹² operations per second; the default is an H100's in bfloat16."""
    utilisation: float = 0.4
    """Share of the peak rate that training reaches."""


@dataclass(frozen=True)
class Memory:
    """Bytes on one GPU, by part."""

    weights: int
    """This GPU's share of all weights, float32."""
    gathered: int
    """What FSDP has gathered at a time: two blocks (one computes, one arrives) and what belongs to no block."""
    gradients: int
    """This GPU's share, float32, and those of one block before they are reduced."""
    optimizer: int
    average: int
    activations: int
    """The most that is alive at a time besides, in one micro-batch."""

    @property
    def total(self) -> int:
        return sum(vars(self).values())


@dataclass(frozen=True)
class Pass:
    """One micro-batch on one GPU."""

    activations: int
    """Largest number of bytes alive at a time beside weights and their gradients."""
    student: int
    """Operations of the student's forward and backward (a multiply-add is two)."""
    teacher: int
    """Operations of the teacher's queries."""


@dataclass(frozen=True)
class Plan:
    """What a run costs."""

    recipe: DistillRecipe
    machine: Machine
    shape: tuple[int, int, int]
    """(C, H, W) of the latents."""
    tokens: int
    """Token states per caption."""
    parameters: int
    trained: int
    memory: Memory
    """As the recipe says."""
    otherwise: Memory
    """With the other choice of `train.activation_checkpointing`."""
    student: int
    """Operations per optimizer step, all GPUs together."""
    teacher: int
    captions: int
    """In the dataset; where it is not prepared, as many as the run draws."""
    cache: int
    """Bytes of the dataset's shards: token states, and latents where training needs them."""

    @property
    def hours(self) -> float:
        rate = self.machine.gpus * self.machine.tflops * 1e12 * self.machine.utilisation
        return self.recipe.train.steps * (self.student + self.teacher) / rate / 3600

    def table(self) -> str:
        """For the terminal."""
        recipe, train, machine = self.recipe, self.recipe.train, self.machine
        micro = recipe.data.batch_size // (machine.gpus * train.accumulate)
        plain, other = ("with", "without") if train.activation_checkpointing else ("without", "with")
        rows = [
            f"  {name:<20}{getattr(self.memory, name) / GB:>8.2f} GB{getattr(self.otherwise, name) / GB:>16.2f} GB"
            for name in (*vars(self.memory), "total")
        ]
        total = self.memory.total / GB
        verdict = (
            "fits"
            if total <= machine.memory_gb
            else f"does not fit {machine.memory_gb:g} GB: {self._remedy(micro)}"
        )
        size = "x".join(map(str, self.shape))
        seconds = 3600 * self.hours / train.steps
        return "\n".join(
            [
                f"{recipe.name} on {machine.gpus} x {machine.memory_gb:g} GB: {micro} samples per micro-batch, "
                f"{train.accumulate} of them on each GPU per step, latents {size}, {self.tokens} tokens",
                "",
                f"parameters            {_amount(self.parameters)}, of the student's own {_amount(self.trained)}",
                f"memory per GPU        {plain} checkpointing   {other} it",
                *rows,
                f"                      {verdict}",
                f"operations per step   {(self.student + self.teacher) / 1e15:.3g} P "
                f"(student {self.student / 1e15:.3g}, teacher {self.teacher / 1e15:.3g})",
                f"storage               {_gigabytes(self.cache)} of shards for {self.captions:,} captions; streamed "
                f"into training {_gigabytes(_text_bytes(self.captions, self.tokens))} of text",
                f"time                  {self.hours:.3g} h for {train.steps:,} steps of {seconds:.3g} s, at "
                f"{machine.utilisation:.0%} of {machine.tflops:g} TFLOPS per GPU",
            ]
        )

    def _remedy(self, micro: int) -> str:
        if (
            not self.recipe.train.activation_checkpointing
            and self.otherwise.total <= self.machine.memory_gb * GB
        ):
            return "set train.activation_checkpointing=true"
        if micro > 1:
            return "raise train.accumulate"
        return "use more GPUs" if self.recipe.train.parallel == "fsdp" else "set train.parallel=fsdp"


def make_plan(recipe: DistillRecipe, machine: Machine, *, side: int | None = None, tokens: int = 256) -> Plan:
    """Plan a run.

    Args:
        recipe: what to train; its batch is spread over the machine's GPUs, whatever `train.workers` says.
        machine: what to train it on.
        side: latent cells per side; by default those of the prepared data or the teacher's card, or 128.
        tokens: token states per caption.

    Raises:
        UserError: the teacher's architecture can't be found, or the batch can't be spread.
    """
    train = recipe.train
    if recipe.data.batch_size % (machine.gpus * train.accumulate):
        raise UserError(
            f"data.batch_size={recipe.data.batch_size} must be a multiple of GPUs × train.accumulate = "
            f"{machine.gpus * train.accumulate}."
        )
    micro = recipe.data.batch_size // (machine.gpus * train.accumulate)
    network = build_on_meta(recipe)
    shape = _latent_shape(recipe, network, side)
    parameters = count_parameters(network)
    trained = sum(p.numel() for p in network.trainable().values())
    standing = _standing(network, recipe, machine.gpus)

    if _computes_bfloat16(train):
        network.to(torch.bfloat16)
    chosen = other = measure(network, recipe, micro, shape, tokens)
    try:
        network.transformer.enable_gradient_checkpointing()  # there is no way back: so second
        thrifty = measure(network, recipe, micro, shape, tokens)
        chosen, other = (thrifty, chosen) if train.activation_checkpointing else (chosen, thrifty)
    except UserError:  # a network of one's own may have none
        if train.activation_checkpointing:
            raise

    counts = (recipe.imitation.nfe, *recipe.imitation.more_nfes)
    segments = statistics.fmean(counts) if recipe.imitation.data_free else 1
    times = train.accumulate * machine.gpus * segments
    width = network.family.condition_width(network.transformer)
    captions = _captions(recipe)
    per_caption = 2 * tokens * width + (0 if recipe.imitation.data_free else 4 * math.prod(shape))
    return Plan(
        recipe, machine, shape, tokens,
        parameters=parameters,
        trained=trained,
        memory=replace(standing, activations=chosen.activations),
        otherwise=replace(standing, activations=other.activations),
        student=chosen.student * times,
        teacher=chosen.teacher * times,
        captions=captions,
        cache=captions * per_caption,
    )  # fmt: skip


def build_on_meta(recipe: DistillRecipe) -> PolicyNetwork:
    """The recipe's teacher with its student at full size, without memory.

    Raises:
        UserError: its architecture can't be found.
    """
    if recipe.teacher.module is not None:
        use_module(recipe.teacher.module)
    family = get_family(recipe.teacher.family)
    config = network_config(recipe.teacher.path)
    with torch.device("meta"):
        transformer = family.build(config)
        family = told_guidance(family, transformer, recipe.teacher.embedded_guidance, recipe.teacher.path)
        check_guidance(family, transformer, recipe.teacher.guidance, "teacher.guidance")
        student = recipe.student
        return PolicyNetwork(
            transformer, family, student.policy, student.lora, recipe.train.seed, student.full
        )


def network_config(path: str) -> dict[str, Any]:
    """Keyword arguments of a teacher's network, without its weights.

    Args:
        path: as in `teacher.path`: a bundled name, a folder, or a hub id.

    Raises:
        UserError: nothing is found there.
    """
    if path in NETWORKS:
        return json.loads((asset("networks") / f"{NETWORKS[path]}.json").read_text())
    location, places = locate(path), ("config.json", "transformer/config.json", "unet/config.json")
    if Path(location).is_dir():
        for place in places:
            if (file := Path(location) / place).exists():
                return json.loads(file.read_text())
        raise UserError(
            f"teacher.path: {path!r} has no config.json, so its network can't be planned: add it."
        )
    from huggingface_hub import hf_hub_download
    from huggingface_hub.errors import EntryNotFoundError

    for place in places:
        try:
            return json.loads(Path(hf_hub_download(location, place)).read_text())
        except EntryNotFoundError:
            continue
        except (OSError, ValueError) as error:
            raise UserError(
                f"teacher.path: the configuration of {path!r} can't be fetched ({str(error).splitlines()[0]}): known "
                f"without a connection are {', '.join(NETWORKS)}."
            ) from error
    raise UserError(f"teacher.path: the hub's {path!r} has no config.json, so its network can't be planned.")


def count_parameters(network: PolicyNetwork) -> int:
    """Parameters of the frozen teacher."""
    teacher = network.transformer if network.teacher is None else network.teacher
    return sum(p.numel() for p in teacher.parameters() if not p.requires_grad)


class Meter(TorchDispatchMode):
    """Bytes alive and operations done inside, tensor by tensor, operation by operation.

    Args:
        outside: tensors that exist already and are counted elsewhere.
    """

    def __init__(self, outside: Iterable[Tensor]) -> None:
        super().__init__()
        self.now = self.peak = self.operations = 0
        self._known = WeakIdKeyDictionary()
        for tensor in outside:
            self._known[tensor.untyped_storage()] = True

    def __torch_dispatch__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        kwargs = kwargs or {}
        result = func(*args, **kwargs)
        if (count := flop_registry.get(func._overloadpacket)) is not None:
            self.operations += count(*args, **kwargs, out_val=result)
        for tensor in tree_leaves(result):
            if isinstance(tensor, Tensor):
                self._watch(tensor.untyped_storage())
        return result

    def _watch(self, storage: torch.UntypedStorage) -> None:
        if storage in self._known:
            return
        self._known[storage] = True
        size = storage.nbytes()
        self.now += size
        self.peak = max(self.peak, self.now)
        weakref.finalize(storage, self._forget, size)

    def _forget(self, size: int) -> None:
        self.now -= size


@contextmanager
def _fused_attention(meter: Meter) -> Iterator[None]:
    """Attention as fused kernels do it: of the scores nothing is kept but a sum per row.

    On the meta device torch would decompose it, with all L² scores in memory. The function itself is replaced, as
    torch lifts function modes during backward, where checkpointed blocks run again.
    """
    own = F.scaled_dot_product_attention

    def fused(query: Tensor, key: Tensor, value: Tensor, *_: Any, **__: Any) -> Tensor:
        return _Flash.apply(query, key, value, meter)

    F.scaled_dot_product_attention = fused
    try:
        yield
    finally:
        F.scaled_dot_product_attention = own


class _Flash(torch.autograd.Function):
    """Shapes, saved tensors and operations of a fused attention kernel; q (B, H, L, D)."""

    @staticmethod
    def forward(ctx: Any, q: Tensor, k: Tensor, v: Tensor, meter: Meter) -> Tensor:
        ctx.meter, ctx.operations = meter, 4 * q.numel() * k.shape[-2]
        meter.operations += ctx.operations
        batch, heads, length, _ = q.shape
        # Kernels write (B, L, H, D): what follows flattens the heads without a copy.
        out = q.new_empty(batch, length, heads, v.shape[-1]).transpose(1, 2)
        ctx.save_for_backward(q, k, v, out, q.new_empty(batch, heads, length, dtype=torch.float32))
        return out

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> Any:
        ctx.meter.operations += int(FLASH_BACKWARD * ctx.operations)
        return *(torch.empty_like(t) for t in ctx.saved_tensors[:3]), None


def measure(
    network: PolicyNetwork, recipe: DistillRecipe, batch: int, shape: tuple[int, int, int], tokens: int
) -> Pass:
    """One micro-batch on the meta device.

    Args:
        network: on the meta device, in the type that it computes in.
        recipe: says how often the teacher is asked.
        batch: samples.
        shape: (C, H, W) of their latents.
        tokens: token states of each.
    """
    dtype = next(network.transformer.parameters()).dtype
    passes = 1 if recipe.teacher.guidance == 1 else 2
    queries = recipe.imitation.intermediate_states * passes
    # FSDP reduces a block's gradients as soon as they are there, and frees them.
    hooks = [p.register_post_accumulate_grad_hook(_drop_gradient) for p in network.trainable().values()]
    meter = Meter([*network.parameters(), *network.buffers()])
    try:
        with torch.device("meta"), _fused_attention(meter), meter:
            x, t = torch.empty(batch, *shape, dtype=dtype), torch.empty(batch, dtype=dtype)
            text = _conditioning(network, batch, tokens, dtype)
            packed = network(x, t, text, student=True)
            predicted = network.head.parameters_of(packed, network._unpack(packed, x))
            student = meter.operations
            network.velocity(x.repeat(queries, 1, 1, 1), t.repeat(queries), text.repeat(queries))
            teacher = meter.operations - student
            loss = torch.stack([value.float().mean() for value in predicted.values()]).sum()
            del packed, predicted
            loss.backward()
    finally:
        for hook in hooks:
            hook.remove()
    return Pass(meter.peak, meter.operations - teacher, teacher)


def _conditioning(network: PolicyNetwork, batch: int, tokens: int, dtype: torch.dtype) -> TextConditioning:
    """Captions as the family takes them, on the default device."""
    width = network.family.condition_width(network.transformer)
    states = torch.empty(batch, tokens, width, dtype=dtype)
    pooled = network.family.pooled_width(network.transformer)
    vectors = None if pooled is None else torch.empty(batch, pooled, dtype=dtype)
    return TextConditioning(states, torch.ones(batch, tokens, dtype=torch.bool), vectors)


def _standing(network: PolicyNetwork, recipe: DistillRecipe, gpus: int) -> Memory:
    """What stays in memory over the whole run (activations: 0), from a network in float32."""
    train = recipe.train
    everything = sum(p.nbytes for p in network.parameters())
    own = sum(p.nbytes for p in network.trainable().values())
    own_blocks = network.family.blocks(network.transformer)
    momentum = sum(p.nbytes for p in muon_parameters(own_blocks, recipe.optimizer))
    slots = (own - momentum) // 4 * ADAM_BYTES + momentum
    if train.parallel == "ddp" or (gpus == 1 and not train.gpu):
        # Averaging sends gradients as one message: a copy, and its mean.
        gradients = own if gpus == 1 else 3 * own
        return Memory(everything, 0, gradients, slots, own, activations=0)
    blocks = [block for part in network.transformers() for block in network.family.blocks(part)]
    sizes = sorted(sum(p.nbytes for p in block.parameters()) for block in blocks)
    outside = everything - sum(sizes)
    gathered = everything if gpus == 1 else outside + sum(sizes[-2:])
    largest = max([_trainable_bytes(block) for block in blocks], default=own)
    compute = 0.5 if _computes_bfloat16(train) else 1.0
    return Memory(
        weights=everything // gpus,
        gathered=int(compute * gathered),
        gradients=own // gpus + int((1 + compute) * largest),
        optimizer=slots // gpus,
        average=own // gpus,
        activations=0,
    )


def _computes_bfloat16(train: TrainSection) -> bool:
    return train.precision == "bfloat16" and train.gpu and train.parallel == "fsdp"


def _trainable_bytes(module: nn.Module) -> int:
    return sum(p.nbytes for p in module.parameters() if p.requires_grad)


def _drop_gradient(parameter: Tensor) -> None:
    parameter.grad = None


def _latent_shape(recipe: DistillRecipe, network: PolicyNetwork, side: int | None) -> tuple[int, int, int]:
    family, transformer = network.family, network.transformer
    channels = family.latent_channels(transformer)
    if side is None:
        if (data := _dataset(recipe)) is not None:
            return next(iter(data.buckets("train")))
        if (card := read_card(recipe.teacher.path)) is not None:
            return card.latent_shape
    side = side or FULL_SIZE
    if side % family.patch(transformer):
        raise UserError(
            f"--latent-size {side} can't be cut into the teacher's {family.patch(transformer)}-cell patches: give "
            "a multiple."
        )
    return channels, side, side


def _captions(recipe: DistillRecipe) -> int:
    data = _dataset(recipe)
    return recipe.train.steps * recipe.data.batch_size if data is None else data.rows("train")


def _dataset(recipe: DistillRecipe) -> DatasetInfo | None:
    """The prepared data; a plan needs none."""
    try:
        return DatasetInfo.open(recipe.data.path)
    except UserError:
        return None


def _text_bytes(captions: int, tokens: int) -> int:
    return captions * tokens * CHARACTERS_PER_TOKEN


def _amount(count: int) -> str:
    return f"{count / 1e9:.1f} B" if count >= 1e9 else f"{count / 1e6:.1f} M"


def _gigabytes(count: float) -> str:
    return f"{count / GB:,.0f} GB" if count >= 100 * GB else f"{count / GB:.2g} GB"
