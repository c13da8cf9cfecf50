"""How our Ray Data pipelines run: quietly, and with a user's errors raised as such."""

from __future__ import annotations

import logging
import re
from collections.abc import Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING

from fewstep.errors import UserError

if TYPE_CHECKING:
    from ray.data import Dataset


def configured(pipeline: Dataset, *, in_order: bool = False) -> Dataset:
    """Set a pipeline's own context: no bars or advice among a job's lines.

    Args:
        in_order: keep blocks in the order of the input.
    """
    # What fails is raised; Ray Data's log would only say it twice more.
    logging.getLogger("ray.data").setLevel(logging.CRITICAL)
    context = pipeline.context
    context.enable_progress_bars = False
    context.print_on_execution_start = False
    context.issue_detectors_config.detectors = []
    context.execution_options.preserve_order = in_order
    return pipeline


@contextmanager
def user_errors() -> Iterator[None]:
    """Raise a UserError of a pipeline's tasks as itself: Ray Data keeps only its text, inside a traceback."""
    from ray.exceptions import RayError

    try:
        yield
    except RayError as error:
        messages = re.findall(rf"^{UserError.__module__}\.UserError: (.+)$", str(error), re.MULTILINE)
        if messages:
            raise UserError(messages[-1]) from error
        raise
