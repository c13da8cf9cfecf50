"""The benchmark of one training step: its bare processes run, and its table says what it should."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from fewstep.benchmarks.step_profile import OTHER, PARTS, kind_of
from fewstep.benchmarks.train_step import draw_profile, in_bare_process, rows_of, step_table
from fewstep.data.stream import Batch
from fewstep.errors import UserError
from fewstep.models.conditioning import ClassConditioning, TextConditioning
from fewstep.train.recipe import DistillRecipe, load_recipe


@pytest.mark.parametrize("workers", [1, 2])
def test_bare_processes_time_a_step_and_its_parts(
    tiny_teacher: Path, tiny_data: Path, tmp_path: Path, workers: int
) -> None:
    settings = [
        f"teacher.path={tiny_teacher}", f"data.path={tiny_data}", "data.batch_size=4", f"train.workers={workers}",
        "train.threads=1", "student.lora={rank: 2}", "student.policy={type: gmflow, components: 2}",
    ]  # fmt: skip
    recipe = load_recipe(DistillRecipe, None, settings)
    seconds = in_bare_process(recipe, 2, tmp_path / "times.json")
    assert set(seconds) == {"bare", "step", "network", "rollouts"}
    assert all(value > 0 for value in seconds.values())


@pytest.mark.slow
def test_a_profile_divides_a_step_into_parts_and_kinds(
    tiny_teacher: Path, tiny_data: Path, tmp_path: Path
) -> None:
    settings = [
        f"teacher.path={tiny_teacher}", f"data.path={tiny_data}", "data.batch_size=4", "train.threads=1",
        "student.lora={rank: 2}", "student.policy={type: gmflow, components: 2}",
    ]  # fmt: skip
    recipe = load_recipe(DistillRecipe, None, settings)
    draw_profile(recipe, 2, tmp_path / "new" / "step.png")
    assert (tmp_path / "new" / "step.png").read_bytes().startswith(b"\x89PNG")
    seconds = in_bare_process(recipe, 2, tmp_path / "times.json", profile=True)
    assert tuple(seconds) == PARTS
    for part in ("teacher", "student forward", "student backward"):
        assert seconds[part]["products"] > 0
    assert seconds["rollouts and loss"]["rollout kernels"] > 0
    assert sum(seconds["optimizer and EMA"].values()) > 0


def test_profiles_are_of_cpus(tmp_path: Path) -> None:
    recipe = load_recipe(DistillRecipe, None, ["train.gpu=true"])
    with pytest.raises(UserError, match=r"--profile: GPUs .* set train\.gpu=false"):
        draw_profile(recipe, 2, tmp_path / "step.png")


def test_operations_are_sorted_by_the_first_kind_that_fits() -> None:
    events = ("aten::addmm", "aten::add_", "aten::gelu_backward", "_MeanVelocityBackward", "aten::unknown")
    kinds = ["products", "sums and scalings", "GELU", "rollout kernels", OTHER]
    assert [kind_of(event) for event in events] == kinds


def test_some_rows_are_padded_to_their_own_longest_text() -> None:
    states = [torch.full((length, 2), float(length)) for length in (3, 1, 2)]
    texts = TextConditioning.collate(states, [torch.full((4,), float(i)) for i in range(3)])
    batch = Batch(torch.arange(3.0).view(3, 1, 1, 1), texts, ["a", "b", "c"], ["0", "1", "2"], (1, 1, 1))
    some = rows_of(batch, [2, 1])
    assert (some.captions, some.keys) == (["c", "b"], ["2", "1"])
    assert some.latent.flatten().tolist() == [2.0, 1.0]
    assert some.conditioning.mask.tolist() == [[True, True], [True, False]]
    assert some.conditioning.states[:, :, 0].tolist() == [[2.0, 2.0], [1.0, 0.0]]
    assert some.conditioning.pooled[:, 0].tolist() == [2.0, 1.0]


def test_some_rows_of_classes() -> None:
    classes = ClassConditioning(torch.tensor([7, 8, 9]))
    some = rows_of(Batch(None, classes, ["a", "b", "c"], ["0", "1", "2"], (1, 1, 1)), [2, 0])
    assert some.conditioning.labels.tolist() == [9, 7]
    assert some.latent is None


def test_the_table_shows_shares_beside_their_limits() -> None:
    seconds = {"bare": 2.0, "ray": 2.1, "waiting": 0.021, "step": 2.0, "network": 1.7, "rollouts": 0.25}
    lines = {line.strip().split("  ")[0]: line.split() for line in step_table(seconds).splitlines()}
    assert lines["inside Ray Train"][-5:] == ["1.050", "of", "bare", "≤", "1.03"]
    assert lines["of that waiting for data"][-6:] == ["0.0210", "1.00%", "of", "Ray's", "<", "2", "%"][-6:]
    assert lines["rollouts alone"][-5:] == ["0.2500", "12.5%", "<", "15", "%"]
