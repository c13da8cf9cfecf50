"""Reading and writing tensors that may be sharded over ranks (FSDP2's DTensors)."""

from __future__ import annotations

import torch
from torch import Tensor
from torch.distributed.tensor import DTensor, distribute_tensor


def whole(tensor: Tensor) -> Tensor:
    """The whole of a possibly sharded tensor, without autograd; every rank has to call this at the same time."""
    tensor = tensor.detach()
    return tensor.full_tensor() if isinstance(tensor, DTensor) else tensor


@torch.no_grad()
def fill(parameter: Tensor, value: Tensor) -> None:
    """Copy a whole tensor, the same on every rank, into a possibly sharded one; nothing is sent between ranks."""
    value = value.to(parameter.device, parameter.dtype)
    if isinstance(parameter, DTensor):
        # src_data_rank None: each rank cuts its own shard out of its own copy, without a broadcast from rank 0.
        value = distribute_tensor(value, parameter.device_mesh, parameter.placements, src_data_rank=None)
    parameter.copy_(value)
