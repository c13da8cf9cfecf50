"""How our Ray Data pipelines run: quietly, and only as far ahead as they are allowed to."""

from __future__ import annotations

import logging
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from ray.data import Dataset


def configured(pipeline: Dataset, *, in_order: bool = False, ahead_bytes: int | None = None) -> Dataset:
    """Set a pipeline's own context: no bars or advice among a job's lines, and the limits asked for.

    Args:
        in_order: keep blocks in the order of the input.
        ahead_bytes: object store memory the pipeline may fill.
    """
    from ray.data import ExecutionResources

    logging.getLogger("ray.data").setLevel(logging.ERROR)
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
