"""Reading of many files of a source by Ray Data tasks, which give only the index of their rows to the driver."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, cast

import numpy as np
import pyarrow as pa

from fewstep.data.execution import configured, user_errors
from fewstep.data.rows import Collected, told_split
from fewstep.data.tables import Rejection, RowError

FOUND = pa.schema(
    [(name, pa.string()) for name in ("key", "caption", "file", "where", "part", "split", "reason", "detail")]
)
"""Columns of what a task found: rows of the index and, with a `reason`, rows that can't be used."""

TASKS = 256
"""Most tasks that files are divided among."""

SCAN_CPUS = 0.1
"""CPU slots of a task: a fraction, because training workers may hold nearly all CPUs of a small cluster."""


class Found:
    """Rows that a task has found so far, as lists of FOUND's columns."""

    def __init__(self) -> None:
        self._rows: list[tuple[str | None, ...]] = []

    def add(self, key: str, caption: str, where: str, file: str, part: str | None, path: str) -> None:
        """Add a row; `path` is what may tell its split."""
        self._rows.append((key, caption, file, where, part, told_split(path), None, None))

    def reject(self, where: str, error: RowError) -> None:
        """Add a row that can't be used."""
        self._rows.append((None, None, None, where, None, None, error.reason, error.detail))

    def table(self) -> pa.Table:
        """The rows as a table."""
        columns = zip(*self._rows, strict=True) if self._rows else [[] for _ in FOUND]
        return pa.table(
            [pa.array(list(column), field.type) for column, field in zip(columns, FOUND, strict=True)],
            schema=FOUND,
        )


def scan(files: Sequence[str], task: Callable[..., pa.Table], **arguments: Any) -> Collected:
    """What tasks find in files, in the order of the files.

    Args:
        files: names.
        task: called in a task with a table that has some of them as its column `file`; returns a table of FOUND.
        arguments: of the task, too.

    Raises:
        UserError: a task raised it.
    """
    import ray.data

    blocks = np.array_split(np.array(files, dtype=object), min(len(files), TASKS))
    # Ray's annotations leave out fn_kwargs.
    pipeline = ray.data.from_arrow(
        [pa.table({"file": pa.array(list(block))}) for block in blocks]
    ).map_batches(
        cast(Any, task), fn_kwargs=arguments, batch_size=None, batch_format="pyarrow", num_cpus=SCAN_CPUS
    )
    collected = Collected()
    with user_errors():
        found = configured(pipeline, in_order=True).iter_batches(batch_size=None, batch_format="pyarrow")
        for table in found:
            _collect(cast(pa.Table, table).select(FOUND.names), collected)
    return collected


def _collect(found: pa.Table, collected: Collected) -> None:
    """Add what a task found, with rejections between the rows that they were found between."""
    usable = found["reason"].is_null().to_numpy()
    start = 0
    for place in [*np.flatnonzero(~usable).tolist(), len(found)]:
        if place > start:
            collected.extend(found.slice(start, place - start))
        if place < len(found):
            row = found.slice(place, 1).to_pylist()[0]
            collected.reject(Rejection(row["where"], row["reason"], row["detail"]))
        start = place + 1
