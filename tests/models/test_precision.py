"""Weights in lower precisions: what is lowered, what stays exact, what it costs in exactness, and what is refused."""

from __future__ import annotations

import asyncio
import json
import sys
from pathlib import Path

import pytest
import torch
import torch.distributed as dist
import torch.multiprocessing as mp
from diffusers import DiffusionPipeline
from diffusers.models.embeddings import Timesteps
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.nn import functional as F

from fewstep.config import PRECISIONS, Precision
from fewstep.engine.engine import Engine
from fewstep.engine.generation import Generation
from fewstep.engine.models import ModelStore
from fewstep.engine.source import ModelSource
from fewstep.errors import UserError
from fewstep.models import precision as precisions
from fewstep.models.adapters import LoRAConfig
from fewstep.models.conditioning import ClassConditioning, Conditioning, TextConditioning
from fewstep.models.family import Family
from fewstep.models.flux import Flux
from fewstep.models.flux2 import Flux2
from fewstep.models.heads import GMFlowConfig
from fewstep.models.network import PolicyNetwork
from fewstep.models.precision import (
    check_arithmetic,
    check_precision,
    compute_in_bfloat16,
    held_bytes,
    is_quantised,
    pipeline_arguments,
    precision_of,
)
from fewstep.models.registry import get_family
from fewstep.models.teacher import load_teacher, open_teacher
from fewstep.student import FewStepPipeline, resolve_student
from fewstep.student.diffusers import save_diffusers

pytestmark = pytest.mark.usefixtures("emulated_bfloat16")

LOWER: tuple[Precision, ...] = ("bfloat16", "int8", "int4")
TIMES = torch.tensor([0.9987, 0.8889, 0.7059])
"""The first is 1 in bfloat16; the others are starts of four evaluations, 0.8906 and 0.7070 there."""

WIDE = {"num_layers": 2, "attention_head_dim": 32, "num_attention_heads": 4}
FAMILIES: dict[str, tuple[Family, dict, float]] = {
    "qwen_image": (
        get_family("qwen_image"),
        WIDE
        | {"patch_size": 2, "in_channels": 12, "out_channels": 3}
        | {"joint_attention_dim": 24, "axes_dims_rope": [8, 12, 12]},
        1.0,
    ),
    "flux": (
        Flux(3.5),
        WIDE
        | {"patch_size": 1, "in_channels": 12, "num_single_layers": 1, "joint_attention_dim": 24}
        | {"guidance_embeds": True, "pooled_projection_dim": 24, "axes_dims_rope": (8, 12, 12)},
        1000.0,
    ),
    "flux2": (
        Flux2(3.5),
        WIDE
        | {"patch_size": 1, "in_channels": 12, "num_single_layers": 1, "joint_attention_dim": 24}
        | {"guidance_embeds": True, "axes_dims_rope": (8, 8, 8, 8)},
        1000.0,
    ),
    "dit": (
        get_family("dit"),
        WIDE | {"in_channels": 3, "sample_size": 8, "patch_size": 2, "num_embeds_ada_norm": 5},
        1000.0,
    ),
}
"""Small networks of every kind, and the unit of time in which their embeddings are called."""


def student(name: str) -> PolicyNetwork:
    family, config, _ = FAMILIES[name]
    torch.manual_seed(0)
    transformer = family.build(config)
    with torch.no_grad():
        for parameter in transformer.parameters():  # DiT's last layers begin at 0
            parameter.add_(torch.randn_like(parameter) * 0.02)
    return PolicyNetwork(transformer, family, GMFlowConfig(components=2, logstd_width=8), None).eval()


def inputs(name: str) -> tuple[Tensor, Tensor, Conditioning]:
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(3, 3, 8, 8, generator=generator)
    if name == "dit":
        return x, TIMES, ClassConditioning(torch.tensor([0, 2, 5]))
    pooled = torch.randn(3, 24, generator=generator) if name == "flux" else None
    states = torch.randn(3, 4, 24, generator=generator)
    return x, TIMES, TextConditioning(states, torch.ones(3, 4, dtype=torch.bool), pooled)


class Seen:
    """The times that a network's embeddings get, and the types of its rotary tables."""

    def __init__(self, transformer: nn.Module) -> None:
        self.times: list[Tensor] = []
        self.tables: set[torch.dtype] = set()
        for name, module in transformer.named_modules():
            if isinstance(module, Timesteps):
                module.register_forward_pre_hook(
                    lambda _, given: self.times.append(given[0].detach().clone())
                )
            if name == "pos_embed" and not hasattr(module, "proj"):  # DiT's belong to the input layer
                module.register_forward_hook(lambda *given: self._table(given[2]))

    def _table(self, table: object) -> None:
        parts = table if isinstance(table, tuple | list) else [table]
        self.tables |= {part.dtype for part in parts if isinstance(part, Tensor)}

    def check(self, times: Tensor, unit: float) -> None:
        assert any(torch.equal(seen, unit * times) for seen in self.times), self.times
        assert all(seen.dtype == torch.float32 for seen in self.times)
        assert self.tables <= {torch.float32, torch.float64, torch.complex64, torch.complex128}


# --- times and positions are exact on every route


@pytest.mark.parametrize("precision", PRECISIONS)
@pytest.mark.parametrize("name", FAMILIES)
def test_time_and_position_stay_exact_in_every_network(name: str, precision: Precision) -> None:
    network = student(name)
    network.lower(precision)
    seen = Seen(network.transformer)
    x, t, conditioning = inputs(name)
    network.velocity(x, t, conditioning)
    seen.check(t, FAMILIES[name][2])


def sharded(rank: int, rendezvous: str, name: str, into: str) -> None:
    """One of two ranks: the network with a bfloat16 base under FSDP2, a step of it, and what its embeddings saw."""
    dist.init_process_group("gloo", init_method=rendezvous, rank=rank, world_size=2)
    network = student(name)
    network.lower("bfloat16")
    seen = Seen(network.transformer)
    mesh = init_device_mesh("cpu", (2,))
    for module in (*network.family.blocks(network.transformer), network):
        fully_shard(module, mesh=mesh)
    x, t, conditioning = inputs(name)
    network.policy(x, t, conditioning).velocity(x, t).square().mean().backward()
    torch.save((seen.times, seen.tables), f"{into}/{rank}.pt")
    dist.destroy_process_group()


@pytest.mark.parametrize("name", ["qwen_image", pytest.param("flux", marks=pytest.mark.slow)])
def test_time_and_position_stay_exact_under_fsdp(name: str, tmp_path: Path) -> None:
    mp.spawn(sharded, (f"file://{tmp_path}/rendezvous", name, str(tmp_path)), nprocs=2)
    for rank in range(2):
        seen = Seen(nn.Module())
        seen.times, seen.tables = torch.load(tmp_path / f"{rank}.pt", weights_only=False)
        seen.check(TIMES, FAMILIES[name][2])


def test_pipeline_and_server_call_the_network_with_the_same_times() -> None:
    times = []
    for precision in PRECISIONS:
        pipe = FewStepPipeline.from_pretrained("emoji-student", **pipeline_arguments(precision))
        seen = Seen(pipe.network.transformer)
        pipe("owl, noto style", seed=0, output_type="latent")
        times.append(torch.cat(seen.times))

        async def served(precision: Precision = precision) -> Tensor:
            source = ModelSource(name="m", source="emoji-student")
            store = ModelStore({"m": source}, precision=precision)
            model, engine = await store.get("m"), Engine()
            seen = Seen(model.pipeline.network.transformer)
            await engine.generate([Generation.of(model, "owl, noto style", 0)])
            await engine.close()
            return torch.cat(seen.times)

        times.append(asyncio.run(served()))
    assert len(times[0]) == 4
    assert len(set(times[0].bfloat16().tolist()) - set(times[0].tolist())) > 0, "bfloat16 would round some"
    assert all(torch.equal(one, times[0]) for one in times)


@pytest.mark.parametrize("merged", [True, False])
@pytest.mark.parametrize("how", ["loaded so", "converted"])
def test_a_diffusers_pipeline_in_bfloat16_gets_exact_times(merged: bool, how: str, tmp_path: Path) -> None:
    pipe = FewStepPipeline.from_pretrained("emoji-student")
    seen = Seen(pipe.network.transformer)
    pipe("owl, noto style", seed=0, output_type="latent")
    save_diffusers(pipe, tmp_path, merged=merged)
    dtype = {"dtype": torch.bfloat16} if how == "loaded so" else {}
    exported = DiffusionPipeline.from_pretrained(tmp_path, trust_remote_code=True, **dtype).to(torch.bfloat16)
    assert exported.transformer.dtype == torch.bfloat16
    there = Seen(exported.transformer)
    exported("owl, noto style", generator=torch.Generator().manual_seed(0), output_type="latent")
    assert torch.equal(torch.cat(there.times), torch.cat(seen.times))


# --- what is lowered


@pytest.mark.parametrize("precision", LOWER)
@pytest.mark.parametrize("name", FAMILIES)
def test_only_linear_layers_of_blocks_are_lowered(name: str, precision: Precision) -> None:
    network = student(name)
    before = {key: value.detach().clone() for key, value in network.named_parameters()}
    network.lower(precision)
    inside = {id(p) for block in network.family.blocks(network.transformer) for p in block.parameters()}
    linear = {f"{key}.weight" for key, module in network.named_modules() if isinstance(module, nn.Linear)}
    lowered = 0
    for key, parameter in network.named_parameters():
        if key in linear and id(parameter) in inside:
            assert parameter.dtype != torch.float32 or is_quantised(parameter), key
            lowered += 1
        else:
            assert torch.equal(parameter, before[key]), key
    assert lowered > 4


def test_what_is_trained_stays_in_float32_and_learns() -> None:
    family, config, _ = FAMILIES["qwen_image"]
    for precision in LOWER:
        for lora, full in ((LoRAConfig(rank=2), False), (None, True)):
            torch.manual_seed(0)
            network = PolicyNetwork(family.build(config), family, GMFlowConfig(components=2), lora, 0, full)
            network.lower(precision)
            assert all(p.dtype == torch.float32 for p in network.trainable().values())
            x, t, conditioning = inputs("qwen_image")
            network.policy(x, t, conditioning).velocity(x, t).square().mean().backward()
            without = [name for name, p in network.trainable().items() if p.grad is None]
            assert without == [], (precision, full)


@pytest.mark.parametrize(("precision", "share"), [("bfloat16", 0.5), ("int8", 0.25), ("int4", 0.13)])
def test_bytes_are_those_planned_and_a_share_of_float32(
    precision: Precision, share: float, tmp_path: Path
) -> None:
    config = FAMILIES["qwen_image"][1] | {"attention_head_dim": 128, "num_attention_heads": 8}
    family = get_family("qwen_image")
    transformer = family.build(config | {"axes_dims_rope": [32, 48, 48]})
    transformer.save_pretrained(tmp_path)
    blocks = nn.ModuleList(family.blocks(transformer))
    whole = held_bytes(blocks)
    transformer, family, folder = open_teacher(str(tmp_path), "qwen_image")
    network = PolicyNetwork(transformer, family, GMFlowConfig(components=2), LoRAConfig(rank=2))
    network.lower(precision)
    planned = network.nbytes
    network.fill(folder, torch.device("cpu"))
    assert network.nbytes == held_bytes(network)
    assert planned == pytest.approx(network.nbytes, rel=0.01)
    held = held_bytes(nn.ModuleList(family.blocks(network.transformer)))
    adapters = sum(p.nbytes for name, p in network.named_parameters() if ".lora_" in name)
    assert (held - adapters) / whole == pytest.approx(share, abs=0.012)


# --- reading


@pytest.mark.parametrize("stored", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("precision", PRECISIONS)
def test_weights_read_one_by_one_are_those_lowered_in_memory(
    precision: Precision, stored: torch.dtype, tmp_path: Path
) -> None:
    original = student("qwen_image")
    original.transformer.save_config(tmp_path)
    state = {name: original.get_parameter(here).to(stored) for name, here in original._base.items()}
    names = sorted(state)
    places = {}
    for index in range(3):
        file = f"diffusion_pytorch_model-{index + 1:05d}-of-00003.safetensors"
        save_file({name: state[name].contiguous() for name in names[index::3]}, tmp_path / file)
        places |= dict.fromkeys(names[index::3], file)
    index_file = tmp_path / "diffusion_pytorch_model.safetensors.index.json"
    index_file.write_text(json.dumps({"metadata": {}, "weight_map": places}))
    family, policy = original.family, original.policy_config
    transformer, _, _ = load_teacher(str(tmp_path), "qwen_image")
    expected = PolicyNetwork(transformer, family, policy, LoRAConfig(rank=2)).eval()
    expected.lower(precision)
    transformer, _, folder = open_teacher(str(tmp_path), "qwen_image")
    network = PolicyNetwork(transformer, family, policy, LoRAConfig(rank=2)).eval()
    network.lower(precision)
    network.fill(folder, torch.device("cpu"))
    x, t, conditioning = inputs("qwen_image")
    with torch.no_grad():
        for role in (True, False):
            assert torch.equal(
                network(x, t, conditioning, student=role), expected(x, t, conditioning, student=role)
            )


@pytest.mark.parametrize("precision", PRECISIONS)
def test_training_weights_read_from_a_file_leaves_the_file_alone(
    precision: Precision, tmp_path: Path
) -> None:
    """Frozen weights may be mapped pages of it; trained ones must not be."""
    network = student("qwen_image")
    network.transformer.save_config(tmp_path)
    state = {n: network.get_parameter(here).detach().contiguous() for n, here in network._base.items()}
    save_file(state, tmp_path / "diffusion_pytorch_model.safetensors")
    transformer, family, folder = open_teacher(str(tmp_path), "qwen_image")
    full = PolicyNetwork(transformer, family, network.policy_config, None, full=True)
    full.lower(precision)
    full.fill(folder, torch.device("cpu"))
    with torch.no_grad():
        for parameter in full.trainable().values():
            parameter.add_(1)
    again = load_file(tmp_path / "diffusion_pytorch_model.safetensors")
    assert all(torch.equal(again[name], value) for name, value in state.items())


# --- exactness


@pytest.mark.parametrize(("precision", "bound"), [("bfloat16", 0.02), ("int8", 0.03), ("int4", 0.25)])
@pytest.mark.parametrize("name", FAMILIES)
def test_a_lowered_network_computes_nearly_the_same(name: str, precision: Precision, bound: float) -> None:
    x, t, conditioning = inputs(name)
    expected = student(name).velocity(x, t, conditioning)
    network = student(name)
    network.lower(precision)
    velocity = network.velocity(x, t, conditioning)
    assert velocity.dtype == torch.float32
    error = ((velocity - expected).norm() / expected.norm()).item()
    assert 0 < error < bound


@pytest.mark.parametrize("name", ["emoji-student", "fashion-student"])
@pytest.mark.parametrize("precision", LOWER)
def test_bundled_students_draw_nearly_the_same(name: str, precision: Precision) -> None:
    prompts = ["owl, noto style"] * 4 if name == "emoji-student" else ["bag", "coat", "sandal", "dress"]
    expected = FewStepPipeline.from_pretrained(name)(prompts, seed=0, output_type="np").images
    pipe = FewStepPipeline.from_pretrained(name, **pipeline_arguments(precision))
    assert pipe.network.precision == precision
    images = pipe(prompts, seed=0, output_type="np").images
    bound = {"bfloat16": 0.015, "int8": 0.02, "int4": 0.08}[precision]
    assert 0 < abs(images - expected).mean() < bound


def test_blocks_compute_products_in_bfloat16_and_on_a_cpu_attention_in_float32() -> None:
    weight, seen = torch.randn(8, 8), {}

    class Block(nn.Module):
        def forward(self, x: Tensor) -> Tensor:
            seen["product"] = F.linear(x, weight)
            seen["attention"] = F.scaled_dot_product_attention(*[seen["product"]] * 3)
            return x + seen["attention"]

    block, x = Block(), torch.randn(1, 2, 6, 8)
    expected = block(x)
    compute_in_bfloat16([block])
    result = block(x)
    assert seen["product"].dtype == torch.bfloat16
    assert seen["attention"].dtype == result.dtype == torch.float32
    torch.testing.assert_close(result, expected, rtol=0.05, atol=0.1)


def test_blocks_that_are_computed_again_in_backward_compute_the_same() -> None:
    gradients = []
    for checkpointing in (False, True):
        family, config, _ = FAMILIES["qwen_image"]
        torch.manual_seed(0)
        network = PolicyNetwork(family.build(config), family, GMFlowConfig(components=2), LoRAConfig(rank=2))
        network.lower("bfloat16")
        if checkpointing:
            network.transformer.enable_gradient_checkpointing()
        x, t, conditioning = inputs("qwen_image")
        network.policy(x, t, conditioning).velocity(x, t).square().mean().backward()
        gradients.append([p.grad for p in network.trainable().values()])
    assert all(torch.equal(a, b) for a, b in zip(*gradients, strict=True))


# --- what is refused


@pytest.mark.parametrize(
    ("dtype", "quantization", "message"),
    [
        (torch.float16, None, "dtype torch.float16 is not known: give torch.float32 or torch.bfloat16"),
        (None, "int3", "quantization 'int3' is not known: give int8 or int4, or None"),
        (None, "bfloat16", "quantization 'bfloat16' is not known"),
        (torch.float32, "int8", "dtype float32 and quantization 'int8' are two precisions: leave one"),
    ],
)
def test_an_unknown_precision_is_one_sentence(dtype, quantization, message: str) -> None:
    with pytest.raises(UserError, match=message):
        precision_of(dtype, quantization)


@pytest.mark.parametrize(("precision", "library"), [("int8", "torchao"), ("int4", "bitsandbytes")])
def test_a_missing_library_is_named_with_its_extra(
    precision: str, library: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(sys.modules, library, None)
    with pytest.raises(
        UserError, match=rf"{precision} needs {library}: pip install 'fewstep\[quantization\]'"
    ):
        check_precision(precision)


def test_a_device_without_bfloat16_refuses_all_that_computes_in_it(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(precisions, "cpu_has_bfloat16", lambda: False)
    check_arithmetic("float32", "cpu")
    for precision in LOWER:
        with pytest.raises(
            UserError, match=f"{precision}: this CPU has no bfloat16 arithmetic.*choose float32"
        ):
            check_arithmetic(precision, "cpu")
        with pytest.raises(UserError, match="no bfloat16 arithmetic"):
            FewStepPipeline.from_pretrained("emoji-student", **pipeline_arguments(precision))


def test_what_does_not_fit_is_known_before_a_weight_is_read(monkeypatch: pytest.MonkeyPatch) -> None:
    from fewstep.models import devices, network

    monkeypatch.setattr(devices, "free_on_host", lambda: 500_000)
    monkeypatch.setattr(network, "stream_weights", lambda folder: pytest.fail("weights are read"))
    message = (
        r"the student in .* in bfloat16 takes \d+\.\d MB, and 0\.5 MB of this machine's memory are free: "
        r"choose a lower precision \(int8 or int4\), or a device with more"
    )
    with pytest.raises(UserError, match=message):
        FewStepPipeline.from_pretrained("emoji-student", dtype=torch.bfloat16)
    with pytest.raises(UserError, match="free: choose a device with more"):
        FewStepPipeline.from_pretrained("emoji-student", quantization="int4")


@pytest.mark.parametrize("device", ["auto", "gpu", "meta", "cuda:x", "None"])
def test_an_unknown_device_is_one_sentence(device: str) -> None:
    with pytest.raises(UserError, match=f"device {device} is not known: give cpu, cuda or cuda:N"):
        FewStepPipeline.from_pretrained("emoji-student", device=device)


@pytest.mark.parametrize("precision", ["fp16", "float16", "INT8", "auto"])
def test_parts_know_no_other_precision(precision) -> None:
    from fewstep.encoders import load_autoencoder, load_encoder

    for load, name in ((load_autoencoder, "a/vae"), (load_encoder, "minilm")):
        with pytest.raises(UserError, match=f"precision '{precision}' is not known: give one of float32"):
            load(name, precision=precision)


def test_the_former_name_of_dtype_still_counts() -> None:
    pipe = FewStepPipeline.from_pretrained("emoji-student", torch_dtype=torch.bfloat16)
    assert held_bytes(pipe.network) < 0.7 * held_bytes(
        FewStepPipeline.from_pretrained("emoji-student").network
    )


def test_quantised_weights_are_not_merged() -> None:
    network = FewStepPipeline.from_pretrained("emoji-student", quantization="int8").network
    [layer, *_] = [layer for layer in network._adapted_layers if is_quantised(layer.get_base_layer().weight)]
    with pytest.raises(
        UserError, match="can't be merged into quantised weights: load the student in float32"
    ):
        layer.merge()


def test_a_student_of_all_weights_is_exported_in_float32_alone(tmp_path: Path) -> None:
    from fewstep.student.diffusers import _state

    pipe = FewStepPipeline.from_pretrained("fashion-student", torch_dtype=torch.bfloat16)
    with pytest.raises(UserError, match=r"held in bfloat16, .* load it in float32 to export it"):
        _state(pipe.network)


def test_a_diffusers_folder_of_adapters_says_how_to_quantise_it(tmp_path: Path) -> None:
    from diffusers import PipelineQuantizationConfig, TorchAoConfig
    from torchao.quantization import Int8WeightOnlyConfig

    save_diffusers(FewStepPipeline.from_pretrained("emoji-student"), tmp_path / "adapters")
    how = PipelineQuantizationConfig(quant_mapping={"transformer": TorchAoConfig(Int8WeightOnlyConfig())})
    with pytest.raises(UserError, match="export the student as a whole"):
        DiffusionPipeline.from_pretrained(
            tmp_path / "adapters", trust_remote_code=True, quantization_config=how
        )


def test_a_merged_diffusers_folder_can_be_quantised_by_diffusers_itself(tmp_path: Path) -> None:
    from diffusers import PipelineQuantizationConfig, TorchAoConfig
    from torchao.quantization import Int8WeightOnlyConfig

    student = FewStepPipeline.from_pretrained(resolve_student("emoji-student").folder)
    expected = student("owl, noto style", seed=0, output_type="latent").images
    save_diffusers(student, tmp_path, merged=True)
    how = PipelineQuantizationConfig(quant_mapping={"transformer": TorchAoConfig(Int8WeightOnlyConfig())})
    pipe = DiffusionPipeline.from_pretrained(tmp_path, trust_remote_code=True, quantization_config=how)
    assert any(is_quantised(parameter) for parameter in pipe.transformer.parameters())
    drawn = pipe("owl, noto style", generator=torch.Generator().manual_seed(0), output_type="latent").images
    assert 0 < ((drawn - expected).norm() / expected.norm()).item() < 0.05
