"""The folder that relative paths (data, runs, mlflow.db) are relative to, and the user's cache."""

from __future__ import annotations

import os
from pathlib import Path

HOME = "FEWSTEP_HOME"
"""Name of the environment variable that chooses the folder."""


def enter_home() -> None:
    """Change to the folder of relative paths.

    That is `FEWSTEP_HOME`, or the current folder where the variable is unset. A job submitted with --working-dir
    starts in a throw-away copy inside Ray's own files; its outputs go to ~/fewstep instead.
    """
    home = os.environ.get(HOME)
    # Ray unpacks a submitted working directory below a folder of this name, and deletes it after the job.
    if home is None and "working_dir_files" in Path.cwd().parts:
        home = str(Path.home() / "fewstep")
        print(f"outputs go to {home} (set {HOME} to choose)", flush=True)
    if home is not None:
        Path(home).mkdir(parents=True, exist_ok=True)
        os.chdir(home)


def cache_folder(name: str) -> Path | None:
    """The folder `~/.cache/fewstep/NAME`, which need not exist; None for users without a home folder.

    Args:
        name: of what is kept there.
    """
    try:
        return Path.home() / ".cache" / "fewstep" / name
    except RuntimeError:  # HOME is unset, and the system does not know the user, as in many containers
        return None
