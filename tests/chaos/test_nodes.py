"""Runs on a cluster whose machines come and go."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import pytest

pytestmark = pytest.mark.chaos

PROGRAM = Path(__file__).with_name("program.py")
STEPS = 120
RESULTS = Path(os.environ.get("CHAOS_NODES_RESULTS", Path(__file__).with_name("nodes.jsonl")))
LARGEST_DIFFERENCE = 1e-3
"""Of the loss of a step, as sums of more or fewer workers are rounded differently."""


def run(home: Path, data: Path, teacher: Path, **plan: object) -> str:
    """What a run of `program.py` printed."""
    home.mkdir()
    settings = {"RAY_TRAIN_WORKER_GROUP_START_TIMEOUT_S": "30", "PYTHONPATH": os.pathsep.join(sys.path)}
    with tempfile.TemporaryDirectory(prefix="r", dir="/tmp") as folder:  # short: Ray's sockets lie below it
        environment = {name: value for name, value in os.environ.items() if name != "RAY_ADDRESS"}
        done = subprocess.run(
            [sys.executable, str(PROGRAM), str(data), str(teacher), json.dumps({"steps": STEPS, **plan})],
            cwd=home, env={**environment, **settings, "RAY_TMPDIR": folder}, capture_output=True, text=True,
            timeout=500,
        )  # fmt: skip
    return done.stdout + done.stderr


def losses_of(said: str) -> dict[int, list[float]]:
    """Losses by step; several of a step that was taken twice."""
    [line] = [line for line in said.splitlines() if line.startswith("result ")] or [None]
    assert line is not None, said[-6000:]
    return {int(step): values for step, values in json.loads(line.removeprefix("result ")).items()}


@pytest.fixture(scope="module")
def undisturbed(tiny_data, tiny_teacher, tmp_path_factory) -> dict[int, float]:
    home = tmp_path_factory.mktemp("undisturbed")
    losses = losses_of(run(home / "run", tiny_data, tiny_teacher, nodes=1, workers=1, acts=[]))
    return {step: values[0] for step, values in losses.items()}


def largest_difference(losses: dict[int, list[float]], undisturbed: dict[int, float]) -> float:
    """Of a step's loss from the undisturbed run's, relative to it; steps that were taken twice count twice."""
    assert set(losses) == set(undisturbed) == set(range(1, STEPS + 1))
    return max(abs(value / undisturbed[step] - 1) for step, values in losses.items() for value in values)


def keep(what: str, difference: float | None, said: str) -> None:
    """Put what came of a test into the results, from which `page.py` makes its table."""
    lines = RESULTS.read_text().splitlines() if RESULTS.exists() else []
    kept = {one["what"]: one for one in map(json.loads, lines)}
    kept[what] = {"what": what, "difference": difference, "said": said}
    RESULTS.write_text("".join(json.dumps(one) + "\n" for one in kept.values()))


def test_two_workers_one_and_two_again_are_one_run(tiny_data, tiny_teacher, tmp_path, undisturbed) -> None:
    acts = [(20, "kill"), (40, "add")]
    said = run(tmp_path / "run", tiny_data, tiny_teacher, nodes=2, workers=[1, 2], acts=acts)
    difference = largest_difference(losses_of(said), undisturbed)
    keep(
        "two workers, a node killed at step 20, one worker, a node added at step 40, two workers",
        difference,
        "",
    )
    assert difference < LARGEST_DIFFERENCE
    assert said.count("resumed from the checkpoint") >= 2, said


def test_a_node_that_is_drained_leaves_a_checkpoint_first(
    tiny_data, tiny_teacher, tmp_path, undisturbed
) -> None:
    said = run(tmp_path / "run", tiny_data, tiny_teacher, nodes=2, workers=[1, 2], acts=[(20, "drain")])
    difference = largest_difference(losses_of(said), undisturbed)
    told = next((line for line in said.splitlines() if "a node is about to go: the checkpoint" in line), None)
    assert told is not None, said[-6000:]
    keep(
        "two workers, a node told at step 20 that it has 20 s, one worker",
        difference,
        told[told.index("a node is") :],
    )
    assert difference < LARGEST_DIFFERENCE


def test_a_run_whose_lost_node_nobody_replaces_ends_and_says_what_is_missing(
    tiny_data, tiny_teacher, tmp_path
) -> None:
    began = time.monotonic()
    said = run(
        tmp_path / "run", tiny_data, tiny_teacher, nodes=2, workers=2, acts=[(20, "kill")],
        overrides=["train.wait_minutes=1"],
    )  # fmt: skip
    [message] = [line for line in said.splitlines() if line.startswith("failed ")]
    assert "for 1 minutes the cluster had no room for 2 workers of 1 CPUs each" in message
    assert "--resume" in message
    assert time.monotonic() - began < 240
    keep("two workers of two at least, a node killed, none comes", None, message.removeprefix("failed "))
