"""UNets of diffusion pipelines are teachers of a flow, and students grow on them."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch

from fewstep.errors import UserError
from fewstep.models import get_family
from fewstep.models.adapters import LoRAConfig
from fewstep.models.conditioning import TextConditioning
from fewstep.models.heads import GMFlowConfig
from fewstep.models.network import PolicyNetwork
from fewstep.models.prediction import DiffusionPrediction
from fewstep.models.teacher import check_guidance, load_teacher, reference_to
from fewstep.plan import Machine, make_plan, plan_table
from fewstep.train.recipe import DistillRecipe

TEXT = TextConditioning.collate([torch.randn(3, 8), torch.randn(5, 8)])
X, T = torch.randn(2, 3, 8, 8), torch.tensor([0.4, 0.9])
SMALL = {
    "in_channels": 3,
    "out_channels": 3,
    "block_out_channels": [8, 16],
    "layers_per_block": 1,
    "norm_num_groups": 4,
}
KINDS = {
    "plain": SMALL | {
        "_class_name": "UNet2DModel", "down_block_types": ["DownBlock2D", "AttnDownBlock2D"],
        "up_block_types": ["AttnUpBlock2D", "UpBlock2D"], "attention_head_dim": 4,
    },
    "conditional": SMALL | {
        "_class_name": "UNet2DConditionModel", "cross_attention_dim": 8, "attention_head_dim": 4,
        "down_block_types": ["DownBlock2D", "CrossAttnDownBlock2D"],
        "up_block_types": ["CrossAttnUpBlock2D", "UpBlock2D"],
    },
}  # fmt: skip


@pytest.mark.parametrize("kind", KINDS)
def test_a_pipelines_unet_is_a_velocity_teacher_with_a_student(kind: str, tmp_path: Path) -> None:
    torch.manual_seed(0)
    family, scheduler = (
        get_family("unet"),
        {"prediction_type": "v_prediction", "beta_schedule": "squaredcos_cap_v2"},
    )
    unet = family.build(KINDS[kind]).network.eval()
    unet.save_pretrained(tmp_path / "unet")
    (tmp_path / "scheduler").mkdir()
    (tmp_path / "scheduler" / "scheduler_config.json").write_text(json.dumps(scheduler))
    transformer, _, _ = load_teacher(str(tmp_path), "unet")
    assert family.latent_channels(transformer) == 3
    assert family.condition_width(transformer) == (8 if kind == "conditional" else 0)

    words = {"encoder_hidden_states": TEXT.states, "encoder_attention_mask": TEXT.mask}
    with torch.no_grad():
        truth = DiffusionPrediction.from_scheduler(scheduler).velocity(
            lambda z, timestep: unet(z, timestep, **(words if kind == "conditional" else {})).sample, X, T
        )
    network = PolicyNetwork(
        transformer, family, GMFlowConfig(components=4, logstd_width=16), LoRAConfig(rank=2)
    )
    torch.testing.assert_close(network.velocity(X, T, TEXT), truth, atol=1e-5, rtol=1e-4)
    policy = network.policy(X, T, TEXT)
    torch.testing.assert_close(policy.velocity(X, T).detach(), truth, atol=0.1, rtol=1e-3)
    policy.velocity(X, T).square().sum().backward()
    assert any(p.grad is not None and p.grad.any() for n, p in network.trainable().items() if "lora_B" in n)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"addition_embed_type": "text"}, r"takes further inputs \(addition_embed_type\)"),
        ({"num_class_embeds": 10}, r"takes further inputs \(num_class_embeds\)"),
        ({"out_channels": 6}, r"maps 3 channels to 6"),
    ],
)
def test_a_unet_that_wants_or_gives_more_is_refused(changes: dict, message: str) -> None:
    with pytest.raises(UserError, match=message):
        get_family("unet").build(KINDS["conditional"] | changes)


def test_guidance_of_a_teacher_without_a_condition_is_refused() -> None:
    family = get_family("unet")
    plain, conditional = (family.build(config) for config in KINDS.values())
    check_guidance(family, conditional, 3.0, "teacher.guidance")
    check_guidance(family, plain, 1.0, "teacher.guidance")
    with pytest.raises(
        UserError, match=r"teacher.guidance: a unet teacher .* none to leave out.* set it to 1"
    ):
        check_guidance(family, plain, 3.0, "teacher.guidance")


def test_two_unet_pipelines_are_two_teachers(tmp_path: Path) -> None:
    hashes = []
    for seed in (0, 1):
        torch.manual_seed(seed)
        get_family("unet").build(KINDS["plain"]).network.save_pretrained(tmp_path / str(seed) / "unet")
        hashes.append(reference_to(str(tmp_path / str(seed)), "unet").sha256)
    assert None not in hashes
    assert hashes[0] != hashes[1]


def test_a_unet_is_planned_without_its_weights(tmp_path: Path) -> None:
    get_family("unet").build(KINDS["plain"]).network.save_pretrained(tmp_path / "unet")
    recipe = DistillRecipe.model_validate(
        {
            "teacher": {"path": str(tmp_path), "family": "unet", "guidance_scale": 1},
            "student": {"lora": {"rank": 2}},
        }
    )
    assert plan_table(make_plan(recipe, Machine(1, 80, 100, 0.4), side=8, tokens=4))


def test_a_unet_without_a_scheduler_is_refused(tmp_path: Path) -> None:
    get_family("unet").build(KINDS["plain"]).network.save_pretrained(tmp_path)
    with pytest.raises(
        UserError, match=r"has no scheduler/scheduler_config.json to say what its UNet predicts"
    ):
        load_teacher(str(tmp_path), "unet")
