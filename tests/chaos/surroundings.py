"""What runs and services need, on this machine and of this test alone: a Ray cluster, Redis, S3 and MLflow."""

from __future__ import annotations

import contextlib
import multiprocessing.util
import os
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
import time
import urllib.request
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import boto3
import psutil
from clock import now
from moto.server import ThreadedMotoServer
from proxy import FaultProxy

BUCKET = "chaos"
NODE = {"num_cpus": 2, "object_store_memory": 100 * 2**20}
RESTART_SECONDS = 3
"""How long the head is away for."""


class Surroundings:
    """Starts everything when it is made, and ends it by `close`.

    Args:
        environment: variables of the cluster's processes, beside those that all need.

    Attributes:
        folder: short, as Ray's sockets lie below it.
        s3, mlflow: proxies, through which both are reached.
        registry: MLflow's own address.
        nodes: of the Ray cluster, beside its head.
    """

    def __init__(self, **environment: str) -> None:
        from ray.cluster_utils import Cluster

        self.folder = Path(tempfile.mkdtemp(prefix="c", dir="/tmp"))
        multiprocessing.util.get_temp_dir()  # is kept until Python ends, so it must not lie in `folder`
        self.closing = contextlib.ExitStack()
        self.s3, self.mlflow = FaultProxy(self._start_s3()), FaultProxy(self._start_mlflow())
        for name, value in {
            "RAY_TMPDIR": str(self.folder / "r"), "RAY_AUTH_MODE": "disabled", "RAY_USAGE_STATS_ENABLED": "0",
            "RAY_GRACEFUL_SHUTDOWN_DRAIN_TIMEOUT_S": "0", **self._start_redis(), "OMP_NUM_THREADS": "1",
            "AWS_ENDPOINT_URL": self.s3.address, "AWS_ACCESS_KEY_ID": "test", "AWS_SECRET_ACCESS_KEY": "test",
            "AWS_REGION": "us-east-1", "PYTHONPATH": os.pathsep.join(sys.path), "MLFLOW_DISABLE_TELEMETRY": "true",
            "TMPDIR": str(self.made("tmp")), **environment,
        }.items():  # fmt: skip
            os.environ[name] = value
        os.environ.pop("RAY_ADDRESS", None)
        tempfile.tempdir = None
        self.made("r")
        boto3.client("s3", region_name="us-east-1").create_bucket(Bucket=BUCKET)
        ports = {"gcs_server_port": free_port(), "dashboard_port": free_port()}
        self.head = NODE | ports | {"num_cpus": 0, "include_dashboard": False}
        self.cluster = Cluster(initialize_head=True, head_node_args=self.head)
        self.closing.callback(self.cluster.shutdown)
        self.nodes: list[Any] = []
        for _ in range(2):
            self.add_node()

    def close(self) -> None:
        """End every process, and delete the folder."""
        self.closing.close()
        self.s3.close()
        self.mlflow.close()
        shutil.rmtree(self.folder, ignore_errors=True)

    def add_node(self) -> None:
        """Start a machine of two CPUs, and wait until it has joined."""
        self.nodes.append(self.cluster.add_node(**NODE))

    def whole(self) -> None:
        """Bring back two nodes, where a cell has left fewer."""
        while len(self.nodes) < 2:
            self.add_node()

    def kill_node(self, node: Any) -> None:
        """A machine is gone at once, with all that runs on it."""
        self.nodes.remove(node)
        with _killed_children(node):
            self.cluster.remove_node(node, allow_graceful=False)

    def restart_gcs(self) -> None:
        """The head's service is killed, and started again with its state."""
        self.cluster.head_node.kill_gcs_server()
        time.sleep(RESTART_SECONDS)
        self.cluster.head_node.start_gcs_server()

    def restart_head(self) -> None:
        """The head's machine is gone at once, and comes again with its addresses and the state that Redis has."""
        head = self.cluster.head_node
        with _killed_children(head):
            head.kill_all_processes(check_alive=False, allow_graceful=False)
        time.sleep(RESTART_SECONDS)
        self.cluster.head_node = None
        self.cluster.add_node(**self.head)

    def processes(self, title: str) -> list[psutil.Process]:
        """This cluster's processes whose title begins so, as Ray names its actors."""
        found = []
        for process in psutil.process_iter(["cmdline"]):
            if "".join(process.info["cmdline"] or []).startswith(title):
                with contextlib.suppress(psutil.Error):
                    if process.environ().get("RAY_TMPDIR") == os.environ["RAY_TMPDIR"]:
                        found.append(process)
        return found

    def made(self, name: str) -> Path:
        """A folder in `folder`."""
        (self.folder / name).mkdir(exist_ok=True)
        return self.folder / name

    def _start_s3(self) -> int:
        server = ThreadedMotoServer(ip_address="127.0.0.1", port=0, verbose=False)
        server.start()
        self.closing.callback(server.stop)
        return server.get_host_and_port()[1]

    def _start_redis(self) -> dict[str, str]:
        """What makes Ray's head keep its state outside of it; nothing where Redis is not installed."""
        if not has_redis():
            return {}
        port = free_port()
        self._run(
            [
                "redis-server",
                "--port",
                str(port),
                "--bind",
                "127.0.0.1",
                "--save",
                "",
                "--dir",
                str(self.folder),
            ]
        )
        return {"RAY_REDIS_ADDRESS": f"127.0.0.1:{port}"}

    def _start_mlflow(self) -> int:
        port, place = free_port(), self.made("mlflow")
        self.registry = f"http://127.0.0.1:{port}"
        self._run(
            [sys.executable, "-m", "mlflow", "server", "--host", "127.0.0.1", "--port", str(port), "--workers", "1",
             "--backend-store-uri", f"sqlite:///{place}/server.db", "--artifacts-destination", str(place / "files")],
            MLFLOW_SERVER_ENABLE_JOB_EXECUTION="false",
        )  # fmt: skip

        def up() -> bool:
            with contextlib.suppress(OSError), urllib.request.urlopen(f"{self.registry}/health", timeout=2):
                return True
            return False

        wait(up, 120, "MLflow to start")
        return port

    def _run(self, command: list[str], **environment: str) -> None:
        process = subprocess.Popen(
            command, cwd=self.folder, env=os.environ | environment, start_new_session=True,
            stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL,
        )  # fmt: skip
        self.closing.callback(process.wait)
        self.closing.callback(os.killpg, process.pid, signal.SIGKILL)


@contextlib.contextmanager
def _killed_children(node: Any) -> Iterator[None]:
    """Kill what runs on a node of Ray's after the node itself, which would start it again."""
    children = psutil.Process(node.all_processes["raylet"][0].process.pid).children(recursive=True)
    yield
    for process in children:
        with contextlib.suppress(psutil.Error):
            process.kill()


def has_redis() -> bool:
    """Whether a Redis server is installed (Debian's package redis-server)."""
    return shutil.which("redis-server") is not None


def wait(happened: Callable[[], Any], seconds: float, what: str) -> None:
    """Wait until something has happened.

    Raises:
        TimeoutError: it has not in that time.
    """
    deadline = now() + seconds
    while not happened():
        if now() > deadline:
            raise TimeoutError(f"waited {seconds:.0f} s for {what}")
        time.sleep(0.01)


def free_port() -> int:
    """A port of loopback that nothing listens on now."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return probe.getsockname()[1]
