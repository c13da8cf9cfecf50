"""MLflow on PostgreSQL with its files in a bucket, and the way there from `mlflow.db` without losing a run."""

from __future__ import annotations

import os
import subprocess
import sys
import time
import urllib.request
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

import boto3
import pytest
from mlflow import MlflowClient

from fewstep.cli import main
from fewstep.errors import UserError
from fewstep.storage import Storage
from fewstep.tracking import migration
from fewstep.tracking.address import artifact_location, connect
from fewstep.tracking.migration import COUNTED
from fewstep.tracking.registry import look_up
from processes import free_port

STEPS = 1500
"""More metric values than a batch has rows."""


@contextmanager
def mlflow_server(database: str, files: str, folder: Path) -> Iterator[str]:
    """An `mlflow server` as infra/kubernetes/base/mlflow.yaml starts it; gives its address."""
    port = free_port()
    command = [
        sys.executable, "-m", "mlflow", "server", "--host", "127.0.0.1", "--port", str(port), "--workers", "1",
        "--backend-store-uri", database, "--artifacts-destination", files,
    ]  # fmt: skip
    environment = os.environ | {
        "MLFLOW_SERVER_ENABLE_JOB_EXECUTION": "false",
        "MLFLOW_DISABLE_TELEMETRY": "true",
    }
    # As MLflow's own client of S3 calls the address.
    environment |= {
        "MLFLOW_S3_ENDPOINT_URL": os.environ["AWS_ENDPOINT_URL"],
        "AWS_DEFAULT_REGION": "us-east-1",
    }
    with open(folder / "server.log", "wb") as log:
        server = subprocess.Popen(
            command, cwd=folder, env=environment, stdout=log, stderr=log, start_new_session=True
        )
    try:
        address, deadline = f"http://127.0.0.1:{port}", time.monotonic() + 120
        while True:
            with suppress(OSError), urllib.request.urlopen(f"{address}/health", timeout=2):
                break
            going_on = server.poll() is None and time.monotonic() < deadline
            assert going_on, (folder / "server.log").read_text()[-3000:]
            time.sleep(0.2)
        yield address
    finally:
        os.killpg(server.pid, 15)
        server.wait(30)


@pytest.fixture
def sqlite(tmp_path: Path) -> str:
    """An `mlflow.db` with two experiments, a failed run, many metrics, files, and a model of two versions."""
    from mlflow.entities import Metric

    uri = f"sqlite:///{tmp_path}/mlflow.db"
    client = connect(uri)
    first = client.create_experiment("emoji", artifact_location=artifact_location(uri, "emoji"))
    client.create_experiment("empty", artifact_location=artifact_location(uri, "empty"))
    client.create_registered_model("emoji-4step")
    for number in (1, 2):
        run = client.create_run(first, tags={"part": "π"}, run_name=f"run {number}")
        client.log_param(run.info.run_id, "steps", 600)
        values = [Metric("loss", 1 / (step + 1), step, step) for step in range(STEPS)]
        for start in range(0, STEPS, 1000):
            client.log_batch(run.info.run_id, metrics=values[start : start + 1000])
        client.log_metric(run.info.run_id, "kid", float("nan"))
        for name, text in (("weights.bin", f"weights {number}" * 1000), ("empty file", "")):
            client.log_text(run.info.run_id, text, f"student/{name}")
        client.set_terminated(run.info.run_id, "FINISHED" if number == 1 else "FAILED")
        client.create_model_version("emoji-4step", f"{run.info.artifact_uri}/student", run.info.run_id)
    client.set_registered_model_alias("emoji-4step", "champion", "1")
    client.set_model_version_tag("emoji-4step", "2", "kid", "1.15")
    return uri


def test_all_runs_and_models_are_there_after_the_move(
    sqlite: str,
    new_database: Callable[[str], str],
    s3_bucket: str,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:
    target, files = new_database("moved"), f"{s3_bucket}/mlflow"
    before = (tmp_path / "mlflow.db").read_bytes()
    assert main(["copy-runs", sqlite, target, "--files", files]) == 0
    assert (tmp_path / "mlflow.db").read_bytes() == before, "what is copied is only read"
    printed = capsys.readouterr().out.splitlines()
    assert [line.split()[-2:] for line in printed[1 : 1 + len(COUNTED)]] == [
        ["3", "3"], ["2", "2"], [str(2 * STEPS + 2)] * 2, ["2", "2"], ["4", "4"], ["0", "0"], ["1", "1"], ["2", "2"],
        ["1", "1"],
    ]  # fmt: skip
    assert printed[-1].startswith("4 files (18,000 bytes) copied to s3://")

    # A second copy into it would mix two histories.
    assert main(["copy-runs", sqlite, target, "--files", files]) == 2
    assert "is not empty (3 experiments, 2 runs, " in capsys.readouterr().err

    old = connect(sqlite)
    [first] = old.search_experiments(filter_string="name = 'emoji'")
    with mlflow_server(target, files, tmp_path) as address:
        new = MlflowClient(address, address)
        assert {one.name for one in new.search_experiments()} == {"Default", "emoji", "empty"}
        runs = {run.info.run_id: run for run in old.search_runs([first.experiment_id])}
        moved = {run.info.run_id: run for run in new.search_runs([first.experiment_id])}
        assert set(moved) == set(runs)
        for identifier, run in moved.items():
            was = runs[identifier]
            assert run.info.status == was.info.status
            assert (run.info.start_time, run.info.end_time) == (was.info.start_time, was.info.end_time)
            assert run.data.tags == was.data.tags
            assert run.data.params == was.data.params
            assert run.data.metrics["kid"] != run.data.metrics["kid"], "NaN stays NaN"
            assert new.get_metric_history(identifier, "loss") == old.get_metric_history(identifier, "loss")
            got = Path(new.download_artifacts(identifier, "student", str(tmp_path)))
            assert (got / "weights.bin").read_text() == f"weights {was.info.run_name[-1]}" * 1000
            assert (got / "empty file").read_bytes() == b""
        champion = new.get_model_version_by_alias("emoji-4step", "champion")
        assert str(champion.version) == "1"
        assert new.get_model_version("emoji-4step", "2").tags == {"kid": "1.15"}
        assert look_up("models:/emoji-4step@champion", address).version == 1

        # The server goes on where the file ended: new numbers, and new files in the bucket.
        number = new.create_experiment("later")
        assert int(number) > max(int(one.experiment_id) for one in old.search_experiments())
        run = new.create_run(number)
        new.log_text(run.info.run_id, "later", "note.txt")
        assert (
            str(
                new.create_model_version("emoji-4step", f"{run.info.artifact_uri}/x", run.info.run_id).version
            )
            == "3"
        )
    bucket = s3_bucket.removeprefix("s3://")
    listed = boto3.client("s3", endpoint_url=os.environ["AWS_ENDPOINT_URL"], region_name="us-east-1")
    keys = {item["Key"] for item in listed.list_objects_v2(Bucket=bucket)["Contents"]}
    assert f"mlflow/{number}/{run.info.run_id}/artifacts/note.txt" in keys
    assert len(keys) == 5


@pytest.mark.parametrize(
    ("source", "target", "message"),
    [
        ("sqlite:///nothing.db", "postgresql+psycopg://127.0.0.1:9/x", "nothing.db is not there"),
        ("http://127.0.0.1:9", "postgresql+psycopg://127.0.0.1:9/x", "is no sqlite database"),
        ("sqlite:///there.db", "sqlite:///other.db", "is no PostgreSQL database"),
    ],
)
def test_places_that_do_not_fit_are_refused(
    source: str, target: str, message: str, tmp_path: Path, capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:  # fmt: skip
    monkeypatch.chdir(tmp_path)
    (tmp_path / "there.db").touch()
    assert main(["copy-runs", source, target, "--files", str(tmp_path / "files")]) == 2
    assert message in capsys.readouterr().err


def test_a_database_with_content_of_any_kind_is_refused(
    sqlite: str, new_database: Callable[[str], str], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    target = new_database("tagged")
    (client := connect(target)).set_experiment_tag("0", "owner", "somebody")
    assert main(["copy-runs", sqlite, target, "--files", str(tmp_path / "files")]) == 2
    assert "is not empty (" in (said := capsys.readouterr().err)
    assert "1 experiment_tags" in said
    assert client.get_experiment("0").tags == {"owner": "somebody"}


def test_a_job_that_writes_meanwhile_is_noticed(
    sqlite: str, new_database: Callable[[str], str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def copy_while_a_run_begins(moved: dict[Path, str], storage: Storage) -> tuple[int, int]:
        connect(sqlite).create_run("0")
        return 0, 0

    monkeypatch.setattr(migration, "_copy_files", copy_while_a_run_begins)
    with pytest.raises(UserError, match="nothing was kept; try again while no job writes"):
        migration.copy_runs(sqlite, target := new_database("meanwhile"), str(tmp_path / "files"))
    assert not connect(target).search_registered_models()


def test_a_file_of_an_older_mlflow_is_refused(
    sqlite: str, new_database: Callable[[str], str], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    import sqlite3

    with sqlite3.connect(tmp_path / "mlflow.db") as database:
        database.execute("UPDATE alembic_version SET version_num = 'before'")
    target = new_database("untouched")
    assert main(["copy-runs", sqlite, target, "--files", str(tmp_path / "files")]) == 2
    assert "mlflow db upgrade" in capsys.readouterr().err
    assert not connect(target).search_registered_models()
