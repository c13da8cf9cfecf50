"""Adapters as others publish them are read for what they mean, and ours are what others' loaders expect."""

from __future__ import annotations

import json
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import diffusers
import numpy as np
import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from torch import Tensor

from fewstep.errors import UserError
from fewstep.models.adapters import LoRAConfig
from fewstep.models.conditioning import TextConditioning
from fewstep.models.heads import DXConfig, GMFlowConfig, PolicyConfig
from fewstep.models.network import PolicyNetwork
from fewstep.models.registry import get_family
from fewstep.models.teacher import load_teacher
from fewstep.student.adapter import (
    CONFIG,
    SCALING,
    WEIGHTS,
    check_adapter,
    load_adapter,
    read_adapter,
    save_adapter,
)

ADAPTERS = Path(__file__).parents[1] / "conformance" / "adapters"

with np.load(ADAPTERS / "io.npz") as archive:
    IO = {key: torch.from_numpy(archive[key]) for key in archive.files}

DX_POLICY = {"type": "DX", "segment_size": 2 / 7, "shift": 3.2}


def teacher(kind: str):
    guidance = float(IO["flux/guidance"][0]) if kind == "flux" else None
    transformer, family, _ = load_teacher(
        str(ADAPTERS / f"{kind}_base"), {"qwen": "qwen_image"}.get(kind, kind), guidance
    )
    return transformer, family


def conditioning(kind: str) -> TextConditioning:
    return TextConditioning(
        IO[f"{kind}/prompt_embeds"],
        IO[f"{kind}/prompt_mask"].bool() if f"{kind}/prompt_mask" in IO
        else torch.ones(IO[f"{kind}/prompt_embeds"].shape[:2], dtype=torch.bool),
        IO.get(f"{kind}/pooled"),
    )  # fmt: skip


def predicted(network: PolicyNetwork, kind: str) -> dict[str, Tensor]:
    """What the head predicts at the recorded inputs."""
    x = IO[f"{kind}/x"]
    with torch.no_grad():
        packed = network.eval()(x, IO[f"{kind}/t"], conditioning(kind), student=True)
    return network.head.parameters_of(packed, network._unpack(packed, x))


def assert_recorded(network: PolicyNetwork, name: str) -> None:
    for key, value in predicted(network, name.partition("_")[0]).items():
        torch.testing.assert_close(value, IO[f"{name}/{key}"], atol=1e-4, rtol=0)


def rewritten(
    name: str,
    folder: Path,
    *,
    config: Callable[[dict[str, Any]], dict[str, Any]] = lambda config: config,
    state: Callable[[dict[str, Tensor]], dict[str, Tensor]] = lambda state: state,
    policy: dict[str, Any] | None = None,
) -> Path:
    """A copy of an adapter of `tests/conformance`, with changed parts."""
    source = ADAPTERS / f"{name}_adapter"
    with safe_open(source / WEIGHTS, "pt") as file:
        metadata = file.metadata() if policy is None else {"policy_config": json.dumps(policy)}
    folder.mkdir(exist_ok=True)
    (folder / CONFIG).write_text(json.dumps(config(json.loads((source / CONFIG).read_text()))))
    save_file(state(load_file(source / WEIGHTS)), folder / WEIGHTS, metadata=metadata)
    return folder


def without_keys(class_name: str) -> Callable[[dict[str, Any]], dict[str, Any]]:
    """The configuration of the widened base, which says nothing of points."""
    return lambda config: (
        {k: v for k, v in config.items() if k not in ("n_grid", "p_order")}
        | {"_class_name": class_name, "patch_size": 1, "out_channels": 5 * 4 * 4}
    )


@pytest.mark.parametrize("class_name", ["QwenImageTransformer2DModel", "DXQwenImageTransformer2DModel"])
@pytest.mark.parametrize("mode", [None, "grid", "polynomial"])
def test_a_dx_adapter_that_does_not_say_its_points_is_read_by_weights_and_metadata(
    class_name: str, mode: str | None, tmp_path: Path
) -> None:
    policy = DX_POLICY | ({} if mode is None else {"mode": mode})
    folder = rewritten("qwen_dx", tmp_path, config=without_keys(class_name), policy=policy)
    network = load_adapter(*teacher("qwen"), folder)
    assert network.policy_config == DXConfig(points=5, mode=mode or "grid", segment_size=2 / 7, shift=3.2)
    assert_recorded(network, "qwen_dx")


@pytest.mark.parametrize(
    ("keys", "policy", "mode"),
    [
        ({"n_grid": 1, "p_order": 5}, {"mode": "polynomial"}, "polynomial"),  # as published
        ({"n_grid": 1, "p_order": 5}, {}, "polynomial"),
        ({"n_grid": 5, "p_order": 1}, {"mode": "polynomial"}, "polynomial"),  # as fewstep 0.2 wrote it
        ({"n_grid": 5}, {}, "grid"),
        ({"n_grid": None}, {}, "grid"),
        ({"n_grid": 5, "p_order": None, "num_layers": None}, {}, "grid"),
        ({"n_grid": None, "p_order": 5}, {}, "polynomial"),
        ({"p_order": 5}, {}, "polynomial"),
    ],
)
def test_the_points_of_a_dx_adapter_stand_under_either_key(
    keys: dict[str, int], policy: dict[str, str], mode: str, tmp_path: Path
) -> None:
    def config(own: dict[str, Any]) -> dict[str, Any]:
        return {k: v for k, v in own.items() if k not in ("n_grid", "p_order")} | keys

    folder = rewritten("qwen_dx", tmp_path, config=config, policy=DX_POLICY | policy)
    network = load_adapter(*teacher("qwen"), folder)
    assert (network.policy_config.points, network.policy_config.mode) == (5, mode)
    assert_recorded(network, "qwen_dx")


@pytest.mark.parametrize(
    ("config", "policy", "message"),
    [
        ({"n_grid": 5, "p_order": 3}, DX_POLICY, "n_grid 5 and p_order 3 together"),
        ({}, DX_POLICY | {"mode": "spline"}, "can't be used .*mode.*'grid' or 'polynomial'"),
        ({"n_grid": "5"}, DX_POLICY, "can't be used .*n_grid '5', which is no whole number"),
        ({"n_grid": 0}, DX_POLICY, "can't be used .*n_grid 0, which is no whole number"),
        ({"p_order": True}, DX_POLICY, "can't be used .*p_order True, which is no whole number"),
        ({"num_layers": "2"}, DX_POLICY, r"not an adapter for this base: num_layers \('2' for 2\)"),
        ({}, DX_POLICY | {"segment_size": 0}, "can't be used .*segment_size"),
        ({}, ["DX"], "no readable adapter"),
        ({"_class_name": "GMQwenImageTransformer2DModel"}, {}, r"num_gaussians is missing"),
        (
            {"n_grid": 4},
            DX_POLICY,
            r"not an adapter for this base: proj_out.weight \(\(80, 48\) for \(64, 48\)",
        ),
    ],
)
def test_a_head_that_is_not_known_here_is_refused_by_name(
    config: dict[str, Any], policy: Any, message: str, tmp_path: Path
) -> None:
    folder = rewritten("qwen_dx", tmp_path, config=lambda own: own | config, policy=policy)
    with pytest.raises(UserError, match=message) as caught:
        load_adapter(*teacher("qwen"), folder)
    assert "\n" not in str(caught.value)


def of_many_ranks(state: dict[str, Tensor], *, alphas: bool) -> dict[str, Tensor]:
    """The same LoRA updates by other ranks, each layer's own; with alphas, by other factors, too."""
    changed = dict(state)
    layers = sorted(name.removesuffix(".lora_A.weight") for name in state if name.endswith(".lora_A.weight"))
    for index, layer in enumerate(layers):
        a, b = state[f"{layer}.lora_A.weight"], state[f"{layer}.lora_B.weight"]
        times = 1 + index % 3  # ranks 4, 8 and 12
        alpha, rank = 2.0 ** (index % 4), times * len(a)
        changed[f"{layer}.lora_A.weight"] = a.repeat(times, 1)
        changed[f"{layer}.lora_B.weight"] = b.repeat(1, times) / times / (alpha / rank if alphas else 1)
        if alphas:
            # A number or a list of one: both are written.
            changed[f"{layer}.alpha"] = torch.tensor(alpha) if index % 2 else torch.tensor([alpha])
    return changed


@pytest.mark.parametrize("alphas", [False, True])
@pytest.mark.parametrize("name", ["qwen_gm", "qwen_dx", "flux_gm"])
def test_layers_of_many_ranks_and_alphas_add_up_to_what_was_recorded(
    name: str, alphas: bool, tmp_path: Path
) -> None:
    kind = name.partition("_")[0]
    folder = rewritten(name, tmp_path / "one", state=lambda state: of_many_ranks(state, alphas=alphas))
    network = load_adapter(*teacher(kind), folder)
    assert_recorded(network, name)
    # Written and read again: by then the factors are part of the weights.
    save_adapter(network, tmp_path / "again")
    assert not any(key.endswith(".alpha") for key in load_file(tmp_path / "again" / WEIGHTS))
    assert_recorded(load_adapter(*teacher(kind), tmp_path / "again"), name)
    network.keep_folded()  # as pipelines do
    assert_recorded(network, name)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (
            {"transformer_blocks.0.attn.to_q.alpha": torch.tensor(1.0)},
            r"to_q.alpha \(not in the base\)",
        ),
        (
            {"transformer_blocks.0.img_mlp.net.2.alpha": torch.tensor(float("nan"))},
            r"net.2.alpha \(no finite number\)",
        ),
        (
            {"transformer_blocks.0.img_mlp.net.2.lora_magnitude_vector.weight": torch.ones(48)},
            r"lora_magnitude_vector.weight \(not in the base\)",
        ),
        (
            {"transformer_blocks.0.img_mlp.net.2.lora_B.weight": torch.ones(48, 3)},
            r"lora_B.weight \(\(48, 3\) for \(48, 4\)\)",
        ),
    ],
)
def test_what_is_no_plain_lora_is_refused_by_name(
    change: dict[str, Tensor], message: str, tmp_path: Path
) -> None:
    folder = rewritten("qwen_gm", tmp_path, state=lambda state: state | change)
    with pytest.raises(UserError, match=f"not an adapter for this base: .*{message}"):
        load_adapter(*teacher("qwen"), folder)


def renamed(**ends: str) -> Callable[[dict[str, Tensor]], dict[str, Tensor]]:
    """Weights with other ends of the names of LoRA's matrices, and another begin of those or of all names."""
    begin, inner = ends.pop("begin", ""), ends.pop("inner", "")

    def name(own: str) -> str:
        if ".lora_" not in own:
            return begin + own
        layer, _, matrix = own.removesuffix(".weight").rpartition(".lora_")
        return begin + inner + layer + ends.get(matrix, f".lora_{matrix}.weight")

    return lambda state: {name(own): tensor for own, tensor in state.items()}


DOWN_UP = {"A": ".lora.down.weight", "B": ".lora.up.weight"}
PEFT = {"A": ".lora_A.default.weight", "B": ".lora_B.default.weight"}


@pytest.mark.parametrize(
    "change",
    [
        {"inner": "transformer."},
        {"begin": "transformer."},
        {"begin": "diffusion_model."},
        {"inner": "model.diffusion_model."},
        {"begin": "base_model.model."},
        {"inner": "base_model.model.transformer."},
        PEFT,
        {"A": ".lora_A.student.weight", "B": ".lora_B.student.weight"},
        DOWN_UP,
        {"A": ".lora_down.weight", "B": ".lora_up.weight"},
        {"inner": "transformer.", **DOWN_UP},
        {"inner": "base_model.model.", **PEFT},
    ],
)
@pytest.mark.parametrize("name", ["qwen_gm", "qwen_dx", "flux_gm"])
def test_names_of_other_makers_are_read(name: str, change: dict[str, str], tmp_path: Path) -> None:
    folder = rewritten(name, tmp_path, state=renamed(**change))
    network = load_adapter(*teacher(name.partition("_")[0]), folder)
    assert_recorded(network, name)


def test_alphas_count_under_other_makers_names(tmp_path: Path) -> None:
    def other(state: dict[str, Tensor]) -> dict[str, Tensor]:
        return renamed(begin="diffusion_model.", **DOWN_UP)(of_many_ranks(state, alphas=True))

    assert_recorded(load_adapter(*teacher("qwen"), rewritten("qwen_gm", tmp_path, state=other)), "qwen_gm")


def test_training_goes_on_from_an_adapter_with_other_makers_names(tmp_path: Path) -> None:
    network = load_adapter(*teacher("qwen"), ADAPTERS / "qwen_gm_adapter")
    plain = check_adapter(network, ADAPTERS / "qwen_gm_adapter")
    given = check_adapter(
        network, rewritten("qwen_gm", tmp_path, state=renamed(begin="transformer.", **PEFT))
    )
    assert given.keys() == plain.keys()
    assert all(torch.equal(given[name], tensor) for name, tensor in plain.items())


LAYER = "transformer_blocks.0.img_mlp.net.2"


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({f"{LAYER}.lora_A.weight": torch.ones(4, 192, dtype=torch.int8)}, r"A.weight \(int8, not floating-point\)"),
        ({"proj_out_means.weight": torch.ones(48, 48, dtype=torch.int64)}, r"weight \(int64, not floating-point\)"),
        ({f"{LAYER}.lora_B.weight": torch.full((48, 4), float("nan"))}, r"lora_B.weight \(not finite\)"),
        ({"proj_out_means.bias": torch.full((48,), float("inf"))}, r"means.bias \(not finite\)"),
        (
            {f"{LAYER}.lora_B.weight": torch.full((48, 4), float("nan")).to(torch.float8_e4m3fn)},
            r"lora_B.weight \(not finite\)",
        ),
        (
            {f"{LAYER}.lora_A.weight": torch.ones(0, 192), f"{LAYER}.lora_B.weight": torch.ones(48, 0)},
            r"lora_A.weight \(shape \(0, 192\), without a rank\)",
        ),
        ({f"{LAYER}.lora_A.weight": torch.ones(())}, r"lora_A.weight \(shape \(\), without a rank\)"),
        (
            {f"{LAYER}.lora_A.weight": torch.ones(0, 192), f"{LAYER}.alpha": torch.ones(())},
            r"lora_A.weight \(shape \(0, 192\), without a rank\)",
        ),
    ],
)  # fmt: skip
def test_weights_that_can_t_be_used_are_refused_by_name(
    change: dict[str, Tensor], message: str, tmp_path: Path
) -> None:
    folder = rewritten("qwen_gm", tmp_path, state=lambda state: state | change)
    with pytest.raises(UserError, match=f"has weights that can't be used: .*{message}"):
        load_adapter(*teacher("qwen"), folder)


@pytest.mark.parametrize(
    ("config", "message"),
    [
        ({"constant_logstd": -1.0}, r"constant_logstd -1\.0"),
        ({"constant_logstd": 0}, r"constant_logstd 0"),
        ({"gm_num_logstd_layers": 1}, r"gm_num_logstd_layers 1"),
        ({"gm_num_logstd_layers": 3}, r"gm_num_logstd_layers 3"),
        ({"num_gaussians": None}, r"num_gaussians is missing"),
    ],
)
def test_a_gm_head_of_another_form_is_refused_by_name(
    config: dict[str, Any], message: str, tmp_path: Path
) -> None:
    folder = rewritten("qwen_gm", tmp_path, config=lambda own: own | config)
    with pytest.raises(UserError, match=message) as caught:
        load_adapter(*teacher("qwen"), folder)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("begin", ["lora_unet_", "lora_te1_", "lora_transformer_"])
def test_names_in_kohyas_form_are_refused_with_the_conversion(begin: str, tmp_path: Path) -> None:
    def kohya(state: dict[str, Tensor]) -> dict[str, Tensor]:
        return {
            begin + n.replace(".lora_A", "@lora_down").replace(".lora_B", "@lora_up").removesuffix(".weight")
            .replace(".", "_").replace("@", ".") + ".weight" if ".lora_" in n else n: tensor
            for n, tensor in state.items()
        }  # fmt: skip

    folder = rewritten("qwen_gm", tmp_path, state=kohya)
    with pytest.raises(
        UserError, match=rf"in kohya's form, such as '{begin}.*convert it to diffusers' names"
    ):
        load_adapter(*teacher("qwen"), folder)


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"r": 4, "lora_alpha": 4, "use_dora": False, "alpha_pattern": {}}, None),
        ({"r": 4, "rank_pattern": {"to_q": 8}, "lora_alpha": 4, "alpha_pattern": {"to_q": 8}}, None),
        ({"r": 4, "lora_alpha": 8}, "lora_alpha 8 for r 4"),
        ({"r": 4, "lora_alpha": 4, "use_rslora": True}, "use_rslora True"),
        ({"r": 4, "lora_alpha": 4, "use_dora": True}, "use_dora True"),
        ({"r": 4, "lora_alpha": 4, "alpha_pattern": {"to_q": 2}}, "alpha_pattern"),
    ],
)
def test_a_factor_that_stands_in_the_metadata_is_not_passed_over(
    settings: dict[str, Any], message: str | None, tmp_path: Path
) -> None:
    folder = rewritten("qwen_gm", tmp_path, state=renamed(inner="transformer."))
    metadata = {SCALING: json.dumps({f"transformer.{key}": value for key, value in settings.items()})}
    save_file(load_file(folder / WEIGHTS), folder / WEIGHTS, metadata=metadata)  # as diffusers writes it
    if message is None:
        assert_recorded(load_adapter(*teacher("qwen"), folder), "qwen_gm")
    else:
        with pytest.raises(UserError, match=f"that its adapters are scaled .*{message}"):
            load_adapter(*teacher("qwen"), folder)


def test_two_weights_of_one_name_are_refused(tmp_path: Path) -> None:
    def twice(state: dict[str, Tensor]) -> dict[str, Tensor]:
        return state | {f"{LAYER}.lora_A.other.weight": state[f"{LAYER}.lora_A.weight"].clone()}

    with pytest.raises(UserError, match=rf"has two weights for {LAYER}.lora_A.weight"):
        load_adapter(*teacher("qwen"), rewritten("qwen_gm", tmp_path, state=twice))


def test_training_goes_on_from_an_adapter_with_alphas_and_refuses_other_ranks(tmp_path: Path) -> None:
    names = [n.removesuffix(".lora_A.weight") for n in load_file(ADAPTERS / "qwen_gm_adapter" / WEIGHTS)
             if n.endswith(".lora_A.weight")]  # fmt: skip
    network = PolicyNetwork(
        *teacher("qwen"),
        GMFlowConfig(components=3, logstd_width=32),
        LoRAConfig(rank=4, targets=tuple(names)),
    )
    layer = names[0]

    def halved(state: dict[str, Tensor]) -> dict[str, Tensor]:
        return state | {f"{layer}.alpha": torch.tensor(2.0)}

    source = load_file(ADAPTERS / "qwen_gm_adapter" / WEIGHTS)
    given = check_adapter(network, rewritten("qwen_gm", tmp_path / "halved", state=halved))
    torch.testing.assert_close(given[f"{layer}.lora_B.weight"], source[f"{layer}.lora_B.weight"] / 2)
    with pytest.raises(UserError, match=re.escape(f"{names[1]}.lora_A.weight ((8, ")):
        check_adapter(
            network, rewritten("qwen_gm", tmp_path, state=lambda state: of_many_ranks(state, alphas=False))
        )


TINY_FLUX2 = {
    "patch_size": 1, "in_channels": 16, "num_layers": 1, "num_single_layers": 1, "attention_head_dim": 16,
    "num_attention_heads": 2, "joint_attention_dim": 24, "timestep_guidance_channels": 256,
    "axes_dims_rope": (4, 4, 4, 4), "guidance_embeds": False,
}  # fmt: skip


def base(kind: str):
    """(transformer, family, inputs) of a tiny network; of FLUX.2 there is none in `tests/conformance`."""
    if kind != "flux2":
        return (*teacher(kind), (IO[f"{kind}/x"], IO[f"{kind}/t"], conditioning(kind)))
    torch.manual_seed(0)
    family = get_family("flux2")
    text = TextConditioning(torch.randn(2, 5, 24), torch.ones(2, 5, dtype=torch.bool))
    inputs = (torch.randn(2, 4, 6, 6), torch.tensor([0.9, 0.4]), text)
    torch.manual_seed(1)
    return family.build(TINY_FLUX2), family, inputs


def disturbed(network: PolicyNetwork) -> PolicyNetwork:
    """The network with other values of all it trains."""
    generator = torch.Generator().manual_seed(2)
    with torch.no_grad():
        for parameter in network.trainable().values():
            parameter.add_(torch.randn(parameter.shape, generator=generator) * 0.05)
    return network.eval()


@pytest.mark.parametrize("mode", ["grid", "polynomial"])
@pytest.mark.parametrize("kind", ["qwen", "flux", "flux2"])
def test_our_dx_adapter_is_a_widened_base_to_other_loaders_and_such_a_one_is_ours(
    kind: str, mode: str, tmp_path: Path
) -> None:
    transformer, family, inputs = base(kind)
    whole = {name: parameter.detach().clone() for name, parameter in transformer.named_parameters()}
    settings = DXConfig(points=3, mode=mode, segment_size=0.5, shift=2.0)
    network = disturbed(PolicyNetwork(transformer, family, settings, LoRAConfig(rank=2)))
    if kind == "flux2":  # the public widened class has no such bias
        torch.nn.init.zeros_(network.head.proj_out.bias)
    save_adapter(network, tmp_path)
    config, state = json.loads((tmp_path / CONFIG).read_text()), load_file(tmp_path / WEIGHTS)
    assert (config["n_grid"], config["p_order"]) == ((3, 1) if mode == "grid" else (1, 3))
    with safe_open(tmp_path / WEIGHTS, "pt") as file:
        assert json.loads(file.metadata()["policy_config"]) == {
            "type": "DX", "segment_size": 0.5, "shift": 2.0, "mode": mode
        }  # fmt: skip

    # As a loader does that knows nothing of fewstep: diffusers' own class with that configuration.
    widened = getattr(diffusers, config["_class_name"].removeprefix("DX")).from_config(config)
    if kind == "flux2":
        del state["proj_out.bias"]
    ends = {name: tensor for name, tensor in state.items() if name.startswith(("norm_out.", "proj_out."))}
    inner = {k: v for k, v in whole.items() if not k.startswith(("norm_out.", "proj_out."))}
    widened.load_state_dict(inner | ends)
    with torch.no_grad():
        for name, down in state.items():
            if (layer := name.removesuffix(".lora_A.weight")) != name:
                widened.get_parameter(f"{layer}.weight").add_(state[f"{layer}.lora_B.weight"] @ down)
        widened.eval()
        expected = family.denoise(widened, *inputs)
        torch.testing.assert_close(network(*inputs, student=True), expected, atol=1e-5, rtol=1e-4)

    # And back, as that loader's exporter would write it: with neither key, in the base's class.
    published = {k: v for k, v in config.items() if k not in ("n_grid", "p_order")}
    published["_class_name"] = type(widened).__name__
    (tmp_path / CONFIG).write_text(json.dumps(published))
    policy = json.dumps(DX_POLICY | {"segment_size": 0.5, "shift": 2.0, "mode": mode})
    save_file(state, tmp_path / WEIGHTS, metadata={"policy_config": policy})
    fresh, family, inputs = base(kind)
    again = load_adapter(fresh, family, tmp_path)
    assert again.policy_config == settings
    with torch.no_grad():
        torch.testing.assert_close(again.eval()(*inputs, student=True), expected, atol=1e-5, rtol=1e-4)


@pytest.mark.parametrize("settings", [GMFlowConfig(components=3, logstd_width=8), DXConfig(points=2)])
@pytest.mark.parametrize("kind", ["qwen", "flux", "flux2"])
def test_our_configuration_counts_outputs_as_published_ones_do(
    kind: str, settings: PolicyConfig, tmp_path: Path
) -> None:
    transformer, family, _ = base(kind)
    save_adapter(PolicyNetwork(transformer, family, settings, LoRAConfig(rank=2)), tmp_path)
    config, state = json.loads((tmp_path / CONFIG).read_text()), load_file(tmp_path / WEIGHTS)
    assert config["patch_size"] == 1
    if isinstance(settings, DXConfig):
        assert len(state["proj_out.weight"]) == config["out_channels"]
    else:
        assert len(state["proj_out_means.weight"]) == config["num_gaussians"] * config["out_channels"]
        assert (
            len(state["proj_out_logweights.weight"])
            == config["num_gaussians"] * config["logweights_channels"]
        )


def test_a_network_s_own_alpha_is_a_weight_like_any_other(tmp_path: Path) -> None:
    save_file({"alpha": torch.ones(4), "inner.alpha": torch.full((4,), 3.0)}, tmp_path / WEIGHTS)
    (tmp_path / CONFIG).write_text("{}")
    assert read_adapter(tmp_path)[2].keys() == {"alpha", "inner.alpha"}
