"""Qwen-Image 2.1 is told as its own pipeline tells it, and its texts are computed once, with the same numbers."""

from __future__ import annotations

import asyncio
from argparse import Namespace
from collections.abc import Callable, Sequence
from dataclasses import replace
from itertools import pairwise
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
import torch.distributed as dist
import torch.multiprocessing as mp
from diffusers.pipelines.qwenimage21.pipeline_qwenimage21 import calculate_shift
from pipelines import qwen_image21 as pipelines
from torch import Tensor, nn

from fewstep.benchmarks import cached_conditions
from fewstep.distill import ImitationConfig, imitation_loss, imitation_walk
from fewstep.engine.engine import Engine
from fewstep.engine.generation import Generation
from fewstep.engine.models import LoadedModel
from fewstep.errors import UserError
from fewstep.flow import SamplerConfig, TeacherSamplerConfig, generate, guided_velocity
from fewstep.models.adapters import LoRAConfig, lora_target_modules
from fewstep.models.cached_texts import CachedTexts
from fewstep.models.conditioning import Conditioning, TextConditioning
from fewstep.models.guided_teacher import GuidedTeacher
from fewstep.models.heads import DXConfig, GMFlowConfig
from fewstep.models.network import PolicyNetwork
from fewstep.models.qwen_image21 import QwenImage21
from fewstep.models.sharded import whole
from fewstep.models.teacher import load_teacher, open_teacher, reference_to
from fewstep.plan.training import measure
from fewstep.student import FewStepPipeline
from fewstep.student.adapter import load_adapter, save_adapter
from fewstep.student.card import StudentCard
from fewstep.student.diffusers import to_diffusers
from fewstep.student.pipeline import save_student
from fewstep.train.parallel import shard
from fewstep.train.recipe import DistillRecipe, TrainConfig, load_recipe

FAMILY = QwenImage21()
CHANNELS, WIDTH = 8, 24
CONFIG = {
    "in_channels": CHANNELS, "out_channels": CHANNELS, "num_layers": 3, "attention_head_dim": 16,
    "num_attention_heads": 2, "context_in_dim": WIDTH, "axes_dims_rope": (4, 6, 6),
}  # fmt: skip
SIZES = [(6, 4), (4, 8)]
TIMES = torch.tensor([0.9987, 0.3, 0.55])


def transformer(**changes: int) -> Any:
    """A small network with random weights, also where the class would begin with zeros."""
    torch.manual_seed(0)
    network = FAMILY.build(CONFIG | changes).eval()
    with torch.no_grad():
        for parameter in network.parameters():
            parameter.add_(torch.randn_like(parameter) * 0.1)
    return network


def states(*lengths: int) -> list[Tensor]:
    return [torch.randn(length, WIDTH, generator=torch.Generator().manual_seed(length)) for length in lengths]


def texts(*lengths: int) -> TextConditioning:
    return TextConditioning.collate(states(*lengths))


def latents(batch: int, height: int, width: int) -> Tensor:
    generator = torch.Generator().manual_seed(height)
    return torch.randn(batch, CHANNELS, height, width, generator=generator)


def as_the_pipeline(network: nn.Module, x: Tensor, t: Tensor, embeds: Tensor) -> Tensor:
    """Velocity (B, C, H, W): packing, arguments and result as in diffusers' pipeline, without its cache."""
    from diffusers import QwenImage21Pipeline

    batch, channels, height, width = x.shape
    packed = QwenImage21Pipeline._pack_latents(x, batch, channels, height, width)
    text = embeds.new_zeros(embeds.shape[:2], dtype=torch.bool)
    slots = torch.cat([text, text.new_ones(batch, packed.shape[1] // 4)], dim=1)
    answer = network(
        hidden_states=packed,
        timestep=t,
        encoder_hidden_states=embeds,
        encoder_hidden_states_mask=None,
        img_shapes=[[(1, height, width)]] * batch,
        img_mask=slots,
        return_dict=False,
    )[0][:, -packed.shape[1] :]
    return QwenImage21Pipeline._unpack_latents(answer, 16 * height, 16 * width, 16)[:, :, 0]


def student(policy: DXConfig | GMFlowConfig | None = None, **how: Any) -> PolicyNetwork:
    how = {"lora": LoRAConfig(rank=2)} | how
    return PolicyNetwork(transformer(), FAMILY, policy or DXConfig(points=3), seed=1, **how)


def with_adapters_at_work(network: PolicyNetwork) -> PolicyNetwork:
    """The same network, with adapters that change what texts are to it."""
    generator = torch.Generator().manual_seed(5)
    with torch.no_grad():
        for name, parameter in network.trainable().items():
            if ".lora_B" in name or not network.lora_config:
                parameter.add_(torch.randn(parameter.shape, generator=generator) * 0.3)
    return network


# --- the teacher


@torch.no_grad()
@pytest.mark.parametrize(("height", "width"), SIZES)
def test_it_answers_as_the_network_in_its_own_pipeline_whatever_its_batch(height: int, width: int) -> None:
    """Captions of different lengths are one batch here, in which each has what the pipeline gives it alone."""
    network, x, embeds = transformer(), latents(3, height, width), states(5, 9, 7)
    theirs = torch.cat(
        [as_the_pipeline(network, x[i : i + 1], TIMES[i : i + 1], embeds[i][None]) for i in range(3)]
    )
    together = FAMILY.denoise(network, x, TIMES, TextConditioning.collate(embeds))
    ours = FAMILY.velocity(together, CHANNELS, height, width)
    torch.testing.assert_close(ours, theirs, atol=1e-5, rtol=0)
    # What padding would do without moving the texts' keys
    padded = TextConditioning.collate(embeds).states
    assert (as_the_pipeline(network, x, TIMES, padded)[0] - theirs[0]).abs().max() > 1e-2


@torch.no_grad()
def test_captions_of_one_length_and_their_own_times_are_one_call_there_too() -> None:
    network, x, embeds = transformer(), latents(3, 6, 4), torch.randn(3, 5, WIDTH)
    theirs = as_the_pipeline(network, x, TIMES, embeds)
    ours = FAMILY.denoise(network, x, TIMES, TextConditioning.collate(list(embeds)))
    torch.testing.assert_close(FAMILY.velocity(ours, CHANNELS, 6, 4), theirs, atol=1e-5, rtol=0)


@pytest.mark.parametrize(("height", "width"), [(3, 4), (4, 3), (1, 1)])
def test_an_odd_side_is_refused_in_one_sentence(height: int, width: int) -> None:
    with pytest.raises(UserError, match=r"^family qwen_image21: .* multiples of 32 pixels\.$"):
        FAMILY.denoise(transformer(), latents(1, height, width), TIMES[:1], texts(3))


def test_a_network_whose_texts_know_the_time_is_refused_in_one_sentence() -> None:
    network = FAMILY.build(CONFIG | {"causal_condition": False})
    with pytest.raises(UserError, match=r"^family qwen_image21: .*causal_condition=true"):
        FAMILY.denoise(network, latents(1, 4, 4), TIMES[:1], texts(3))


def test_parameters_named_unused_get_no_gradient_and_all_others_do() -> None:
    network = transformer()
    FAMILY.denoise(network, latents(2, 6, 4), TIMES[:2], texts(4, 6)).square().sum().backward()
    without = {n for n, p in network.named_parameters() if p.grad is None or not p.grad.any()}
    assert without == set(FAMILY.unused_parameters(network))


def test_adapters_sit_on_every_feed_forward_and_on_the_time_embedding_alone() -> None:
    expected = {
        f"transformer_blocks.{index}.img_mlp.{layer}"
        for index in range(3)
        for layer in ("proj", "gate_layer", "out")
    } | {f"time_text_embed.timestep_embedder.linear_{index}" for index in (1, 2)}
    assert set(lora_target_modules(transformer(), FAMILY, ("paper",))) == expected


def test_sizes_are_those_of_the_configuration() -> None:
    network = transformer()
    assert (FAMILY.latent_channels(network), FAMILY.condition_width(network)) == (CHANNELS, WIDTH)
    assert (FAMILY.patch(network), FAMILY.pooled_width(network)) == (1, None)
    assert FAMILY.blocks(network) == list(network.transformer_blocks)


@torch.no_grad()
def test_guided_images_are_those_of_diffusers_own_pipeline(tmp_path: Path) -> None:
    """Captions and null condition of three lengths in one batch, as the pipeline gives each of them alone."""
    from diffusers import QwenImage21Pipeline

    pipelines.write(tmp_path)
    prompts, noise = ["a cat", "a very large dog"], torch.randn(2, pipelines.CHANNELS, 6, 4)
    theirs = pipelines.sample(tmp_path, prompts, noise, 3, 2.5, "ugly")
    pipe = QwenImage21Pipeline.from_pretrained(tmp_path, processor=pipelines.processor())
    embeds = [pipe.encode_prompt(text)[0][0] for text in (*prompts, "ugly")]
    assert len({len(one) for one in embeds}) == 3
    network, _, _ = load_teacher(str(tmp_path), "qwen_image21")
    policy_network = PolicyNetwork(network, FAMILY, DXConfig(points=2), LoRAConfig(rank=2))
    teacher = GuidedTeacher(policy_network, TextConditioning.collate(embeds[2:]), 2.5)
    conditioning, x = teacher.prepare(TextConditioning.collate(embeds[:2])), noise
    tokens = noise.shape[2] * noise.shape[3]
    mu = calculate_shift(tokens, 256, 4096, 0.5, 1.15)
    pipe.scheduler.set_timesteps(sigmas=[1.0, 2 / 3, 1 / 3], mu=mu)
    for sigma, after in pairwise(pipe.scheduler.sigmas):
        x = x + (after - sigma) * teacher.velocity(x, sigma.expand(2), conditioning)
    torch.testing.assert_close(x, theirs, atol=1e-5, rtol=0)


# --- the student


@pytest.mark.parametrize("how", [{}, {"lora": None, "full": True}], ids=["LoRA", "full"])
def test_a_new_student_starts_as_its_teacher_and_all_of_it_learns(how: dict[str, Any]) -> None:
    network, x, conditioning = student(**how), latents(3, 6, 4), texts(5, 9, 7)
    bare = FAMILY.velocity(FAMILY.denoise(transformer(), x, TIMES, conditioning), CHANNELS, 6, 4)
    teacher = network.velocity(x, TIMES, conditioning)
    torch.testing.assert_close(teacher, bare, atol=1e-6, rtol=0)
    policy = network.policy(x, TIMES, conditioning)
    torch.testing.assert_close(policy.velocity(x, TIMES), teacher, atol=1e-4, rtol=0)
    with_adapters_at_work(network)
    network.policy(x, TIMES, conditioning).velocity(x, TIMES).square().sum().backward()
    assert [n for n, p in network.trainable().items() if p.grad is None or not p.grad.any()] == []
    assert torch.equal(network.velocity(x, TIMES, conditioning), teacher)


def test_the_mixture_s_means_start_within_their_noise_of_the_teacher() -> None:
    network, x, conditioning = (
        student(GMFlowConfig(components=4, logstd_width=8)),
        latents(2, 6, 4),
        texts(5, 9),
    )
    policy = network.policy(x, TIMES[:2], conditioning)
    teacher = network.velocity(x, TIMES[:2], conditioning)
    assert (policy.velocity(x, TIMES[:2]) - teacher).abs().max() < 0.2


def test_an_adapter_comes_back_as_it_was(tmp_path: Path) -> None:
    network, x, conditioning = with_adapters_at_work(student()).eval(), latents(2, 6, 4), texts(5, 9)
    save_adapter(network, tmp_path)
    again = load_adapter(transformer(), FAMILY, tmp_path).eval()
    with torch.no_grad():
        before, after = (one(x, TIMES[:2], conditioning, student=True) for one in (network, again))
    assert torch.equal(before, after)


def test_a_network_filled_from_files_is_the_one_loaded(tmp_path: Path) -> None:
    transformer().save_pretrained(tmp_path)
    loaded = PolicyNetwork(FAMILY.load(str(tmp_path)), FAMILY, DXConfig(points=2), LoRAConfig(rank=2)).eval()
    bones, family, folder = open_teacher(str(tmp_path), "qwen_image21")
    assert all(parameter.is_meta for parameter in bones.parameters())
    assert folder is not None
    filled = PolicyNetwork(bones, family, DXConfig(points=2), LoRAConfig(rank=2)).eval()
    filled.fill(folder, torch.device("cpu"))
    x, conditioning = latents(2, 6, 4), texts(5, 9)
    with torch.no_grad():
        for role in (True, False):
            one, other = (net(x, TIMES[:2], conditioning, student=role) for net in (loaded, filled))
            assert torch.equal(one, other)


@pytest.mark.usefixtures("emulated_bfloat16")
def test_in_bfloat16_the_time_stays_exact() -> None:
    network, x, conditioning = student().eval(), latents(3, 6, 4), texts(5, 9, 7)
    exact = network.velocity(x, TIMES, conditioning)
    network.lower("bfloat16")
    seen: list[Tensor] = []
    network.transformer.time_text_embed.time_proj.register_forward_pre_hook(
        lambda module, given: seen.append(given[0])
    )
    rounded = network.velocity(x, TIMES, conditioning)
    assert any(torch.equal(times, FAMILY.embedded_time(TIMES)) for times in seen)
    error = (rounded - exact).square().mean() / exact.square().mean()
    assert 0 < error < 1e-3


# --- cached texts


def ways(network: PolicyNetwork) -> dict[str, Callable[[Conditioning, bool], Conditioning]]:
    """Without and with the cache."""
    return {
        "plain": lambda conditioning, student: conditioning,
        "cached": lambda conditioning, student: network.prepare(conditioning, student=student),
    }


@torch.no_grad()
def test_cached_texts_give_the_same_answers_in_both_roles_at_any_time() -> None:
    network, x, conditioning = with_adapters_at_work(student()).eval(), latents(3, 6, 4), texts(5, 9, 7)
    for role in (True, False):
        cached = network.prepare(conditioning, student=role)
        for t in (TIMES, TIMES.flip(0)):
            plain = network(x, t, conditioning, student=role)
            torch.testing.assert_close(network(x, t, cached, student=role), plain, atol=1e-6, rtol=0)
    own, base = (network.prepare(conditioning, student=role).tensors[-1] for role in (True, False))
    assert not torch.allclose(own, base, atol=1e-3)


def test_texts_cached_for_one_role_are_refused_by_the_other() -> None:
    network = student()
    x, conditioning = latents(1, 4, 4), texts(5)
    for role in (True, False):
        with pytest.raises(ValueError, match="prepared for the"):
            network(x, TIMES[:1], network.prepare(conditioning, student=role), student=not role)
    one, other = (network.prepare(conditioning, student=role) for role in (True, False))
    with pytest.raises(ValueError, match="in one batch"):
        one.cat(other)


@torch.no_grad()
def test_batches_of_cached_texts_are_cut_and_joined_as_those_of_texts() -> None:
    network = student().eval()
    plain, other = texts(5, 9, 7), texts(3)
    cached, null = (network.prepare(one, student=False) for one in (plain, other))
    assert cached.lengths == [5, 9, 7]
    assert len(cached) == 3
    x = latents(1, 4, 4)

    def answers(conditioning: Conditioning) -> Tensor:
        count = len(conditioning)
        return network.velocity(x.expand(count, -1, -1, -1), TIMES[:1].expand(count), conditioning)

    changes: dict[str, Callable[[Any, Any], Any]] = {
        "slice": lambda one, _: one[1:],
        "repeat": lambda one, _: one.repeat(2),
        "expand": lambda _, two: two.expand(4),
        "cat": lambda one, two: one.cat(two.expand(2)),
        "join": lambda one, two: Conditioning.join([one[:1], two, one[2:]]),
        "where": lambda one, two: one.where(torch.tensor([True, False, True]), two),
        "to": lambda one, _: one.to("cpu", torch.float32),
    }
    for name, change in changes.items():
        expected = answers(change(plain, other))
        torch.testing.assert_close(answers(change(cached, null)), expected, atol=1e-5, rtol=0, msg=name)


def test_repeated_and_joined_cached_texts_are_no_copies() -> None:
    cached = student().prepare(texts(5, 9), student=False)
    assert cached.repeat(3).cat(cached).nbytes == cached.nbytes


SAMPLER = SamplerConfig(nfe=2, shift=3.2, substeps=8)
IMITATION = ImitationConfig(intermediate_states=2, window=2)


def gradients_of(
    network: PolicyNetwork,
    way: str,
    *,
    data_free: bool,
    generator: torch.Generator,
) -> tuple[list[float], dict[str, Tensor]]:
    """Losses and gradients of one step of a guided teacher and captions of different lengths."""
    # Before anything is computed, while FSDP has the parameters that are trained in their places.
    network.zero_grad()
    conditioning, null, prepare = texts(5, 9), texts(3), ways(network)[way]
    teacher = GuidedTeacher(network, null, 3.0, frozen=True)
    taught = teacher.prepare(conditioning) if way == "cached" else conditioning
    seen, finish = prepare(conditioning, True).cut() if data_free else (conditioning, lambda: None)
    roles = (
        lambda x, sigma: network.policy(x, sigma, seen),
        lambda x, sigma: teacher.velocity(x, sigma, taught.repeat(len(x) // 2)),
    )
    losses = []
    if data_free:
        for result in imitation_walk(*roles, latents(2, 6, 4), generator, SAMPLER, IMITATION):
            result.loss.backward()
            losses.append(result.loss.item())
        finish()
    else:
        result = imitation_loss(*roles, latents(2, 6, 4), generator, SAMPLER, IMITATION)
        result.loss.backward()
        losses.append(result.loss.item())
    return losses, {name: whole(p.grad) for name, p in network.trainable().items()}


def assert_same(
    one: tuple[list[float], dict[str, Tensor]], other: tuple[list[float], dict[str, Tensor]]
) -> None:
    assert one[0] == pytest.approx(other[0], rel=1e-5)
    assert one[1].keys() == other[1].keys()
    for name, gradient in one[1].items():
        scale = max(1.0, gradient.abs().max().item())
        torch.testing.assert_close(other[1][name], gradient, atol=1e-5 * scale, rtol=0, msg=name)


STEPS = pytest.mark.parametrize("data_free", [False, True], ids=["from data", "data-free"])


def step_of(network: PolicyNetwork, way: str, data_free: bool) -> tuple[list[float], dict[str, Tensor]]:
    return gradients_of(network, way, data_free=data_free, generator=torch.Generator().manual_seed(3))


@STEPS
@pytest.mark.parametrize("how", [{}, {"lora": None, "full": True}], ids=["LoRA", "full"])
def test_a_distillation_step_has_the_same_loss_and_gradients_with_cached_texts(
    how: dict[str, Any], data_free: bool
) -> None:
    network = with_adapters_at_work(student(**how))
    plain = step_of(network, "plain", data_free)
    assert_same(plain, step_of(network, "cached", data_free))
    network.transformer.enable_gradient_checkpointing()
    assert_same(plain, step_of(network, "plain", data_free))
    assert_same(plain, step_of(network, "cached", data_free))


def sharded_steps(rank: int, rendezvous: str, into: str) -> None:
    """One rank's work: losses and whole gradients of both steps of a sharded network, with activations kept or not."""
    torch.set_num_threads(1)
    dist.init_process_group("gloo", init_method=rendezvous, rank=rank, world_size=2)
    results = {}
    for checkpointing in (False, True):
        network = with_adapters_at_work(student())
        settings = TrainConfig(parallel="fsdp", workers=2, activation_checkpointing=checkpointing)
        objective: Any = SimpleNamespace(models=[network], family=FAMILY, transformer=network.transformer)
        shard(objective, settings, world_size=2)
        for data_free in (False, True):
            results[checkpointing, data_free] = step_of(network, "cached", data_free)
    if rank == 0:
        torch.save(results, into)
    dist.destroy_process_group()


def test_a_sharded_network_has_the_same_gradients_with_cached_texts(tmp_path: Path) -> None:
    place = f"file://{tmp_path / 'rendezvous'}"
    mp.spawn(sharded_steps, (place, str(tmp_path / "results")), nprocs=2)
    network = with_adapters_at_work(student())
    for (_, data_free), results in torch.load(tmp_path / "results").items():
        assert_same(step_of(network, "plain", data_free), results)


@pytest.mark.parametrize("kind", cached_conditions.KINDS)
def test_training_itself_computes_texts_once_with_the_same_numbers(kind: str) -> None:
    """The benchmark's steps are those of the training's objective."""
    sizes = {"width": 128, "layers": 2, "image": 4, "text": 16, "batch": 2, "nfe": 2, "repeats": 1}
    row = cached_conditions.measured(
        cached_conditions.KINDS[kind], Namespace(**sizes), torch.device("cpu"), timed=False
    )
    assert row["error"] < 1e-5
    assert row["cached_operations"] < 0.9 * row["plain_operations"]


def passes_of(network: PolicyNetwork, run: Callable[[], object]) -> list[int]:
    """Tokens that the first block computes in each of its calls."""
    tokens: list[int] = []

    def note(module: nn.Module, given: Sequence[Any], named: dict[str, Any]) -> None:
        [hidden] = [*given[:1], *([named["hidden_states"]] if "hidden_states" in named else [])]
        tokens.append(hidden.shape[0] * hidden.shape[1])

    hook = FAMILY.blocks(network.transformer)[0].register_forward_pre_hook(note, with_kwargs=True)
    run()
    hook.remove()
    return tokens


def test_the_null_condition_of_a_frozen_teacher_is_computed_once() -> None:
    network, conditioning = student(), texts(5, 9)
    for frozen, second in ((True, 1), (False, 2)):
        teacher = GuidedTeacher(network, texts(3), 2.0, frozen=frozen)
        assert len(passes_of(network, lambda teacher=teacher: teacher.prepare(conditioning))) == 2
        assert len(passes_of(network, lambda teacher=teacher: teacher.prepare(conditioning))) == second


@torch.no_grad()
def test_a_guided_velocity_is_that_of_two_calls_of_their_own_lengths() -> None:
    network, conditioning, null = student(), texts(5, 9, 7), texts(3)
    x = latents(3, 6, 4)
    positive = network.velocity(x, TIMES, conditioning)
    expected = guided_velocity(positive, network.velocity(x, TIMES, null.expand(3)), 2.5)
    teacher = GuidedTeacher(network, null, 2.5)
    torch.testing.assert_close(teacher.velocity(x, TIMES, conditioning), expected, atol=1e-5, rtol=0)
    prepared = teacher.prepare(conditioning)
    tokens = passes_of(network, lambda: teacher.velocity(x, TIMES, prepared))
    assert tokens == [2 * 3 * 24], "one call, of the images' tokens alone"
    torch.testing.assert_close(teacher.velocity(x, TIMES, prepared), expected, atol=1e-5, rtol=0)


def test_what_is_prepared_has_a_gradient_for_the_student_alone() -> None:
    network, conditioning = student(), texts(5)
    of_student, of_teacher = (network.prepare(conditioning, student=role) for role in (True, False))
    assert isinstance(of_student, CachedTexts)
    assert all(tensor.requires_grad for tensor in of_student.tensors)
    assert not any(tensor.requires_grad for tensor in of_teacher.tensors)
    assert network.prepare(of_student, student=True).texts == of_student.texts
    assert replace(of_student, student=False).student is False


# --- generating, planning, exporting


PIXELS, STATES = 3, 384
"""Latent channels and width of states where encoders and pixels are real: MiniLM has 384."""


@pytest.fixture(scope="module")
def exported(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder of a student whose adapters are at work."""
    folder = tmp_path_factory.mktemp("qwen_image21")
    base = transformer(in_channels=PIXELS, out_channels=PIXELS, context_in_dim=STATES)
    base.save_pretrained(folder / "teacher")
    card = StudentCard(
        teacher=reference_to(str(folder / "teacher"), "qwen_image21"),
        text_encoder="minilm",
        autoencoder="pixel",
        latent_shape=(PIXELS, 6, 4),
        sampler=SamplerConfig(nfe=3, shift=3.2, substeps=8),
        teacher_sampler=TeacherSamplerConfig(guidance_scale=2.0),
    )
    network = PolicyNetwork(base, FAMILY, DXConfig(points=3), LoRAConfig(rank=2), seed=1)
    save_student(with_adapters_at_work(network), card, folder / "student")
    return folder / "student"


def captions(*lengths: int) -> TextConditioning:
    generator = torch.Generator().manual_seed(1)
    return TextConditioning.collate([torch.randn(n, STATES, generator=generator) for n in lengths])


def noise_of(batch: int) -> Tensor:
    return torch.randn(batch, PIXELS, 6, 4, generator=torch.Generator().manual_seed(2))


def calls_of(network: nn.Module, run: Callable[[], object]) -> tuple[int, int]:
    """How often the network computes texts, and how often images."""
    modes: list[str] = []

    def note(module: nn.Module, given: Any, named: dict[str, Any]) -> None:
        modes.append(named["kv_cache_mode"])

    hook = network.register_forward_pre_hook(note, with_kwargs=True)
    run()
    hook.remove()
    return modes.count("extract"), modes.count("cached")


def test_a_pipeline_computes_its_captions_once_for_all_evaluations(exported: Path) -> None:
    pipe = FewStepPipeline.from_pretrained(exported)
    conditioning, noise = captions(5, 9), noise_of(2)
    sampler = pipe.card.sampler
    images: list[Tensor] = []
    counted = calls_of(
        pipe.network.transformer,
        lambda: images.append(pipe.sample(noise, conditioning, sampler)),
    )
    assert counted == (1, 3)
    policy_at = lambda x, t: pipe.network.policy(x, t, conditioning)  # noqa: E731
    with torch.no_grad():
        torch.testing.assert_close(generate(policy_at, noise, sampler), images[0], atol=1e-5, rtol=0)
    given = {"prompt_embeds": conditioning.states, "prompt_embeds_mask": conditioning.mask, "latents": noise}
    counted = calls_of(
        pipe.network.transformer, lambda: images.append(pipe(**given, output_type="latent").images)
    )
    assert counted == (1, 3)
    torch.testing.assert_close(images[1], images[0], atol=1e-6, rtol=0)


def test_changed_embeddings_are_computed_anew(exported: Path) -> None:
    pipe = FewStepPipeline.from_pretrained(exported)
    conditioning, noise, other = captions(9), noise_of(1), captions(9).states.flip(1)

    def change(*_: Any) -> dict[str, Tensor]:
        return {"prompt_embeds": other}

    given = {"prompt_embeds": conditioning.states, "latents": noise, "output_type": "latent"}
    counted = calls_of(
        pipe.network.transformer,
        lambda: pipe(
            **given, callback_on_step_end=change, callback_on_step_end_tensor_inputs=["prompt_embeds"]
        ),
    )
    assert counted == (4, 3)


@pytest.mark.parametrize("teacher_steps", [None, 3], ids=["student", "teacher"])
def test_the_engine_computes_each_request_s_caption_once_and_as_alone(
    exported: Path, teacher_steps: int | None
) -> None:
    pipe = FewStepPipeline.from_pretrained(exported)
    model = LoadedModel("one", "1", pipe)
    prompts = ["owl", "red heart, noto style", "a very long caption of a flag with stripes, twemoji style"]

    def asked(*prompts: str) -> list[Tensor]:
        async def generate_all() -> list[Tensor]:
            engine = Engine(max_wait_s=0.2)
            generations = [
                Generation.of(model, prompt, seed=0, teacher_steps=teacher_steps) for prompt in prompts
            ]
            images = await engine.generate(generations)
            await engine.close()
            return [image.latent for image in images]

        return asyncio.run(generate_all())

    together: list[Tensor] = []
    computed, evaluated = calls_of(pipe.network.transformer, lambda: together.extend(asked(*prompts)))
    assert evaluated == 3, "one batch, of captions of different lengths"
    assert computed == 3 + (teacher_steps is not None), (
        "each caption once, and the null condition of guidance"
    )
    for prompt, latent in zip(prompts, together, strict=True):
        torch.testing.assert_close(asked(prompt)[0], latent, atol=1e-5, rtol=0)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_an_export_generates_as_the_student_does(exported: Path, dtype: torch.dtype) -> None:
    pipe = FewStepPipeline.from_pretrained(exported)
    theirs = to_diffusers(pipe, dtype=dtype)
    conditioning, noise = captions(5, 9), noise_of(2)
    given = {"prompt_embeds": conditioning.states, "prompt_embeds_mask": conditioning.mask, "latents": noise}
    images: list[Tensor] = []
    counted = calls_of(
        theirs.transformer,
        lambda: images.append(theirs(**given, output_type="latent").images),
    )
    assert counted == (1, 3)
    expected = pipe(**given, output_type="latent").images
    near = 1e-5 if dtype == torch.float32 else 0.15
    torch.testing.assert_close(images[0], expected, atol=near, rtol=0)


def test_a_network_without_values_can_be_planned() -> None:
    recipe = load_recipe(DistillRecipe, "qwen_image_4nfe", ["teacher.family=qwen_image21"])
    with torch.device("meta"):
        network = PolicyNetwork(FAMILY.build(CONFIG), FAMILY, DXConfig(), LoRAConfig(rank=2))
    network.transformer.enable_gradient_checkpointing()
    one, other = (measure(network, recipe, batch, (CHANNELS, 6, 4), 9) for batch in (1, 2))
    assert 0 < one.student < other.student
    assert one.teacher > 0
