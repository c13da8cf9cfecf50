"""Runs whose number of workers changes on the way: a node is killed, one is added."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import tempfile
from pathlib import Path

import pytest

PROGRAM = """
import json, os, sys, time
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from pathlib import Path
import psutil
import ray
from ray.cluster_utils import Cluster
from fewstep.data.schema import DatasetInfo
from fewstep.tracking.address import connect
from fewstep.train import trainer
from fewstep.train.recipe import DistillRecipe, load_recipe

data, teacher, plan = sys.argv[1], sys.argv[2], json.loads(sys.argv[3])
trainer.RESIZE_SECONDS = 1
node = {"num_cpus": 1, "object_store_memory": 100 * 2**20}
cluster = Cluster(initialize_head=True, head_node_args={**node, "num_cpus": 0, "include_dashboard": False})
nodes = [cluster.add_node(**node, resources={"worker": 1}) for _ in range(plan["nodes"])]
ray.init(address=cluster.address)
steps = plan["steps"]
recipe = load_recipe(DistillRecipe, None, [
    f"data.path={data}", "data.batch_size=8", f"teacher.path={teacher}", f"train.steps={steps}", "train.threads=1",
    "train.log_every=1", "train.checkpoint_every=10", "train.sample_every=0", "train.keep_checkpoints=50",
    "student.lora={rank: 4, dropout: 0.1}", "student.policy={type: gmflow, components: 3, logstd_width: 16}",
    "imitation.window=2", f"train.workers={plan['workers']}", "train.cpus_per_worker=1",
])

def reached(step):
    done = [int(path.name.split("-")[1]) for path in Path("runs").glob("*/step-*")]
    return bool(done) and max(done) >= step

def training():
    processes = psutil.process_iter(["cmdline"])
    workers = [one for one in processes if "".join(one.info["cmdline"] or []).startswith("ray::RayTrainWorker")]
    return [one for one in workers if one.environ().get("RAY_TMPDIR") == os.environ["RAY_TMPDIR"]]

def slowed_until(workers):
    # Ray reads the cluster's resources every 20 seconds: there have to be steps left to train when it does.
    while len(training()) < workers and not fitting.done():
        for seconds, change in ((0.9, "suspend"), (0.1, "resume")):
            for worker in training():
                with suppress(psutil.NoSuchProcess):
                    getattr(worker, change)()
            time.sleep(seconds)

def act():
    for after, what in plan["acts"]:
        while not reached(after) and not fitting.done():
            time.sleep(0.05)
        print("act", what, flush=True)
        if what == "kill":
            cluster.remove_node(nodes.pop(), allow_graceful=False)
        elif what == "add":
            nodes.append(cluster.add_node(**node, resources={"worker": 1}))
            slowed_until(2)
        elif what == "drain":
            import subprocess
            subprocess.run([sys.executable, "-m", "ray.scripts.scripts", "drain-node", "--address", cluster.address,
                "--node-id", nodes[-1].node_id, "--reason", "DRAIN_NODE_REASON_PREEMPTION", "--reason-message", "spot",
                "--deadline-remaining-seconds", "5"], check=True)
            time.sleep(5)
            cluster.remove_node(nodes.pop(), allow_graceful=False)  # as the machine is taken away

# Ray starts nodes from the main thread alone.
with ThreadPoolExecutor(1) as threads:
    fitting = threads.submit(trainer.fit, recipe)
    act()
    trained = fitting.result()
client = connect("sqlite:///mlflow.db")
points = client.get_metric_history(trained.mlflow_run, "train/loss")
losses = {}
for point in points:
    losses.setdefault(point.step, []).append(point.value)
print("result", json.dumps(losses), flush=True)
ray.shutdown()
cluster.shutdown()
"""


STEPS = 120


def run(home: Path, data: Path, teacher: Path, **plan: object) -> tuple[dict[int, list[float]], str]:
    """Losses by step, and what the run printed."""
    home.mkdir()
    with tempfile.TemporaryDirectory(prefix="r", dir="/tmp") as folder:  # short: Ray's sockets lie below it
        environment = {name: value for name, value in os.environ.items() if name != "RAY_ADDRESS"}
        done = subprocess.run(
            [sys.executable, "-c", PROGRAM, str(data), str(teacher), json.dumps({"steps": STEPS, **plan})],
            cwd=home, env={**environment, "RAY_TMPDIR": folder}, capture_output=True, text=True, timeout=500,
        )  # fmt: skip
    said = done.stdout + done.stderr
    [line] = [line for line in done.stdout.splitlines() if line.startswith("result ")] or [None]
    assert line is not None, said[-6000:]
    return {int(step): values for step, values in json.loads(line.removeprefix("result ")).items()}, said


@pytest.fixture(scope="module")
def undisturbed(tiny_data, tiny_teacher, tmp_path_factory) -> dict[int, float]:
    home = tmp_path_factory.mktemp("undisturbed")
    losses, _ = run(home / "run", tiny_data, tiny_teacher, nodes=1, workers=1, acts=[])
    return {step: values[0] for step, values in losses.items()}


def assert_same(losses: dict[int, list[float]], undisturbed: dict[int, float]) -> None:
    assert set(losses) == set(undisturbed) == set(range(1, STEPS + 1))
    for step, values in losses.items():
        for value in values:  # of a step that was taken twice, as its node died before the next checkpoint
            assert value == pytest.approx(undisturbed[step], rel=1e-3), step


def test_two_workers_one_and_two_again_are_one_run(tiny_data, tiny_teacher, tmp_path, undisturbed) -> None:
    losses, said = run(
        tmp_path / "run", tiny_data, tiny_teacher, nodes=2, workers=[1, 2], acts=[(20, "kill"), (40, "add")]
    )
    assert_same(losses, undisturbed)
    assert said.count("resumed from the checkpoint") >= 2, said
