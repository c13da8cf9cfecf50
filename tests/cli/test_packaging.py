"""What is installed: the wheel holds all that a user needs, and nothing that takes another's name."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
import tomllib
import zipfile
from configparser import ConfigParser
from importlib import metadata
from pathlib import Path

import pytest
from PIL import Image

from fewstep import __version__

ROOT = Path(__file__).parents[2]


@pytest.fixture(scope="module")
def wheel(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Built from a copy of what a clone holds, so that the checkout stays as it is."""
    source, out = tmp_path_factory.mktemp("source"), tmp_path_factory.mktemp("wheel")
    for name in ("platform", "serve"):
        shutil.copytree(ROOT / name, source / name, ignore=shutil.ignore_patterns("__pycache__"))
    for name in ("pyproject.toml", "README.md", "LICENSE"):
        shutil.copy(ROOT / name, source)
    subprocess.run(
        [sys.executable, "-m", "pip", "wheel", "--quiet", "--no-deps", "--no-build-isolation", "--no-index",
         "--wheel-dir", str(out), str(source)],
        check=True, timeout=300,
    )  # fmt: skip
    [file] = out.glob("*.whl")
    return file


@pytest.fixture(scope="module")
def installed(wheel: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder that the wheel's files are in after an installation."""
    folder = tmp_path_factory.mktemp("site-packages")
    with zipfile.ZipFile(wheel) as archive:
        archive.extractall(folder)
    return folder


def test_the_wheel_holds_packages_recipes_networks_page_and_script(installed: Path) -> None:
    packages = {path.name for path in installed.iterdir() if path.is_dir() and path.suffix != ".dist-info"}
    assert packages == {"fewstep", "fewstep_serve", "fewstep_loadtest"}, "`serve` is a name of others'"

    def below(folder: Path) -> set[str]:
        files = {str(path.relative_to(folder)) for path in folder.rglob("*") if path.is_file()}
        return {file for file in files if "__pycache__" not in file}

    assert below(installed / "fewstep") == below(ROOT / "platform" / "fewstep")
    assert below(installed / "fewstep_serve") == below(ROOT / "serve" / "fewstep_serve")
    assert (installed / "fewstep" / "py.typed").exists()
    assert len(list((installed / "fewstep" / "recipes").glob("*.yaml"))) >= 16
    [information] = installed.glob("*.dist-info")
    scripts = ConfigParser()
    scripts.read(information / "entry_points.txt")
    assert dict(scripts["console_scripts"]) == {"fewstep": "fewstep.cli:main"}


def test_the_installed_package_generates_without_the_checkout(installed: Path, tmp_path: Path) -> None:
    code = "import fewstep, sys; from fewstep.cli import main; print(fewstep.__file__); sys.exit(main())"
    done = subprocess.run(
        [sys.executable, "-c", code, "generate", "--prompt", "strawberry, fluent style"], cwd=tmp_path,
        env=os.environ | {"PYTHONPATH": str(installed)}, capture_output=True, text=True, timeout=300,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    assert done.stdout.startswith(str(installed))
    with Image.open(tmp_path / "out" / "generated.png") as image:
        assert len(image.getcolors(1 << 16)) > 10


def test_the_version_is_written_once() -> None:
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())
    assert "version" not in project["project"]
    assert project["tool"]["setuptools"]["dynamic"]["version"] == {"attr": "fewstep.__version__"}
    assert metadata.version("fewstep") == __version__


def test_every_installed_dependency_is_pinned() -> None:
    """The constraints hold what `make setup` installs: all that the package asks for, and what that asks for."""
    from packaging.requirements import Requirement
    from packaging.utils import canonicalize_name

    pins = dict(line.split("==") for line in (ROOT / "infra" / "constraints.txt").read_text().splitlines())
    pinned = {canonicalize_name(name): version for name, version in pins.items()}
    seen, waiting = set(), [("fewstep", "dev")]
    while waiting:
        name, extra = waiting.pop()
        if (name, extra) in seen:
            continue
        seen.add((name, extra))
        for text in metadata.requires(name) or []:
            need = Requirement(text)
            if need.marker is None or need.marker.evaluate({"extra": extra}):
                waiting += [(canonicalize_name(need.name), wanted) for wanted in ("", *need.extras)]
    # setuptools is torch's for its compiler; what builds this package brings its own. pip is the environment's.
    missing = {name for name, _ in seen} - set(pinned) - {"fewstep", "setuptools", "pip"}
    assert not missing
