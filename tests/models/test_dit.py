"""The DiT family: diffusers' own numbers in continuous time, a null class for guidance, and students on it."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
import torch.distributed as dist
from diffusers import DDIMScheduler, DiTTransformer2DModel, FlowMatchEulerDiscreteScheduler
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from fewstep.encoders import load_encoder
from fewstep.errors import UserError
from fewstep.flow import NO_SHIFT
from fewstep.models.adapters import LoRAConfig
from fewstep.models.conditioning import ClassConditioning, Conditioning
from fewstep.models.dit import DiT
from fewstep.models.guided_teacher import GuidedTeacher
from fewstep.models.heads import DXConfig, GMFlowConfig
from fewstep.models.network import PolicyNetwork
from fewstep.models.prediction import DiffusionPrediction
from fewstep.models.registry import get_family
from fewstep.models.teacher import TeacherCard, load_teacher, open_teacher, save_teacher
from fewstep.policies import rollout
from fewstep.student.adapter import adapter_state, load_adapter, save_adapter

FAMILY = DiT()
TINY = {
    "num_attention_heads": 2, "attention_head_dim": 16, "in_channels": 3, "out_channels": 3, "num_layers": 2,
    "sample_size": 8, "patch_size": 2, "num_embeds_ada_norm": 5,
}  # fmt: skip
X = torch.randn(3, 3, 8, 8, generator=torch.Generator().manual_seed(1))
T = torch.tensor([1.0, 0.3337, 0.0])


def random_dit() -> nn.Module:
    """Small, and not a new one's zero velocity."""
    torch.manual_seed(0)
    transformer = FAMILY.build(TINY)
    with torch.no_grad():
        for parameter in transformer.parameters():
            parameter.add_(torch.randn_like(parameter) * 0.1)
    return transformer.eval().requires_grad_(False)


def with_variances() -> nn.Module:
    """diffusers' own network as DiTs were published: six channels out of three, one embedder copied to every block."""
    torch.manual_seed(0)
    stock = DiTTransformer2DModel(**TINY | {"out_channels": 6}).eval()
    for block in stock.transformer_blocks:
        block.norm1.emb.load_state_dict(stock.transformer_blocks[0].norm1.emb.state_dict())
    return stock


@pytest.fixture
def tiny_dit() -> nn.Module:
    return random_dit()


@pytest.fixture
def lone_process_group() -> Iterator[None]:
    dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
    yield
    dist.destroy_process_group()


def classes(*labels: str) -> ClassConditioning:
    return Conditioning.join(load_encoder("labels:5").encode(labels))


def velocity(transformer: nn.Module, x: Tensor, t: Tensor, conditioning: ClassConditioning) -> Tensor:
    tokens = FAMILY.denoise(transformer, x, t, conditioning)
    return FAMILY.unpack(tokens, FAMILY.latent_channels(transformer), *x.shape[-2:])[:, 0]


def test_the_family_is_registered() -> None:
    assert isinstance(get_family("dit"), DiT)


def test_a_diffusers_folder_with_learned_variances_gives_its_own_first_channels(tmp_path: Path) -> None:
    stock = with_variances()
    stock.save_pretrained(tmp_path)
    transformer, family, _ = load_teacher(str(tmp_path), "dit")
    assert family.latent_channels(transformer) == 3
    with torch.no_grad():
        expected = stock(X, T * 1000, torch.tensor([0, 4, 5]), return_dict=False)[0][:, :3]
        ours = velocity(transformer.eval(), X, T, classes("0", "4", ""))
    torch.testing.assert_close(ours, expected, atol=1e-5, rtol=1e-5)


def test_a_pipelines_noise_predictor_is_a_velocity_teacher_with_a_student(tmp_path: Path) -> None:
    """The layout and the prediction of the first DiTs: noise and variances, under 1,000 linear betas."""
    stock = with_variances()
    stock.save_pretrained(tmp_path / "transformer")
    DDIMScheduler().save_pretrained(tmp_path / "scheduler")
    transformer, family, _ = load_teacher(str(tmp_path), "dit")
    numbers, t = torch.tensor([0, 4, 5]), torch.tensor([0.9, 0.3337, 0.1])
    with torch.no_grad():
        expected = DiffusionPrediction.from_scheduler(DDIMScheduler().config).velocity(
            lambda z, timestep: stock(z, timestep, numbers, return_dict=False)[0][:, :3], X, t
        )
    network = PolicyNetwork(
        transformer, family, GMFlowConfig(components=4, logstd_width=16), LoRAConfig(rank=2)
    )
    labels = classes("0", "4", "")
    torch.testing.assert_close(network.velocity(X, t, labels), expected, atol=1e-4, rtol=1e-4)
    policy = network.policy(X, t, labels)
    torch.testing.assert_close(policy.velocity(X, t).detach(), expected, atol=0.15, rtol=1e-3)
    policy.velocity(X, t).square().sum().backward()
    assert network.head.proj_out_means.weight.grad.any()
    published = family.published(transformer, {**dict(stock.named_parameters()), **last_layer(network)})
    assert torch.equal(published["proj_out_2.weight"], channels_of(stock.proj_out_2.weight))


def last_layer(network: PolicyNetwork) -> dict[str, Tensor]:
    return {f"proj_out.{name}": p for name, p in network.transformer.proj_out.teacher.named_parameters()}


def channels_of(weight: Tensor) -> Tensor:
    """The rows of a last layer (p·p·6, D) that give the first three channels."""
    return weight.unflatten(0, (4, 6))[:, :3].flatten(0, 1)


def test_a_scheduler_that_says_nothing_known_is_refused_and_a_flows_is_a_velocity(tmp_path: Path) -> None:
    DiTTransformer2DModel(**TINY).save_pretrained(tmp_path / "transformer")
    FlowMatchEulerDiscreteScheduler().save_pretrained(tmp_path / "scheduler")
    transformer, _, _ = load_teacher(str(tmp_path), "dit")
    assert transformer.prediction is None
    file = tmp_path / "scheduler" / "scheduler_config.json"
    file.write_text(json.dumps({"_class_name": "DDIMScheduler", "prediction_type": "score"}))
    with pytest.raises(UserError, match="prediction_type 'score'"):
        load_teacher(str(tmp_path), "dit")


def test_a_trained_noise_predictor_is_saved_as_it_is(tmp_path: Path) -> None:
    torch.manual_seed(0)
    scheduler = {"_class_name": "DDIMScheduler", "beta_schedule": "linear"}
    transformer = FAMILY.build(TINY | {"scheduler": scheduler})
    assert transformer.proj_out.layer.weight.abs().max() == 0, "a new one begins at a prediction of zero"
    with torch.no_grad():
        for parameter in transformer.parameters():  # as training does, all of them
            parameter.copy_((parameter + torch.randn_like(parameter) * 0.1).half())
    card = TeacherCard("dit", "labels:5", "pixel", (3, 8, 8), shift=1.0, guidance_scale=2.0)
    save_teacher(transformer, card, tmp_path, dict(transformer.named_parameters()))
    loaded, family, _ = load_teacher(str(tmp_path), "dit")
    labels = classes("0", "4", "")
    with torch.no_grad():
        before, after = (family.denoise(network.eval(), X, T, labels) for network in (transformer, loaded))
    torch.testing.assert_close(after, before, atol=1e-3, rtol=1e-3)


def test_a_teacher_of_another_family_or_with_missing_weights_is_refused(tmp_path: Path) -> None:
    DiTTransformer2DModel(**TINY).save_pretrained(tmp_path / "whole")
    with pytest.raises(UserError, match=r"holds no qwen_image model .* and \d+ others are missing"):
        load_teacher(str(tmp_path / "whole"), "qwen_image")
    with pytest.raises(UserError, match=r"holds no qwen_image model .* and \d+ others are missing"):
        open_teacher(str(tmp_path / "whole"), "qwen_image")
    file = tmp_path / "whole" / "diffusion_pytorch_model.safetensors"
    state = load_file(file)
    del state["proj_out_2.weight"]
    save_file(state, file, metadata={"format": "pt"})
    with pytest.raises(
        UserError, match=r"holds no dit model .*DiTTransformer2DModel's weights proj_out_2.weight are missing"
    ):
        load_teacher(str(tmp_path / "whole"), "dit")
    file.write_bytes(file.read_bytes()[:1000])
    with pytest.raises(UserError, match="holds no dit model"):
        load_teacher(str(tmp_path / "whole"), "dit")


def test_a_saved_teacher_opens_in_diffusers_itself(tiny_dit: nn.Module, tmp_path: Path) -> None:
    tiny_dit.load_state_dict({name: tensor.half().float() for name, tensor in tiny_dit.state_dict().items()})
    card = TeacherCard("dit", "labels:5", "pixel", (3, 8, 8), shift=1.0, guidance_scale=2.0)
    save_teacher(tiny_dit, card, tmp_path, dict(tiny_dit.named_parameters()))
    stock = DiTTransformer2DModel.from_pretrained(tmp_path, torch_dtype=torch.float32).eval()
    again, _, _ = load_teacher(str(tmp_path), "dit")
    with torch.no_grad():
        expected = stock(X, T * 1000, torch.tensor([1, 2, 5]), return_dict=False)[0]
        for transformer in (tiny_dit, again.eval()):
            ours = velocity(transformer, X, T, classes("1", "2", ""))
            torch.testing.assert_close(ours, expected, atol=1e-5, rtol=1e-5)


def test_dit_xl_2_has_675_million_parameters() -> None:
    with torch.device("meta"):
        transformer = FAMILY.build(
            {"num_attention_heads": 16, "attention_head_dim": 72, "in_channels": 4, "out_channels": 8,
             "num_layers": 28, "sample_size": 32, "patch_size": 2, "num_embeds_ada_norm": 1000}
        )  # fmt: skip
    assert round(sum(p.numel() for p in transformer.parameters()) / 1e6) == 675


def test_a_new_network_is_the_zero_velocity_and_learns_at_once() -> None:
    transformer = FAMILY.build(TINY).requires_grad_(True)
    u = velocity(transformer, X, T, classes("0", "1", "2"))
    assert not u.any()
    (u - X).square().mean().backward()
    assert transformer.proj_out.weight.grad.any()


def test_guidance_departs_from_the_null_class_inside_its_interval(tiny_dit: nn.Module) -> None:
    network = PolicyNetwork(tiny_dit, FAMILY, DXConfig(points=2), lora=None)
    labels, null = classes("3", "3", "3"), classes("")
    t = torch.tensor([1.0, 0.5, 0.2])
    guided = GuidedTeacher(network, null, 3.0, (0.0, 0.7)).velocity(X, t, labels)
    of_class = network.velocity(X, t, labels)
    of_none = network.velocity(X, t, classes("", "", ""))
    assert (of_class - of_none).abs().max() > 1e-3, "the null class is a class of its own"
    torch.testing.assert_close(guided[1:], (3 * of_class - 2 * of_none)[1:], atol=1e-4, rtol=0)
    torch.testing.assert_close(guided[:1], of_class[:1], atol=1e-5, rtol=0)


def test_a_new_student_moves_like_one_teacher_euler_step(tiny_dit: nn.Module) -> None:
    network = PolicyNetwork(tiny_dit, FAMILY, DXConfig(points=4), LoRAConfig(rank=2))
    labels, ones, zeros = classes("0", "1", "4"), torch.ones(3), torch.zeros(3)
    with torch.no_grad():
        policy = network.policy(X, ones, labels)
        moved, sigma = rollout(policy, X, ones, zeros, shift=NO_SHIFT, substeps=16)
    assert not sigma.any()
    torch.testing.assert_close(moved, X - network.velocity(X, ones, labels), atol=1e-4, rtol=0)


def test_a_new_mixture_stands_around_the_teachers_velocity(tiny_dit: nn.Module) -> None:
    network = PolicyNetwork(tiny_dit, FAMILY, GMFlowConfig(components=64, logstd_width=8), LoRAConfig(rank=2))
    labels, t = classes("0", "1", "4"), torch.tensor([1.0, 0.7, 0.4])
    with torch.no_grad():
        ours = network.policy(X, t, labels).velocity(X, t)
    error = (ours - network.velocity(X, t, labels)).abs().max()
    assert 0 < error < 4 * 0.05 / 8, "64 draws of standard deviation 0.05, one per component and channel"


def test_adapters_survive_a_round_trip_and_leave_the_teacher_alone(
    tmp_path: Path, tiny_dit: nn.Module
) -> None:
    labels = classes("0", "", "4")
    with torch.no_grad():
        before = velocity(tiny_dit, X, T, labels)
    network = PolicyNetwork(tiny_dit, FAMILY, GMFlowConfig(components=3, logstd_width=8), LoRAConfig(rank=2))
    with torch.no_grad():
        for parameter in network.trainable().values():
            parameter.normal_(std=0.1)
    torch.testing.assert_close(network.velocity(X, T, labels), before, atol=1e-6, rtol=0)
    save_adapter(network, tmp_path)
    again = load_adapter(random_dit(), FAMILY, tmp_path)
    ours, theirs = adapter_state(network), adapter_state(again)
    assert ours.keys() == theirs.keys()
    assert all(torch.equal(ours[name], theirs[name]) for name in ours)
    with torch.no_grad():
        first, second = (n.eval()(X, T, labels, student=True) for n in (network, again))
    assert torch.equal(first, second)


@pytest.mark.parametrize("full", [False, True])
def test_sharded_blocks_compute_the_same_student_and_gradients(lone_process_group, full: bool) -> None:
    """The embedder serves all blocks: none of their FSDP groups may hold it."""
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.fsdp import fully_shard

    results = []
    for sharded in (False, True):
        lora = None if full else LoRAConfig(rank=2)
        network = PolicyNetwork(random_dit(), FAMILY, DXConfig(points=2), lora, full=full)
        if sharded:
            mesh = init_device_mesh("cpu", (1,))
            blocks = [b for transformer in network.transformers() for b in FAMILY.blocks(transformer)]
            for module in (*blocks, network):
                fully_shard(module, mesh=mesh, reshard_after_forward=True)
        labels, t = classes("0", "1", "4"), torch.tensor([1.0, 0.6, 0.3])
        u = network.velocity(X, t, labels)
        network.policy(X, t, labels).velocity(X, t).square().mean().backward()
        gradients = [p.grad.full_tensor() if sharded else p.grad for p in network.trainable().values()]
        results.append([u, *gradients])
    for whole, shards in zip(*results, strict=True):
        torch.testing.assert_close(shards, whole, atol=1e-6, rtol=1e-5)


def test_all_parameters_reach_the_output(tiny_dit: nn.Module) -> None:
    tiny_dit.requires_grad_(True)
    velocity(tiny_dit, X, T, classes("0", "1", "")).square().sum().backward()
    without = {name for name, p in tiny_dit.named_parameters() if p.grad is None or not p.grad.any()}
    assert without == set(FAMILY.unused_parameters(tiny_dit))


def test_the_network_drops_no_classes_of_its_own_accord(tiny_dit: nn.Module) -> None:
    tiny_dit.train()
    x, labels = X[:1].expand(64, -1, -1, -1), classes(*["2"] * 64)
    with torch.no_grad():
        u = velocity(tiny_dit, x, torch.full((64,), 0.5), labels)
    torch.testing.assert_close(u, u[:1].expand_as(u), atol=1e-5, rtol=0)


def test_recomputed_blocks_give_the_same_gradients(tiny_dit: nn.Module) -> None:
    gradients = []
    for recompute in (False, True):
        if recompute:
            tiny_dit.enable_gradient_checkpointing()
        tiny_dit.requires_grad_(True).zero_grad()
        velocity(tiny_dit, X, T, classes("0", "1", "2")).square().sum().backward()
        gradients.append([p.grad.clone() for p in tiny_dit.parameters()])
    for kept, recomputed in zip(*gradients, strict=True):
        torch.testing.assert_close(recomputed, kept, atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("size", [(8, 16), (4, 4)])
def test_other_sizes_than_the_trained_one_work(tiny_dit: nn.Module, size: tuple[int, int]) -> None:
    x = torch.randn(2, 3, *size)
    with torch.no_grad():
        assert velocity(tiny_dit, x, torch.tensor([0.2, 0.9]), classes("0", "1")).shape == x.shape


def test_patches_come_back_to_their_places() -> None:
    x = torch.arange(2 * 3 * 8 * 12.0).view(2, 3, 8, 12)
    cells = x.view(2, 3, 2, 4, 3, 4).permute(0, 2, 4, 1, 3, 5)
    assert torch.equal(FAMILY.unpack(cells.reshape(2, 6, -1), 3, 8, 12)[:, 0], x)
