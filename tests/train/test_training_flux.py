"""Making a guidance-distilled FLUX network, and distilling it, step by step and without a cluster."""

from __future__ import annotations

from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from torch import Tensor

from fewstep.data.schema import Encoding
from fewstep.data.stream import Batch
from fewstep.errors import UserError
from fewstep.models.conditioning import TextConditioning
from fewstep.models.registry import get_family
from fewstep.models.teacher import load_teacher
from fewstep.train.objectives import Distillation, GuidanceDistillation, build_objective
from fewstep.train.recipe import DistillRecipe, TeacherRecipe, load_recipe
from fewstep.train.validation import _check_imitated, _check_pooled

SHAPE = (3, 8, 8)


def objective(teacher: Path, *overrides: str) -> Distillation:
    settings = [
        f"teacher.path={teacher}", "teacher.family=flux", "teacher.guidance_scale=1",
        "teacher.embedded_guidance_scale=3.5",
        "student.policy={type: gmflow, components: 3, logstd_width: 16}", "student.lora={rank: 4}",
        "imitation.mixing_steps=10", "sampler.nfe=2",
    ]  # fmt: skip
    recipe = load_recipe(DistillRecipe, None, [*settings, *overrides])
    objective = Distillation(recipe, TextConditioning.collate([torch.zeros(2, 384)]), torch.device("cpu"))
    objective.read_weights(torch.device("cpu"))
    return objective


def batch(size: int = 4) -> Batch:
    generator = torch.Generator().manual_seed(1)
    states = [torch.randn(3 + index % 2, 384, generator=generator) for index in range(size)]
    latent = torch.randn(size, *SHAPE, generator=generator)
    names = [str(index) for index in range(size)]
    return Batch(latent, TextConditioning.collate(states), names, names, SHAPE)


def loss(distillation: Distillation, step: int, seed: int = 0) -> Tensor:
    return sum(r.loss for r in distillation.losses(batch(), torch.Generator().manual_seed(seed), step))


def test_the_teachers_share_of_a_step_follows_from_its_number_alone(tiny_flux_teacher) -> None:
    distillation = objective(tiny_flux_teacher)
    with torch.no_grad():
        first, fifth, after = (loss(distillation, step) for step in (1, 5, 11))
        assert torch.equal(loss(distillation, 5), fifth), "whatever steps were taken before"
        plain = loss(objective(tiny_flux_teacher, "imitation.mixing_steps=0"), 1)
    assert torch.equal(after, plain)
    assert len({first.item(), fifth.item(), after.item()}) == 3


@pytest.mark.parametrize("data_free", [False, True])
def test_what_is_learned_on_mixed_trajectories_holds_on_the_students_own(
    tiny_flux_teacher, data_free: bool
) -> None:
    distillation = objective(tiny_flux_teacher, f"imitation.data_free={data_free}")
    optimizer = torch.optim.Adam(distillation.parameters().values(), lr=1e-3)

    @torch.no_grad()
    def on_its_own() -> float:
        return sum(loss(distillation, 11, seed).item() for seed in range(100, 104))

    before = on_its_own()
    for step in range(1, 31):
        loss(distillation, step, seed=step).backward()
        optimizer.step()
        optimizer.zero_grad()
    assert on_its_own() < 0.6 * before


def test_the_network_is_told_the_scale_of_the_recipe(tiny_flux_teacher) -> None:
    x, t, conditioning = torch.randn(2, *SHAPE), torch.tensor([0.3, 0.9]), batch(2).conditioning
    velocities = [
        objective(tiny_flux_teacher, f"teacher.embedded_guidance_scale={scale}").teacher.velocity(
            x, t, conditioning
        )
        for scale in (1.0, 3.5)
    ]
    assert not torch.allclose(*velocities, atol=1e-6)


def test_data_without_the_whole_caption_s_vector_that_the_teacher_takes_is_refused(tiny_flux_teacher) -> None:
    transformer, family, _ = load_teacher(str(tiny_flux_teacher), "flux", 3.5)
    info = SimpleNamespace(root="data", shards=(), encoding=Encoding("minilm", 384, "pixel"))
    _check_pooled(info, transformer, family, "tiny")  # the mean token state serves
    info.encoding = Encoding("minilm", 384, "pixel", pooled_dim=768)
    with pytest.raises(UserError, match=r"vectors of width 768 .* takes 384"):
        _check_pooled(info, transformer, family, "tiny")


SMALL = {
    "in_channels": 12, "num_layers": 1, "num_single_layers": 1, "attention_head_dim": 32, "num_attention_heads": 2,
    "joint_attention_dim": 384, "pooled_projection_dim": 384, "axes_dims_rope": [8, 12, 12],
}  # fmt: skip


@pytest.mark.slow
def test_a_network_learns_to_be_told_the_scale_of_another_ones_guidance() -> None:
    settings = [
        f"network={{family: flux, config: {SMALL | {'guidance_embeds': True}}}}",
        "guidance_distillation={teacher: emoji, scales: [1, 4]}",
    ]
    recipe, null = load_recipe(TeacherRecipe, None, settings), torch.zeros(2, 384)
    learner = build_objective(recipe, TextConditioning.collate([null]), torch.device("cpu"))
    assert isinstance(learner, GuidanceDistillation)
    optimizer = torch.optim.Adam(learner.parameters().values(), lr=3e-3)

    def error(seed: int) -> Tensor:
        return next(learner.losses(batch(), torch.Generator().manual_seed(seed), seed)).loss

    with torch.no_grad():
        before = sum(error(seed) for seed in range(1000, 1008))
    for step in range(1, 121):
        error(step).backward()
        optimizer.step()
        optimizer.zero_grad()
    x, t, texts = torch.randn(4, *SHAPE), torch.full((4,), 0.8), batch().conditioning
    with torch.no_grad():
        assert sum(error(seed) for seed in range(1000, 1008)) < 0.5 * before
        low, high = (learner.model(x, t, texts, torch.full((4,), scale)) for scale in (1.0, 4.0))
        guided, plain = (
            learner.imitated.velocity(x, t, condition) for condition in (texts, learner.null.expand(4))
        )
    similarity = torch.cosine_similarity((high - low).flatten(), (guided - plain).flatten(), dim=0)
    assert similarity > 0.5, "a larger scale moves the velocity as guidance does"


def test_guidance_distillation_needs_a_network_that_is_told_a_scale() -> None:
    recipe = load_recipe(TeacherRecipe, None, ["guidance_distillation.teacher=emoji"])
    info, family = (
        SimpleNamespace(root="data", shards=(), encoding=Encoding("minilm", 384, "pixel")),
        get_family("flux"),
    )
    with torch.device("meta"):
        plain, told = (family.build(SMALL | {"guidance_embeds": embeds}) for embeds in (False, True))
    _check_imitated(recipe, info, told, family)
    with pytest.raises(UserError, match="add guidance_embeds: true"):
        _check_imitated(recipe, info, plain, family)
    info.encoding = Encoding("minilm", 768, "pixel")
    with pytest.raises(UserError, match=r"width 768 .* takes 384"):
        _check_imitated(recipe, info, told, family)


def test_a_network_that_cannot_start_from_its_teacher_is_refused() -> None:
    settings = ["guidance_distillation={teacher: emoji, from_teacher: true}"]
    recipe = load_recipe(TeacherRecipe, None, settings)
    info, family = (
        SimpleNamespace(root="data", shards=(), encoding=Encoding("minilm", 384, "pixel")),
        get_family("flux"),
    )
    with torch.device("meta"):
        narrow, fitting = (
            family.build(SMALL | {"guidance_embeds": True, "num_layers": 5, "num_attention_heads": heads})
            for heads in (2, 4)
        )
    _check_imitated(recipe, info, fitting, family)
    with pytest.raises(UserError, match="teacher's width and number of blocks"):
        _check_imitated(recipe, info, narrow, family)
