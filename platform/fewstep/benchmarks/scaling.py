"""`fewstep benchmark scaling`: steps of several processes as the planner predicts them, and as they are."""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import tempfile
from collections.abc import Callable, Mapping
from pathlib import Path
from unittest.mock import patch

import torch
import torch.distributed as dist
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh

from fewstep.benchmarks.measure import aligned, interleaved, log_to_mlflow, machine
from fewstep.train.recipe import DistillRecipe, load_recipe

DESCRIPTION = """\
Check the predictions of `fewstep distill --dry-run --scaling` against steps of a small network, which processes on this
machine take together, with their messages by gloo on the loopback device. In the same processes, in turns:

  messages   gathers, reductions and averages of a small and of a large size: a time per message and a rate
  computing  the step of as many processes at once, each with the model to itself: plain, and with FSDP's own work, its
             hooks and copies, as the only one that shares the weights
  together   the step as the trainer takes it, with the weights sharded (fsdp) or whole (ddp)

From the first two the planner predicts the third. Processes on a CPU compute or send, and don't overlap the two."""

EXAMPLES = """\
reading the table
  "error" is predicted ÷ measured − 1. "computing" is that of the layout: with FSDP's own work for fsdp. What the
  prediction leaves out is that at each message processes wait for the slowest of them, and that they share cores and
  memory with those that still compute: it is more on a machine with fewer cores than processes.

examples
  {program}                                  2 and 4 processes, two minutes
  {program} --workers 2 --samples 4
  {program} --repeats 10 --tracking sqlite:///mlflow.db"""

SIZES = (1 << 14, 1 << 23)
"""Bytes of the small and of the large message."""


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Declare the options."""
    parser.add_argument(
        "--recipe", metavar="NAME|FILE", default="emoji_qwen_4nfe",
        help="a bundled recipe's name, or a YAML file; default: %(default)s",
    )  # fmt: skip
    parser.add_argument("--set", action="append", default=[], metavar="KEY=VALUE", help="override one field")
    parser.add_argument(
        "--workers", type=int, nargs="+", default=[2, 4], metavar="N", help="processes; default: 2 4"
    )
    parser.add_argument("--samples", type=int, default=1, help="of each process; default: %(default)s")
    parser.add_argument("--repeats", type=int, default=7, help="timed rounds; default: %(default)s")
    parser.add_argument("--tracking", metavar="URI", help="also log the table to this MLflow address")


def run(options: argparse.Namespace) -> None:
    """Measure and predict, and print the table.

    Raises:
        UserError: the recipe can't be run here.
    """
    from fewstep.benchmarks.train_step import prepared_recipe

    recipe = prepared_recipe(options)
    measured = {
        workers: in_processes(recipe, workers, options.samples, options.repeats)
        for workers in options.workers
    }
    description = f"{machine(torch.device('cpu'))}; {recipe.name}, {options.samples} samples on each process"
    table = f"{description}\n\n{scaling_steps_table(measured)}"
    print(f"\n{table}")
    if options.tracking:
        metrics = {
            f"{workers}/{name}": value
            for workers, values in measured.items()
            for name, value in values.items()
        }
        log_to_mlflow(options.tracking, "scaling", description, table, metrics)


def scaling_steps_table(measured: Mapping[int, Mapping[str, float]]) -> str:
    """Milliseconds and errors as text, a line for each number of processes and way to share the weights.

    Args:
        measured: by number of processes, as `in_processes` gives it.
    """
    rows = [
        (
            f"{workers}, {layout}", f"{one['gather_rate'] / 1e9:.2f}", f"{one[f'{layout}_alone'] * 1e3:.1f}",
            f"{(one[f'{layout}_predicted'] - one[f'{layout}_alone']) * 1e3:.1f}",
            f"{one[f'{layout}_predicted'] * 1e3:.1f}", f"{one[layout] * 1e3:.1f}",
            f"{one[f'{layout}_predicted'] / one[layout] - 1:+.0%}",
        )
        for workers, one in measured.items()
        for layout in ("fsdp", "ddp")
    ]  # fmt: skip
    header = (
        "processes, layout", "gather GB/s", "computing ms", "messages ms", "predicted ms", "measured ms", "error"
    )  # fmt: skip
    return aligned(header, rows)


def in_processes(recipe: DistillRecipe, workers: int, samples: int, repeats: int) -> dict[str, float]:
    """`measured_steps` in as many processes, with a worker's environment.

    Args:
        recipe: of the step.
        workers: how many processes.
        samples: of each.
        repeats: timed rounds.
    """
    from fewstep.train.trainer import worker_environment

    train = recipe.train.model_copy(update={"workers": workers, "accumulate": 1, "threads": 1, "gpu": False})
    data = recipe.data.model_copy(update={"batch_size": workers * samples})
    recipe = recipe.model_copy(update={"train": train, "data": data})
    with tempfile.TemporaryDirectory() as folder:
        file, result = Path(folder) / "recipe.yaml", Path(folder) / "result.json"
        file.write_text(json.dumps(recipe.model_dump(mode="json")))  # JSON is YAML
        command = [
            sys.executable, "-m", "torch.distributed.run", "--standalone", f"--nproc-per-node={workers}",
            "-m", "fewstep.benchmarks.scaling", str(file), str(repeats), str(result),
        ]  # fmt: skip
        subprocess.run(command, env=os.environ | worker_environment(recipe.train), check=True)
        return json.loads(result.read_text())


def measured_steps(recipe: DistillRecipe, repeats: int) -> dict[str, float]:
    """Seconds of a step, measured and predicted, in one of the processes that torchrun started.

    Args:
        recipe: of the step, for as many workers as there are processes.
        repeats: timed rounds.

    Returns:
        Seconds of the step that each process takes alone ("fsdp_alone", "ddp_alone"), of the step that they take
        together ("fsdp", "ddp"), and as predicted ("fsdp_predicted", "ddp_predicted"); bytes per second of a gather
        ("gather_rate").
    """
    from itertools import repeat

    from fewstep.benchmarks.train_step import rows_of
    from fewstep.data.schema import DatasetInfo
    from fewstep.data.stream import read_split
    from fewstep.encoders import load_encoder
    from fewstep.models.conditioning import TextConditioning
    from fewstep.plan.scaling import Messages, Workload, nothing, step_seconds
    from fewstep.plan.training import measure, new_student, planned_references
    from fewstep.train import parallel
    from fewstep.train.learner import Learner
    from fewstep.train.progress import LossMeter

    dist.init_process_group("gloo")
    rank, workers, device = dist.get_rank(), dist.get_world_size(), torch.device("cpu")
    torch.set_num_threads(1)
    torch.set_flush_denormal(True)  # as the worker does
    info = DatasetInfo.open(recipe.data.path)
    null = load_encoder(info.encoding.text_encoder, max_tokens=info.encoding.max_tokens).null()
    samples = recipe.data.batch_size // workers
    shape = next(iter(info.buckets("train")))
    rows = read_split(recipe.data.path, "train", recipe.data.batch_size, shape=shape)
    batch = rows_of(rows, list(range(rank * samples, (rank + 1) * samples)))
    meter = LossMeter(device)

    def stepper(layout: str, alone: bool) -> Callable[[], None]:
        train = recipe.train.model_copy(update={"parallel": layout})
        own = recipe.model_copy(update={"train": train})
        # FSDP needs a group, which is of this process alone then; replicas average nothing where there is no other.
        with patch.object(parallel, "init_device_mesh", _mesh_of_one if alone else init_device_mesh):
            learner = Learner(own, null, device, rank, workers)
        if alone and layout == "ddp":
            learner.world_size = 1

        def step() -> None:
            dist.barrier()  # all begin together, as steps in a row do
            learner.step(1, repeat(batch), meter)

        return step

    runs = {
        name: stepper(name.removesuffix("_alone"), name.endswith("_alone"))
        for name in ("fsdp_alone", "ddp_alone", "fsdp", "ddp")
    }
    seconds = interleaved(runs, repeats, device)
    # Of all processes the slowest: no one goes on before it.
    for name, value in seconds.items():
        seconds[name] = _largest(value)
    gather, reduce, average = (line(kind, repeats) for kind in (_gather, _reduce, _average))
    # Copies are among what FSDP does alone.
    messages = {
        "fsdp": Messages(gather, reduce, nothing, nothing),
        "ddp": Messages(nothing, nothing, average, nothing),
    }

    network = new_student(recipe)
    texts = batch.conditioning
    tokens = texts.states.shape[1] if isinstance(texts, TextConditioning) else 0  # classes have none
    references = planned_references(recipe, network, None)
    cost = measure(network, recipe, samples, shape, tokens, references)
    work = Workload.of(network, recipe, cost, samples)
    operations = work.segments * samples * work.operations
    predicted = {
        f"{layout}_predicted": step_seconds(
            work, [samples], operations / seconds[f"{layout}_alone"], own, overlap=False
        )
        for layout, own in messages.items()
    }
    dist.destroy_process_group()
    return seconds | predicted | {"gather_rate": SIZES[1] / gather(SIZES[1])}


def _mesh_of_one(device: str, _: tuple[int, ...]) -> DeviceMesh:
    """A mesh of this process alone, in place of one of all processes."""
    return init_device_mesh(device, (dist.get_world_size(), 1), mesh_dim_names=("others", "own"))["own"]


def line(message: Callable[[int], Callable[[], object]], repeats: int) -> Callable[[int], float]:
    """Seconds of a kind of message by its bytes: the line through the measured times of a small and a large one.

    Args:
        message: makes what sends one of a number of bytes.
        repeats: timed rounds.
    """
    times = interleaved({str(size): message(size) for size in SIZES}, 3 * repeats, torch.device("cpu"))
    small, large = (_largest(times[str(size)]) for size in SIZES)
    slope = max(large - small, 0) / (SIZES[1] - SIZES[0])
    return lambda size: small + (size - SIZES[0]) * slope if size else 0.0


def _gather(size: int) -> Callable[[], object]:
    whole = torch.empty(size // 4)
    part = torch.zeros(len(whole) // dist.get_world_size())
    return lambda: dist.all_gather_into_tensor(whole, part)


def _reduce(size: int) -> Callable[[], object]:
    whole = torch.zeros(size // 4)
    part = torch.empty(len(whole) // dist.get_world_size())
    return lambda: dist.reduce_scatter_tensor(part, whole)


def _average(size: int) -> Callable[[], object]:
    whole = torch.zeros(size // 4)
    return lambda: dist.all_reduce(whole)


def _largest(value: float) -> float:
    """The largest of all processes' values."""
    held = torch.tensor(value, dtype=torch.float64)
    dist.all_reduce(held, dist.ReduceOp.MAX)
    return held.item()


def _process(recipe: str, repeats: str, result: str) -> None:
    """What `in_processes` starts: read the recipe's file, and write the seconds to the file `result`."""
    seconds = measured_steps(load_recipe(DistillRecipe, recipe), int(repeats))
    if os.environ["RANK"] == "0":
        Path(result).write_text(json.dumps(seconds))


if __name__ == "__main__":
    _process(*sys.argv[1:])
