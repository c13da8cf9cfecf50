"""What holds of every family of diffusers' text-to-image transformers, of tiny networks with random weights."""

from __future__ import annotations

import shutil
from dataclasses import dataclass
from functools import cached_property
from importlib import import_module
from pathlib import Path
from types import SimpleNamespace
from typing import Any, cast

import pytest
import torch
import torch.distributed as dist
from diffusers import DiffusionPipeline
from pipelines.parts import varied
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard

from fewstep.data.columns import Encoding
from fewstep.errors import UserError
from fewstep.flow import SamplerConfig, TeacherSamplerConfig
from fewstep.models.adapters import LoRAConfig
from fewstep.models.conditioning import TextConditioning
from fewstep.models.diffusers_family import DiffusersFamily
from fewstep.models.heads import DXConfig, GMFlowConfig, PolicyConfig
from fewstep.models.network import PolicyNetwork
from fewstep.models.registry import get_family
from fewstep.models.teacher import load_teacher, open_teacher
from fewstep.plan.training import measure, square
from fewstep.student import FewStepPipeline, StudentCard, save_student
from fewstep.student.adapter import load_adapter, save_adapter
from fewstep.student.diffusers import save_diffusers
from fewstep.train.recipe import DistillRecipe, load_recipe
from fewstep.train.validation import _check_fit

CHANNELS, HEIGHT, WIDTH = 4, 8, 6
TIMES = torch.tensor([0.9987, 0.7059])
"""In bfloat16, they are 1 and 0.7070."""
GMFLOW, DX = GMFlowConfig(components=2, logstd_width=8), DXConfig(points=2)
WEIGHTS = "diffusion_pytorch_model.safetensors"


@dataclass
class Case:
    """A family with a tiny network of it, and inputs.

    Args:
        name: of the family.
        lengths: tokens of two captions.
        frames: latent frames, of families of videos.
        module: in `pipelines`, with the network's configuration, if its name is not the family's.
    """

    name: str
    lengths: tuple[int, int] = (5, 9)
    frames: int = 1
    module: str = ""

    @property
    def config(self) -> dict[str, Any]:
        return import_module(f"pipelines.{self.module or self.name}").CONFIG

    @cached_property
    def family(self) -> DiffusersFamily:
        return cast(DiffusersFamily, get_family(self.named))

    @property
    def named(self) -> str:
        """The family in recipes."""
        return self.name if self.frames == 1 else f"{self.name}:{self.frames}"

    def network(self) -> Any:
        torch.manual_seed(0)
        return varied(self.family.build(self.config))

    @cached_property
    def conditioning(self) -> TextConditioning:
        generator = torch.Generator().manual_seed(1)
        with torch.device("meta"):
            network = self.network_on_meta()
        width, pooled = self.family.condition_width(network), self.family.pooled_width(network)
        states = [torch.randn(length, width, generator=generator) for length in self.lengths]
        vectors = None if pooled is None else list(torch.randn(2, pooled, generator=generator))
        return TextConditioning.collate(states, vectors)

    def network_on_meta(self) -> Any:
        with torch.device("meta"):
            return self.family.build(self.config)

    @property
    def inputs(self) -> tuple[Tensor, Tensor, TextConditioning]:
        x = torch.randn(2, CHANNELS, HEIGHT, WIDTH, generator=torch.Generator().manual_seed(2))
        return x, TIMES, self.conditioning

    def student(self, policy: PolicyConfig = GMFLOW, *, full: bool = False) -> PolicyNetwork:
        network = PolicyNetwork(
            self.network(), self.family, policy, None if full else LoRAConfig(rank=2), full=full
        )
        return stirred(network)


CASES = {
    "sd3": Case("sd3", lengths=(7, 7)),  # its encoders give all captions one length
    "krea2": Case("krea2"),
    "wan": Case("wan"),
    "wan:2": Case("wan", frames=2),
    "z_image": Case("z_image"),
    "longcat_image": Case("longcat_image"),
    "flux2_klein": Case("flux2", module="flux2_klein"),
}


@pytest.fixture(params=CASES)
def case(request: pytest.FixtureRequest) -> Case:
    return CASES[request.param]


@torch.no_grad()
def stirred(network: PolicyNetwork) -> PolicyNetwork:
    """The same student with all that is trained moved a little, as adapters and parts of the head begin at 0."""
    generator = torch.Generator().manual_seed(3)
    for parameter in network.trainable().values():
        parameter.add_(torch.randn(parameter.shape, generator=generator) * 0.05)
    return network


def velocity(case: Case, network: nn.Module, *inputs: Any) -> Tensor:
    x, t, conditioning = inputs or case.inputs
    with torch.no_grad():
        tokens = case.family.denoise(network, x, t, conditioning)
    return case.family.velocity(tokens, *x.shape[1:])


def gradients(network: PolicyNetwork, case: Case) -> dict[str, Tensor | None]:
    """Of the mean square of everything that the student's head gives, by the parameters' names."""
    network.zero_grad()
    network(*case.inputs, student=True).square().mean().backward()
    return {name: None if p.grad is None else p.grad.clone() for name, p in network.trainable().items()}


# --- the network


def test_a_sample_does_not_depend_on_its_batch(case: Case) -> None:
    network, (x, t, conditioning) = case.network(), case.inputs
    together = velocity(case, network)
    for index, length in enumerate(case.lengths):
        one = conditioning[slice(index, index + 1)]
        alone = TextConditioning(one.states[:, :length], one.mask[:, :length], one.pooled)
        row = velocity(case, network, x[index : index + 1], t[index : index + 1], alone)
        torch.testing.assert_close(together[index : index + 1], row, atol=1e-5, rtol=0)


def test_parameters_named_unused_get_no_gradient_and_all_others_do(case: Case) -> None:
    network = case.network()
    case.family.denoise(network, *case.inputs).square().sum().backward()
    without = {name for name, p in network.named_parameters() if p.grad is None or not p.grad.any()}
    assert without == set(case.family.unused_parameters(network))


def test_a_network_without_values_is_planned(case: Case) -> None:
    with torch.device("meta"):
        network = PolicyNetwork(case.network_on_meta(), case.family, GMFLOW, LoRAConfig(rank=2))
    recipe = load_recipe(DistillRecipe, "qwen_image_4nfe", [])
    planned = measure(network, recipe, 2, (CHANNELS, HEIGHT, WIDTH), 9)
    assert planned.activations > 0
    assert planned.teacher > planned.student / 3


# --- the student


@pytest.mark.parametrize("full", [False, True])
def test_the_teacher_s_role_is_the_network_itself(case: Case, full: bool) -> None:
    """Also where the network was called before the student was built on it."""
    network = case.network()
    alone = velocity(case, network)
    lora = None if full else LoRAConfig(rank=2)
    student = stirred(PolicyNetwork(network, case.family, GMFLOW, lora, full=full))
    assert alone.any()
    torch.testing.assert_close(student.velocity(*case.inputs), alone, atol=1e-6, rtol=0)
    with torch.no_grad():
        student(*case.inputs, student=True)
    torch.testing.assert_close(student.velocity(*case.inputs), alone, atol=1e-6, rtol=0)


@pytest.mark.parametrize("full", [False, True])
def test_a_new_student_starts_as_its_teacher(case: Case, full: bool) -> None:
    (x, t, conditioning), lora = case.inputs, None if full else LoRAConfig(rank=2)
    teacher = velocity(case, case.network())
    policies = {
        name: PolicyNetwork(case.network(), case.family, settings, lora, full=full).policy(x, t, conditioning)
        for name, settings in (("dx", DX), ("gm", GMFLOW))
    }
    torch.testing.assert_close(policies["dx"].velocity(x, t), teacher, atol=1e-4, rtol=0)
    offset = policies["gm"].velocity(x, t) - teacher
    assert offset.abs().max() < 5 * GMFlowConfig().bias_noise_std
    # The noise is one number per channel.
    torch.testing.assert_close(offset, offset[:, :, :1, :1].expand_as(offset), atol=1e-4, rtol=0)


@pytest.mark.parametrize("full", [False, True])
def test_gradients_reach_everything_that_is_trained(case: Case, full: bool) -> None:
    student = case.student(full=full)
    missing = {name for name, g in gradients(student, case).items() if g is None or not g.any()}
    assert missing == set()


@pytest.mark.parametrize("full", [False, True])
def test_recomputed_activations_give_the_same_gradients(case: Case, full: bool) -> None:
    student = case.student(full=full)
    kept = gradients(student, case)
    student.transformer.enable_gradient_checkpointing()
    torch.testing.assert_close(gradients(student, case), kept, atol=1e-5, rtol=1e-4)


@pytest.mark.parametrize("policy", [GMFLOW, DX])
@pytest.mark.parametrize("full", [False, True])
def test_a_round_trip_keeps_the_student(case: Case, full: bool, policy: PolicyConfig, tmp_path: Path) -> None:
    student = case.student(policy, full=full)
    save_adapter(student, tmp_path)
    again = load_adapter(case.network(), case.family, tmp_path)
    assert again.policy_config == policy
    (x, t, conditioning) = case.inputs
    velocities = [network.policy(x, t, conditioning).velocity(x, t) for network in (student, again)]
    torch.testing.assert_close(*velocities, atol=1e-6, rtol=0)
    torch.testing.assert_close(
        again.velocity(*case.inputs), velocity(case, case.network()), atol=1e-6, rtol=0
    )


# --- files


@pytest.fixture
def folder(case: Case, tmp_path: Path) -> Path:
    """A pipeline's folder, whose network has other values than the constructor gives, buffers included."""
    network = case.network()
    network.save_pretrained(tmp_path / "transformer")
    file = tmp_path / "transformer" / WEIGHTS
    state = load_file(file)
    assert set(state) == set(network.state_dict())
    buffers = [name for name, _ in network.named_buffers() if name in state]
    save_file(
        {name: t + 0.25 if name in buffers else t for name, t in state.items()},
        file,
        metadata={"format": "pt"},
    )
    return tmp_path


@pytest.mark.parametrize("full", [False, True])
def test_a_skeleton_that_is_filled_is_the_loaded_network(case: Case, folder: Path, full: bool) -> None:
    lora = None if full else LoRAConfig(rank=2)
    loaded, family, _ = load_teacher(str(folder), case.named)
    whole = PolicyNetwork(loaded, family, GMFLOW, lora, full=full)
    skeleton, family, weights = open_teacher(str(folder), case.named)
    assert all(parameter.is_meta for parameter in skeleton.parameters())
    filled = PolicyNetwork(skeleton, family, GMFLOW, lora, full=full)
    assert weights is not None
    filled.fill(weights, torch.device("cpu"))
    assert whole.state_dict().keys() == filled.state_dict().keys()
    for name, tensor in whole.state_dict().items():
        assert torch.equal(tensor, filled.state_dict()[name]), name
    assert torch.equal(whole.velocity(*case.inputs), filled.velocity(*case.inputs))


def test_a_folder_without_a_weight_or_buffer_is_refused(case: Case, folder: Path, tmp_path: Path) -> None:
    file = folder / "transformer" / WEIGHTS
    state = load_file(file)
    shutil.copy(file, tmp_path / "whole.safetensors")
    persistent = [name for name, _ in case.network().named_buffers() if name in state]
    for name in [next(iter(state)), *persistent]:
        save_file({n: t for n, t in state.items() if n != name}, file, metadata={"format": "pt"})
        for opened in (load_teacher, open_teacher):
            with pytest.raises(UserError, match=f"{name} are missing"):
                opened(str(folder), case.named)


def test_a_sharded_student_learns_as_a_whole_one(case: Case, folder: Path) -> None:
    loaded, family, _ = load_teacher(str(folder), case.named)
    whole = stirred(PolicyNetwork(loaded, family, GMFLOW, LoRAConfig(rank=2)))
    expected, teacher = gradients(whole, case), whole.velocity(*case.inputs)
    dist.init_process_group("gloo", init_method=f"file://{folder}/rendezvous", rank=0, world_size=1)
    try:
        skeleton, family, weights = open_teacher(str(folder), case.named)
        sharded = PolicyNetwork(skeleton, family, GMFLOW, LoRAConfig(rank=2))
        mesh = init_device_mesh("cpu", (1,))
        for module in (*family.blocks(skeleton), sharded):
            fully_shard(module, mesh=mesh)
        assert weights is not None
        sharded.fill(weights, torch.device("cpu"))
        values = whole.state_dict()
        with torch.no_grad():
            for name, parameter in sharded.named_parameters():
                cast(Any, parameter).to_local().copy_(values[name])
        found = gradients(sharded, case)
        torch.testing.assert_close(sharded.velocity(*case.inputs), teacher, atol=1e-6, rtol=0)
    finally:
        dist.destroy_process_group()
    for name, gradient in expected.items():
        local = cast(Any, found[name]).to_local()
        torch.testing.assert_close(local, gradient, atol=1e-6, rtol=1e-4)


# --- precision


@pytest.mark.parametrize("precision", ["float32", "bfloat16"])
def test_the_time_stays_exact(case: Case, precision: Any) -> None:
    """In the module that embeds it, in both roles, whatever the blocks compute in."""
    student = case.student()
    student.lower(precision)
    seen: list[Tensor] = []
    embedding = student.transformer.get_submodule(case.family.time_embedding)
    embedding.register_forward_pre_hook(lambda _, given: seen.append(given[0]))
    student.velocity(*case.inputs)
    student(*case.inputs, student=True)
    assert len(seen) == 2
    for time in seen:
        assert time.dtype == torch.float32
        assert torch.equal(time, case.family.embedded_time(TIMES))


def test_lower_precision_changes_little(case: Case) -> None:
    exact, lowered = case.student(), case.student()
    lowered.lower("bfloat16")
    expected, found = exact.velocity(*case.inputs), lowered.velocity(*case.inputs)
    assert not torch.equal(found, expected)
    assert (found - expected).square().mean() < 1e-3 * expected.square().mean()


# --- sizes


def test_sizes_that_the_network_has_no_place_for_are_refused(case: Case) -> None:
    student, network = case.student(), case.network()
    family = case.family
    most = family.largest_side(network)
    sizes = [(HEIGHT + 1, WIDTH, "can't be cut")]
    if most is not None:
        sizes.append((HEIGHT, most + family.patch(network), "positions for"))
        x = torch.zeros(2, CHANNELS, family.frames * most, family.patch(network))
        assert velocity(case, network, x, TIMES, case.conditioning).shape == x.shape
        x = torch.zeros(2, CHANNELS, HEIGHT, most)
        assert velocity(case, network, x, TIMES, case.conditioning).shape == x.shape
        with pytest.raises(UserError, match=f"give at most {most}"):
            square(student, most + family.patch(network))
        assert square(student, most) == (CHANNELS, family.frames * most, most)
    encoding: Any = SimpleNamespace(
        text_encoder="minilm", autoencoder=f"pixel::{family.frames}", token_dim=family.condition_width(network),
        pooled_dim=family.pooled_width(network), references=0,
    )  # fmt: skip
    for height, width, message in sizes:
        shards = [SimpleNamespace(shape=(CHANNELS, height, width))]
        info: Any = SimpleNamespace(root="data", shards=shards, encoding=cast(Encoding, encoding))
        with pytest.raises(UserError, match=message) as caught:
            _check_fit(info, network, family, "teacher")
        assert str(caught.value).count(".\n") == 0


# --- diffusers


TEXTS = {
    "sd3": {"in_channels": 3, "out_channels": 3, "joint_attention_dim": 384, "pooled_projection_dim": 384},
    "krea2": {"in_channels": 12, "text_hidden_dim": 128},
    "wan": {"in_channels": 3, "out_channels": 3, "text_dim": 384},
    "z_image": {"in_channels": 3, "cap_feat_dim": 384},
    "longcat_image": {"in_channels": 12, "joint_attention_dim": 384},
    "flux2": {"in_channels": 12, "joint_attention_dim": 384},
}
"""Of networks for pixels and the bundled text encoder, whose states are 384 wide."""


@pytest.fixture(params=[False, True], ids=["adapters", "full"])
def pipe(case: Case, request: pytest.FixtureRequest, tmp_path: Path) -> FewStepPipeline:
    """A student of the bundled text encoder."""
    torch.manual_seed(0)
    varied(case.family.build(case.config | TEXTS[case.name])).save_pretrained(tmp_path / "teacher")
    transformer, family, reference = load_teacher(str(tmp_path / "teacher"), case.named)
    lora = None if request.param else LoRAConfig(rank=2)
    network = stirred(PolicyNetwork(transformer, family, GMFLOW, lora, full=request.param))
    card = StudentCard(
        teacher=reference,
        text_encoder="minilm",
        autoencoder="pixel",
        latent_shape=(3, HEIGHT, WIDTH),
        sampler=SamplerConfig(nfe=2),
        teacher_sampler=TeacherSamplerConfig(guidance_scale=3.0),
    )
    save_student(network, card, tmp_path / "student")
    return FewStepPipeline.from_pretrained(tmp_path / "student")


@pytest.mark.parametrize("merged", [False, True])
def test_an_exported_student_gives_the_same_images(
    pipe: FewStepPipeline, merged: bool, tmp_path: Path
) -> None:
    prompts = (
        ["red heart", "red heart"] if pipe.card.teacher.family == "sd3" else ["red heart", "a very old owl"]
    )
    ours = pipe(prompts, seed=[0, 1], output_type="latent").images
    save_diffusers(pipe, tmp_path / "exported", merged=merged)
    for dtype, error in ((torch.float32, 1e-4), (torch.bfloat16, 0.3)):
        exported = DiffusionPipeline.from_pretrained(
            tmp_path / "exported", trust_remote_code=True, torch_dtype=dtype
        )
        generators = [torch.Generator().manual_seed(seed) for seed in (0, 1)]
        theirs = exported(prompts, generator=generators, output_type="latent").images
        torch.testing.assert_close(theirs, ours, atol=error, rtol=0)
        assert (theirs - ours).abs().mean() < error / 10


def test_an_exported_student_in_bfloat16_is_told_exact_times(
    case: Case, pipe: FewStepPipeline, tmp_path: Path
) -> None:
    save_diffusers(pipe, tmp_path / "exported")
    exported = DiffusionPipeline.from_pretrained(
        tmp_path / "exported", trust_remote_code=True, torch_dtype=torch.bfloat16
    )
    times: list[list[Tensor]] = [[], []]
    for transformer, seen in zip((pipe.network.transformer, exported.transformer), times, strict=True):
        embedding = transformer.get_submodule(case.family.time_embedding)
        embedding.register_forward_hook(lambda _, given, __, seen=seen: seen.append(given[0]))
    pipe("red heart", num_inference_steps=3, output_type="latent")
    exported("red heart", num_inference_steps=3, output_type="latent")
    assert len(times[0]) == len(times[1]) == 3
    assert all(torch.equal(*pair) for pair in zip(*times, strict=True))


def test_what_diffusers_keeps_in_float32_is_kept_so_on_a_teacher_too(
    pipe: FewStepPipeline, tmp_path: Path
) -> None:
    types = []
    for merged in (False, True):
        save_diffusers(pipe, folder := tmp_path / f"merged-{merged}", merged=merged)
        exported = DiffusionPipeline.from_pretrained(
            folder, trust_remote_code=True, torch_dtype=torch.bfloat16
        )
        own = exported.transformer.named_parameters()
        types.append({name: p.dtype for name, p in own})
    assert types[0] == types[1]
    partly = get_family(pipe.card.teacher.family).name.startswith(("krea2", "wan"))
    assert (torch.float32 in types[0].values()) == partly
