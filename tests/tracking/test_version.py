"""A run says which code made it, wherever the code runs."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from fewstep.tracking import version
from fewstep.tracking.version import CodeVersion, code_version, library_versions, run_tags


@pytest.fixture
def checkout(tmp_path: Path) -> Path:
    """A git checkout with a copy of the package's version module in it."""
    package = tmp_path / "repo" / "fewstep"
    package.mkdir(parents=True)
    shutil.copy(version.__file__, package / "version.py")
    git(package, "init", "-q")
    git(package, "add", ".")
    git(package, "-c", "user.name=t", "-c", "user.email=t@t", "commit", "-q", "-m", "first")
    return package


def git(folder: Path, *arguments: str) -> str:
    done = subprocess.run(["git", "-C", str(folder), *arguments], check=True, capture_output=True, text=True)
    return done.stdout.strip()


def version_seen_in(folder: Path) -> CodeVersion:
    environment = {key: value for key, value in os.environ.items() if key != version.VARIABLE}
    command = [sys.executable, "-c", "import version; print(version.code_version())"]
    done = subprocess.run(command, cwd=folder, env=environment, check=True, capture_output=True, text=True)
    return CodeVersion.parse(done.stdout.strip())


def test_a_checkout_gives_its_commit_and_whether_it_was_changed(checkout):
    assert version_seen_in(checkout).commit == git(checkout, "rev-parse", "HEAD")
    assert not version_seen_in(checkout).dirty
    with open(checkout / "version.py", "a") as file:
        file.write("\n")
    assert version_seen_in(checkout).dirty


def test_code_outside_a_checkout_or_untracked_in_a_foreign_one_claims_no_commit(checkout, tmp_path):
    for folder in (tmp_path / "copied", checkout / "site-packages"):
        folder.mkdir()
        shutil.copy(version.__file__, folder / "version.py")
        assert version_seen_in(folder).commit is None


@pytest.mark.parametrize("text", ["0.1.0", "0.1.0+3f2a9c1", "0.1.0+3f2a9c1.dirty"])
def test_the_environment_variable_wins_and_carries_everything(text, monkeypatch):
    monkeypatch.setenv(version.VARIABLE, text)
    assert str(code_version()) == text
    assert run_tags()["fewstep.version"] == text


def test_runs_are_tagged_with_library_versions():
    import numpy

    assert library_versions()["numpy"] == numpy.__version__
    assert run_tags()["library.numpy"] == numpy.__version__
