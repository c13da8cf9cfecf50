"""Training with reference images: teachers and students see them, and are refused where they can't."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from fewstep.data.schema import DatasetInfo
from fewstep.data.stream import read_split
from fewstep.encoders import load_encoder
from fewstep.errors import UserError
from fewstep.models.registry import get_family
from fewstep.student import FewStepPipeline, read_student_card
from fewstep.train.objectives.teachers import FlowMatching
from fewstep.train.recipe import TeacherRecipe, load_recipe
from fewstep.train.validation import _check_fit
from tiny import recipe, train_here, write_data, write_teacher


@pytest.fixture(scope="module")
def teacher(tmp_path_factory: pytest.TempPathFactory) -> Path:
    write_teacher(folder := tmp_path_factory.mktemp("teacher"))
    return folder


@pytest.mark.parametrize("data_free", [True, False])
def test_a_student_learns_with_the_references_of_its_rows(
    teacher: Path, tmp_path: Path, data_free: bool
) -> None:
    losses = []
    for seed in (0, 1):  # the same rows beside other references
        write_data(data := tmp_path / f"data{seed}", references=1, seed=seed)
        # Guided, so that the teacher's queries of the null text have references, too
        settings = recipe(
            data, teacher, "train.steps=2", f"imitation.data_free={data_free}", "teacher.guidance_scale=2.0"
        )
        metrics = train_here(settings, tmp_path / f"student{seed}")
        losses.append([step["train/loss"] for step in metrics])
    assert torch.tensor(losses).isfinite().all()
    assert losses[0] != losses[1]
    assert read_student_card(tmp_path / "student0").references == 1
    pipe = FewStepPipeline.from_pretrained(tmp_path / "student0")
    batch = read_split(tmp_path / "data0", "held_out", 2)
    noise = torch.randn(2, 3, 8, 8, generator=torch.Generator().manual_seed(0))
    assert pipe.sample(noise, batch.conditioning, pipe.card.sampler).isfinite().all()


def test_a_teacher_learns_with_the_references_of_its_rows(teacher: Path, tmp_path: Path) -> None:
    write_data(tmp_path / "data", references=2)
    settings = load_recipe(
        TeacherRecipe,
        None,
        [f"data.path={tmp_path / 'data'}", f"network.start={teacher}", "flow_matching.condition_dropout=0.5"],
    )
    objective = FlowMatching(settings, load_encoder("minilm").null(), torch.device("cpu"))
    batch = read_split(tmp_path / "data", "train", 4)
    assert len(batch.conditioning.references) == 2
    for images in batch.conditioning.references:
        images.requires_grad_()
    [result] = objective.losses(batch, torch.Generator().manual_seed(0), 1)
    result.loss.backward()
    # Also those of samples whose text was dropped
    for images in batch.conditioning.references:
        assert images.grad is not None
        assert (images.grad.flatten(1).abs().sum(1) > 0).all()
    noise = torch.randn(4, 3, 8, 8, generator=torch.Generator().manual_seed(0))
    assert objective.sample(noise, batch.conditioning).isfinite().all()


def test_a_family_without_references_refuses_a_dataset_with_them(teacher: Path, tmp_path: Path) -> None:
    write_data(tmp_path / "data", references=1)
    flux = get_family("flux")
    network = flux.build(
        {"patch_size": 1, "in_channels": 12, "num_layers": 1, "num_single_layers": 1, "attention_head_dim": 16,
         "num_attention_heads": 2, "joint_attention_dim": 384, "pooled_projection_dim": 384,
         "guidance_embeds": False, "axes_dims_rope": [4, 6, 6]}
    )  # fmt: skip
    with pytest.raises(UserError, match="have reference images, and the family 'flux' takes none"):
        _check_fit(DatasetInfo.open(tmp_path / "data"), network, flux, "tiny")
