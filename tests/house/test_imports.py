"""Which part of the house may know which: imports point one way, and never in a circle."""

from __future__ import annotations

import ast
import subprocess
import sys
from collections.abc import Iterator
from graphlib import CycleError, TopologicalSorter
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
SOURCES = (ROOT / "platform", ROOT / "serve")

FOUNDATION = {
    "fewstep",
    "assets",
    "config",
    "draws",
    "errors",
    "files",
    "home",
    "hub",
    "images",
    "passwords",
    "recipes",
    "text",
}
"""What everybody may use."""

KNOWS: dict[str, set[str]] = {
    # The mathematics: readable beside the paper, and free of Ray, MLflow and diffusers.
    "policies": set(),
    "flow": {"policies"},
    "distill": {"policies", "flow"},
    # Networks, and what goes into them.
    "models": {"policies", "flow"},
    "encoders": {"models"},
    # Where things lie.
    "storage": set(),
    "data": {"models", "encoders", "storage"},
    "tracking": {"storage"},
    # The student that training makes and everything after it uses.
    "student": {"policies", "flow", "models", "encoders", "storage", "tracking"},
    "engine": {"flow", "models", "encoders", "student"},
    "evaluate": {"flow", "models", "encoders", "data", "student"},
    "train": {
        "policies", "flow", "distill", "models", "encoders", "storage", "data", "tracking", "student", "evaluate",
        "cluster",
    },
    "plan": {"flow", "models", "encoders", "data", "student", "evaluate", "train"},
    # What orchestrates them, and what users call.
    "workflow": {
        "models", "encoders", "storage", "data", "tracking", "student", "evaluate", "train", "plan"
    },
    "benchmarks": {
        "policies", "flow", "distill", "models", "encoders", "data", "tracking", "train", "cluster", "student",
        "storage", "plan",
    },
    "cluster": set(),
    "fewstep_serve": {"config", "engine", "flow", "encoders", "models", "student", "storage"},
    "fewstep_loadtest": {"engine", "student", "tracking", "fewstep_serve", "cluster"},
    # Names of before fewstep 0.2.
    "export": {"student"},
}  # fmt: skip
"""Package or lone module → the packages that it may import, beside itself and the foundation. `cli` may import all."""

PURE = ("policies", "flow", "distill")
FOREIGN_TO_PURE = {"ray", "mlflow", "diffusers", "transformers", "peft", "pyarrow"}


def modules() -> dict[str, Path]:
    """Dotted name → file, of everything that is installed."""
    found = {}
    for source in SOURCES:
        for file in source.rglob("*.py"):
            parts = file.relative_to(source).with_suffix("").parts
            found[".".join(parts[:-1] if parts[-1] == "__init__" else parts)] = file
    return found


MODULES = modules()


def imported(file: Path) -> Iterator[str]:
    """Every module that a file names in an import, wherever it stands: inside functions and for type checkers too."""
    for node in ast.walk(ast.parse(file.read_text())):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{file}: relative imports hide what is imported"
            # `from package import module` names the module, `from module import name` does not.
            for alias in node.names:
                name = f"{node.module}.{alias.name}"
                yield name if name in MODULES else node.module


def room(module: str) -> str:
    """The package of `fewstep` that a module belongs to, or the top-level package of another."""
    parts = module.split(".")
    return parts[0] if parts[0] != "fewstep" or len(parts) == 1 else parts[1]


def test_every_room_is_on_the_plan() -> None:
    rooms = {room(module) for module in MODULES} - FOUNDATION - {"cli"}
    assert rooms == set(KNOWS)


@pytest.mark.parametrize("module", sorted(MODULES))
def test_imports_point_downwards(module: str) -> None:
    mine = room(module)
    if mine == "cli":
        return
    allowed = KNOWS.get(mine, set()) | FOUNDATION | {mine}
    ours = {name for name in imported(MODULES[module]) if name.split(".")[0].startswith("fewstep")}
    assert {room(name) for name in ours} <= allowed, {name for name in ours if room(name) not in allowed}


@pytest.mark.parametrize("module", [name for name in sorted(MODULES) if room(name) in PURE])
def test_the_mathematics_knows_no_platform(module: str) -> None:
    roots = {name.split(".")[0] for name in imported(MODULES[module])}
    assert not roots & FOREIGN_TO_PURE


def test_no_files_import_each_other_in_a_circle() -> None:
    graph = {
        name: {other for other in imported(file) if other in MODULES and other != name}
        for name, file in MODULES.items()
    }
    # A package's __init__ gathers names of its own modules, which is no circle: they never ask it for anything.
    for name, file in MODULES.items():
        if file.name == "__init__.py":
            graph[name] = {other for other in graph[name] if not other.startswith(f"{name}.")}
    try:
        TopologicalSorter(graph).prepare()
    except CycleError as error:
        pytest.fail(" → ".join(error.args[1]))


def test_no_packages_import_each_other_in_a_circle() -> None:
    graph: dict[str, set[str]] = {}
    for name, file in MODULES.items():
        others = {room(other) for other in imported(file) if other in MODULES}
        graph.setdefault(room(name), set()).update(others - {room(name), "fewstep"})
    try:
        TopologicalSorter(graph).prepare()
    except CycleError as error:
        pytest.fail(" → ".join(error.args[1]))


def test_reading_settings_and_tables_needs_no_torch() -> None:
    """Commands that only read such files begin at once, and so do processes that only read shards."""
    code = "import sys, fewstep.cli.serve, fewstep.data.tables, fewstep.data.order; sys.exit('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code]).returncode == 0


def test_encoders_and_trainings_start_without_what_they_do_not_use() -> None:
    """Each takes a second or more to import, in every process of a run."""
    code = """
import sys
import fewstep.data.encode
assert "torch.distributed.checkpoint" not in sys.modules
import fewstep.train.trainer
assert not {"peft", "diffusers", "transformers"} & set(sys.modules)
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
