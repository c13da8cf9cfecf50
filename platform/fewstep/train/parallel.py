"""How workers share a model: FSDP2 or whole replicas (DDP); and the precision they compute in."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from contextlib import nullcontext
from functools import wraps
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import FSDPModule, MixedPrecisionPolicy, fully_shard
from torch.nn import functional as F
from torch.nn.utils import parameters_to_vector, vector_to_parameters
from torch.overrides import TorchFunctionMode

from fewstep.train.objectives import Objective
from fewstep.train.recipe import TrainSection


def is_sharded(settings: TrainSection, world_size: int) -> bool:
    """Whether FSDP shards the model: not with whole replicas, and not for a lone CPU worker."""
    return settings.parallel == "fsdp" and (world_size > 1 or settings.gpu)


def shard(objective: Objective, settings: TrainSection, world_size: int) -> None:
    """Shard the objective's model in place, one FSDP group per transformer block and one for the rest.

    With `parallel: ddp` every worker keeps the whole model, and `average_gradients` is all they share. With
    bfloat16, blocks compute in it (of replicas and on CPUs, their matrix products do); weights stay, and gradients
    are reduced, in float32. A lone CPU worker keeps its model as it is: it has nothing to share, and FSDP's hooks are
    13 % of a small model's step.
    """
    if settings.activation_checkpointing:
        objective.transformer.enable_gradient_checkpointing()
    blocks = [b for network in objective.model.transformers() for b in objective.family.blocks(network)]
    if settings.compile is not None:
        for block in blocks:  # and not the whole: gathering weights between blocks breaks its graph anyway
            block.compile(backend=settings.compile)
    precision = MixedPrecisionPolicy()
    if settings.precision == "bfloat16" and settings.gpu and settings.parallel == "fsdp":
        precision = MixedPrecisionPolicy(param_dtype=torch.bfloat16, reduce_dtype=torch.float32)
    elif settings.precision == "bfloat16":
        for transformer in objective.model.transformers():
            transformer.forward = _bfloat16_products(transformer.forward, "cuda" if settings.gpu else "cpu")
    if not is_sharded(settings, world_size):
        return
    mesh = init_device_mesh("cuda" if settings.gpu else "cpu", (world_size,))
    # One worker has nothing to gather: it keeps the weights whole between uses.
    reshard = world_size > 1
    for module in (*blocks, objective.model):
        fully_shard(module, mesh=mesh, mp_policy=precision, reshard_after_forward=reshard)


@torch.no_grad()
def average_gradients(parameters: Iterable[nn.Parameter], settings: TrainSection, world_size: int) -> None:
    """DDP's share of a step: replace each worker's gradients by their mean over all; FSDP has done so already.

    Once per step, in one message. `DistributedDataParallel` would send them in every backward, and a data-free
    step has one per segment.
    """
    if settings.parallel == "fsdp" or world_size == 1:
        return
    gradients = [p.grad for p in parameters if p.grad is not None]
    flat = parameters_to_vector(gradients)
    dist.all_reduce(flat)
    vector_to_parameters(flat / world_size, gradients)


def drop_gathered(model: nn.Module) -> None:
    """Forget gathered copies of the weights, after the shards were changed behind FSDP's back."""
    for module in model.modules():
        if isinstance(module, FSDPModule):
            module.reshard()


def cpu_has_bfloat16() -> bool:
    """Whether this machine's CPU multiplies bfloat16 matrices in hardware; others take 50 to 100 times longer."""
    capabilities = torch.cpu.get_capabilities()
    return bool(capabilities.get("avx512_bf16") or capabilities.get("amx_bf16"))


def _bfloat16_products(forward: Callable[..., Any], device: str = "cpu") -> Callable[..., Any]:
    """`forward` with its linear layers in bfloat16; on CPUs with AVX512-BF16 1.3 times as fast as float32."""

    @wraps(forward)
    def mixed(*args: Any, **kwargs: Any) -> Any:
        attention = _Float32Attention() if device == "cpu" else nullcontext()
        with torch.autocast(device, torch.bfloat16), attention:
            return forward(*args, **kwargs)

    return mixed


class _Float32Attention(TorchFunctionMode):
    """Attention in float32 inside autocast: torch's CPU kernel has a bfloat16 backward seven times as slow."""

    def __torch_function__(
        self,
        func: Any,
        types: Iterable[type],
        args: tuple[Any, ...] = (),
        kwargs: dict[str, Any] | None = None,
    ) -> Any:
        kwargs = kwargs or {}
        if func is not F.scaled_dot_product_attention:
            return func(*args, **kwargs)
        with torch.autocast("cpu", enabled=False):
            return func(*map(_widened, args), **{name: _widened(value) for name, value in kwargs.items()})


def _widened(value: Any) -> Any:
    return value.float() if isinstance(value, Tensor) and value.is_floating_point() else value
