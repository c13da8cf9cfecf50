"""The families LongCat-Image and FLUX.2 klein: what students are built of, and which layers they adapt."""

from __future__ import annotations

from importlib import import_module
from pathlib import Path
from typing import Any

import pytest
import torch
from diffusers import DiffusionPipeline
from torch import Tensor, nn

from fewstep.errors import UserError
from fewstep.flow import SamplerConfig, TeacherSamplerConfig
from fewstep.models import precision as precisions
from fewstep.models.adapters import LoRAConfig, lora_target_modules
from fewstep.models.conditioning import TextConditioning
from fewstep.models.heads import DXConfig, GMFlowConfig
from fewstep.models.longcat_image import LongCatImage
from fewstep.models.network import PolicyNetwork
from fewstep.models.registry import get_family
from fewstep.models.teacher import load_teacher, open_teacher
from fewstep.student import FewStepPipeline, StudentCard, save_student
from fewstep.student.adapter import load_adapter, save_adapter
from fewstep.student.diffusers import save_diffusers

CASES = {"longcat_image": "longcat_image", "flux2_klein": "flux2"}
"""Module in `pipelines` with a network's settings → family."""

TIMES = torch.tensor([0.9987, 0.7059])
"""In bfloat16, they are 1 and 0.7070."""

GMFLOW = GMFlowConfig(components=2)


class Case:
    """A family, and a tiny network of it."""

    def __init__(self, name: str) -> None:
        self.name, self.config = CASES[name], import_module(f"pipelines.{name}").CONFIG | {"num_layers": 2}
        self.family: Any = get_family(self.name)

    def network(self, **changes: Any) -> Any:
        torch.manual_seed(0)
        return self.family.build(self.config | changes).eval()

    def conditioning(self, *lengths: int) -> TextConditioning:
        width, made = self.config["joint_attention_dim"], torch.Generator()
        return TextConditioning.collate(
            [torch.randn(n, width, generator=made.manual_seed(n)) for n in lengths]
        )

    @property
    def inputs(self) -> tuple[Tensor, Tensor, TextConditioning]:
        x = torch.randn(2, 4, 8, 6, generator=torch.Generator().manual_seed(0))
        return x, TIMES, self.conditioning(5, 9)

    @torch.no_grad()
    def velocity(self, network: nn.Module, *inputs: Any) -> Tensor:
        x, t, conditioning = inputs or self.inputs
        return self.family.velocity(self.family.denoise(network, x, t, conditioning), *x.shape[1:])

    def student(self, policy: Any = GMFLOW, *, full: bool = False) -> PolicyNetwork:
        lora = None if full else LoRAConfig(rank=2)
        network = PolicyNetwork(self.network(), self.family, policy, lora, full=full)
        with torch.no_grad():  # adapters and parts of the head begin at 0
            for parameter in network.trainable().values():
                parameter.add_(torch.randn(parameter.shape) * 0.05)
        return network


@pytest.fixture(params=CASES)
def case(request: pytest.FixtureRequest) -> Case:
    return Case(request.param)


def gradients(student: PolicyNetwork, case: Case) -> dict[str, Tensor | None]:
    student.zero_grad()
    student(*case.inputs, student=True).square().mean().backward()
    return {name: None if p.grad is None else p.grad.clone() for name, p in student.trainable().items()}


def test_longcat_is_called_as_its_pipeline_calls_it() -> None:
    """Directly, with its own helpers for positions and packing, in two sizes, one of them wider than high."""
    from diffusers import LongCatImagePipeline
    from diffusers.pipelines.longcat_image.pipeline_longcat_image import prepare_pos_ids

    case = Case("longcat_image")
    network = case.network()
    for height, width in ((8, 6), (4, 12)):
        x = torch.randn(2, 4, height, width)
        image = prepare_pos_ids(1, "image", (512, 512), height=height // 2, width=width // 2)
        whole = case.conditioning(512, 512)
        with torch.no_grad():
            theirs = network(
                hidden_states=LongCatImagePipeline._pack_latents(x, *x.shape),
                encoder_hidden_states=whole.states,
                timestep=TIMES,
                txt_ids=prepare_pos_ids(0, "text", (0, 0), num_token=512),
                img_ids=image,
                return_dict=False,
            )[0]
            ours = case.family.denoise(network, x, TIMES, whole)
        torch.testing.assert_close(ours, theirs, atol=1e-5, rtol=0)


def test_a_sample_does_not_depend_on_its_batch(case: Case) -> None:
    """Shorter texts than a pipeline's encoder gives."""
    network, (x, t, conditioning) = case.network(), case.inputs
    together = case.velocity(network)
    for row, length in enumerate((5, 9)):
        alone = case.velocity(network, x[row : row + 1], t[row : row + 1], case.conditioning(length))
        torch.testing.assert_close(together[row : row + 1], alone, atol=1e-5, rtol=0)
    assert torch.equal(conditioning.states[0, 5:], torch.zeros_like(conditioning.states[0, 5:]))


def test_parameters_named_unused_get_no_gradient_and_all_others_do(case: Case) -> None:
    network = case.network()
    case.family.denoise(network, *case.inputs).square().sum().backward()
    without = {name for name, p in network.named_parameters() if p.grad is None or not p.grad.any()}
    assert without == set(case.family.unused_parameters(network)) == set()


def test_the_network_says_its_sizes(case: Case) -> None:
    network, family = case.network(), case.family
    assert family.latent_channels(network) == 4
    assert family.condition_width(network) == case.config["joint_attention_dim"]
    assert (family.pooled_width(network), family.takes_guidance(network)) == (None, False)
    assert len(family.blocks(network)) == 3


def test_the_adapted_layers_of_longcat_are_ffns_and_the_time_embedding() -> None:
    network = Case("longcat_image").network()
    dual = [
        f"transformer_blocks.{index}.{ff}.net.{layer}"
        for index in (0, 1)
        for ff in ("ff", "ff_context")
        for layer in ("0.proj", "2")
    ]
    single = [f"single_transformer_blocks.0.{layer}" for layer in ("proj_mlp", "proj_out")]
    time = [f"time_embed.timestep_embedder.linear_{n}" for n in (1, 2)]
    for target in ("paper", "ffn"):  # nothing is shared with attention
        assert set(lora_target_modules(network, LongCatImage(), (target,))) == {*dual, *single, *time}


def test_a_matrix_that_ffn_and_attention_share_can_be_left_out() -> None:
    case = Case("flux2_klein")
    network = case.network(num_single_layers=2)
    paper, ffn = (set(lora_target_modules(network, case.family, (target,))) for target in ("paper", "ffn"))
    assert paper - ffn == {f"single_transformer_blocks.{i}.attn.to_qkv_mlp_proj" for i in (0, 1)}
    assert ffn < paper
    assert all(f"single_transformer_blocks.{i}.attn.to_out" in ffn for i in (0, 1))
    again = lora_target_modules(network, case.family, ("ffn", "to_qkv_mlp_proj"))
    assert set(again) == paper
    assert LoRAConfig().targets == ("paper",)


@pytest.mark.parametrize("full", [False, True])
def test_a_new_student_starts_as_its_teacher_and_leaves_it_alone(case: Case, full: bool) -> None:
    (x, t, conditioning), lora = case.inputs, None if full else LoRAConfig(rank=2)
    teacher = case.velocity(case.network())
    for policy, bound in ((DXConfig(points=2), 1e-5), (GMFLOW, 5 * GMFlowConfig().bias_noise_std)):
        student = PolicyNetwork(case.network(), case.family, policy, lora, full=full)
        torch.testing.assert_close(student.velocity(x, t, conditioning), teacher, atol=1e-6, rtol=0)
        offset = student.policy(x, t, conditioning).velocity(x, t) - teacher
        assert offset.abs().max() < bound
    changed = case.student(full=full)
    torch.testing.assert_close(changed.velocity(x, t, conditioning), teacher, atol=1e-6, rtol=0)


@pytest.mark.parametrize("full", [False, True])
def test_gradients_reach_everything_and_are_the_same_when_activations_are_recomputed(
    case: Case, full: bool
) -> None:
    student = case.student(full=full)
    kept = gradients(student, case)
    assert [name for name, g in kept.items() if g is None or not g.any()] == []
    student.transformer.enable_gradient_checkpointing()
    torch.testing.assert_close(gradients(student, case), kept, atol=1e-5, rtol=1e-4)


def test_a_round_trip_keeps_the_student(case: Case, tmp_path: Path) -> None:
    student = case.student()
    save_adapter(student, tmp_path)
    again = load_adapter(case.network(), case.family, tmp_path)
    x, t, conditioning = case.inputs
    velocities = [one.policy(x, t, conditioning).velocity(x, t) for one in (student, again)]
    torch.testing.assert_close(*velocities, atol=1e-6, rtol=0)


@pytest.mark.parametrize("full", [False, True])
def test_a_skeleton_that_is_filled_is_the_loaded_network(case: Case, tmp_path: Path, full: bool) -> None:
    case.network().save_pretrained(tmp_path / "transformer")
    lora = None if full else LoRAConfig(rank=2)
    whole, family, _ = load_teacher(str(tmp_path), case.name)
    skeleton, _, weights = open_teacher(str(tmp_path), case.name)
    assert all(parameter.is_meta for parameter in skeleton.parameters())
    loaded = PolicyNetwork(whole, family, GMFLOW, lora, full=full)
    filled = PolicyNetwork(skeleton, family, GMFLOW, lora, full=full)
    assert weights is not None
    filled.fill(weights, torch.device("cpu"))
    for name, tensor in loaded.state_dict().items():
        assert torch.equal(tensor, filled.state_dict()[name]), name
    assert torch.equal(loaded.velocity(*case.inputs), filled.velocity(*case.inputs))


@pytest.mark.parametrize("precision", ["float32", "bfloat16"])
def test_time_and_positions_stay_exact(case: Case, precision: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(precisions, "cpu_has_bfloat16", lambda: True)
    student = case.student()
    exact = student.velocity(*case.inputs)
    student.lower(precision)
    seen: list[Tensor] = []
    embedding = student.transformer.get_submodule(case.family.time_embedding)
    embedding.register_forward_pre_hook(lambda _, given: seen.append(given[0]))
    tables: list[Any] = []
    student.transformer.pos_embed.register_forward_hook(lambda *given: tables.extend(given[2]))
    lowered = student.velocity(*case.inputs)
    student(*case.inputs, student=True)
    assert len(seen) == 2
    assert all(torch.equal(time, case.family.embedded_time(TIMES)) for time in seen)
    assert {table.dtype for table in tables} == {torch.float32}
    assert torch.equal(lowered, exact) == (precision == "float32")
    assert (lowered - exact).square().mean() < 1e-3 * exact.square().mean()


@pytest.mark.parametrize("full", [False, True])
def test_an_exported_student_gives_the_same_images_also_in_bfloat16(
    case: Case, full: bool, tmp_path: Path
) -> None:
    texts = {"in_channels": 12, "joint_attention_dim": 384}  # of pixels, and the bundled text encoder
    case.network(**texts).save_pretrained(tmp_path / "teacher")
    transformer, family, reference = load_teacher(str(tmp_path / "teacher"), case.name)
    network = PolicyNetwork(transformer, family, GMFLOW, None if full else LoRAConfig(rank=2), full=full)
    with torch.no_grad():
        for parameter in network.trainable().values():
            parameter.add_(torch.randn(parameter.shape) * 0.05)
    card = StudentCard(
        teacher=reference, text_encoder="minilm", autoencoder="pixel", latent_shape=(3, 8, 6),
        sampler=SamplerConfig(nfe=2), teacher_sampler=TeacherSamplerConfig(guidance_scale=3.0),
    )  # fmt: skip
    save_student(network, card, tmp_path / "student")
    pipe, prompts = FewStepPipeline.from_pretrained(tmp_path / "student"), ["red heart", "a very old owl"]
    ours = pipe(prompts, seed=[0, 1], output_type="latent").images
    for merged in (False, True):
        save_diffusers(pipe, tmp_path / f"{merged}", merged=merged)
        for dtype, error in ((torch.float32, 1e-4), (torch.bfloat16, 0.3)):
            exported = DiffusionPipeline.from_pretrained(
                tmp_path / f"{merged}", trust_remote_code=True, torch_dtype=dtype
            )
            generators = [torch.Generator().manual_seed(seed) for seed in (0, 1)]
            theirs = exported(prompts, generator=generators, output_type="latent").images
            torch.testing.assert_close(theirs, ours, atol=error, rtol=0)
            assert (theirs - ours).abs().mean() < error / 10


def test_longer_texts_than_there_is_room_for_are_refused() -> None:
    case = Case("longcat_image")
    x, t = case.inputs[0][:1], TIMES[:1]
    with pytest.raises(UserError, match="up to 512 tokens, and one has 513: prepare"):
        case.velocity(case.network(), x, t, case.conditioning(513))
