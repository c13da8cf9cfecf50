"""Fixtures that several suites share."""

from __future__ import annotations

import os
import signal
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch

import tiny
from hub_server import HubServer

ROOT = Path(__file__).parents[1]

if "PYTEST_XDIST_WORKER" in os.environ:  # `make test` runs two at once: each, and what it starts, on one core
    os.environ.setdefault("OMP_NUM_THREADS", "1")

# A shell that starts the tests in the background has SIGINT ignored, here and in all that is started here; but there
# are tests of Ctrl-C.
if signal.getsignal(signal.SIGINT) is signal.SIG_IGN:
    signal.signal(signal.SIGINT, signal.default_int_handler)

# Triton reads this when it is imported, and torch may be the first to do so.
if not torch.cuda.is_available():
    os.environ.setdefault("TRITON_INTERPRET", "1")


LONGEST = (
    "train/test_training.py",
    "integration/test_serve.py",
    "train/test_recovery.py",
    "data/test_encode.py",
)
"""Files that take minutes, the longest first."""


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """The longest files come first, then others that need the Ray node: as the last, they would leave a core idle."""
    slow = {item.path for item in items if "ray_cluster" in getattr(item, "fixturenames", ())}
    first = {ROOT / "tests" / name: place for place, name in enumerate(LONGEST)}
    items.sort(key=lambda item: (first.get(item.path, len(first)), item.path not in slow))


PLANTED = {
    name: f"planted-{name.lower()}" for name in ("HF_TOKEN", "MLFLOW_TRACKING_PASSWORD", "AWS_SESSION_TOKEN")
}
"""Secrets in the environment of the Ray node, which are to be found nowhere else."""


@pytest.fixture(scope="session")
def ray_cluster() -> Iterator[str]:
    """A local Ray node with four logical CPUs for the whole test session; gives the address of its job API.

    All its ports are free ones, so that it runs beside any other node of this machine.
    """
    import ray

    port, dashboard, agent, client = (_free_port() for _ in range(4))
    scripts = Path(sys.executable).parent
    folder = tempfile.mkdtemp(prefix="ray-", dir="/tmp")  # short: Ray's sockets lie below it
    command = [
        str(scripts / "ray"), "start", "--head", "--block", "--num-cpus=4", f"--port={port}",
        f"--dashboard-port={dashboard}", f"--dashboard-agent-listen-port={agent}",
        f"--ray-client-server-port={client}", f"--temp-dir={folder}", "--disable-usage-stats",
        "--node-ip-address=127.0.0.1",
    ]  # fmt: skip
    os.environ["RAY_AUTH_MODE"] = "disabled"  # as in the Makefile
    os.environ["RAY_GRACEFUL_SHUTDOWN_DRAIN_TIMEOUT_S"] = "0"  # at its end nobody is served any more
    path = f"{scripts}{os.pathsep}{os.environ['PATH']}"
    node = subprocess.Popen(
        command, cwd=ROOT, env=os.environ | PLANTED | {"PATH": path}, start_new_session=True, stdout=subprocess.DEVNULL,
        stderr=subprocess.DEVNULL,
    )  # fmt: skip
    address = f"http://127.0.0.1:{dashboard}"
    try:
        _wait_for_job_agent(address)
        ray.init(address=f"127.0.0.1:{port}")
        yield address
        ray.shutdown()
    finally:
        node.send_signal(signal.SIGTERM)  # `ray start --block` stops the node's processes
        node.wait(60)


@pytest.fixture(scope="session")
def s3_server() -> Iterator[str]:
    """Address of an S3 server on this machine."""
    from moto.server import ThreadedMotoServer

    server = ThreadedMotoServer(ip_address="127.0.0.1", port=0, verbose=False)
    server.start()
    host, port = server.get_host_and_port()
    yield f"http://{host}:{port}"
    server.stop()


@pytest.fixture
def hub_server() -> Iterator[HubServer]:
    """An empty Hugging Face hub on this machine."""
    server = HubServer()
    yield server
    server.close()


@pytest.fixture
def s3_bucket(s3_server: str, monkeypatch: pytest.MonkeyPatch) -> str:
    """`s3://…` of a fresh bucket on that server, the usual variables pointing there."""
    import uuid

    import boto3

    settings = {
        "AWS_ENDPOINT_URL": s3_server,
        "AWS_ACCESS_KEY_ID": "test",
        "AWS_SECRET_ACCESS_KEY": "test",
        "AWS_REGION": "us-east-1",
    }
    for name, value in settings.items():
        monkeypatch.setenv(name, value)
    bucket = f"bucket-{uuid.uuid4().hex[:8]}"
    boto3.client("s3", endpoint_url=s3_server, region_name="us-east-1").create_bucket(Bucket=bucket)
    return f"s3://{bucket}"


@pytest.fixture
def emulated_bfloat16(monkeypatch: pytest.MonkeyPatch) -> None:
    """Lower precisions are taken also on a CPU that has to emulate bfloat16: for small networks it is quick enough."""
    from fewstep.models import precision

    monkeypatch.setattr(precision, "cpu_has_bfloat16", lambda: True)


@pytest.fixture(scope="session")
def tiny_teacher(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Folder of `tiny.write_teacher`."""
    folder = tmp_path_factory.mktemp("tiny-teacher")
    tiny.write_teacher(folder)
    return folder


@pytest.fixture(scope="session")
def tiny_data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Folder of `tiny.write_data`."""
    root = tmp_path_factory.mktemp("tiny-data")
    tiny.write_data(root)
    return root


def _free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return probe.getsockname()[1]


def _wait_for_job_agent(address: str) -> None:
    """A node takes jobs some seconds after it is up."""
    from ray.job_submission import JobSubmissionClient

    deadline = time.monotonic() + 120
    while True:
        try:
            JobSubmissionClient(address).submit_job(entrypoint="true")
            return
        except (RuntimeError, OSError):  # those of requests are OSErrors
            if time.monotonic() > deadline:
                raise
            time.sleep(0.5)
