"""A run beside another Ray cluster that is started on the same machine meanwhile."""

from __future__ import annotations

import os
import signal
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path

import pytest

PROGRAM = """
import sys, time
from pathlib import Path
import ray, ray.train
from ray.train.torch import TorchTrainer
from fewstep.cluster import told_own_cluster

def work(folder):
    Path(folder, "working").touch()
    while not Path(folder, "another").exists():
        time.sleep(0.1)
    time.sleep(8)  # Ray Train's helper asks every second whether the run lives

ray.init(address=sys.argv[1])
with told_own_cluster():
    TorchTrainer(
        work,
        train_loop_config=sys.argv[2],
        scaling_config=ray.train.ScalingConfig(num_workers=1, resources_per_worker={"CPU": 0.5}),
        run_config=ray.train.RunConfig(name="beside", storage_path=sys.argv[2]),
    ).fit()
"""

WITHOUT_DASHBOARD = """
import os, ray
from ray.util.state import get_actor
from ray.util.state.exception import RayStateApiException
from fewstep.cluster import told_own_cluster

ray.init(address="local", num_cpus=1, include_dashboard=False, _node_ip_address="127.0.0.1")
before = dict(os.environ)
with told_own_cluster():
    assert os.environ["RAY_ADDRESS"] == ray.get_runtime_context().gcs_address
    print("asks", os.environ["RAY_API_SERVER_ADDRESS"])
    try:
        get_actor("0" * 32)
    except RayStateApiException:  # for which Ray Train's helper waits, and ends nothing
        print("no answer")
assert dict(os.environ) == before
"""


@pytest.fixture
def machine() -> Iterator[dict[str, str]]:
    """The environment of processes that know of no other Ray clusters than those of this test."""
    with tempfile.TemporaryDirectory(prefix="r", dir="/tmp") as folder:  # short: Ray's sockets lie below it
        # Ray keeps the address of the cluster that was started last in this folder.
        settings = {"RAY_TMPDIR": folder, "RAY_GRACEFUL_SHUTDOWN_DRAIN_TIMEOUT_S": "0"}
        yield {name: value for name, value in os.environ.items() if name != "RAY_ADDRESS"} | settings


@contextmanager
def cluster(machine: dict[str, str]) -> Iterator[str]:
    """Address of a new cluster, the machine's latest."""
    port, dashboard, agent, client = (free_port() for _ in range(4))
    command = [
        sys.executable, "-m", "ray.scripts.scripts", "start", "--head", "--block", "--num-cpus=2", f"--port={port}",
        f"--dashboard-port={dashboard}", f"--dashboard-agent-listen-port={agent}",
        f"--ray-client-server-port={client}", "--node-ip-address=127.0.0.1", "--disable-usage-stats",
    ]  # fmt: skip
    quiet = subprocess.DEVNULL
    node = subprocess.Popen(command, env=machine, start_new_session=True, stdout=quiet, stderr=quiet)
    latest = Path(machine["RAY_TMPDIR"], "ray", "ray_current_cluster")
    try:
        wait_until(lambda: latest.exists() and latest.read_text().endswith(f":{port}"), node)
        yield latest.read_text()
    finally:
        node.send_signal(signal.SIGTERM)  # `ray start --block` stops the node's processes
        node.wait(60)


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return probe.getsockname()[1]


def wait_until(happened: Callable[[], bool], process: subprocess.Popen) -> None:
    deadline = time.monotonic() + 180
    while not happened():
        assert process.poll() is None, f"{process.args} has ended"
        assert time.monotonic() < deadline, f"{process.args} takes too long"
        time.sleep(0.1)


@pytest.mark.slow
def test_a_run_is_not_ended_by_another_cluster(machine: dict[str, str], tmp_path: Path) -> None:
    with ExitStack() as clusters, open(tmp_path / "log", "w") as log:
        own = clusters.enter_context(cluster(machine))
        run = subprocess.Popen(
            [sys.executable, "-c", PROGRAM, own, str(tmp_path)], env=machine, cwd=tmp_path, stdout=log, stderr=log
        )  # fmt: skip
        clusters.callback(run.kill)
        wait_until((tmp_path / "working").exists, run)
        clusters.enter_context(cluster(machine))
        (tmp_path / "another").touch()
        status = run.wait(180)
    said = (tmp_path / "log").read_text()
    assert status == 0, said[-2000:]
    assert "Found multiple active Ray instances" not in said, "nothing had to guess"


def test_a_cluster_without_a_dashboard_asks_nobody_else_s(machine: dict[str, str], tmp_path: Path) -> None:
    done = subprocess.run(
        [sys.executable, "-c", WITHOUT_DASHBOARD], env=machine, cwd=tmp_path, capture_output=True, text=True
    )
    assert done.stdout.splitlines() == ["asks http://127.0.0.1:9", "no answer"], done.stderr[-2000:]
