"""Sending a spooled session to MLflow: batches of records, one upload at a time."""

from __future__ import annotations

import logging
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

from fewstep.tracking.address import connect, mlflow_settings
from fewstep.tracking.spool import Record, Session

if TYPE_CHECKING:
    from mlflow import MlflowClient

log = logging.getLogger(__name__)

RECORD_SECONDS = 10
"""HTTP timeout of one batch of records."""

UPLOAD_SECONDS = 60
"""HTTP timeout of one request of an upload."""

MAX_ITEMS = 1000
"""MLflow's limit on metrics, params and tags in one `log_batch` call."""

MAX_PARAMS_OR_TAGS = 100
"""MLflow's limit on params, and on tags, in one `log_batch` call."""

BAD_REQUESTS_ALLOWED = 3
"""So many times in a row BAD_REQUEST does not yet count as a refusal: MLflow's database layer also answers it for
trouble that passes."""


@dataclass(frozen=True)
class Item:
    """One metric, param or tag."""

    kind: str
    """Which of the three: metric, param or tag."""
    key: str
    value: Any
    """A number for metrics, text for params and tags."""
    time_ms: int = 0
    """When a metric was logged, in milliseconds since 1970."""
    step: int = 0
    """The optimizer step that a metric belongs to."""
    once: tuple[str, float] | None = None
    """Name and value of a metric by which it is told that MLflow has the metrics of this step already."""


@dataclass
class LogBatch:
    """Neighbouring records that fit into one call to MLflow: items, or one change of the run's status.

    A status never shares a batch with metrics, because it must not arrive before those that were logged earlier.
    """

    items: list[Item] = field(default_factory=list)
    status: Record | None = None
    end: int = 0
    """The journal's offset behind the last of these records."""

    def takes(self, items: list[Item]) -> bool:
        """Whether these items may join the batch without breaking MLflow's limits."""
        params = {item.key for item in self.items if item.kind == "param"}
        if any(item.kind == "param" and item.key in params for item in items):
            return False  # MLflow refuses a key twice in one batch
        together = [item.kind for item in self.items + items]
        return (
            len(together) <= MAX_ITEMS
            and together.count("param") <= MAX_PARAMS_OR_TAGS
            and together.count("tag") <= MAX_PARAMS_OR_TAGS
        )


class Courier:
    """Delivers one session to MLflow.

    Its methods raise whatever MLflow raises when it can't be reached; the journal then stays as it is.

    A batch whose answer got lost is sent again. That changes nothing in MLflow: its metric table's primary
    key is (key, timestamp, step, run, value, is_nan) and `log_batch` skips rows that exist already; params
    and tags are set to the values they have; files are overwritten with themselves.

    Args:
        session: what to deliver; whoever made it closes it.
    """

    def __init__(self, session: Session) -> None:
        self.session = session
        self._client: MlflowClient | None = None
        self._bad_requests = 0
        self._warned: set[str] = set()
        self._known: dict[
            str, set[tuple[int, float]]
        ] = {}  # what MLflow had when this session was first sent

    def send_records(self) -> bool:
        """Send the records that wait now, in batches as full as they can be.

        Returns:
            Whether any were sent.
        """
        records = self.session.records
        # What is appended while this runs waits for the next call, so that a busy run's values fill whole batches
        # instead of travelling one by one.
        until, sent = records.end, False
        while records.sent < until and (batch := next_batch(records.read())) is not None:
            with mlflow_settings(RECORD_SECONDS):
                if items := [item for item in batch.items if not self._has(item)]:
                    self._log(items)
                if batch.status is not None:
                    self._set_status(batch.status)
            sent = True
            records.confirm(batch.end)
            if records.sent == 0:  # delivered to the end and emptied
                break
        return sent

    def send_upload(self) -> bool:
        """Send the file or folder that has waited longest.

        Returns:
            Whether there was one.
        """
        waiting = self.session.uploads.read()
        if not waiting:
            return False
        record, end = waiting[0]
        source = self.session.folder / record["file"]
        with mlflow_settings(UPLOAD_SECONDS):
            try:
                if source.is_dir():
                    folder = "/".join(part for part in (record["folder"], source.name) if part)
                    self._mlflow.log_artifacts(self.session.run_id, str(source), folder)
                else:
                    self._mlflow.log_artifact(self.session.run_id, str(source), record["folder"])
            except Exception as error:
                if not self._refused(error):
                    raise
                self._set_aside(record, record["file"], error)
                self.session.uploads.confirm(end)
                return True
        self.session.uploads.confirm(end)
        self.session.discard_file(record["file"])
        return True

    @property
    def _mlflow(self) -> MlflowClient:
        if self._client is None:
            self._client = connect(self.session.uri)
        return self._client

    def _has(self, item: Item) -> bool:
        """Whether MLflow has an item from an earlier process of the run, which took the same step."""
        if item.once is None:
            return False
        name, value = item.once
        if name not in self._known:
            history = self._mlflow.get_metric_history(self.session.run_id, name)
            self._known[name] = {(point.step, point.value) for point in history}
        return (item.step, value) in self._known[name]

    def _log(self, items: list[Item]) -> None:
        """Send items in order; a refused batch is halved until the invalid item stands alone."""
        from mlflow.entities import Metric, Param, RunTag

        try:
            self._mlflow.log_batch(
                self.session.run_id,
                metrics=[Metric(i.key, i.value, i.time_ms, i.step) for i in items if i.kind == "metric"],
                params=[Param(i.key, i.value) for i in items if i.kind == "param"],
                tags=[RunTag(i.key, i.value) for i in items if i.kind == "tag"],
            )
            self._bad_requests = 0
        except Exception as error:
            if not self._refused(error):
                raise
            if len(items) == 1:
                self._set_aside(vars(items[0]), f"{items[0].kind} {items[0].key!r}", error)
            else:
                # MLflow refuses a batch as a whole and does not reliably say for which item.
                middle = len(items) // 2
                self._log(items[:middle])
                self._log(items[middle:])

    def _set_status(self, record: Record) -> None:
        if record["status"] == "RUNNING":
            self._mlflow.update_run(self.session.run_id, status="RUNNING")
        else:
            self._mlflow.set_terminated(self.session.run_id, record["status"], record["time_ms"])

    def _refused(self, error: Exception) -> bool:
        """Whether MLflow answered, and will never take this: not because it is away, or the run is deleted."""
        code = getattr(error, "error_code", None)
        if code == "BAD_REQUEST":
            self._bad_requests += 1
            return self._bad_requests > BAD_REQUESTS_ALLOWED
        if code != "INVALID_PARAMETER_VALUE":
            return False
        # A deleted run takes nothing either, but can be restored: what belongs to it goes on waiting.
        return self._mlflow.get_run(self.session.run_id).info.lifecycle_stage == "active"

    def _set_aside(self, record: Record, what: str, error: Exception) -> None:
        self.session.set_aside(record, str(error))
        if what not in self._warned:  # the same metric is refused at every step
            self._warned.add(what)
            log.warning(
                "MLflow refused %s, kept in %s: %s", what, self.session.folder / "refused.jsonl", error
            )


def next_batch(waiting: list[tuple[Record, int]]) -> LogBatch | None:
    """As many of the first records as one call may carry; None when there are none.

    Args:
        waiting: records in order, each with the journal's offset behind it (see `Journal.read`).
    """
    batch = LogBatch()
    for record, end in waiting:
        if record["kind"] == "status":
            if batch.end == 0:  # only where no metrics come before it in this batch
                batch.status, batch.end = record, end
            break
        items = unpack(record)
        if batch.items and not batch.takes(items):
            break
        batch.items += items
        batch.end = end
    return batch if batch.end else None


def unpack(record: Record) -> list[Item]:
    """The items of a journal's record, such as {"kind": "metric", "values": {key: value}, "time_ms", "step"}."""
    common: dict[str, Any] = {name: record[name] for name in ("time_ms", "step") if name in record}
    if "once" in record:
        common["once"] = tuple(record["once"])
    return [Item(record["kind"], key, value, **common) for key, value in record["values"].items()]
