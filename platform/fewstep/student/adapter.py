"""Adapters: files of a student's own weights, in the format in which π-Flow adapters are published.

    config.json                               class name, configuration of the base, sizes of the head
    diffusion_pytorch_model.safetensors       weights of head and LoRA; metadata `policy_config` is JSON

LoRA weights are named after the base's modules, `….lora_A.weight` and `….lora_B.weight`, those of the head after its
own (`norm_out`, `proj_out_means`, …). For a student whose weights are all trained, the file has all of them, under the
base's names.

Adapters of others are read, too, where each layer has a rank of its own, or a file says by `….alpha` that its adapters
are scaled by alpha/rank; where names begin with what others call the network (`transformer.`, `diffusion_model.`,
`base_model.model.`), and where the two matrices are called down and up or have peft's name of the adapter in theirs. We
write adapters whose factor is 1, without `….alpha`.

A DX head is one output projection with a velocity for each of its N points or coefficients. Its configuration is that
of a base with so many outputs, and says `n_grid` = N of a grid, `p_order` = N of a polynomial. Some published ones say
neither, and have the base's own class name; then the rows of the projection and `policy_config` tell.
"""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Mapping
from pathlib import Path
from statistics import mode
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from fewstep.config import PRECISIONS, Precision
from fewstep.errors import UserError
from fewstep.files import save_weights
from fewstep.models.devices import check_fits, return_freed_memory
from fewstep.models.family import Family, Transformer
from fewstep.models.heads import DXConfig, GMFlowConfig, PolicyConfig
from fewstep.models.network import LoRAConfig, PolicyNetwork
from fewstep.models.packing import PackedFamily
from fewstep.models.planned import lower_on_meta
from fewstep.models.sharded import fill


def _too_large(precision: Precision) -> str:
    """What to do where a student of that precision is too large for a device."""
    lower = PRECISIONS[PRECISIONS.index(precision) + 1 :]
    return (
        f"choose a lower precision ({' or '.join(lower)}), or " if lower else "choose "
    ) + "a device with more"


WEIGHTS = "diffusion_pytorch_model.safetensors"
CONFIG = "config.json"
LORA_A = ".lora_A.weight"
"""End of the name of a LoRA's first matrix, after the name of its layer."""

LORA_B = ".lora_B.weight"
"""End of the name of its second matrix."""

LORA = re.compile(r"\.lora[_.](A|B|down|up)(\.[^.]+)?\.weight$")
"""Ends that others give the names of the two matrices; between, peft has the adapter's name."""

PREFIXES = ("base_model.model.", "model.diffusion_model.", "diffusion_model.", "transformer.")
"""What others put before the names of a network's layers, in the order in which it is taken off."""

KOHYA = "lora_"
"""Begin of the names in kohya's form, such as `lora_unet_blocks_0_attn.lora_down.weight`."""

SCALING = "lora_adapter_metadata"
"""Key of safetensors' metadata under which diffusers' `save_lora_weights` puts peft's settings of an adapter."""

ALPHA = ".alpha"
"""End of the name of the number that, over the rank, is the factor of a layer's LoRA."""

PROJECTION, BIAS = "proj_out.weight", "proj_out.bias"
"""Names of the weights of a DX head."""


def adapter_state(network: PolicyNetwork, weights: Mapping[str, Tensor] | None = None) -> dict[str, Tensor]:
    """The student's weights under their published names, on the CPU.

    Args:
        network: the student's.
        weights: values, such as the EMA's, in place of the network's trainable parameters; by the network's own names.
    """
    chosen: Mapping[str, Tensor] = network.trainable() if weights is None else weights
    return {_published(name, network): tensor.detach().cpu().contiguous() for name, tensor in chosen.items()}


def save_adapter(network: PolicyNetwork, folder: Path, weights: dict[str, Tensor] | None = None) -> None:
    """Write an adapter's two files.

    Args:
        network: the student's.
        folder: made if it does not exist.
        weights: as for `adapter_state`.
    """
    folder.mkdir(parents=True, exist_ok=True)
    settings = network.policy_config
    base_class = type(network.transformer).__name__
    # Keys and class names are those of the published format.
    if isinstance(settings, GMFlowConfig):
        points = 1
        head = {
            "_class_name": f"GM{base_class}",
            "num_gaussians": settings.components,
            "logstd_inner_dim": settings.logstd_width,
            "gm_num_logstd_layers": 2,
            "logweights_channels": network.head.outputs // network.channels,
            "constant_logstd": None,
        }
        policy: dict[str, Any] = {"type": "GMFlow"}
    else:
        points = settings.points
        grid = settings.mode == "grid"
        head = {
            "_class_name": f"DX{base_class}",
            "n_grid": points if grid else 1,
            "p_order": 1 if grid else points,
        }
        policy = {
            "type": "DX",
            "segment_size": settings.segment_size,
            "shift": settings.shift,
            "mode": settings.mode,
        }
    base = _base_config(network, points)
    (folder / CONFIG).write_text(json.dumps(head | base, indent=2) + "\n")
    save_weights(
        adapter_state(network, weights), folder / WEIGHTS, metadata={"policy_config": json.dumps(policy)}
    )


def _base_config(network: PolicyNetwork, points: int) -> dict[str, Any]:
    """The base's configuration as an adapter's says it: with the outputs of `points` velocities."""
    # Without notes such as the path that it was loaded from.
    base = {k: v for k, v in network.transformer.config.items() if not k.startswith("_")}
    if isinstance(network.family, PackedFamily):
        # Of these networks the published format counts outputs per token, as if each token were a patch of one cell.
        base |= {"patch_size": 1, "out_channels": points * network.head.outputs}
    return base


def load_adapter(
    transformer: Transformer,
    family: Family,
    folder: Path,
    base: Path | None = None,
    precision: Precision = "float32",
    device: torch.device | str = "cpu",
) -> PolicyNetwork:
    """Make a student of a loaded teacher and an adapter's weights.

    Args:
        transformer: the teacher's; modified in place.
        family: of the teacher.
        folder: the adapter's.
        base: folder with the values of a transformer on the meta device; None for one that has them.
        precision: in which weights are held; in others than float32 the network is for generating alone.
        device: where values that are read from `base` go.

    Raises:
        UserError: there is no adapter, or it is one for another base, and the message lists what does not fit; or the
            device has less memory free than the student takes.
    """
    network, state = _student_of(transformer, family, folder, *read_adapter(folder))
    own = list(network.trainable())
    if precision != "float32":
        network.requires_grad_(False).lower(precision)  # of a student that has all weights itself, those too
    if base is not None:
        check_fits(network.nbytes, f"the student in {folder} in {precision}", device, _too_large(precision))
        network.fill(base, torch.device(device))
    for name in own:
        # Taken out, as it is copied: no second copy of all of them is to stay.
        network.assign(name, state.pop(_published(name, network)), network.get_parameter(name).device)
    return_freed_memory()
    return network


def adapter_on_meta(
    transformer: Transformer, family: Family, folder: Path, precision: Precision
) -> PolicyNetwork:
    """The student that `load_adapter` would make, without any values: of the adapter only the files' heads are read.

    Args:
        transformer: the teacher's, on the meta device; modified in place.
        family, folder, precision: as for `load_adapter`.

    Raises:
        UserError: as `load_adapter`.
    """
    adapter = read_adapter(folder, values=False)
    with torch.device("meta"):
        network, _ = _student_of(transformer, family, folder, *adapter)
    lower_on_meta(network.requires_grad_(False), precision)
    return network


def _student_of(
    transformer: Transformer,
    family: Family,
    folder: Path,
    config: dict[str, Any],
    policy: dict[str, Any],
    state: dict[str, Tensor],
) -> tuple[PolicyNetwork, dict[str, Tensor]]:
    """A new student with the head and adapters that an adapter has weights for, and those weights by published names.

    Args:
        transformer, family, folder: as for `load_adapter`.
        config, policy, state: as `read_adapter` gives them.

    Raises:
        UserError: as `load_adapter`.
    """
    state = _unprefixed(state, transformer, folder)
    _check_layers(transformer, config, state, folder)
    settings = _policy_config(
        config, policy, state, family.ending(transformer).projection.out_features, folder
    )
    # The file itself does not say so, but only a full student has weights of the base's inner layers.
    output = family.output_prefixes
    full = any(name in state for name, _ in transformer.named_parameters() if not name.startswith(output))
    ranks = {
        name.removesuffix(LORA_A): len(tensor) for name, tensor in state.items() if name.endswith(LORA_A)
    }
    # The file does not say which layers were adapted: the names of its weights do.
    lora = LoRAConfig(rank=mode(ranks.values()), dropout=0.0, targets=tuple(ranks)) if ranks else None
    network = PolicyNetwork(transformer, family, settings, lora, full=full, ranks=ranks)
    return network, _fitting(network, state, folder)


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
    state = _unprefixed(state, network.transformer, folder)
    state = _fitting(network, state, folder)
    given = _policy_config(config, policy, state, network.head.outputs, folder)
    own = network.policy_config
    # How a head starts is no property of its weights.
    if isinstance(given, GMFlowConfig) and isinstance(own, GMFlowConfig):
        own = own.model_copy(update={"bias_noise_std": given.bias_noise_std})
    if given != own:
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
    own = {_published(name, network): parameter for name, parameter in network.trainable().items()}
    if BIAS in own and BIAS not in state and network.head.bare:
        # The public format has the bias of the base's projection, and this base (FLUX.2) has none: ours is 0 then.
        state = state | {BIAS: torch.zeros(own[BIAS].shape)}
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
        f"{key} ({config[key]!r} for {own[key]!r})"
        for key in ("num_layers", "num_single_layers")
        if config.get(key) is not None and key in own and config[key] != own[key]
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
        raise UserError(
            f"{folder} is not an adapter for this base: {_some(misfits)}; give the teacher (and the "
            "adapters' settings) that it was trained with."
        )


def _some(names: list[str]) -> str:
    """The first five of a list, and how many more there are."""
    return ", ".join(names[:5]) + (f", and {len(names) - 5} more" if len(names) > 5 else "")


def _fill(network: PolicyNetwork, state: dict[str, Tensor]) -> None:
    """Copy weights by their published names into the network's trainable parameters."""
    for name, parameter in network.trainable().items():
        fill(parameter, state[_published(name, network)])


def read_adapter(
    folder: Path, values: bool = True
) -> tuple[dict[str, Any], dict[str, Any], dict[str, Tensor]]:
    """Read an adapter's folder: its configuration, policy settings and weights.

    The factor alpha/rank of a LoRA is multiplied into its second matrix, and `….alpha` left out.

    Args:
        folder: the adapter's.
        values: whether weights are read; otherwise they are on the meta device, and have their shapes alone.

    Raises:
        UserError: files are missing or broken, names are in kohya's form, or weights can't be used.
    """
    try:
        config = json.loads((folder / CONFIG).read_text())
        with safe_open(folder / WEIGHTS, framework="pt") as file:
            metadata = file.metadata() or {}
            policy = json.loads(metadata.get("policy_config", "{}"))
            scaling = json.loads(metadata.get(SCALING, "{}"))
            read = {
                # An alpha is a single number.
                name: file.get_tensor(
                    name
                ).clone()  # not the file's mapped pages, which would stay to the last
                if values or name.endswith(ALPHA)
                else torch.empty(file.get_slice(name).get_shape(), device="meta")
                for name in file.keys()  # noqa: SIM118 — not a dict
            }
        if not all(isinstance(part, dict) for part in (config, policy, scaling)):
            raise ValueError("the configuration is no table of names and values")
    except (OSError, ValueError, SafetensorError) as error:
        raise UserError(f"{folder} holds no readable adapter ({CONFIG} and {WEIGHTS}): {error}.") from None
    if kohya := [name for name in read if name.startswith(KOHYA)]:
        raise UserError(
            f"{folder} has names in kohya's form, such as {kohya[0]!r}, from which the layers can't be told: convert "
            "it to diffusers' names."
        )
    _check_scaling(scaling, folder)
    state = _renamed(read, lambda name: LORA.sub(_matrix, name), folder)
    _check_weights(state, folder)
    return config, policy, _scaled(state, folder)


def _check_scaling(settings: dict[str, Any], folder: Path) -> None:
    """Refuse an adapter that is, by peft's settings beside it, more than the product of its two matrices.

    Args:
        settings: by peft's names, which may have a prefix.
        folder: for messages.

    Raises:
        UserError: it is scaled by another factor than 1, or of another kind.
    """
    by_name = {name.rpartition(".")[2]: value for name, value in settings.items() if value}
    rank, alpha = by_name.get("r"), by_name.get("lora_alpha")
    faults = [f"{name} {by_name[name]!r}" for name in ("use_dora", "use_rslora") if name in by_name]
    if alpha != rank and None not in (alpha, rank):
        faults.append(f"lora_alpha {alpha!r} for r {rank!r}")
    if by_name.get("alpha_pattern", {}) != by_name.get("rank_pattern", {}):
        faults.append("an alpha_pattern other than its rank_pattern")
    if faults:
        raise UserError(
            f"{folder} says in {SCALING} that its adapters are scaled ({', '.join(faults)}), which is not read from "
            f"there: multiply the factor into the weights, or add LAYER{ALPHA}, and leave {SCALING} out."
        )


def _matrix(end: re.Match[str]) -> str:
    """Our end of the name of a LoRA's matrix, for another one."""
    return LORA_A if end[1] in ("A", "down") else LORA_B


def _unprefixed(state: dict[str, Tensor], transformer: Transformer, folder: Path) -> dict[str, Tensor]:
    """An adapter's weights by the names that the base has for its layers, without others' prefixes.

    Raises:
        UserError: two weights are of one name then.
    """
    # A network may have a part of that name itself.
    parts = dict(transformer.named_children())
    prefixes = [prefix for prefix in PREFIXES if prefix.partition(".")[0] not in parts]

    def bare(name: str) -> str:
        for prefix in prefixes:
            name = name.removeprefix(prefix)
        return name

    return _renamed(state, bare, folder)


def _renamed(state: Mapping[str, Tensor], rename: Callable[[str], str], folder: Path) -> dict[str, Tensor]:
    """An adapter's weights by other names.

    Raises:
        UserError: two weights get one name.
    """
    renamed: dict[str, Tensor] = {}
    for name, tensor in state.items():
        if (new := rename(name)) in renamed:
            raise UserError(
                f"{folder} has two weights for {new}, one of them called {name}: leave in one adapter only."
            )
        renamed[new] = tensor
    return renamed


def _check_weights(state: Mapping[str, Tensor], folder: Path) -> None:
    """Refuse weights that would give no images, or others than the adapter's.

    Raises:
        UserError: some are quantised to whole numbers or not finite, or a LoRA has rank 0.
    """
    faults = []
    for name, tensor in state.items():
        if name.endswith(ALPHA):
            continue  # a number, for which `_scaled` has a message of its own
        if not tensor.is_floating_point():
            faults.append(f"{name} ({str(tensor.dtype).removeprefix('torch.')}, not floating-point)")
        elif not (tensor.is_meta or tensor.float().isfinite().all()):  # types of 8 bits have no such check
            faults.append(f"{name} (not finite)")
        elif name.endswith(LORA_A) and (tensor.ndim < 2 or not len(tensor)):
            faults.append(f"{name} (shape {tuple(tensor.shape)}, without a rank)")
    if faults:
        raise UserError(
            f"{folder} has weights that can't be used: {_some(faults)}; export it again with finite floating-point "
            "weights, and only layers of rank 1 or more."
        )


def _scaled(state: dict[str, Tensor], folder: Path) -> dict[str, Tensor]:
    """An adapter's weights with the `….alpha` of each LoRA multiplied into its second matrix.

    Raises:
        UserError: an alpha is no number.
    """
    # A network may have parameters of its own of that name: those of a LoRA stand beside its matrices.
    layers = [name.removesuffix(LORA_A) for name in state if name.endswith(LORA_A)]
    scaled = [layer for layer in layers if layer + ALPHA in state and layer + LORA_B in state]
    alphas = {layer + ALPHA: state[layer + ALPHA] for layer in scaled}
    _refuse(
        [
            f"{name} (no finite number)"
            for name, alpha in alphas.items()
            if alpha.numel() != 1 or not alpha.isfinite().all()
        ],
        folder,
    )
    state = dict(state)
    for layer in scaled:
        factor = state.pop(layer + ALPHA).item() / len(state[layer + LORA_A])
        # In float32: the product may not be a number of the file's type.
        state[layer + LORA_B] = state[layer + LORA_B].float() * factor
    return state


def _published(name: str, network: PolicyNetwork) -> str:
    """The published name of one of a `PolicyNetwork`'s parameters."""
    # peft puts the adapter's name, here always "default", into the names of its parameters.
    return (
        name.removeprefix(network.head_prefix)
        .removeprefix("transformer.")
        .replace(".default.weight", ".weight")
    )


def _policy_config(
    config: dict[str, Any], policy: dict[str, Any], state: dict[str, Tensor], outputs: int, folder: Path
) -> PolicyConfig:
    """The head's settings, from an adapter's configuration, policy settings and weights.

    Args:
        config: of the adapter.
        policy: settings of the policy, from the weights' metadata.
        state: the adapter's weights.
        outputs: of the base's projection, C·p².
        folder: for messages.

    Raises:
        UserError: the configuration is not that of a student, or of one with a head that is not known here.
    """
    # null says as much as nothing.
    config = {key: value for key, value in config.items() if value is not None}
    try:
        if str(config.get("_class_name")).startswith("GM"):
            if "constant_logstd" in config:
                raise ValueError(
                    f"constant_logstd {config['constant_logstd']!r}, where logstds are predicted here"
                )
            if (layers := config.get("gm_num_logstd_layers", 2)) != 2:
                raise ValueError(f"gm_num_logstd_layers {layers!r}, where there are 2 here")
            return GMFlowConfig(components=config["num_gaussians"], logstd_width=config["logstd_inner_dim"])
        return _dx_config(config, policy, state, outputs)
    except KeyError as error:
        raise UserError(
            f"{folder} holds no student: its {CONFIG} says nothing of a policy head ({error.args[0]} is missing)."
        ) from None
    except (ValueError, TypeError) as error:
        reason = " ".join(str(error).split())[:200]
        raise UserError(
            f"{folder} holds no student that fewstep can build: its settings of the policy head can't be used "
            f"({reason}); export it again, with a GMFlow head or a DX head of mode grid or polynomial."
        ) from None


def _dx_config(
    config: dict[str, Any], policy: dict[str, Any], state: dict[str, Tensor], outputs: int
) -> DXConfig:
    """As `_policy_config`, of a DX head.

    Raises:
        KeyError: nothing says that it is one.
        ValueError: a setting is unknown or out of range.
    """
    is_dx = str(config.get("_class_name")).startswith("DX") or policy.get("type") == "DX"
    if not is_dx and "n_grid" not in config:
        raise KeyError("n_grid")
    grid, order = config.get("n_grid", 1), config.get("p_order", 1)
    for key, number in (("n_grid", grid), ("p_order", order)):
        if type(number) is not int or number < 1:  # JSON's true is no number
            raise ValueError(f"{key} {number!r}, which is no whole number of at least 1")
    if grid > 1 and order > 1:
        raise ValueError(
            f"n_grid {grid} and p_order {order} together, which is neither a grid nor a polynomial"
        )
    points = grid * order
    if not {"n_grid", "p_order"} & config.keys():
        if PROJECTION not in state:
            raise KeyError(PROJECTION)
        # Rows for no whole number of velocities are another base's, and refused by their shape.
        points = max(1, len(state[PROJECTION]) // outputs)
    # What the file leaves out has the default of the public policy.
    given = {key: policy[key] for key in ("mode", "segment_size", "shift") if policy.get(key) is not None}
    return DXConfig(**({"points": points, "mode": "polynomial" if order > 1 else "grid"} | given))
