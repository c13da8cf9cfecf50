"""Which code and which libraries made a run."""

from __future__ import annotations

import os
import platform
import subprocess
from dataclasses import dataclass
from importlib import metadata
from pathlib import Path

VARIABLE = "FEWSTEP_CODE_VERSION"
"""Environment variable that gives the version instead of git."""

_LIBRARIES = (
    "torch",
    "ray",
    "mlflow",
    "diffusers",
    "transformers",
    "peft",
    "safetensors",
    "pyarrow",
    "numpy",
)


@dataclass(frozen=True)
class CodeVersion:
    """Package version and, where known, git commit; written "0.1.0+3f2a9c1.dirty"."""

    package: str
    commit: str | None = None
    dirty: bool = False
    """Whether tracked files differ from the commit."""

    def __str__(self) -> str:
        if self.commit is None:
            return self.package
        return f"{self.package}+{self.commit}{'.dirty' if self.dirty else ''}"

    @classmethod
    def parse(cls, text: str) -> CodeVersion:
        """The version that was written as `text`."""
        package, _, local = text.partition("+")
        return cls(package, local.removesuffix(".dirty") or None, local.endswith(".dirty"))


def code_version() -> CodeVersion:
    """The version of this code.

    The environment variable FEWSTEP_CODE_VERSION wins, which holds `str` of an earlier result: a driver can set it
    for its workers, whose copy of the code has no .git.
    """
    if given := os.environ.get(VARIABLE):
        return CodeVersion.parse(given)
    here = Path(__file__).resolve()
    # A package installed into a folder that lies inside somebody else's checkout must not claim its commit.
    if _git(here.parent, "ls-files", "--error-unmatch", here.name) is None:
        return CodeVersion(_package_version())
    commit = _git(here.parent, "rev-parse", "HEAD")
    changes = _git(here.parent, "status", "--porcelain", "--untracked-files=no")
    return CodeVersion(_package_version(), commit, bool(changes))


def library_versions() -> dict[str, str]:
    """Versions of Python and of the installed libraries that shape results."""
    versions = {"python": platform.python_version()}
    for name in _LIBRARIES:
        try:
            versions[name] = metadata.version(name)
        except metadata.PackageNotFoundError:
            continue
    return versions


def run_tags() -> dict[str, str]:
    """Tags of a run that say what made it; MLflow's page shows the commit in its own column."""
    code = code_version()
    tags = {"fewstep.version": str(code)}
    if code.commit is not None:
        tags["mlflow.source.git.commit"] = code.commit
    return tags | {f"library.{name}": version for name, version in library_versions().items()}


def processor() -> str:
    """Name of this machine's processor."""
    try:
        with open("/proc/cpuinfo") as file:
            return next(line.partition(":")[2].strip() for line in file if line.startswith("model name"))
    except (OSError, StopIteration):
        return platform.processor() or platform.machine()


def _package_version() -> str:
    try:
        return metadata.version("fewstep")
    except metadata.PackageNotFoundError:  # run from the source tree
        return "0.0.0"


def _git(folder: Path, *arguments: str) -> str | None:
    """A git command's output; None where there is no git or no checkout, or when git takes over 10 s."""
    try:
        done = subprocess.run(
            ["git", "-C", str(folder), *arguments],
            capture_output=True,
            text=True,
            timeout=10,
            env=os.environ | {"GIT_OPTIONAL_LOCKS": "0"},
        )
    except (OSError, subprocess.TimeoutExpired):
        return None
    return done.stdout.strip() if done.returncode == 0 else None
