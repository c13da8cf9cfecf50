"""Loading networks from diffusers folders and hub repositories: whole, or without weights, which shards read later."""

from __future__ import annotations

import json
import os
from collections.abc import Iterable, Iterator
from fnmatch import fnmatch
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open
from torch import Tensor

from fewstep.hub import hub_folder
from fewstep.models.devices import map_large_blocks, return_freed_memory
from fewstep.models.family import Transformer

PARTS = ("config.json", "model_index.json", "diffusion_pytorch_model*", "transformer/*", "scheduler/*")
"""Files that are fetched of a hub repository: a network's own, or those of a pipeline's transformer and scheduler."""

LARGE_WEIGHT = 2**20
"""Numbers from which on a weight is read by itself."""

LARGE = 2**30
"""Bytes of weights from which on the gaps between a network's activations matter more than the time to map them."""

WHOLE = "diffusion_pytorch_model.safetensors"
"""Name of the file of a network that is not cut into several."""

VARIANTS = ("*.fp16*", "*.bf16*")
"""Files that are not fetched or read: copies of the same weights in other precisions."""

SCHEDULER = "scheduler"
"""Name of the folder of a pipeline's scheduler, and of the entry for the scheduler in a network's configuration."""


def network_folder(path: str) -> Path:
    """The folder of a network's own files.

    Args:
        path: folder or hub id of the network itself, or of a pipeline with a `transformer`. The files of a hub id,
            as `parse_hub_id` reads it, are fetched into the hub's local cache, once per machine.

    Raises:
        OSError: neither has a `config.json`, or the hub can't be reached.
        ValueError: it is no folder, and no hub id.
    """
    folder = Path(path)
    if not folder.is_dir():
        folder = hub_folder(path, PARTS, VARIANTS)
    for candidate in (folder, folder / "transformer"):
        if (candidate / "config.json").exists():
            return candidate
    raise OSError(f"{path} has no config.json, and no transformer/config.json")


def scheduler_config(folder: Path) -> dict[str, Any] | None:
    """The configuration of the scheduler in a network's folder, or in its pipeline's folder; None if there is none."""
    for place in (folder, folder / SCHEDULER, folder.parent / SCHEDULER):
        if (file := place / "scheduler_config.json").exists():
            return json.loads(file.read_text())
    return None


def from_pretrained(kind: type[Any], path: str) -> Transformer:
    """A diffusers network of class `kind` in float32; `path` as for `network_folder`."""
    return read(kind, network_folder(path))


def read(kind: type[Any], folder: Path) -> Transformer:
    """A diffusers network of class `kind` in float32.

    Args:
        kind: class of the network.
        folder: the network's own.

    Raises:
        ValueError: weights are missing there (diffusers would leave them at random values).
    """
    network, found = kind.from_pretrained(folder, torch_dtype=torch.float32, output_loading_info=True)
    if missing := [*found["missing_keys"], *found["mismatched_keys"]]:
        raise ValueError(_lacking(kind, missing))
    return network


def skeleton(kind: type[Any], path: str) -> tuple[Transformer, Path]:
    """A diffusers network with its parameters on the meta device, and the folder of its weights.

    Buffers have their values: those that the folder has, and others as the constructor computes them, such as rotary
    frequencies.

    Raises:
        ValueError: a weight is missing there, or has another shape.
    """
    from accelerate import init_empty_weights

    folder = network_folder(path)
    # Buffers are computed: no file has them.
    with init_empty_weights(include_buffers=False):
        network = kind.from_config(kind.load_config(folder))
    # diffusers would leave missing weights at random values; on the meta device, nothing checks later.
    stored = _headers(folder)
    shapes = {name: shape for name, (_, shape) in stored.items()}
    buffers = {name: own for name, own in network.named_buffers() if name in network.state_dict()}
    tensors = {**dict(network.named_parameters()), **buffers}
    if missing := [name for name in tensors if name not in shapes]:
        raise ValueError(_lacking(kind, missing))
    for name, own in tensors.items():
        if shapes[name] != own.shape:
            raise ValueError(
                f"{name} of a {kind.__name__} has shape {tuple(shapes[name])}, and its config.json says "
                f"{tuple(own.shape)}"
            )
    # Such as SD3's table of positions, which is for another size where a model was fine-tuned.
    for name, buffer in buffers.items():
        with safe_open(stored[name][0], framework="pt") as file:
            buffer.copy_(file.get_tensor(name))
    return network, folder


def _lacking(kind: type[Any], missing: list[str]) -> str:
    """The message about weights that a folder lacks, of which `missing` has the names."""
    others = f" and {len(missing) - 1} others" if len(missing) > 1 else ""
    return f"of a {kind.__name__}'s weights {missing[0]}{others} are missing"


def _headers(folder: Path) -> dict[str, tuple[str, torch.Size]]:
    """Name → file and shape of the weights in a folder's safetensors, from the files' headers."""
    # From headers alone, so that a folder that lacks weights is refused before anything large is read.
    found: dict[str, tuple[str, torch.Size]] = {}
    for path in map(str, weight_files(folder)):
        with safe_open(path, framework="pt") as file:
            for name in list(file.keys()):
                if name in found:
                    raise ValueError(
                        f"{name} is in {found[name][0]} and in {path}: delete the file that is left over"
                    )
                part = file.get_slice(name)
                if not part.get_dtype().startswith(("F16", "F32", "F64", "BF16")):
                    raise ValueError(
                        f"{name} in {path} is held in {part.get_dtype()}, quantised already: give the weights that were"
                    )
                found[name] = path, torch.Size(part.get_shape())
    return found


def weight_files(folder: Path) -> list[Path]:
    """The safetensors files of a network's folder that diffusers would read: those of its index, if it has one.

    Copies in other precisions (`VARIANTS`), and files that an index does not name, are left out.

    Raises:
        ValueError: the index names a file that is not there.
    """
    indices = _without_variants(folder.glob("*.safetensors.index.json"))
    if len(indices) == 1:
        named = set(json.loads(indices[0].read_text())["weight_map"].values())
        if missing := sorted(name for name in named if not (folder / name).exists()):
            raise ValueError(f"{folder} lacks {missing[0]}, which {indices[0].name} names")
        return sorted(folder / name for name in named)
    files = _without_variants(folder.glob("*.safetensors"))
    whole = [file for file in files if file.name == WHOLE]
    return whole or files


def _without_variants(files: Iterable[Path]) -> list[Path]:
    return sorted(file for file in files if not any(fnmatch(file.name, variant) for variant in VARIANTS))


def stream_weights(folder: Path) -> Iterator[tuple[str, Tensor]]:
    """The names and weights in a folder's safetensors, one after the other, the largest first, on the CPU.

    Pages of an open file that were read count as memory of the process, so that it is opened anew for each large
    weight. The largest come first, when converting them takes memory beside nearly nothing.
    """
    sizes = {(path, name): shape.numel() for name, (path, shape) in _headers(folder).items()}
    paths = list(dict.fromkeys(path for path, _ in sizes))
    if sum(os.path.getsize(path) for path in paths) > LARGE:
        map_large_blocks()
    large = [place for place in sizes if sizes[place] >= LARGE_WEIGHT]
    for path, name in sorted(large, key=lambda place: -sizes[place]):
        with safe_open(path, framework="pt") as file:
            yield name, file.get_tensor(name)
        return_freed_memory()
    for path in paths:
        with safe_open(path, framework="pt") as file:
            for name in [name for place, name in sizes if place == path and sizes[path, name] < LARGE_WEIGHT]:
                yield name, file.get_tensor(name)
