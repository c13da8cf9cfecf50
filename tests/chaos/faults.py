"""Faults: what is broken, and how it is mended again."""

from __future__ import annotations

import contextlib
import signal
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager
from pathlib import Path

import boto3
from moments import Run
from proxy import FaultProxy, Trouble
from surroundings import BUCKET, wait

Fault = Callable[[Run], AbstractContextManager[None]]
"""Begins when the context is entered, and is mended when it is left."""

SHORT_SECONDS, LONG_SECONDS = 8.0, 40.0
"""How long services are away for."""


@contextmanager
def worker_killed(run: Run) -> Iterator[None]:
    """SIGKILL of a training worker."""
    run.draw.choice(run.site.processes("ray::RayTrainWorker")).kill()
    yield


@contextmanager
def controller_killed(run: Run) -> Iterator[None]:
    """SIGKILL of the process in which Ray Train's controller runs."""
    for process in run.site.processes("ray::TrainController"):
        process.kill()
    yield


@contextmanager
def driver_killed(run: Run) -> Iterator[None]:
    """SIGKILL of the driver."""
    run.driver.kill(signal.SIGKILL)
    wait(lambda: run.driver.ended, 10, "the driver to be gone")
    yield


@contextmanager
def driver_told_to_end(run: Run) -> Iterator[None]:
    """SIGTERM of the driver."""
    run.driver.kill(signal.SIGTERM)
    yield


@contextmanager
def node_killed(run: Run) -> Iterator[None]:
    """A machine is gone at once, with all its processes, and another comes."""
    run.site.kill_node(run.draw.choice(run.site.nodes))
    yield
    run.site.add_node()


@contextmanager
def node_lost(run: Run) -> Iterator[None]:
    """A machine is gone at once, and none comes."""
    run.site.kill_node(run.draw.choice(run.site.nodes))
    wait(lambda: run.driver.ended, 240, "the run to say that there is no room for it")
    yield
    run.site.add_node()


@contextmanager
def gcs_killed(run: Run) -> Iterator[None]:
    """The cluster's head service is killed, and started again with its state."""
    run.site.restart_gcs()
    yield


@contextmanager
def head_killed(run: Run) -> Iterator[None]:
    """The head's machine is gone at once, with the driver, and comes again with its state."""
    run.site.restart_head()
    wait(lambda: run.driver.ended, 60, "the driver to be gone")
    yield


def s3(trouble: Trouble, seconds: float) -> Fault:
    """S3 in trouble for a while."""
    return _service(lambda run: run.site.s3, trouble, seconds)


def mlflow(trouble: Trouble, seconds: float) -> Fault:
    """MLflow in trouble for a while."""
    return _service(lambda run: run.site.mlflow, trouble, seconds)


def shard(damage: str) -> Fault:
    """A shard of the data is removed, or cut, until the run has ended."""

    @contextmanager
    def fault(run: Run) -> Iterator[None]:
        client = boto3.client("s3", region_name="us-east-1")
        key = "data/train/3x8x8/part-00001.parquet"
        whole = client.get_object(Bucket=BUCKET, Key=key)["Body"].read()
        if damage == "removed":
            client.delete_object(Bucket=BUCKET, Key=key)
        else:
            client.put_object(Bucket=BUCKET, Key=key, Body=whole[: len(whole) // 2])
        try:
            wait(lambda: run.driver.ended, 300, "the run to say that a shard is broken")
            yield
        finally:
            client.put_object(Bucket=BUCKET, Key=key, Body=whole)

    return fault


@contextmanager
def disk_full(run: Run) -> Iterator[None]:
    """The disk with checkpoints and the spool, of `home`, is full for a while."""
    filler = run.home / "disk" / "filler"
    with contextlib.suppress(OSError), filler.open("wb", buffering=0) as stream:
        while True:
            stream.write(bytes(1 << 16))
    try:
        with contextlib.suppress(TimeoutError):
            wait(lambda: run.driver.ended, SHORT_SECONDS, "the run to end before")
        yield
    finally:
        filler.unlink()


def _service(which: Callable[[Run], FaultProxy], trouble: Trouble, seconds: float) -> Fault:
    @contextmanager
    def fault(run: Run) -> Iterator[None]:
        proxy = which(run)
        proxy.set(trouble)
        proxy.release()  # what is held meets the trouble
        try:
            with contextlib.suppress(TimeoutError):
                wait(lambda: run.driver.ended, seconds, "the run to end before")
            yield
        finally:
            proxy.set("pass")

    return fault


def sizes(folder: Path) -> dict[str, int]:
    """Bytes of every file below a folder."""
    return {
        str(file.relative_to(folder)): file.stat().st_size for file in folder.rglob("*") if file.is_file()
    }
