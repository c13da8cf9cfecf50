"""How our Ray Data pipelines run: quietly, and only as far ahead as they are allowed to."""

from __future__ import annotations

import logging
import re
from collections.abc import Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING

from fewstep.errors import UserError

if TYPE_CHECKING:
    from ray.data import Dataset


def configured(pipeline: Dataset, *, in_order: bool = False, ahead_bytes: int | None = None) -> Dataset:
    """Set a pipeline's own context: no bars or advice among a job's lines, and the limits asked for.

    Args:
        in_order: keep blocks in the order of the input.
        ahead_bytes: object store memory the pipeline may fill.
    """
    from ray.data import ExecutionResources

    # What fails is raised; Ray Data's log would only say it twice more.
    logging.getLogger("ray.data").setLevel(logging.CRITICAL)
    context = pipeline.context
    context.enable_progress_bars = False
    context.print_on_execution_start = False
    context.issue_detectors_config.detectors = []
    context.execution_options.preserve_order = in_order
    if ahead_bytes is not None:
        context.execution_options.resource_limits = ExecutionResources.for_limits(
            object_store_memory=ahead_bytes
        )
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
