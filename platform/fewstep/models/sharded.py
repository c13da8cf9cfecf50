"""Reading and writing tensors that may be sharded over ranks (FSDP2's DTensors)."""

from __future__ import annotations

import os
from collections.abc import Iterator, Mapping
from pathlib import Path

import torch
import torch.distributed.checkpoint as dcp
from torch import Tensor
from torch.distributed.checkpoint.filesystem import FileSystem
from torch.distributed.tensor import DTensor, distribute_tensor

from fewstep.models.pretrained import weight_files

LOADED_NUMBERS = 2**26
"""Numbers that are read into sharded weights at a time, by all ranks together."""


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


def read_weights(parameters: Mapping[str, Tensor], folder: Path) -> None:
    """Fill parameters in place from a folder's safetensors; each rank reads only its own rows of a sharded one.

    Args:
        parameters: by their names in the files; tensors or DTensors of any floating-point type. Every rank has to call
            this at the same time.
        folder: has one or several `*.safetensors`. Copies in other precisions (`VARIANTS`) are not read.

    Raises:
        ValueError: a parameter is missing there, or has another shape.
    """
    for group in _groups(parameters):
        reader = dcp.HuggingFaceStorageReader(str(folder))
        # The reader lists the folder itself; which of two copies of a weight it would take depends on the files' order.
        reader.fs = _WeightFiles()
        try:
            dcp.load(group, storage_reader=reader)
        except dcp.api.CheckpointException as error:
            [(rank, (cause, _)), *_] = error.failures.items()
            raise ValueError(f"{folder}: {cause} (rank {rank})") from error


def _groups(parameters: Mapping[str, Tensor]) -> Iterator[dict[str, Tensor]]:
    """Parameters in groups of at least `LOADED_NUMBERS` (whole) numbers, the same on every rank."""
    # Read all at once, the mapped pages of the files would stay in memory until the last one is read.
    group: dict[str, Tensor] = {}
    for name, parameter in parameters.items():
        group[name] = parameter
        if sum(one.numel() for one in group.values()) >= LOADED_NUMBERS:
            yield group
            group = {}
    if group:
        yield group


class _WeightFiles(FileSystem):
    """File system of the checkpoint reader that lists only the files that are a network's weights."""

    def ls(self, path: str | os.PathLike[str]) -> list[str]:
        return [str(file) for file in weight_files(Path(path))]
