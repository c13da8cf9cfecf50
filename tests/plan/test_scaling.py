"""Steps on many GPUs: what must hold of any of them, what FSDP really sends, and what processes here really take."""

from __future__ import annotations

import json
from collections import Counter
from pathlib import Path

import pytest
import torch
import torch.distributed as dist
import torch.multiprocessing as mp
from hypothesis import given
from hypothesis import strategies as st

from fewstep.benchmarks.scaling import in_processes
from fewstep.cli import main
from fewstep.data.datasets.bundled import open_data
from fewstep.data.stream import Batch
from fewstep.draws import SampleGenerators
from fewstep.errors import UserError
from fewstep.models.conditioning import TextConditioning
from fewstep.plan.scaling import LAYOUTS, Layout, Links, Scaling, Stage, elapsed, stages
from fewstep.plan.scaling_plot import scaling_plot
from fewstep.plan.training import Machine, make_plan
from fewstep.train.objectives import Distillation
from fewstep.train.parallel import shard
from fewstep.train.recipe import DistillRecipe, load_recipe

SLOW = Links(nvlink_gb=0.5, infiniband_gb=0.002)
"""Links that are slow beside the small network's steps."""

MACHINE = Machine(gpus=8, memory_gb=80, tflops=1)


def recipe(*overrides: str) -> DistillRecipe:
    return load_recipe(
        DistillRecipe,
        None,
        ["data.batch_size=256", "train.workers=8", "train.accumulate=4", "train.parallel=fsdp", *overrides],
    )


@pytest.fixture(scope="module")
def scaling() -> Scaling:
    return Scaling(recipe(), MACHINE, side=16, tokens=24)


times = st.floats(0, 10)


@given(st.lists(st.builds(Stage, times, times, times), max_size=30))
def test_overlapped_messages_take_no_longer_than_others_and_no_less_than_computing_or_sending(
    parts: list[Stage],
) -> None:
    seconds = elapsed(parts)
    assert seconds <= elapsed(parts, overlap=False) * (1 + 1e-9)
    assert seconds >= sum(part.compute for part in parts) * (1 - 1e-9)
    assert seconds >= sum(part.gather + part.reduce for part in parts) * (1 - 1e-9)


def test_one_block_is_gathered_ahead_and_gradients_follow_the_weights_that_set_out_before() -> None:
    # While one block computes the next arrives: the slower of the two counts.
    assert elapsed([Stage(1, 3), Stage(1, 3), Stage(1, 3)]) == 1 + 3 * 3
    assert elapsed([Stage(3, 1), Stage(3, 1), Stage(3, 1)]) == 3 * 3 + 1
    # Only one: the third sets out when the second begins.
    assert elapsed([Stage(1, 5), Stage(1, 1), Stage(4, 1)]) == 1 + 5 + 4 + 1
    # The last gradients have nothing to hide behind.
    assert elapsed([Stage(1, 2, 1), Stage(1, 2, 1)]) == 1 + 2 + 2 + 1


@pytest.mark.parametrize("layout", LAYOUTS)
def test_a_lone_gpu_sends_nothing(scaling: Scaling, layout: Layout) -> None:
    step = scaling.step(1, SLOW)
    assert step.seconds[layout] == pytest.approx(step.computing)


def test_computing_is_what_the_plan_says(scaling: Scaling) -> None:
    plan = make_plan(scaling.recipe, MACHINE, side=16, tokens=24)
    step = scaling.step(8, Links())
    assert step.computing == pytest.approx(3600 * plan.hours / scaling.recipe.train.steps, rel=1e-6)
    assert step.memory["fsdp"] == plan.memory.total
    assert step.samples == plan.micro_batch


def test_rings_take_what_the_slowest_part_of_them_takes() -> None:
    links = Links(utilisation=1.0, nvlink_hop=0, infiniband_hop=0)
    # In a node each of 8 GPUs receives 7/8 by NVLink; between two nodes each adapter receives a sixteenth.
    assert links.ring(8_000_000_000, 1, 8) == pytest.approx(7 / 450)
    assert links.ring(16_000_000_000, 2, 8) == pytest.approx(max(15 / 450, 1 / 50))
    assert links.ring(2_000_000_000, 2, 1) == pytest.approx(1 / 50)
    hops = Links(nvlink_hop=1, infiniband_hop=100)
    assert hops.ring(1, 2, 8) == pytest.approx(14 * 1 + 1 * 100)
    with pytest.raises(UserError, match=r"12 GPUs don't fill nodes of 8: give a multiple"):
        links.messages("fsdp", 12)


@pytest.mark.parametrize("gpus", [8, 64])
def test_no_step_is_shorter_than_its_computing_and_none_longer_on_faster_links(
    scaling: Scaling, gpus: int
) -> None:
    slow, fast = scaling.step(gpus, SLOW), scaling.step(gpus, Links())
    for layout in LAYOUTS:
        assert fast.computing * (1 - 1e-9) <= fast.seconds[layout] < slow.seconds[layout]
    # In one node they are the same, and between slow nodes weights that stay in them are a gain.
    shared, hybrid = slow.seconds["fsdp"], slow.seconds["hybrid"]
    assert hybrid == pytest.approx(shared) if gpus == 8 else hybrid < shared / 2


def test_a_batch_of_all_ends_the_scaling_and_one_of_each_gpu_does_not(scaling: Scaling) -> None:
    few, many = scaling.step(8, SLOW), scaling.step(256, SLOW)
    assert many.share("fsdp") < few.share("fsdp")
    assert many.micro_batches == many.samples == 1
    with pytest.raises(UserError, match="batch_size=256 is too small for 512 workers"):
        scaling.step(512, SLOW)
    each = scaling.step(256, SLOW, 32 * 256)
    assert (each.micro_batches, each.samples) == (few.micro_batches, few.samples)
    assert each.computing == pytest.approx(few.computing)
    assert each.memory["ddp"] == few.memory["ddp"] > few.memory["fsdp"] > each.memory["fsdp"]
    assert each.memory["hybrid"] == few.memory["hybrid"] == few.memory["fsdp"]


def test_quantised_weights_are_planned_whole() -> None:
    assert Scaling(recipe("train.precision=int8"), MACHINE, side=16, tokens=24).layouts == ("ddp",)


def sent_by_fsdp(rank: int, folder: str, overrides: list[str]) -> None:
    """One of two ranks: the numbers of gathers and reductions in a micro-batch under FSDP."""
    dist.init_process_group("gloo", init_method=f"file://{folder}/rendezvous", rank=rank, world_size=2)
    torch.set_num_threads(1)
    settings = recipe(*overrides)
    text = TextConditioning.collate([torch.randn(24, 384)])
    objective = Distillation(settings, text, torch.device("cpu"), sharded=True)
    shard(objective, settings.train, 2)
    objective.read_weights(torch.device("cpu"))
    batch = Batch(torch.randn(1, 3, 16, 16), text, [""], [""], (3, 16, 16))
    with torch.profiler.profile() as profile:
        for result in objective.losses(batch, SampleGenerators(0, 1, range(1), 1), 1):
            result.loss.backward()
    kinds = ("c10d::_allgather_base_", "c10d::_reduce_scatter_base_")
    counted = Counter(event.name for event in profile.events() or () if event.name in kinds)
    if rank == 0:
        Path(folder, "counts.json").write_text(json.dumps([counted[kind] for kind in kinds]))
    dist.destroy_process_group()


@pytest.mark.parametrize(
    "overrides",
    [
        pytest.param(["imitation.data_free=false"], marks=pytest.mark.slow),
        ["imitation.data_free=true", "teacher.guidance_scale=1"],
    ],
)
def test_the_messages_that_are_planned_are_those_that_fsdp_sends(
    overrides: list[str], tmp_path: Path
) -> None:
    mp.spawn(sent_by_fsdp, (str(tmp_path), overrides), nprocs=2)
    gathers, reductions = json.loads((tmp_path / "counts.json").read_text())
    scaling = Scaling(recipe(*overrides), MACHINE, side=16, tokens=24)
    parts = stages(scaling.work, 1, 1.0, SLOW.messages("fsdp", 2))
    assert gathers == scaling.work.segments * sum(part.gather > 0 for part in parts)
    assert reductions == scaling.work.segments * sum(part.reduce > 0 for part in parts)


@pytest.mark.slow
def test_processes_take_what_is_predicted() -> None:
    """In a loose form, as other work shares the cores; `fewstep benchmark scaling` measures the error."""
    settings = load_recipe(DistillRecipe, "emoji_qwen_4nfe", [])
    data = settings.data.model_copy(update={"path": open_data(settings.data.path).root})
    seconds = in_processes(settings.model_copy(update={"data": data}), workers=2, samples=1, repeats=3)
    for layout in ("fsdp", "ddp"):
        assert seconds[f"{layout}_predicted"] > seconds[f"{layout}_alone"] > 0
        assert 1 / 3 < seconds[f"{layout}_predicted"] / seconds[layout] < 3


def test_the_command_prints_both_batches_and_draws(
    capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    picture = tmp_path / "scaling.png"
    options = ["--dry-run", "--latent-size", "16", "--tokens", "24", "--plot", str(picture)]
    sets = ["--set", "data.batch_size=64", "--set", "train.workers=8"]
    assert main(["distill", *options, *sets, "--scaling", "8", "32", "--infiniband", "12.5"]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert "InfiniBand 12.5 GB/s for each GPU" in lines[1]
    assert [line.split()[:2] for line in lines if line[:5].strip().isdigit()] == [
        ["8", "64"], ["32", "64"], ["8", "64"], ["32", "256"],
    ]  # fmt: skip
    assert picture.read_bytes()[:4] == b"\x89PNG"


def test_the_plot_has_a_line_for_each_layout(scaling: Scaling) -> None:
    left, right = scaling_plot(scaling, Links(), [8, 16]).axes
    assert [line.get_label() for line in left.lines] == ["computing alone", *LAYOUTS]
    assert len(right.lines) == len(LAYOUTS) + 1, "and one where the links are"
