"""`fewstep benchmark train-step`: one distillation step, and how much of it is rollouts, data and Ray."""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Mapping
from dataclasses import replace
from itertools import cycle
from pathlib import Path
from statistics import mean
from typing import TYPE_CHECKING, Any
from unittest.mock import patch

import torch
from torch import Tensor

from fewstep.benchmarks.measure import aligned, interleaved, log_to_mlflow, machine
from fewstep.benchmarks.step_profile import profiled, step_plot
from fewstep.errors import UserError
from fewstep.models.conditioning import TextConditioning
from fewstep.train.progress import LossMeter
from fewstep.train.recipe import DistillRecipe, load_recipe

if TYPE_CHECKING:
    from fewstep.data.stream import Batch
    from fewstep.train.learner import Learner

BATCHES = 8
"""Batches that the bare process takes in turns; it holds them in memory."""

DESCRIPTION = """\
Take the steps of a distillation recipe (by default the main job's) in two ways, in turns:

  bare   in as many processes with torch alone: no Ray, no sharding, batches in memory, the environment of a worker;
         several average their gradients
  Ray    as the job does: Ray Train's workers, FSDP or replicas, batches streamed by Ray Data, metrics to MLflow

and in the bare processes also, in turns with the whole step,

  network    the calls of the network that the step makes: student forward and backward, teacher's guided queries;
             then optimizer and EMA; no rollouts
  rollouts   all the rest of π-ID: the policies' rollouts to the visited states, the micro windows and their
             gradient to the head's output; no network"""

EXAMPLES = """\
reading the table
  Times are seconds per optimizer step. The first half of each run warms up and is not counted. The limits are those
  of the main job on a CPU: rollouts under 15 % of a step, Ray at most 1.03 times the bare processes, waiting for
  data under 2 %. Ray's own processes, idle, take a seventh of one core whatever the model: 7 % of two cores, less
  than 1 % of sixteen.

examples
  {program}                                    two rounds of 40 steps each, some 6 minutes
  {program} --rounds 4 --steps 60 --tracking sqlite:///mlflow.db
  {program} --recipe fashion_dit_1nfe --set imitation.intermediate_states=4
  {program} --set train.gpu=true --set train.workers=1
  {program} --recipe fashion_dit_1nfe --steps 20 --profile train_step.png"""


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Declare the options."""
    parser.add_argument(
        "--recipe",
        metavar="NAME|FILE",
        default="emoji_qwen_4nfe",
        help="a bundled recipe's name, or a YAML file; default: %(default)s",
    )
    parser.add_argument("--set", action="append", default=[], metavar="KEY=VALUE", help="override one field")
    parser.add_argument("--steps", type=int, default=40, help="of each run; default: %(default)s")
    parser.add_argument("--rounds", type=int, default=2, help="runs of each kind; default: %(default)s")
    parser.add_argument("--tracking", metavar="URI", help="also log the table to this MLflow address")
    parser.add_argument(
        "--profile",
        metavar="FILE.png",
        type=Path,
        help="instead, draw where the time of a bare step on one CPU thread goes, by part and kind of operation",
    )


def prepared_recipe(options: argparse.Namespace) -> DistillRecipe:
    """The recipe of `--recipe` and `--set`, with its data prepared.

    Raises:
        UserError: there is no such recipe, or its data are not there.
    """
    from fewstep.data.datasets.bundled import open_data

    recipe = load_recipe(DistillRecipe, options.recipe, options.set)
    data = recipe.data.model_copy(update={"path": open_data(recipe.data.path).root})
    return recipe.model_copy(update={"data": data})


def run(options: argparse.Namespace) -> None:
    """Take the steps in both ways, and print the table.

    Raises:
        UserError: the recipe can't be run here.
    """
    from fewstep.cluster import connect_ray

    recipe = prepared_recipe(options)
    torch.set_num_threads(recipe.train.threads)
    if options.profile is not None:
        draw_profile(recipe, options.steps, options.profile)
        return
    connect_ray()
    rounds = []
    with tempfile.TemporaryDirectory() as folder:
        # In turns, so that a machine that gets slower or faster meanwhile favours neither.
        for number in range(options.rounds):
            bare = in_bare_process(recipe, options.steps, Path(folder) / f"bare-{number}.json")
            rounds.append(bare | ray_run(recipe, options.steps, Path(folder), number))
    seconds = {name: mean(one[name] for one in rounds) for name in rounds[0]}
    description = machine(torch.device("cuda" if recipe.train.gpu else "cpu"))
    table = f"{description}; {recipe.name}, batch {recipe.data.batch_size}\n\n{step_table(seconds)}"
    print(f"\n{table}")
    if options.tracking:
        log_to_mlflow(options.tracking, "train-step", description, table, ratios(seconds) | seconds)


def ratios(seconds: Mapping[str, float]) -> dict[str, float]:
    """Shares and quotients of times; some of them have a limit in the table.

    Args:
        seconds: per step, of "bare", "ray", "waiting" (for data, with Ray), "step", "network" and "rollouts".
    """
    return {
        "rollouts_share": seconds["rollouts"] / seconds["step"],
        "network_share": seconds["network"] / seconds["step"],
        "ray_over_bare": seconds["ray"] / seconds["bare"],
        "waiting_share": seconds["waiting"] / seconds["ray"],
    }


def step_table(seconds: Mapping[str, float]) -> str:
    """Seconds and ratios as text, one line each; `seconds` as for `ratios`."""
    of = ratios(seconds)
    rows = [
        ("bare, steps in a row", f"{seconds['bare']:.3f}", "1.000", ""),
        ("inside Ray Train", f"{seconds['ray']:.3f}", f"{of['ray_over_bare']:.3f} of bare", "≤ 1.03"),
        (
            "  of that waiting for data",
            f"{seconds['waiting']:.4f}",
            f"{of['waiting_share']:.2%} of Ray's",
            "< 2 %",
        ),
        ("bare, in turns with parts", f"{seconds['step']:.3f}", "100 %", ""),
        ("  network alone", f"{seconds['network']:.3f}", f"{of['network_share']:.1%}", ""),
        ("  rollouts alone", f"{seconds['rollouts']:.4f}", f"{of['rollouts_share']:.1%}", "< 15 %"),
    ]
    return aligned(("one optimizer step", "seconds", "ratio", "limit"), rows)


def ray_run(recipe: DistillRecipe, steps: int, folder: Path, number: int) -> dict[str, float]:
    """Seconds per step ("ray"), and of waiting for data in one ("waiting"), in the second half of a short real run.

    Args:
        recipe: of the run.
        steps: how many it takes.
        folder: for its checkpoints and its MLflow database.
        number: of the run, which becomes part of its name.
    """
    from fewstep.train.trainer import fit

    # Metrics are means since the last ones, so the last ones are of the second half.
    train = {"steps": steps, "log_every": steps // 2, "checkpoint_every": steps, "sample_every": 0}
    short = recipe.model_copy(
        update={
            "train": recipe.train.model_copy(update=train | {"storage": str(folder / "runs")}),
            "tracking": recipe.tracking.model_copy(update={"uri": f"sqlite:///{folder / 'mlflow.db'}"}),
        }
    )
    metrics = fit(short, f"benchmark-train-{os.getpid()}-{number}").metrics
    return {
        "ray": metrics["train/seconds_per_step"],
        "waiting": metrics["train/seconds_waiting_for_data"],
    }


def draw_profile(recipe: DistillRecipe, steps: int, file: Path) -> None:
    """Profile a bare step of one worker on a CPU, and write its plot.

    Raises:
        UserError: the recipe's workers have GPUs, whose kernels run while the host does something else.
    """
    if recipe.train.gpu:
        raise UserError(
            "--profile: GPUs work behind the back of the host that is profiled: set train.gpu=false."
        )
    one = recipe.model_copy(update={"train": recipe.train.model_copy(update={"workers": 1})})
    with tempfile.TemporaryDirectory() as folder:
        seconds: Any = in_bare_process(one, steps, Path(folder) / "profile.json", profile=True)
    whole = 1e3 * sum(sum(kinds.values()) for kinds in seconds.values())
    batch, precision = recipe.data.batch_size, recipe.train.precision
    title = f"{recipe.name}, batch {batch}, {precision}: {whole:.0f} ms; {machine(torch.device('cpu'))}"
    file.parent.mkdir(parents=True, exist_ok=True)
    step_plot(seconds, title).savefig(file)
    print(f"{title}\n{file}")


def in_bare_process(
    recipe: DistillRecipe, steps: int, result: Path, *, profile: bool = False
) -> dict[str, float]:
    """`bare_run` in as many processes as the recipe has workers, with a worker's environment.

    Args:
        recipe: of the run.
        steps: how many it takes in a row.
        result: a file that does not exist yet, for the times.
        profile: take `step_profile.profiled` instead, and return what it gives.
    """
    from fewstep.train.trainer import worker_environment

    file = result.with_suffix(".yaml")
    file.write_text(json.dumps(recipe.model_dump(mode="json")))  # JSON is YAML
    command = [sys.executable]
    if (workers := recipe.train.fewest_workers) > 1:
        command += ["-m", "torch.distributed.run", "--standalone", f"--nproc-per-node={workers}"]
    command += ["-m", "fewstep.benchmarks.train_step", str(file), str(steps), str(result)]
    command += ["profile"] if profile else []
    # Thread settings and those of the allocator are read when a process starts, so this one can't do it itself.
    subprocess.run(command, env=os.environ | worker_environment(recipe.train), check=True)
    return json.loads(result.read_text())


def bare_run(recipe: DistillRecipe, steps: int, *, profile: bool = False) -> dict[str, Any]:
    """Time steps in this process, alone or as one of those that torchrun started.

    Args:
        recipe: of the run.
        steps: how many are taken in a row; the first half warms up.
        profile: profile the second half instead, and return what `step_profile.profiled` gives.

    Returns:
        Seconds of one step in a row with others ("bare"), and of a whole step and its parts that are taken in turns
        ("step", "network", "rollouts").
    """
    import torch.distributed as dist

    from fewstep.data.schema import DatasetInfo
    from fewstep.data.stream import read_split
    from fewstep.encoders import load_encoder
    from fewstep.train.learner import Learner

    rank, workers = 0, recipe.train.fewest_workers
    if workers > 1:
        dist.init_process_group("nccl" if recipe.train.gpu else "gloo")
        rank = dist.get_rank()
    device = torch.device(f"cuda:{rank}" if recipe.train.gpu else "cpu")
    if recipe.train.gpu:
        torch.cuda.set_device(device)
    torch.set_num_threads(recipe.train.threads)
    torch.set_flush_denormal(True)  # as the worker does

    # The worker's own model, losses and optimizers, but whole copies of the model even where the recipe shards it:
    # sharding is one of the things compared. Its micro-batches are not split: a step has one batch here.
    replicas = recipe.train.model_copy(update={"parallel": "ddp", "accumulate": 1})
    recipe = recipe.model_copy(update={"train": replicas})
    info = DatasetInfo.open(recipe.data.path)
    null = load_encoder(info.encoding.text_encoder, max_tokens=info.encoding.max_tokens).null()
    learner = Learner(recipe, null, device, rank, workers)

    size = learner.share.largest
    rows = read_split(recipe.data.path, "train", BATCHES * size, shape=next(iter(info.buckets("train"))))
    order = torch.randperm(len(rows), generator=torch.Generator().manual_seed(rank)).split(size)
    batches = cycle([rows_of(rows, index.tolist()) for index in order])
    parts = StepParts(learner, next(batches))

    def step() -> None:
        learner.step(1, batches, parts.meter)

    def in_a_row(count: int) -> float:
        began = time.perf_counter()
        for _ in range(count):
            step()
        if device.type == "cuda":
            torch.cuda.synchronize(device)
        return (time.perf_counter() - began) / count

    in_a_row(steps // 2)
    if profile:
        return profiled(learner, step, steps - steps // 2)
    bare = in_a_row(steps - steps // 2)
    runs = {"step": step, "network": parts.network, "rollouts": parts.rollouts}
    return {"bare": bare} | interleaved(runs, max(3, steps // 4), device)


class StepParts:
    """The two parts of a distillation step: the network's calls, and all the rest.

    The calls of one step are remembered with their answers: the first part makes the calls without the rest, the second
    does the rest with the answers in place of the calls.

    Args:
        learner: takes the step.
        batch: that it is taken on.
    """

    def __init__(self, learner: Learner, batch: Batch) -> None:
        self._learner, self._batch = learner, learner.to_device(batch)
        self.meter = LossMeter(learner.device)
        self._calls: list[tuple[tuple[Any, ...], dict[str, Any], Tensor]] = []
        forward = learner.objective.model.forward

        def remembering(*args: Any, **named: Any) -> Tensor:
            packed = forward(*args, **named)
            self._calls.append((args, named, packed.detach()))
            return packed

        with patch.object(learner.objective.model, "forward", remembering):
            self._losses()

    def network(self) -> None:
        """The calls, the backward through them, then optimizer and EMA."""
        for args, named, _ in self._calls:
            with torch.set_grad_enabled(named["student"]):
                packed = self._learner.objective.model(*args, **named)
            if named["student"]:
                packed.square().mean().backward()
        self._learner.update(1, self.meter)

    def rollouts(self) -> None:
        """The rest: what makes the calls and uses their answers, and the backward to the network's output."""
        answers = (answer for _, _, answer in self._calls)

        def answered(*_: Any, student: bool, **__: Any) -> Tensor:
            return next(answers).detach().requires_grad_(student)

        with patch.object(self._learner.objective.model, "forward", answered):
            self._losses()

    def _losses(self) -> None:
        generator = self._learner.seed(
            0, self._learner.share.parts[0]
        )  # the same random numbers each time, so that the calls are the same
        for result in self._learner.objective.losses(self._batch, generator, step=1):
            result.loss.backward()


def rows_of(batch: Batch, index: list[int]) -> Batch:
    """Some samples of a batch as a batch of their own; texts are padded to the longest among them."""
    conditioning = batch.conditioning.map(lambda tensor: tensor[index])
    if isinstance(conditioning, TextConditioning):
        longest = int(conditioning.mask.sum(1).max())  # padding comes last
        conditioning = TextConditioning(
            conditioning.states[:, :longest], conditioning.mask[:, :longest], conditioning.pooled
        )
    latent = None if batch.latent is None else batch.latent[index]
    captions, keys = [batch.captions[i] for i in index], [batch.keys[i] for i in index]
    return replace(batch, latent=latent, conditioning=conditioning, captions=captions, keys=keys)


def _bare_process(recipe: str, steps: str, result: str, *profile: str) -> None:
    """What `in_bare_process` starts: run the recipe's file, and write the times to the file `result`."""
    seconds = bare_run(load_recipe(DistillRecipe, recipe), int(steps), profile=bool(profile))
    if int(os.environ.get("RANK", "0")) == 0:
        Path(result).write_text(json.dumps(seconds))


if __name__ == "__main__":
    _bare_process(*sys.argv[1:])
