"""A training run on a cluster of its own, on this machine, to which a plan of accidents happens.

    python program.py DATA TEACHER '{"steps": 120, "nodes": 2, "workers": [1, 2], "acts": [[20, "kill"], [40, "add"]]}'

An accident happens when the checkpoint of its step is reported. The last line is `result` and the losses of each step,
or `failed` and the message.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from pathlib import Path

import psutil
import ray
from ray.cluster_utils import Cluster

import tiny
from fewstep.errors import UserError
from fewstep.tracking.address import connect
from fewstep.train import trainer

DATA, TEACHER, PLAN = sys.argv[1], sys.argv[2], json.loads(sys.argv[3])
NODE = {"num_cpus": 1, "object_store_memory": 100 * 2**20}
DRAIN_SECONDS = 20

trainer.RESIZE_SECONDS = 1
cluster = Cluster(initialize_head=True, head_node_args={**NODE, "num_cpus": 0, "include_dashboard": False})
nodes = [cluster.add_node(**NODE, resources={"worker": 1}) for _ in range(PLAN["nodes"])]
ray.init(address=cluster.address)
recipe = tiny.recipe(
    Path(DATA), Path(TEACHER), f"train.steps={PLAN['steps']}", "train.checkpoint_every=10", "train.keep_checkpoints=50",
    f"train.workers={PLAN['workers']}", "train.cpus_per_worker=1", "data.reading=tasks", *PLAN.get("overrides", ()),
)  # fmt: skip


def reached(step: int) -> bool:
    done = [int(path.name.split("-")[1]) for path in Path("runs").glob("*/step-*")]
    return bool(done) and max(done) >= step


def training() -> list[psutil.Process]:
    processes = psutil.process_iter(["cmdline"])
    workers = [
        one for one in processes if "".join(one.info["cmdline"] or []).startswith("ray::RayTrainWorker")
    ]
    return [one for one in workers if one.environ().get("RAY_TMPDIR") == os.environ["RAY_TMPDIR"]]


def slowed_until(reached: Callable[[], bool]) -> None:
    """Let training come to a tenth of its speed, so that there are steps left when it notices what has happened."""
    while not reached() and not fitting.done():
        for seconds, change in ((0.9, "suspend"), (0.1, "resume")):
            for worker in training():
                with suppress(psutil.NoSuchProcess):
                    getattr(worker, change)()
            time.sleep(seconds)


def happen(what: str) -> None:
    print("act", what, flush=True)
    if what == "kill":
        cluster.remove_node(nodes.pop(), allow_graceful=False)
    elif what == "kill worker":
        training()[-1].kill()
    elif what == "add":
        nodes.append(cluster.add_node(**NODE, resources={"worker": 1}))
        slowed_until(lambda: len(training()) == 2)  # Ray reads the cluster's resources every 20 seconds
    elif what == "drain":
        subprocess.run(
            [sys.executable, "-m", "ray.scripts.scripts", "drain-node", "--address", cluster.address, "--node-id",
             nodes[-1].node_id, "--reason", "DRAIN_NODE_REASON_PREEMPTION", "--reason-message", "spot",
             "--deadline-remaining-seconds", str(DRAIN_SECONDS)], check=True,
        )  # fmt: skip
        gone = time.monotonic() + DRAIN_SECONDS
        slowed_until(lambda: time.monotonic() > gone)
        cluster.remove_node(nodes.pop(), allow_graceful=False)  # as the machine is taken away
    else:
        raise ValueError(what)


# Ray starts nodes from the main thread alone.
with ThreadPoolExecutor(1) as threads:
    fitting = threads.submit(trainer.fit, recipe)
    for after, what in PLAN["acts"]:
        while not reached(after) and not fitting.done():
            time.sleep(0.05)
        happen(what)
    try:
        trained = fitting.result()
    except UserError as error:
        print("failed", error, flush=True)
        sys.exit()
losses: dict[int, list[float]] = {}
for point in connect("sqlite:///mlflow.db").get_metric_history(trained.mlflow_run, "train/loss"):
    losses.setdefault(point.step, []).append(point.value)
print("result", json.dumps(losses), flush=True)
ray.shutdown()
cluster.shutdown()
