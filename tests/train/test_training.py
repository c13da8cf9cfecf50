"""Training on Ray: learns, survives kills exactly, and stops cleanly where it must."""

from __future__ import annotations

import contextlib
import json
import math
import os
import shutil
import signal
import threading
import time
from argparse import Namespace
from pathlib import Path

import psutil
import pytest
import torch
from safetensors.torch import load_file

import tiny
from fewstep.cli.common import chosen_recipe
from fewstep.data.prepare import PreparationConfig, prepare
from fewstep.data.sources import prompts
from fewstep.errors import UserError
from fewstep.images import Size
from fewstep.models.precision import cpu_has_bfloat16
from fewstep.student import FewStepPipeline
from fewstep.student.mlflow_model import PYFUNC_MODEL
from fewstep.tracking.address import connect
from fewstep.tracking.registry import register
from fewstep.tracking.run import Tracker
from fewstep.train.checkpoint import optimizer_tensors
from fewstep.train.recipe import DistillRecipe, TeacherRecipe, load_recipe
from fewstep.train.trainer import TrainedModel, fit
from fewstep.train.validation import check

STEPS = 14
WEIGHTS = "diffusion_pytorch_model.safetensors"

pytestmark = pytest.mark.usefixtures("ray_cluster")


@pytest.fixture(scope="module")
def empty_database(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A database of MLflow without runs; to make its tables takes a second."""
    file = tmp_path_factory.mktemp("empty") / "mlflow.db"
    connect(f"sqlite:///{file}").search_experiments()
    return file


@pytest.fixture
def home(empty_database: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    shutil.copy(empty_database, tmp_path)
    monkeypatch.chdir(tmp_path)
    return tmp_path


def recipe(data: Path, teacher: Path, *overrides: str) -> DistillRecipe:
    return tiny.recipe(data, teacher, f"train.steps={STEPS}", *overrides)


def losses(home: Path, run: str) -> dict[int, set[float]]:
    """Every value of the loss that the run logged, by step."""
    client = connect(f"sqlite:///{home / 'mlflow.db'}")
    by_step: dict[int, set[float]] = {}
    for point in client.get_metric_history(run, "train/loss"):
        by_step.setdefault(point.step, set()).add(point.value)
    return by_step


def only_run(home: Path):
    client = connect(f"sqlite:///{home / 'mlflow.db'}")
    [run] = client.search_runs([experiment.experiment_id for experiment in client.search_experiments()])
    return run


def kill_worker_after(home: Path, step: int) -> threading.Thread:
    """SIGKILL the only training worker once a checkpoint of at least `step` steps was reported."""

    def run() -> None:
        deadline = time.monotonic() + 240
        while time.monotonic() < deadline:
            reported = [int(p.name.split("-")[1]) for p in home.glob("runs/*/step-*")]
            if reported and max(reported) >= step:
                os.kill(_train_worker_process(), signal.SIGKILL)
                return
            time.sleep(0.05)

    thread = threading.Thread(target=run)
    thread.start()
    return thread


def _train_worker_process() -> int:
    """The training worker's process, by the title that Ray gives it; of this session's node, and no other."""
    for process in psutil.Process().children(recursive=True):
        with contextlib.suppress(psutil.NoSuchProcess):
            if " ".join(process.cmdline()).startswith("ray::") and "TrainWorker" in process.cmdline()[0]:
                return process.pid
    raise AssertionError("no training worker is running")


def exported(trained: TrainedModel, home: Path) -> dict[str, torch.Tensor]:
    return load_file(home / trained.folder / WEIGHTS)


@pytest.fixture(scope="module")
def uninterrupted(tiny_data, tiny_teacher, tmp_path_factory):
    home = tmp_path_factory.mktemp("uninterrupted")
    before = Path.cwd()
    os.chdir(home)
    try:
        trained = fit(recipe(tiny_data, tiny_teacher, "train.sample_every=5"))
        return home, trained, exported(trained, home)
    finally:
        os.chdir(before)


def test_a_run_is_tracked_and_exported(uninterrupted) -> None:
    home, trained, weights = uninterrupted
    client = connect(f"sqlite:///{home / 'mlflow.db'}")
    run = client.get_run(trained.mlflow_run)
    assert run.info.status == "FINISHED"
    assert run.data.params["optimizer.lr"] == "0.001"
    assert set(losses(home, trained.mlflow_run)) == set(range(1, STEPS + 1))
    for name in (
        "gradient_norm",
        "learning_rate",
        "samples_per_second",
        "seconds_waiting_for_data",
        "loss_t1of4",
    ):
        assert f"train/{name}" in run.data.metrics
    samples = {artifact.path for artifact in client.list_artifacts(trained.mlflow_run, "samples")}
    assert samples == {"samples/step-000005.png", "samples/step-000010.png"}
    assert all(tensor.isfinite().all() for tensor in weights.values())


def test_a_killed_worker_continues_the_same_run_with_the_very_same_losses(
    uninterrupted, tiny_data, tiny_teacher, home
) -> None:
    reference_home, reference, weights = uninterrupted
    # Slow enough that a kill lands in the middle: a checkpoint at every step, killed after the fifth.
    killer = kill_worker_after(home, 5)
    # Who reads the shards changes nothing either.
    trained = fit(recipe(tiny_data, tiny_teacher, "train.checkpoint_every=1", "data.reading=tasks",
                         "train.sample_every=5"))  # fmt: skip
    killer.join()
    ours, theirs = losses(home, trained.mlflow_run), losses(reference_home, reference.mlflow_run)
    assert ours == theirs, "replayed steps, too, have bit for bit the uninterrupted run's losses"
    run = only_run(home)
    assert run.info.run_id == trained.mlflow_run, "one run, not two"
    assert int(run.data.tags["resumed_from_step"]) >= 1, "the worker was killed while it trained"
    for name, tensor in exported(trained, home).items():
        assert torch.equal(tensor, weights[name])


@pytest.mark.slow
def test_two_sharded_workers_in_little_memory_continue_after_a_kill_bit_for_bit(
    tiny_data, tiny_teacher, home, tmp_path_factory, monkeypatch
) -> None:
    """A frozen base in bfloat16, beside float32 adapters in the same FSDP groups, and Adam of 8 bits."""
    settings = [
        "train.workers=2", "train.steps=8", "student.lora={rank: 64}", "optimizer.type=adam8bit",
        "optimizer.ema_offload=true", "train.sample_every=5",
        f"train.precision={'bfloat16' if cpu_has_bfloat16() else 'float32'}",
    ]  # fmt: skip
    trained = fit(recipe(tiny_data, tiny_teacher, *settings))
    expected, weights = losses(home, trained.mlflow_run), exported(trained, home)
    elsewhere = tmp_path_factory.mktemp("killed")
    monkeypatch.chdir(elsewhere)
    killer = kill_worker_after(elsewhere, 3)
    again = fit(recipe(tiny_data, tiny_teacher, *settings, "train.checkpoint_every=1"))
    killer.join()
    assert losses(elsewhere, again.mlflow_run) == expected
    assert int(only_run(elsewhere).data.tags["resumed_from_step"]) >= 1, (
        "a worker was killed while it trained"
    )
    for name, tensor in exported(again, elsewhere).items():
        assert torch.equal(tensor, weights[name]), name


def test_a_run_is_resumed_from_another_folder_by_its_checkpoints_alone(
    uninterrupted, tiny_data, tiny_teacher, home, tmp_path_factory, monkeypatch
) -> None:
    first_home, first, weights = uninterrupted
    run = first.run_name
    shutil.copytree(first_home / "runs", home / "runs")
    shutil.copy(first_home / "mlflow.db", home)
    monkeypatch.chdir(tmp_path_factory.mktemp("elsewhere"))
    there = [f"train.storage={home / 'runs'}", f"tracking.uri=sqlite:///{home / 'mlflow.db'}"]
    with pytest.raises(UserError, match=rf"there is no run '{run}' in runs; give the name"):
        chosen_recipe(DistillRecipe, resuming(run), "emoji_qwen_4nfe")
    with pytest.raises(
        UserError, match=rf"last checkpoint is of step {STEPS}: set train.steps to that or more"
    ):
        fit(chosen_recipe(DistillRecipe, resuming(run, *there, "train.steps=4"), "emoji_qwen_4nfe"), run)
    with pytest.raises(UserError, match=rf"run '{run}' began with optimizer.type=adam, and its checkpoints"):
        chosen_recipe(DistillRecipe, resuming(run, *there, "optimizer.type=muon"), "emoji_qwen_4nfe")
    longer = chosen_recipe(
        DistillRecipe, resuming(run, *there, f"train.steps={STEPS + 2}"), "emoji_qwen_4nfe"
    )
    assert longer.student == recipe(tiny_data, tiny_teacher).student, (
        "the run's own recipe, not the job's default"
    )
    trained = fit(longer, run)
    assert only_run(home).info.run_id == trained.mlflow_run == first.mlflow_run, "one run, not two"
    assert set(losses(home, trained.mlflow_run)) == set(range(1, STEPS + 3))
    # The rate fell to zero twice, so not bit for bit.
    assert exported(trained, Path.cwd()).keys() == weights.keys()
    with pytest.raises(UserError, match=rf"its checkpoints are in {home / 'runs'}: add --set train.storage"):
        chosen_recipe(DistillRecipe, resuming(run, "train.storage=other"), "emoji_qwen_4nfe")


def resuming(run: str, *overrides: str) -> Namespace:
    """What the command line `--resume RUN --set …` is parsed into."""
    return Namespace(recipe=None, resume=run, set=list(overrides))


def test_a_loaded_optimizer_counts_its_steps_where_its_parameters_are() -> None:
    parameter = torch.nn.Parameter(torch.zeros(3, device="meta"))
    optimizer = torch.optim.AdamW([parameter], fused=False)
    slots = optimizer_tensors([optimizer], {"weight": parameter})["weight"]
    assert {name: slot.device.type for name, slot in slots.items()} == dict.fromkeys(slots, "meta")


@pytest.mark.slow
def test_two_workers_train_the_same_model_sharded_or_as_replicas(tiny_data, tiny_teacher, home) -> None:
    tolerance = (
        2e-3  # Muon multiplies in bfloat16: another order of sums is another number in the third digit
    )
    results = []
    for parallel in ("fsdp", "ddp"):
        trained = fit(
            recipe(tiny_data, tiny_teacher, "train.workers=2", "train.accumulate=2", "train.steps=4",
                   "imitation.data_free=true", f"train.parallel={parallel}", "optimizer.type=muon")
        )  # fmt: skip
        values = [value for step in losses(home, trained.mlflow_run).values() for value in step]
        assert len(values) == 4
        results.append((values, exported(trained, home)))
    (sharded_losses, sharded), (replica_losses, replicas) = results
    assert replica_losses == pytest.approx(sharded_losses, rel=tolerance)
    for name, tensor in sharded.items():
        torch.testing.assert_close(replicas[name], tensor, atol=tolerance, rtol=1e-3, msg=name)


def test_a_non_finite_loss_stops_the_run_and_keeps_the_last_good_checkpoint(
    tiny_data, tiny_teacher, home
) -> None:
    with pytest.raises(UserError, match=r"infinite or NaN .* lower optimizer.lr") as caught:
        fit(recipe(tiny_data, tiny_teacher, "optimizer.lr=1e30", "optimizer.max_grad_norm=1e30",
                   "optimizer.warmup_steps=0", "train.checkpoint_every=1", "health.on_divergence=stop"))  # fmt: skip
    assert "\n" not in str(caught.value)
    assert only_run(home).info.status == "FAILED"
    kept = [path / "state.json" for path in home.glob("runs/*/step-*")]
    assert kept
    assert all(math.isfinite(json.loads(state.read_text())["metrics"]["train/loss"]) for state in kept)


def test_prompts_alone_suffice_for_data_free_training(tiny_teacher, home) -> None:
    listed = home / "prompts.txt"
    listed.write_text("\n".join(f"small thing {index}" for index in range(24)))
    prepare(
        prompts([str(listed)], held_out=0.1), str(home / "prompts"), PreparationConfig(sizes=(Size(8, 8),))
    )
    overrides = ["data.batch_size=4", "sampler.nfe=2"]
    with pytest.raises(UserError, match=r"prompts alone.*set imitation.data_free=true"):
        fit(recipe(home / "prompts", tiny_teacher, *overrides))
    data_free = recipe(home / "prompts", tiny_teacher, *overrides, "imitation.data_free=true")
    check(data_free)
    [*_, last] = tiny.train_here(data_free, home / "student")
    assert {name for name in last if name.startswith("train/loss_t")} == {
        "train/loss_t4of4", "train/loss_t2of4",
    }, "walks enter at raw times 1 and 1/3"  # fmt: skip
    adapters = load_file(home / "student" / WEIGHTS)
    assert all(tensor.any() for name, tensor in adapters.items() if "lora_B" in name)


def test_a_flux_teacher_is_distilled_with_mixed_trajectories(tiny_data, tiny_flux_teacher, home) -> None:
    mixed = recipe(tiny_data, tiny_flux_teacher, "teacher.family=flux", "teacher.guidance_scale=1",
                   "teacher.embedded_guidance_scale=3.5", "imitation.mixing_steps=8")  # fmt: skip
    check(mixed)
    assert all(math.isfinite(step["train/loss"]) for step in tiny.train_here(mixed, home / "student"))
    adapters = load_file(home / "student" / WEIGHTS)
    assert all(tensor.any() for name, tensor in adapters.items() if "lora_B" in name)
    pipe = FewStepPipeline.from_pretrained(home / "student")
    assert pipe.network.family.embedded_guidance_scale == 3.5, (
        "the exported student is told the scale it learned with"
    )
    assert pipe("small thing 1", output_type="latent").images[0].isfinite().all()


def test_a_sharded_student_goes_on_from_another_ones_adapter(
    uninterrupted, tiny_data, tiny_teacher, home
) -> None:
    first_home, first, weights = uninterrupted
    start = f"student.start={first_home / first.folder}"
    with pytest.raises(UserError, match=r"student.start: .* is not an adapter for this base: .*lora_A"):
        fit(recipe(tiny_data, tiny_teacher, start, "student.lora={rank: 2}"))
    still = fit(
        recipe(tiny_data, tiny_teacher, start, "train.steps=1", "optimizer.lr=1e-9", "train.workers=2")
    )
    for name, tensor in exported(still, home).items():
        torch.testing.assert_close(tensor, weights[name], atol=1e-7, rtol=0, msg=name)


def test_relative_paths_and_tracking_addresses_mean_the_driver_s_folder(
    uninterrupted, tiny_data, tiny_teacher, home
) -> None:
    first_home, first, weights = uninterrupted
    Path("teacher").symlink_to(tiny_teacher)
    known = Tracker.start("sqlite:///mlflow.db", "first", "first", {}, {}, Path("spool"))
    register(first_home / first.folder, "first", "sqlite:///mlflow.db", known.run_id, script=PYFUNC_MODEL)
    still = fit(recipe(tiny_data, "./teacher", "student.start=models:/first@champion", "train.steps=1",
                       "optimizer.lr=1e-9", "tracking.uri=sqlite:///mlflow.db"))  # fmt: skip
    for name, tensor in exported(still, home).items():
        torch.testing.assert_close(tensor, weights[name], atol=1e-7, rtol=0, msg=name)


def test_a_teacher_trains_with_the_same_machinery(tiny_data, tiny_teacher, home) -> None:
    settings = [
        f"data.path={tiny_data}", "data.batch_size=8", "train.steps=30", "train.threads=1",
        "train.cpus_per_worker=0.5", "train.log_every=10", "train.sample_every=0", "optimizer.lr=3e-3",
        f"network.start={tiny_teacher}",
    ]  # fmt: skip
    trained = fit(load_recipe(TeacherRecipe, None, settings))
    values = losses(home, trained.mlflow_run)
    assert min(values[30]) < 0.8 * max(values[1])
    from fewstep.models.teacher import load_teacher, read_card

    load_teacher(str(trained.folder), "qwen_image")
    assert read_card(str(trained.folder)).text_encoder == "minilm"


@pytest.mark.parametrize(
    "overrides",
    [
        pytest.param(["train.workers=2", "train.accumulate=2"], marks=pytest.mark.slow),  # sharded
        ["train.workers=3", "train.parallel=ddp"],  # three shares of a batch of 8; more workers than shards
    ],
)
def test_the_number_of_workers_changes_nothing_but_the_order_of_sums(
    uninterrupted, tiny_data, tiny_teacher, home, overrides
) -> None:
    reference_home, reference, weights = uninterrupted
    trained = fit(recipe(tiny_data, tiny_teacher, *overrides))
    alone, shared = losses(reference_home, reference.mlflow_run), losses(home, trained.mlflow_run)
    assert set(shared) == set(alone)
    for step, values in alone.items():
        [ours], [theirs] = shared[step], values
        assert ours == pytest.approx(theirs, rel=1e-4), step
    for name, tensor in exported(trained, home).items():
        torch.testing.assert_close(tensor, weights[name], atol=1e-4, rtol=1e-2, msg=name)


@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        (["train.workers=4", "train.cpus_per_worker=2"], r"need 8 CPUs, the Ray cluster has 4"),
        (["train.gpu=true"], r"GPUs, the Ray cluster has 0"),
        (["data.path=nowhere"], r"there is no dataset at .*nowhere"),
        (["teacher.path=./missing"], r"teacher.path: there is no folder"),
        (["tracking.uri=http://127.0.0.1:9"], r"127.0.0.1:9"),
    ],
)
def test_what_cannot_work_is_refused_before_training(
    tiny_data, tiny_teacher, home, overrides, message
) -> None:
    with pytest.raises(UserError, match=message) as caught:
        fit(recipe(tiny_data, tiny_teacher, *overrides))
    assert "\n" not in str(caught.value)
    assert not list(home.glob("runs/*")), "nothing was started"


def test_data_that_does_not_fit_the_teacher_is_refused(tiny_data, home) -> None:
    other = Path(__file__).parents[1] / "conformance" / "adapters" / "qwen_base"
    with pytest.raises(UserError, match="prepare the data with the teacher's own"):
        fit(recipe(tiny_data, other))
