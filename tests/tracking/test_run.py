"""A run loses nothing, keeps its order and never makes the training wait."""

from __future__ import annotations

import json
import logging
import math
import os
import signal
import sqlite3
import subprocess
import sys
import textwrap
import threading
import time
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

from fewstep.errors import UserError
from fewstep.tracking.address import connect, sqlite_path
from fewstep.tracking.resend import main, resend
from fewstep.tracking.run import Tracker
from fewstep.tracking.spool import sessions

LATENCY_SECONDS = 0.05


def start(uri: str, spool: Path, **changes: Any) -> Tracker:
    settings: dict[str, Any] = {"params": {"lr": 1e-3}, "tags": {"kind": "test"}} | changes
    return Tracker.start(uri, "distil", "a run", spool=spool, **settings)


def history(uri: str, run_id: str, key: str) -> list[tuple[int, float, int]]:
    return [(m.step, m.value, m.timestamp) for m in connect(uri).get_metric_history(run_id, key)]


def log_steps(tracker: Tracker, steps: range, seconds: float = 0.0) -> float:
    """Log a loss at every step; returns the median call's seconds (one slow call is the busy machine's)."""
    times = []
    for step in steps:
        began = time.perf_counter()
        tracker.log_metrics({"loss": 1.0 / (step + 1), "rate": step}, step=step)
        times.append(time.perf_counter() - began)
        time.sleep(seconds)
    return float(np.median(times))


def test_a_process_that_joins_a_run_does_not_open_it_again(tmp_path):
    uri = f"sqlite:///{tmp_path / 'mlflow.db'}"
    driver = start(uri, tmp_path / "spool")
    worker = Tracker.join(driver.run)
    driver.finish()
    log_steps(worker, range(3))
    assert worker.flush()
    run = connect(uri).get_run(driver.run_id)
    assert run.info.status == "FINISHED", "what a worker sends late does not make it RUNNING"
    assert run.data.metrics["rate"] == 2


def test_everything_logged_arrives_with_its_values_steps_and_files(server, tmp_path):
    with start(
        server.uri, tmp_path / "spool", params={"student": {"nfe": 4}, "prompt": "x" * 9000}
    ) as tracker:
        log_steps(tracker, range(2500))
        tracker.log_metrics({"bad/nan": math.nan, "bad/inf": math.inf}, step=3)
        tracker.log_image(np.zeros((8, 8, 3), np.uint8), "samples/000100.png")
        tracker.log_text("hello", "notes.txt")
        tracker.log_json({"nfe": 4}, "report/recipe.json")
        (tmp_path / "folder" / "deep").mkdir(parents=True)
        (tmp_path / "folder" / "deep" / "file.txt").write_text("deep")
        tracker.log_artifact(tmp_path / "folder", "exports")
        (tmp_path / "folder" / "deep" / "file.txt").write_text("changed after the call")

    client = connect(server.uri)
    run = client.get_run(tracker.run_id)
    assert (run.info.status, run.info.run_name) == ("FINISHED", "a run")
    assert run.data.params["student.nfe"] == "4"
    assert run.data.params["prompt"].startswith("xxxx")
    assert run.data.tags["kind"] == "test"
    assert math.isnan(run.data.metrics["bad/nan"])
    assert run.data.metrics["bad/inf"] > 1e300
    losses = sorted(history(server.uri, tracker.run_id, "loss"))
    assert [(step, value) for step, value, _ in losses] == [(step, 1.0 / (step + 1)) for step in range(2500)]
    local = Path(client.download_artifacts(tracker.run_id, "", str(tmp_path)))
    assert Image.open(local / "samples/000100.png").size == (8, 8)
    assert (local / "notes.txt").read_text() == "hello"
    assert json.loads((local / "report/recipe.json").read_text()) == {"nfe": 4}
    assert (local / "exports/folder/deep/file.txt").read_text() == "deep"
    assert sessions(tmp_path / "spool") == []


def test_nothing_is_lost_when_the_server_is_killed_and_restarted(server, tmp_path):
    tracker = start(server.uri, tmp_path / "spool")
    log_steps(tracker, range(0, 50))
    assert tracker.flush(30)
    log_steps(tracker, range(50, 60))
    server.kill()
    before = time.time_ns() // 1_000_000
    latency = log_steps(tracker, range(60, 100), seconds=0.02)
    tracker.log_text("written while away", "away.txt")
    after = time.time_ns() // 1_000_000
    server.start()
    assert tracker.finish(timeout=60)

    losses = history(server.uri, tracker.run_id, "loss")
    assert sorted({(step, value) for step, value, _ in losses}) == [(s, 1.0 / (s + 1)) for s in range(100)]
    assert len(losses) == 100, "a batch sent twice shows once"
    assert all(before <= moment <= after for step, _, moment in losses if step >= 60), "original times"
    assert latency < LATENCY_SECONDS
    run = connect(server.uri).get_run(tracker.run_id)
    assert run.info.status == "FINISHED"
    assert [file.path for file in connect(server.uri).list_artifacts(tracker.run_id)] == ["away.txt"]


def test_a_server_that_never_answers_slows_neither_calls_nor_flush(wire, tmp_path, caplog, monkeypatch):
    monkeypatch.setattr("fewstep.tracking.delivery.RECORD_SECONDS", 1)
    tracker = start(wire.uri, tmp_path / "spool")
    assert tracker.flush(30)
    wire.hang()
    with caplog.at_level(logging.WARNING, "fewstep"):
        assert log_steps(tracker, range(200), seconds=0.01) < LATENCY_SECONDS
        began = time.perf_counter()
        assert not tracker.flush(1.0)
        assert time.perf_counter() - began < 2.0
        assert not tracker.flush(3.0)
    assert len([record for record in caplog.records if "take metrics" in record.message]) == 1, "said once"
    wire.mend()
    assert tracker.finish(timeout=60)
    assert len(history(wire.uri, tracker.run_id, "loss")) == 200


def test_finish_returns_in_time_and_a_later_process_sends_the_rest(wire, tmp_path, capsys):
    tracker = start(wire.uri, tmp_path / "spool")
    assert tracker.flush(30)
    wire.cut()
    log_steps(tracker, range(30))
    tracker.log_text("kept", "kept.txt")
    began = time.perf_counter()
    assert not tracker.finish(timeout=1.0)
    assert time.perf_counter() - began < 4.0
    assert resend(tmp_path / "spool") == (0, 1)
    assert "not delivered" in capsys.readouterr().err

    wire.mend()
    done = subprocess.run(
        [sys.executable, "-m", "fewstep.tracking.resend", str(tmp_path / "spool")],
        capture_output=True,
        text=True,
        env=os.environ | {"PYTHONPATH": os.pathsep.join(sys.path)},
    )
    assert (done.returncode, done.stdout) == (0, "1 sessions delivered, 0 still waiting\n"), done.stderr
    run = connect(wire.uri).get_run(tracker.run_id)
    assert run.info.status == "FINISHED"
    assert len(history(wire.uri, tracker.run_id, "loss")) == 30
    assert sessions(tmp_path / "spool") == []


def test_a_killed_worker_continues_the_same_run_even_while_the_server_is_away(wire, tmp_path):
    spool = tmp_path / "spool"
    script = f"""
        import os, signal, time
        from pathlib import Path
        from fewstep.tracking.run import Tracker
        tracker = Tracker.start({wire.uri!r}, "distil", "killed", {{"lr": 1}}, {{}}, Path({str(spool)!r}))
        tracker.flush(30)
        print(tracker.run_id, flush=True)
        input()
        for step in range(20):
            tracker.log_metrics({{"loss": step}}, step=step)
        os.kill(os.getpid(), signal.SIGKILL)
    """
    worker = subprocess.Popen(
        [sys.executable, "-c", textwrap.dedent(script)],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        text=True,
        env=os.environ | {"PYTHONPATH": os.pathsep.join(sys.path)},
    )
    run_id = worker.stdout.readline().strip()
    wire.cut()
    worker.communicate("go\n", timeout=60)
    assert worker.returncode == -signal.SIGKILL

    tracker = start(wire.uri, spool, run_id=run_id, params={"lr": 1})
    assert tracker.run_id == run_id
    for step in range(20, 40):
        tracker.log_metrics({"loss": step}, step=step)
    assert not tracker.flush(1.0)
    wire.mend()
    assert tracker.finish(timeout=60)

    assert [step for step, *_ in sorted(history(wire.uri, run_id, "loss"))] == list(range(40))
    assert connect(wire.uri).get_run(run_id).info.status == "FINISHED"
    assert len(connect(wire.uri).search_runs(["1"], f"attributes.run_id = '{run_id}'")) == 1
    assert sessions(spool) == []


def test_sqlite_keeps_files_beside_the_database_and_waits_for_a_locked_one(database, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    tracker = start(database, tmp_path / "spool")
    assert tracker.flush(30)
    other = sqlite3.connect(sqlite_path(database), isolation_level=None)
    other.execute("BEGIN IMMEDIATE")
    assert log_steps(tracker, range(20)) < LATENCY_SECONDS
    assert not tracker.flush(2.0)
    other.execute("ROLLBACK")
    other.close()
    tracker.log_text("x", "x.txt")
    assert tracker.finish(timeout=60)

    run = connect(database).get_run(tracker.run_id)
    assert Path(run.info.artifact_uri).is_relative_to(sqlite_path(database).parent / "mlartifacts" / "distil")
    assert (Path(run.info.artifact_uri) / "x.txt").read_text() == "x"
    assert len(history(database, tracker.run_id, "loss")) == 20
    assert not (tmp_path / "mlruns").exists()


def test_two_processes_write_one_run_through_one_spool(database, tmp_path):
    driver = start(database, tmp_path / "spool")
    worker = start(database, tmp_path / "spool", run_id=driver.run_id)
    threads = [
        threading.Thread(target=lambda t=tracker, k=key: [t.log_metrics({k: s}, s) for s in range(50)])
        for tracker, key in ((driver, "driver"), (worker, "worker"))
    ]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert worker.finish(timeout=60)
    assert driver.finish(timeout=60)
    assert (
        len(history(database, driver.run_id, "driver"))
        == len(history(database, driver.run_id, "worker"))
        == 50
    )


def test_a_refused_value_is_kept_aside_and_holds_up_nothing(database, tmp_path, caplog):
    with caplog.at_level(logging.WARNING, "fewstep"):
        tracker = start(database, tmp_path / "spool")
        tracker.log_metrics({"good": 1.0, "bad?": 2.0}, step=0)
        tracker.log_params({"lr": "another"})
        log_steps(tracker, range(10))
        assert tracker.finish(timeout=60)
    assert len(history(database, tracker.run_id, "good")) == 1
    assert len(history(database, tracker.run_id, "loss")) == 10
    (refused,) = (tmp_path / "spool").glob("*/refused.jsonl")
    assert [json.loads(line)["record"]["key"] for line in refused.read_text().splitlines()] == ["bad?", "lr"]
    assert "bad?" in caplog.text


def test_a_batch_whose_confirmation_was_lost_is_harmless_to_send_again(database, tmp_path):
    tracker = start(database, tmp_path / "spool")
    log_steps(tracker, range(20))
    tracker.log_metrics({"bad/nan": math.nan}, step=0)
    assert tracker.flush(30)
    tracker._session.records._move_mark(0)
    assert tracker.finish(timeout=30)
    assert len(history(database, tracker.run_id, "loss")) == 20
    assert len(history(database, tracker.run_id, "bad/nan")) == 1
    assert not list((tmp_path / "spool").glob("*/refused.jsonl"))


def test_steps_that_are_taken_again_after_a_kill_are_points_once(database, tmp_path):
    first = start(database, tmp_path / "spool")
    for step in range(5):
        first.log_metrics({"loss": 1 / (step + 1), "rate": 10.0}, step, once="loss")
    assert first.flush(30)
    # As the next worker does, from a checkpoint of step 2: the losses are the same, but not the rate.
    second = Tracker.join(first.run)
    for step in range(3, 8):
        second.log_metrics({"loss": 1 / (step + 1), "rate": 20.0}, step, once="loss")
    second.log_metrics({"loss": 7.0, "rate": 20.0}, 4, once="loss")  # with another setting
    assert second.finish(timeout=30)
    losses = [(step, value) for step, value, _ in history(database, first.run_id, "loss")]
    assert sorted(losses) == sorted([(step, 1 / (step + 1)) for step in range(8)] + [(4, 7.0)])
    rates = [(step, value) for step, value, _ in history(database, first.run_id, "rate")]
    assert sorted(rates) == sorted(
        [(step, 10.0) for step in range(5)] + [(step, 20.0) for step in (4, 5, 6, 7)]
    )
    assert first.finish(timeout=30)


def test_an_exception_ends_the_run_as_failed(database, tmp_path):
    with pytest.raises(ZeroDivisionError), start(database, tmp_path / "spool") as tracker:
        tracker.log_metrics({"loss": 1 / 0}, step=0)
    assert connect(database).get_run(tracker.run_id).info.status == "FAILED"


def test_a_full_disk_is_said_once_and_training_goes_on(database, tmp_path, caplog, monkeypatch):
    tracker = start(database, tmp_path / "spool")
    assert tracker.flush(30)
    with monkeypatch.context() as full, caplog.at_level(logging.WARNING, "fewstep"):
        full.setattr(tracker._session.records, "_file", FullDisk(tracker._session.records._file))
        log_steps(tracker, range(10))
    assert len([record for record in caplog.records if "No space left" in record.message]) == 1
    tracker.log_metrics({"later": 1.0}, step=11)
    assert tracker.finish(timeout=30)
    assert len(history(database, tracker.run_id, "later")) == 1
    assert [step for step, *_ in history(database, tracker.run_id, "loss")] == list(range(10)), (
        "nothing is lost"
    )


class FullDisk:
    """A file on a disk with five bytes left."""

    def __init__(self, file: Any) -> None:
        self._file = file

    def write(self, line: bytes) -> int:
        self._file.write(line[:5])
        raise OSError(28, "No space left on device")

    def truncate(self, size: int) -> int:
        return self._file.truncate(size)


def test_starting_names_what_is_wrong_and_the_remedy(database, tmp_path):
    with pytest.raises(UserError, match="has no run 'a1b2': correct the id"):
        start(database, tmp_path / "spool", run_id="a1b2")
    (tmp_path / "file").write_text("")
    with pytest.raises(UserError, match=r"spool .* can't be written .* local disk"):
        start(database, tmp_path / "file" / "spool")
    client = connect(database)
    client.delete_experiment(client.create_experiment("gone"))
    with pytest.raises(UserError, match=r"'gone' .* is deleted: restore it"):
        Tracker.start(database, "gone", "run", {}, {}, tmp_path / "spool")


def test_resend_refuses_what_is_no_folder(tmp_path, capsys):
    assert main([str(tmp_path / "nothing")]) == 2
    assert "is not a folder: give the folder the job named" in capsys.readouterr().err
