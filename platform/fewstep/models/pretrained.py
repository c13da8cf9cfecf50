"""Networks from diffusers folders and hub repositories: at once, or first without weights, which shards then read."""

from __future__ import annotations

import json
import os
from collections.abc import Mapping
from fnmatch import fnmatch
from pathlib import Path
from typing import Any

import torch
import torch.distributed.checkpoint as dcp
from safetensors import safe_open
from torch import Tensor, nn
from torch.distributed.checkpoint.filesystem import FileSystem

PARTS = ("config.json", "diffusion_pytorch_model*", "transformer/*", "scheduler/*")
"""What is fetched of a hub repository: a network's own files, or those of a pipeline's transformer and scheduler."""

VARIANTS = ("*.fp16*", "*.bf16*")
"""What is not: copies of the same weights in other precisions."""

SCHEDULER = "scheduler"
"""Folder of a pipeline's scheduler; in a network's configuration, the key of the scheduler's."""


def network_folder(path: str) -> Path:
    """The folder of a network's own files.

    Args:
        path: folder or hub id of the network itself, or of a pipeline, whose `transformer` it then is. A hub id's files
            are fetched into the hub's local cache, once per machine.

    Raises:
        OSError: neither has a `config.json`, or the hub can't be reached.
    """
    folder = Path(path)
    if not folder.is_dir():
        from huggingface_hub import snapshot_download

        folder = Path(snapshot_download(path, allow_patterns=list(PARTS), ignore_patterns=list(VARIANTS)))
    for candidate in (folder, folder / "transformer"):
        if (candidate / "config.json").exists():
            return candidate
    raise OSError(f"{path} has no config.json, and no transformer/config.json")


def scheduler_config(folder: Path) -> dict[str, Any] | None:
    """The configuration of the scheduler that lies in a network's folder or in its pipeline's; None without one."""
    for place in (folder, folder / SCHEDULER, folder.parent / SCHEDULER):
        if (file := place / "scheduler_config.json").exists():
            return json.loads(file.read_text())
    return None


def from_pretrained(kind: type[Any], path: str) -> nn.Module:
    """A diffusers network of class `kind` in float32; `path` as for `network_folder`."""
    return read(kind, network_folder(path))


def read(kind: type[Any], place: str | Path, **where: Any) -> nn.Module:
    """A diffusers network of class `kind` in float32.

    Args:
        kind: its class.
        place: folder or hub id.
        where: further arguments of diffusers' `from_pretrained`, such as `subfolder`.

    Raises:
        ValueError: weights are missing there: diffusers would leave them random.
    """
    network, found = kind.from_pretrained(place, torch_dtype=torch.float32, output_loading_info=True, **where)
    if missing := [*found["missing_keys"], *found["mismatched_keys"]]:
        raise ValueError(_lacking(kind, missing))
    return network


def skeleton(kind: type[Any], path: str) -> tuple[nn.Module, Path]:
    """A diffusers network whose parameters are on the meta device, and the folder of its weights.

    Only parameters are: tables that a constructor computes (rotary frequencies) are there.

    Raises:
        ValueError: a weight is missing there, or has another shape.
    """
    from accelerate import init_empty_weights

    folder = network_folder(path)
    with init_empty_weights(include_buffers=False):
        network = kind.from_config(kind.load_config(folder))
    shapes = _shapes(folder)
    if missing := [name for name, own in network.named_parameters() if shapes.get(name) != own.shape]:
        raise ValueError(_lacking(kind, missing))
    return network, folder


def _lacking(kind: type[Any], missing: list[str]) -> str:
    others = f" and {len(missing) - 1} others" if len(missing) > 1 else ""
    return f"of a {kind.__name__}'s weights {missing[0]}{others} are missing"


def _shapes(folder: Path) -> dict[str, torch.Size]:
    """Of the weights in a folder's safetensors, from their headers."""
    shapes: dict[str, torch.Size] = {}
    for path in _WithoutVariants().ls(folder):
        if str(path).endswith(".safetensors"):
            with safe_open(path, framework="pt") as file:
                names = list(file.keys())
                shapes |= {name: torch.Size(file.get_slice(name).get_shape()) for name in names}
    return shapes


def read_weights(parameters: Mapping[str, Tensor], folder: Path) -> None:
    """Fill parameters in place from a folder's safetensors; of a sharded one each rank reads its own rows only.

    Args:
        parameters: by their names in the files; tensors or DTensors of any float type. All ranks must ask together.
        folder: one or several `*.safetensors`. Copies in other precisions beside them (`VARIANTS`) are not read.

    Raises:
        ValueError: a parameter is missing there, or has another shape.
    """
    reader = dcp.HuggingFaceStorageReader(str(folder))
    reader.fs = _WithoutVariants()
    try:
        dcp.load(dict(parameters), storage_reader=reader)
    except dcp.api.CheckpointException as error:
        [(rank, (cause, _)), *_] = error.failures.items()
        raise ValueError(f"{folder}: {cause} (rank {rank})") from error


class _WithoutVariants(FileSystem):
    """A folder's files, as the reader of checkpoints lists them, without copies of the weights in other precisions."""

    def ls(self, path: str | os.PathLike[str]) -> list[str]:
        files = super().ls(path)
        return [file for file in files if not any(fnmatch(os.path.basename(file), v) for v in VARIANTS)]
