"""The driver of a run, as `fewstep distill` is one, in a process that has its imports done when it begins."""

from __future__ import annotations

import os
import sys
import traceback

import ray
import ray.train.torch

from fewstep.errors import UserError
from fewstep.train.recipe import DistillRecipe
from fewstep.workflow import distil as workflow


def work(
    recipe: dict[str, object], run: str, address: str, home: str, log: str, environment: dict[str, str]
) -> None:
    """Distil on a cluster; what is printed goes to a file, and the status is that of the command.

    Args:
        recipe: its fields.
        run: name of the run, which is continued if it exists.
        address: of the Ray cluster.
        home: folder to work in.
        log: file that output is appended to.
        environment: variables that differ from this process's.
    """
    os.setsid()
    output = os.open(log, os.O_WRONLY | os.O_CREAT | os.O_APPEND)
    os.dup2(output, 1)
    os.dup2(output, 2)
    os.chdir(home)
    os.environ.update(environment)
    ray.init(address=address)
    try:
        workflow.distil(DistillRecipe.model_validate(recipe), run)
    except UserError as error:
        print(f"fewstep distill: error: {error}", flush=True)
        sys.exit(2)
    except Exception:
        traceback.print_exc()
        sys.exit(1)
