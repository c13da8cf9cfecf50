"""How workers share a model (sharded by FSDP2, or whole replicas, DDP), and the precision that they compute in."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from contextlib import nullcontext
from functools import wraps
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import FSDPModule, MixedPrecisionPolicy, fully_shard
from torch.nn import functional as F
from torch.overrides import TorchFunctionMode

from fewstep.train.objectives import Objective
from fewstep.train.recipe import TrainConfig

BUCKET_BYTES = 1 << 25
"""Of the gradients that workers average in one message: the most that is copied for it, at a time."""


def is_sharded(settings: TrainConfig, world_size: int) -> bool:
    """Whether FSDP shards the model: neither replicas nor the model of a lone CPU worker are sharded."""
    return settings.parallel == "fsdp" and (world_size > 1 or settings.gpu)


def shard(objective: Objective, settings: TrainConfig, world_size: int) -> None:
    """Prepare the objective's model in place: sharding, precision, checkpointing of activations, compilation.

    With `parallel: fsdp` each transformer block is one FSDP group, and the rest of the model another. With
    `parallel: ddp` every worker keeps the whole model, and `average_gradients` is all that workers exchange. A lone CPU
    worker keeps its model as it is: it has nothing to share, and FSDP's hooks take 13 % of a small model's step.

    With bfloat16, FSDP on GPUs runs blocks in it; elsewhere only matrix products are computed in it. In all cases
    weights are kept, and gradients averaged, in float32.
    """
    if settings.activation_checkpointing:
        objective.transformer.enable_gradient_checkpointing()
    blocks = [b for network in objective.model.transformers() for b in objective.family.blocks(network)]
    if settings.compile is not None:
        # Block by block: FSDP gathers weights between blocks, which would break a graph of the whole anyway.
        for block in blocks:
            block.compile(backend=settings.compile)
    precision = MixedPrecisionPolicy()  # float32 throughout
    if settings.precision == "bfloat16" and settings.gpu and settings.parallel == "fsdp":
        precision = MixedPrecisionPolicy(param_dtype=torch.bfloat16, reduce_dtype=torch.float32)
    elif settings.precision == "bfloat16":
        for transformer in objective.model.transformers():
            transformer.forward = _bfloat16_products(transformer.forward, "cuda" if settings.gpu else "cpu")
    if not is_sharded(settings, world_size):
        return
    # One dimension: all workers share one copy of the model.
    mesh = init_device_mesh("cuda" if settings.gpu else "cpu", (world_size,))
    # A single worker has nothing to gather, so that dropping gathered weights after each use would only take time.
    reshard = world_size > 1
    # Blocks first: what is left of the parameters when the whole model is sharded becomes its own group.
    for module in (*blocks, objective.model):
        fully_shard(module, mesh=mesh, mp_policy=precision, reshard_after_forward=reshard)


@torch.no_grad()
def average_gradients(parameters: Iterable[nn.Parameter], settings: TrainConfig, world_size: int) -> None:
    """Replace each worker's gradients by their mean over all workers, for `parallel: ddp`. FSDP does so in backward.

    Done once per step and in place, in messages of many small gradients or one large one. torch's
    `DistributedDataParallel` would send gradients in every backward, of which a data-free step has one per segment.
    """
    if settings.parallel == "fsdp" or world_size == 1:
        return
    # The same parameters have gradients on every worker, so that the messages agree.
    for bucket in _buckets([p.grad for p in parameters if p.grad is not None]):
        _average(bucket, world_size)


def _average(gradients: list[Tensor], world_size: int) -> None:
    """Average some gradients in place, in one message, which a single one is itself."""
    alone = len(gradients) == 1 and gradients[0].is_contiguous()
    message = gradients[0] if alone else torch.cat([gradient.reshape(-1) for gradient in gradients])
    dist.all_reduce(message)
    message.div_(world_size)
    if not alone:
        parts = message.split([gradient.numel() for gradient in gradients])
        for gradient, part in zip(gradients, parts, strict=True):
            gradient.copy_(part.view_as(gradient))


def _buckets(gradients: Iterable[Tensor]) -> Iterator[list[Tensor]]:
    """The gradients in order, in groups that have at most `BUCKET_BYTES` together unless it is a single one."""
    bucket: list[Tensor] = []
    for gradient in gradients:
        if bucket and sum(g.nbytes for g in bucket) + gradient.nbytes > BUCKET_BYTES:
            yield bucket
            bucket = []
        bucket.append(gradient)
    if bucket:
        yield bucket


def drop_gathered(model: nn.Module) -> None:
    """Have FSDP gather weights again, after the shards were changed directly (such as by `PowerEMA.swapped`)."""
    # FSDP keeps weights gathered, after a forward without backward for example, and does not notice changed shards.
    for module in model.modules():
        if isinstance(module, FSDPModule):
            module.reshard()


def cpu_has_bfloat16() -> bool:
    """Whether this machine's CPU multiplies bfloat16 matrices in hardware; others take 50 to 100 times as long."""
    capabilities = torch.cpu.get_capabilities()
    return bool(capabilities.get("avx512_bf16") or capabilities.get("amx_bf16"))


def _bfloat16_products(forward: Callable[..., Any], device: str = "cpu") -> Callable[..., Any]:
    """`forward` with autocast to bfloat16; on CPUs with AVX512-BF16 it is 1.3 times as fast as in float32."""

    @wraps(forward)
    def mixed(*args: Any, **kwargs: Any) -> Any:
        # Entered at each call: modes and autocast hold for the thread that enters them.
        attention = _Float32Attention() if device == "cpu" else nullcontext()
        with torch.autocast(device, torch.bfloat16), attention:
            return forward(*args, **kwargs)

    return mixed


class _Float32Attention(TorchFunctionMode):
    """A mode in which attention is computed in float32, also inside autocast.

    The backward of torch's attention kernel for CPUs is seven times as slow in bfloat16.
    """

    def __torch_function__(
        self,
        func: Any,
        types: Iterable[type],
        args: tuple[Any, ...] = (),
        kwargs: dict[str, Any] | None = None,
    ) -> Any:
        # Called for every torch function inside the mode; only attention is changed.
        kwargs = kwargs or {}
        if func is not F.scaled_dot_product_attention:
            return func(*args, **kwargs)
        with torch.autocast("cpu", enabled=False):
            return func(*map(_widened, args), **{name: _widened(value) for name, value in kwargs.items()})


def _widened(value: Any) -> Any:
    """A floating-point tensor in float32; anything else as it is."""
    return value.float() if isinstance(value, Tensor) and value.is_floating_point() else value
