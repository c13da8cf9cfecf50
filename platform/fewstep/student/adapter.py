"""Adapters: files of a student's own weights, in the format in which π-Flow adapters are published.

    config.json                               class name, configuration of the base, sizes of the head
    diffusion_pytorch_model.safetensors       weights of head and LoRA; metadata `policy_config` is JSON

LoRA weights are named after the base's modules, `….lora_A.weight` and `….lora_B.weight` (alpha = rank), those of the
head after its own (`norm_out`, `proj_out_means`, …). For a student whose weights are all trained, the file has all of
them, under the base's names.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from safetensors import SafetensorError, safe_open
from torch import Tensor

from fewstep.errors import UserError
from fewstep.files import save_weights
from fewstep.models.family import Family, Transformer
from fewstep.models.heads import DXConfig, GMFlowConfig, PolicyConfig
from fewstep.models.network import LoRAConfig, PolicyNetwork
from fewstep.models.sharded import fill

WEIGHTS = "diffusion_pytorch_model.safetensors"
CONFIG = "config.json"
HEAD = "transformer.norm_out.head."
"""Prefix of the names of the head's parameters in a `PolicyNetwork`."""

LORA_A = ".lora_A.weight"
"""End of the name of a LoRA's first matrix, after the name of its layer."""

OUTPUT = ("norm_out.", "proj_out.")
"""Prefixes of the names of the base's own last layers, and of the head's that take their place."""


def adapter_state(network: PolicyNetwork, weights: Mapping[str, Tensor] | None = None) -> dict[str, Tensor]:
    """The student's weights under their published names, on the CPU.

    Args:
        network: the student's.
        weights: values, such as the EMA's, in place of the network's trainable parameters; by the network's own names.
    """
    chosen: Mapping[str, Tensor] = network.trainable() if weights is None else weights
    return {_published(name): tensor.detach().cpu().contiguous() for name, tensor in chosen.items()}


def save_adapter(network: PolicyNetwork, folder: Path, weights: dict[str, Tensor] | None = None) -> None:
    """Write an adapter's two files.

    Args:
        network: the student's.
        folder: made if it does not exist.
        weights: as for `adapter_state`.
    """
    folder.mkdir(parents=True, exist_ok=True)
    settings = network.policy_config
    # The base's configuration goes along, without notes such as the path that it was loaded from.
    base = {k: v for k, v in network.transformer.config.items() if not k.startswith("_")}
    base_class = type(network.transformer).__name__
    # Keys and class names are those of the published format.
    if isinstance(settings, GMFlowConfig):
        head = {
            "_class_name": f"GM{base_class}",
            "num_gaussians": settings.components,
            "logstd_inner_dim": settings.logstd_width,
            "gm_num_logstd_layers": 2,
            "logweights_channels": network.head.area,
            "constant_logstd": None,
        }
        policy: dict[str, Any] = {"type": "GMFlow"}
    else:
        head = {"_class_name": f"DX{base_class}", "n_grid": settings.points, "p_order": 1}
        policy = {
            "type": "DX",
            "segment_size": settings.segment_size,
            "shift": settings.shift,
            "mode": settings.mode,
        }
    (folder / CONFIG).write_text(json.dumps(head | base, indent=2) + "\n")
    save_weights(
        adapter_state(network, weights), folder / WEIGHTS, metadata={"policy_config": json.dumps(policy)}
    )


def load_adapter(transformer: Transformer, family: Family, folder: Path) -> PolicyNetwork:
    """Make a student of a loaded teacher and an adapter's weights.

    Args:
        transformer: the teacher's; modified in place.
        family: of the teacher.
        folder: the adapter's.

    Raises:
        UserError: there is no adapter, or it is one for another base; the message lists what does not fit.
    """
    config, policy, state = read_adapter(folder)
    _check_layers(transformer, config, state, folder)
    settings = _policy_config(config, policy, folder)
    # The file itself does not say so, but only a full student has weights of the base's inner layers.
    full = any(name in state for name, _ in transformer.named_parameters() if not name.startswith(OUTPUT))
    network = PolicyNetwork(transformer, family, settings, _lora_config(state), full=full)
    _fill(network, _fitting(network, state, folder))
    return network


def fill_adapter(network: PolicyNetwork, folder: Path) -> None:
    """Give a student, which may be sharded, an adapter's weights.

    Raises:
        UserError: as `check_adapter`.
    """
    _fill(network, check_adapter(network, folder))


def check_adapter(network: PolicyNetwork, folder: Path) -> dict[str, Tensor]:
    """Read an adapter's weights by their published names, and check that they fit a student.

    Raises:
        UserError: there is no adapter, or it has another base, rank or head; the message lists what does not fit.
    """
    config, policy, state = read_adapter(folder)
    state = _fitting(network, state, folder)
    if (given := _policy_config(config, policy, folder)) != network.policy_config:
        raise UserError(
            f"{folder} is not an adapter for this head: it has {given!r}, and the student is to have "
            f"{network.policy_config!r}: set student.policy to the adapter's."
        )
    return state


def _fitting(network: PolicyNetwork, state: dict[str, Tensor], folder: Path) -> dict[str, Tensor]:
    """`state`, if its names and shapes are those of the network's trainable parameters.

    Raises:
        UserError: they are not.
    """
    own = {_published(name): parameter for name, parameter in network.trainable().items()}
    # All that does not fit is collected, so that one message tells whether it is a rank, a layer or another model.
    misfits = [f"{name} (not in the base)" for name in state if name not in own]
    misfits += [f"{name} (missing)" for name in own if name not in state]
    misfits += [
        f"{name} ({tuple(state[name].shape)} for {tuple(own[name].shape)})"
        for name in own
        if name in state and state[name].shape != own[name].shape
    ]
    _refuse(misfits, folder)
    return state


def _check_layers(
    transformer: Transformer, config: dict[str, Any], state: dict[str, Tensor], folder: Path
) -> None:
    """Refuse an adapter for layers that the base does not have, or for a base with another number of layers.

    Raises:
        UserError: it is one.
    """
    own = transformer.config
    misfits = [
        f"{key} ({config[key]} for {own[key]})"
        for key in ("num_layers", "num_single_layers")
        if key in config and key in own and config[key] != own[key]
    ]
    layers = {name for name, _ in transformer.named_modules()}
    misfits += [
        f"{name} (not in the base)"
        for name in state
        if name.endswith(LORA_A) and name.removesuffix(LORA_A) not in layers
    ]
    _refuse(misfits, folder)


def _refuse(misfits: list[str], folder: Path) -> None:
    """Raise a UserError that lists what does not fit, if anything."""
    if misfits:
        more = f", and {len(misfits) - 5} more" if len(misfits) > 5 else ""
        raise UserError(
            f"{folder} is not an adapter for this base: {', '.join(misfits[:5])}{more}; give the teacher (and the "
            "adapters' settings) that it was trained with."
        )


def _fill(network: PolicyNetwork, state: dict[str, Tensor]) -> None:
    """Copy weights by their published names into the network's trainable parameters."""
    for name, parameter in network.trainable().items():
        fill(parameter, state[_published(name)])


def read_adapter(folder: Path) -> tuple[dict[str, Any], dict[str, Any], dict[str, Tensor]]:
    """Read an adapter's folder: its configuration, policy settings and weights.

    Raises:
        UserError: files are missing or broken.
    """
    try:
        config = json.loads((folder / CONFIG).read_text())
        with safe_open(folder / WEIGHTS, framework="pt") as file:
            policy = json.loads((file.metadata() or {}).get("policy_config", "{}"))
            state = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118 — not a dict
    except (OSError, json.JSONDecodeError, SafetensorError) as error:
        raise UserError(f"{folder} holds no readable adapter ({CONFIG} and {WEIGHTS}): {error}.") from None
    return config, policy, state


def _published(name: str) -> str:
    """The published name of one of a `PolicyNetwork`'s parameters."""
    # peft puts the adapter's name, here always "default", into the names of its parameters.
    return name.removeprefix(HEAD).removeprefix("transformer.").replace(".default.weight", ".weight")


def _policy_config(config: dict[str, Any], policy: dict[str, Any], folder: Path) -> PolicyConfig:
    """The head's settings, from an adapter's configuration and policy settings.

    Raises:
        UserError: the configuration is not that of a student.
    """
    try:
        if config["_class_name"].startswith("GM"):
            return GMFlowConfig(components=config["num_gaussians"], logstd_width=config["logstd_inner_dim"])
        return DXConfig(
            points=config["n_grid"],
            mode=policy.get("mode", "grid"),
            segment_size=policy.get("segment_size", 1.0),
            shift=policy.get("shift", 1.0),
        )
    except KeyError as error:
        raise UserError(
            f"{folder} holds no student: its {CONFIG} says nothing of a policy head ({error.args[0]} is missing)."
        ) from None


def _lora_config(state: dict[str, Tensor]) -> LoRAConfig | None:
    """Settings of the LoRA adapters in a file's weights; None if there are none."""
    # The file does not say which layers were adapted: the names of its weights do.
    adapters = {name: tensor for name, tensor in state.items() if name.endswith(LORA_A)}
    if not adapters:
        return None
    rank = next(iter(adapters.values())).shape[0]
    return LoRAConfig(rank=rank, dropout=0.0, targets=tuple(n.removesuffix(LORA_A) for n in adapters))
