"""A registration that is killed at any time leaves the served alias where it was."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from pathlib import Path

from fewstep.tracking.address import connect
from fewstep.tracking.registry import look_up, resolve

PROGRAM = '''
import sys
from pathlib import Path
from fewstep.tracking.promotion import give_alias
from fewstep.tracking.registry import register
from fewstep.tracking.run import Tracker

folder, uri = Path(sys.argv[1]), sys.argv[2]
script = folder.parent / "model.py"
script.write_text("""
from mlflow.models import set_model
from mlflow.pyfunc import PythonModel
class Nothing(PythonModel):
    def predict(self, context, model_input: list[str], params=None):
        return model_input
set_model(Nothing())
""")
with Tracker.start(uri, "distil", "killed", {}, {}, folder.parent / "spool") as tracker:
    pass
print("first", flush=True)
while True:
    version = register(folder, "killed", uri, tracker.run_id, alias=None, script=script)
    give_alias(version, uri, "champion", [])
    print(version.version, flush=True)
'''
"""Registers version after version, until it is killed."""

KILLS = 3
"""Programs that are killed, each at another time of a registration."""


def test_the_alias_always_points_at_a_complete_version(database: str, tmp_path: Path) -> None:
    folder = tmp_path / "student"
    folder.mkdir()
    for index in range(40):  # files enough that a kill may come between them
        (folder / f"part-{index}.txt").write_text("whole")
    environment = os.environ | {"PYTHONPATH": os.pathsep.join(sys.path)}
    registered = 0
    for kill in range(KILLS):
        program = subprocess.Popen(
            [sys.executable, "-c", PROGRAM, str(folder), database], stdout=subprocess.PIPE, text=True, env=environment,
            stderr=subprocess.DEVNULL,
        )  # fmt: skip
        assert program.stdout is not None
        lines, started = [], time.monotonic()
        while len(lines) < 2:  # the run, and a first version, whose time is that of the next
            line = program.stdout.readline()
            assert line, "the program ended by itself"
            lines.append(line.strip())
            if lines == ["first"]:
                started = time.monotonic()
        registered = max(registered, int(lines[-1]))
        time.sleep((time.monotonic() - started) * (kill + 1) / (KILLS + 1))
        program.send_signal(signal.SIGKILL)
        rest = program.communicate()[0].split()
        registered = max([registered, *map(int, rest)])

        served = look_up("models:/killed@champion", database)
        assert served.version is not None
        # The version that was just given the alias may not have been printed yet.
        assert registered <= served.version <= registered + 1
        found, _ = resolve("models:/killed@champion", database)
        assert sorted(file.read_text() for file in found.iterdir()) == ["whole"] * 40
        version = connect(database).get_model_version("killed", str(served.version))
        assert version.status == "READY"
