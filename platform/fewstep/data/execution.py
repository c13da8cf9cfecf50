"""Common settings of our Ray Data pipelines: no output of their own, and UserErrors of their tasks raised as such."""

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
    """Configure a pipeline to print nothing: no progress bars, no advice.

    Args:
        pipeline: changed in place, and returned.
        in_order: whether blocks keep the order of the input.
    """
    # Errors are raised; Ray Data's log would only repeat them.
    logging.getLogger("ray.data").setLevel(logging.CRITICAL)
    context = pipeline.context
    context.enable_progress_bars = False
    context.print_on_execution_start = False
    context.issue_detectors_config.detectors = []
    context.execution_options.preserve_order = in_order
    return pipeline


@contextmanager
def user_errors() -> Iterator[None]:
    """A context in which a UserError of a pipeline's tasks is raised as a UserError.

    Ray Data itself raises a RayError that has only its text, inside of a traceback.
    """
    from ray.exceptions import RayError

    try:
        yield
    except RayError as error:
        messages = re.findall(
            rf"^{UserError.__module__}\.(?:UserError|UnreachableError): (.+)$", str(error), re.MULTILINE
        )
        if messages:
            raise UserError(messages[-1]) from error  # the last, if tracebacks are nested
        raise
