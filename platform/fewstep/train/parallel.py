"""FSDP2: weights sharded over the workers, gathered block by block."""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import FSDPModule, MixedPrecisionPolicy, fully_shard
from torch.distributed.tensor import DTensor

from fewstep.train.objectives import Objective
from fewstep.train.recipe import TrainSection


def shard(objective: Objective, settings: TrainSection, world_size: int) -> None:
    """Shard the objective's model in place, one FSDP group per transformer block and one for the rest.

    With bfloat16, blocks compute in it; weights stay, and gradients are reduced, in float32.
    """
    blocks = objective.family.blocks(objective.transformer)
    if settings.activation_checkpointing:
        objective.transformer.enable_gradient_checkpointing()
    mesh = init_device_mesh("cuda" if settings.gpu else "cpu", (world_size,))
    precision = MixedPrecisionPolicy()
    if settings.precision == "bfloat16":
        precision = MixedPrecisionPolicy(param_dtype=torch.bfloat16, reduce_dtype=torch.float32)
    # One worker has nothing to gather: it keeps the weights whole between uses.
    reshard = world_size > 1
    for block in blocks:
        fully_shard(block, mesh=mesh, mp_policy=precision, reshard_after_forward=reshard)
    fully_shard(objective.model, mesh=mesh, mp_policy=precision, reshard_after_forward=reshard)


def drop_gathered(model: nn.Module) -> None:
    """Forget gathered copies of the weights, after the shards were changed behind FSDP's back."""
    for module in model.modules():
        if isinstance(module, FSDPModule):
            module.reshard()


def full(tensor: Tensor) -> Tensor:
    """The whole of a possibly sharded tensor, on the CPU; all ranks must ask together."""
    tensor = tensor.detach()
    return (tensor.full_tensor() if isinstance(tensor, DTensor) else tensor).cpu()
