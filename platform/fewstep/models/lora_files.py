"""Reading LoRA files by the loaders of diffusers, which know the styles of keys of diffusers, peft and kohya."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError

from fewstep.assets import expanded
from fewstep.errors import UserError
from fewstep.hub import hub_folder, is_hub_id
from fewstep.models.diffusers_family import DiffusersFamily, bare_pipeline
from fewstep.models.family import Family, Transformer


def taking_loras(family: Family, field: str) -> DiffusersFamily:
    """The family, if its networks are diffusers' own.

    Args:
        family: of the network that a LoRA is for.
        field: name of the setting, for error messages.

    Raises:
        UserError: they are not, so that diffusers has no loader of LoRAs for them.
    """
    if not isinstance(family, DiffusersFamily):
        raise _not_loaded(family, field)
    return family


def adapted_layers(family: DiffusersFamily, network: Transformer, path: str, field: str) -> dict[str, Any]:
    """The layers of a network that a LoRA adapts, by name, as peft's `LoraLayer`s with the LoRA's matrices.

    Args:
        family: of the network.
        network: on the meta device; changed in place, and of no further use.
        path: of the LoRA, as `lora_file` takes it.
        field: name of the setting, for error messages.

    Raises:
        UserError: the file can't be read, or holds no LoRA of this network.
    """
    from peft.tuners.lora import LoraLayer

    _make_hollow(network)
    wanted = _load(family, network, path, field)
    layers = {name: layer for name, layer in network.named_modules() if isinstance(layer, LoraLayer)}
    # diffusers only warns of what it leaves out.
    if unknown := sorted(wanted - set(layers)):
        raise UserError(f"{field}: {path} adapts {unknown[0]}, which this {family.network} lacks.")
    if not layers:
        raise UserError(f"{field}: {path} adapts no layer of a {family.network}: choose another.")
    return layers


def lora_file(path: str, field: str) -> Path:
    """The file of a LoRA.

    Args:
        path: a safetensors file, a folder with one, or a hub id.
        field: name of the setting, for error messages.

    Raises:
        UserError: there is none, or there are several.
    """
    place = expanded(path)
    if place.is_file():
        return place
    if not place.is_dir():
        if not is_hub_id(path):
            raise UserError(f"{field}: there is no file {path!r}: correct the path.")
        try:
            place = hub_folder(path, ["*.safetensors"])
        except OSError as error:
            raise UserError(f"{field}: {error}: check the name and the connection, or give a file.") from None
    files = sorted(place.glob("*.safetensors"))
    if len(files) != 1:
        raise UserError(f"{field}: {path} has {len(files)} *.safetensors files: name the file itself.")
    return files[0]


def _make_hollow(network: Transformer) -> None:
    """Give a network on the meta device zeros that take no memory: peft would move a LoRA to the base's device."""
    for module in network.modules():
        for name, parameter in module._parameters.items():
            if parameter is not None and parameter.is_meta:
                zeros = torch.zeros(()).expand(parameter.shape)
                module._parameters[name] = torch.nn.Parameter(zeros, requires_grad=False)


def _load(family: DiffusersFamily, network: Transformer, path: str, field: str) -> set[str]:
    """Load a LoRA into a network by the loader of its pipeline.

    Returns:
        Names of the layers that the file has weights for.

    Raises:
        UserError: it can't be read, or has no weights of such a network.
    """
    file = lora_file(path, field)
    pipeline = bare_pipeline(family.pipeline, transformer=network)
    if not hasattr(pipeline, "load_lora_weights"):
        raise _not_loaded(family, field)
    where = {"weight_name": file.name}
    try:
        state = pipeline.lora_state_dict(str(file.parent), **where)
        pipeline.load_lora_weights(str(file.parent), **where)
    except (OSError, ValueError, KeyError, RuntimeError, SafetensorError) as error:
        reason = " ".join(str(error).split())[:300]
        raise UserError(f"{field}: {path} can't be loaded into a {family.network}: {reason}") from None
    prefix = "transformer."
    weights = state[0] if isinstance(state, tuple) else state
    return {
        name.removeprefix(prefix).partition(".lora_")[0]
        for name in weights
        if name.startswith(prefix) and ".lora_" in name
    }


def _not_loaded(family: Family, field: str) -> UserError:
    return UserError(
        f"{field}: diffusers loads no LoRA into networks of the family {family.name!r}: fold it into the "
        "teacher's weights before, and leave the list empty."
    )
