"""Adapters: the student's own weights, in the format in which π-Flow adapters are published.

    config.json                               class name, base configuration, head sizes
    diffusion_pytorch_model.safetensors       head and LoRA weights; metadata `policy_config` is JSON

Names inside are the base's module names, `….lora_A.weight` / `….lora_B.weight` (alpha = rank), and the
head's (`norm_out`, `proj_out_means`, …). A student of whom all weights were trained has them all, under the base's
names.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor, nn

from fewstep.errors import UserError
from fewstep.models.family import Family
from fewstep.models.heads import DXSettings, GMFlowSettings, PolicySettings
from fewstep.models.network import LoRASettings, PolicyNetwork
from fewstep.models.sharded import fill

WEIGHTS = "diffusion_pytorch_model.safetensors"
CONFIG = "config.json"
HEAD = "transformer.norm_out.head."
"""Where `PolicyNetwork` keeps its head."""

LORA_A = ".lora_A.weight"
"""How the names of half of an adapter's LoRA weights end, after the layer's."""

OUTPUT = ("norm_out.", "proj_out.")
"""What begins so is the base's own output, or the student's head in its place."""


def adapter_state(network: PolicyNetwork, weights: dict[str, Tensor] | None = None) -> dict[str, Tensor]:
    """The student's weights under their published names.

    Args:
        network: whose trainable parameters these are.
        weights: other values (an average, say) under the network's own names.
    """
    weights = network.trainable() if weights is None else weights
    return {_published(name): tensor.detach().cpu().contiguous() for name, tensor in weights.items()}


def save_adapter(network: PolicyNetwork, folder: Path, weights: dict[str, Tensor] | None = None) -> None:
    """Write `config.json` and the safetensors file."""
    folder.mkdir(parents=True, exist_ok=True)
    settings = network.policy_settings
    base = {k: v for k, v in network.transformer.config.items() if not k.startswith("_")}
    base_class = type(network.transformer).__name__
    if isinstance(settings, GMFlowSettings):
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
    save_file(
        adapter_state(network, weights), folder / WEIGHTS, metadata={"policy_config": json.dumps(policy)}
    )


def load_adapter(transformer: nn.Module, family: Family, folder: Path) -> PolicyNetwork:
    """Grow a student on a loaded teacher and fill in an adapter's weights.

    Raises:
        UserError: no adapter there, or one for another base; what does not fit is listed.
    """
    config, policy, state = read_adapter(folder)
    _check_layers(transformer, config, state, folder)
    settings = _policy_settings(config, policy, folder)
    full = any(name in state for name, _ in transformer.named_parameters() if not name.startswith(OUTPUT))
    network = PolicyNetwork(transformer, family, settings, _lora_settings(state), full=full)
    _fill(network, _fitting(network, state, folder))
    return network


def fill_adapter(network: PolicyNetwork, folder: Path) -> None:
    """Give a student, sharded or not, an adapter's weights.

    Raises:
        UserError: as `check_adapter`.
    """
    _fill(network, check_adapter(network, folder))


def check_adapter(network: PolicyNetwork, folder: Path) -> dict[str, Tensor]:
    """An adapter's weights by their published names, once it is known that they are a student's.

    Raises:
        UserError: no adapter there, or one for another base, rank or head; what does not fit is listed.
    """
    config, policy, state = read_adapter(folder)
    state = _fitting(network, state, folder)
    if (given := _policy_settings(config, policy, folder)) != network.policy_settings:
        raise UserError(
            f"{folder} is not an adapter for this head: it has {given!r}, and the student is to have "
            f"{network.policy_settings!r}: set student.policy to the adapter's."
        )
    return state


def _fitting(network: PolicyNetwork, state: dict[str, Tensor], folder: Path) -> dict[str, Tensor]:
    own = {_published(name): parameter for name, parameter in network.trainable().items()}
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
    transformer: nn.Module, config: dict[str, Any], state: dict[str, Tensor], folder: Path
) -> None:
    """Refuse adapters of layers that a base does not have, or of a base with another number of them."""
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
    if misfits:
        more = f", and {len(misfits) - 5} more" if len(misfits) > 5 else ""
        raise UserError(
            f"{folder} is not an adapter for this base: {', '.join(misfits[:5])}{more}; give the teacher (and the "
            "adapters' settings) that it was trained with."
        )


def _fill(network: PolicyNetwork, state: dict[str, Tensor]) -> None:
    for name, parameter in network.trainable().items():
        fill(parameter, state[_published(name)])


def read_adapter(folder: Path) -> tuple[dict[str, Any], dict[str, Any], dict[str, Tensor]]:
    """Configuration, policy settings and weights of an adapter folder.

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
    return name.removeprefix(HEAD).removeprefix("transformer.").replace(".default.weight", ".weight")


def _policy_settings(config: dict[str, Any], policy: dict[str, Any], folder: Path) -> PolicySettings:
    try:
        if config["_class_name"].startswith("GM"):
            return GMFlowSettings(components=config["num_gaussians"], logstd_width=config["logstd_inner_dim"])
        return DXSettings(
            points=config["n_grid"],
            mode=policy.get("mode", "grid"),
            segment_size=policy.get("segment_size", 1.0),
            shift=policy.get("shift", 1.0),
        )
    except KeyError as error:
        raise UserError(
            f"{folder} holds no student: its {CONFIG} says nothing of a policy head ({error.args[0]} is missing)."
        ) from None


def _lora_settings(state: dict[str, Tensor]) -> LoRASettings | None:
    adapters = {name: tensor for name, tensor in state.items() if name.endswith(LORA_A)}
    if not adapters:
        return None
    rank = next(iter(adapters.values())).shape[0]
    return LoRASettings(rank=rank, dropout=0.0, targets=tuple(n.removesuffix(LORA_A) for n in adapters))
