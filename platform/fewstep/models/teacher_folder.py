"""Teachers that are a base with LoRA files folded into it, or a single file: written once, as a diffusers folder."""

from __future__ import annotations

import hashlib
import json
import shutil
import tempfile
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import Tensor

from fewstep.config import Config
from fewstep.errors import UserError
from fewstep.files import save_weights
from fewstep.home import cache_folder
from fewstep.models.diffusers_family import DiffusersFamily
from fewstep.models.family import Family
from fewstep.models.lora_files import adapted_layers, lora_file, taking_loras
from fewstep.models.pretrained import network_folder, scheduler_config, stream_weights
from fewstep.models.weights_hash import weights_hash

SHARD_BYTES = 2 * 10**9
"""Size of the written files of weights: what is held in memory at a time."""

INDEX = "diffusion_pytorch_model.safetensors.index.json"
"""Name of the list of these files, by diffusers' convention."""


FIELD = "teacher.loras"
"""Name of the setting that lists LoRAs, for error messages."""

PREFIXES = ("model.diffusion_model.", "diffusion_model.")
"""What the names in single files may begin with."""


class LoRAFile(Config):
    """A LoRA that is folded into a teacher's weights before distillation."""

    path: str
    """A safetensors file, a folder with one, or a hub id; keys in the style of diffusers, peft or kohya."""
    scale: float = 1.0
    """Factor on it."""


def teacher_folder(base: str, family: Family, loras: Sequence[LoRAFile] = ()) -> str:
    """The diffusers folder of a teacher: of a base with LoRAs folded in, of a single file, or `base` itself.

    What is not such a folder yet is written when it is first asked for, and kept in `~/.cache/fewstep/teachers` under
    the hashes of base and LoRAs. Weights are read, folded and written one by one, each sum rounded once to the type of
    the base's file.

    Args:
        base: folder or hub id of the network or its pipeline, or a single file of its weights.
        family: of the network.
        loras: what is folded in.

    Raises:
        UserError: a LoRA can't be read, or has layers that the network lacks; diffusers can't read the single file; or
            the user has no home folder.
    """
    if (file := Path(base)).is_file():
        base = _converted(file, family)
    if not loras:
        return base
    family = taking_loras(family, FIELD)
    source = network_folder(base)
    key = folded_hash(weights_hash(str(source)), loras)
    folder = _kept(key)
    if not folder.exists():
        with _appearing(folder, source) as place:
            shutil.copy(source / "config.json", place)
            _write_shards(place, _Deltas(family, source, loras).added(stream_weights(source)))
    return str(folder)


def _converted(file: Path, family: Family) -> str:
    """The folder of a network that is a single file, converted by diffusers.

    Raises:
        UserError: diffusers can't read it.
    """
    if not isinstance(family, DiffusersFamily) or not hasattr(family.network_class, "from_single_file"):
        raise UserError(
            f"teacher.path: diffusers reads no single files of the family {family.name!r}: give a folder instead of "
            f"{file}."
        )
    folder = _kept(weights_hash(str(file)))
    if folder.exists():
        return str(folder)
    # Without one beside the file, diffusers fetches that of the model which the weights' names belong to.
    config = {"config": str(file.parent)} if (file.parent / "config.json").exists() else {}
    try:
        state = load_file(file)
        for prefix in PREFIXES:
            state = {name.removeprefix(prefix): tensor for name, tensor in state.items()}
        dtype = next(iter(state.values())).dtype
        network = family.network_class.from_single_file(state, torch_dtype=dtype, **config)
        if lacking := [name for name, parameter in network.named_parameters() if parameter.is_meta]:
            raise ValueError(f"{lacking[0]} is missing")
    except (OSError, ValueError, KeyError, RuntimeError, StopIteration, SafetensorError) as error:
        reason = " ".join(str(error).split())[:300]
        raise UserError(
            f"teacher.path: diffusers can't read {file} as a {family.network} ({reason}): put its config.json beside "
            "it, or give a folder."
        ) from None
    with _appearing(folder, file.parent) as place:
        network.save_pretrained(place)
    return str(folder)


def check_loras(base: str, family: Family, loras: Sequence[LoRAFile]) -> None:
    """Check that LoRAs can be folded into a network, without reading its weights.

    Raises:
        UserError: as `teacher_folder`.
    """
    if loras:
        _Deltas(taking_loras(family, FIELD), network_folder(base), loras)


def folded_hash(base: str | None, loras: Sequence[LoRAFile]) -> str | None:
    """SHA-256 of a base's hash and its LoRAs' contents and scales; `base` itself without LoRAs, or if it is None."""
    if base is None or not loras:
        return base
    facts = [base, *((weights_hash(str(lora_file(lora.path, FIELD))), lora.scale) for lora in loras)]
    return hashlib.sha256(json.dumps(facts).encode()).hexdigest()


class _Deltas:
    """What LoRAs add to a network's weights.

    Args:
        family: of the network.
        source: folder of the network.
        loras: what is added.

    Raises:
        UserError: a file holds no LoRA of this network.
    """

    def __init__(self, family: DiffusersFamily, source: Path, loras: Sequence[LoRAFile]) -> None:
        self._layers: list[tuple[float, Mapping[str, Any]]] = []
        for lora in loras:
            network, _ = family.skeleton(str(source))
            layers = adapted_layers(family, network, lora.path, FIELD)
            self._layers.append((lora.scale, {f"{name}.weight": layer for name, layer in layers.items()}))

    def added(self, weights: Iterator[tuple[str, Tensor]]) -> Iterator[tuple[str, Tensor]]:
        """The weights with the LoRAs folded in, in the types that they have."""
        for name, weight in weights:
            present = [(scale, layers[name]) for scale, layers in self._layers if name in layers]
            if present:
                total = weight.float()
                for scale, layer in present:
                    for adapter in layer.lora_A:
                        total = total + scale * layer.get_delta_weight(adapter).float()
                weight = total.to(weight.dtype)
            yield name, weight


def _kept(key: str | None) -> Path:
    """The folder in which a teacher of this hash is kept.

    Raises:
        UserError: the user has no home folder.
    """
    assert key is not None, "a network's folder has weights"
    if (kept := cache_folder("teachers")) is None:
        raise UserError("there is no home folder to keep the written teacher in: set HOME.")
    return kept / key[:32]


@contextmanager
def _appearing(folder: Path, source: Path) -> Iterator[Path]:
    """A place to write a folder, which appears when it is whole; with the scheduler of the `source` folder."""
    folder.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=folder.parent) as scratch:
        place = Path(scratch) / folder.name
        place.mkdir()
        if (scheduler := scheduler_config(source)) is not None:
            (place / "scheduler_config.json").write_text(json.dumps(scheduler, indent=2) + "\n")
        yield place
        try:
            place.rename(folder)
        except OSError:
            if not folder.exists():  # otherwise another process has written the same meanwhile
                raise


def _write_shards(place: Path, weights: Iterator[tuple[str, Tensor]]) -> None:
    shard: dict[str, Tensor] = {}
    files: dict[str, str] = {}

    def save() -> None:
        name = f"diffusion_pytorch_model-{len(set(files.values())) + 1:05}.safetensors"
        save_weights(shard, place / name, metadata={"format": "pt"})
        files.update(dict.fromkeys(shard, name))
        shard.clear()

    for name, weight in weights:
        shard[name] = weight.contiguous()
        if sum(tensor.nbytes for tensor in shard.values()) >= SHARD_BYTES:
            save()
    if shard:
        save()
    (place / INDEX).write_text(json.dumps({"metadata": {}, "weight_map": files}, indent=2) + "\n")
