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
UPLOAD_SECONDS = 60
# MLflow's limits for one log_batch call.
MAX_ITEMS = 1000
MAX_PARAMS_OR_TAGS = 100
# MLflow's database layer also answers BAD_REQUEST for passing trouble, so only a lasting one is a refusal.
PATIENCE_WITH_BAD_REQUEST = 3


@dataclass(frozen=True)
class Item:
    """One metric, param or tag; a batch is a list of them."""

    kind: str
    key: str
    value: float | str
    time_ms: int = 0
    step: int = 0


@dataclass
class Batch:
    """Neighbouring records that fit in one call. A status stands alone: it must not overtake metrics."""

    items: list[Item] = field(default_factory=list)
    status: Record | None = None
    end: int = 0

    def takes(self, items: list[Item]) -> bool:
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
    """Delivers one session. Raises whatever MLflow raises when it is away; the journal then stays as it is.

    A batch whose answer got lost is sent again. That changes nothing in MLflow: its metric table's primary
    key is (key, timestamp, step, run, value, is_nan) and `log_batch` skips rows that exist already; params
    and tags are set to the values they have; files are overwritten with themselves.
    """

    def __init__(self, session: Session) -> None:
        self.session = session
        self._client: MlflowClient | None = None
        self._bad_requests = 0
        self._warned: set[str] = set()

    def send_records(self) -> bool:
        """Send the records that wait now, in full batches; False when none did.

        What arrives meanwhile stays for the next call, so that a busy run's values travel together.
        """
        records = self.session.records
        until, sent = records.end, False
        while records.sent < until and (batch := next_batch(records.read())) is not None:
            with mlflow_settings(RECORD_SECONDS):
                if batch.items:
                    self._log(batch.items)
                if batch.status is not None:
                    self._set_status(batch.status)
            sent = True
            records.confirm(batch.end)
            if records.sent == 0:  # delivered to the end and emptied
                break
        return sent

    def send_upload(self) -> bool:
        """Send one file or folder; False when nothing waits."""
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
                middle = len(items) // 2
                self._log(items[:middle])
                self._log(items[middle:])

    def _set_status(self, record: Record) -> None:
        if record["status"] == "RUNNING":
            self._mlflow.update_run(self.session.run_id, status="RUNNING")
        else:
            self._mlflow.set_terminated(self.session.run_id, record["status"], record["time_ms"])

    def _refused(self, error: Exception) -> bool:
        """Whether MLflow is there and will never take this (and is not just away, or the run deleted)."""
        code = getattr(error, "error_code", None)
        if code == "BAD_REQUEST":
            self._bad_requests += 1
            return self._bad_requests > PATIENCE_WITH_BAD_REQUEST
        if code != "INVALID_PARAMETER_VALUE":
            return False
        return self._mlflow.get_run(self.session.run_id).info.lifecycle_stage == "active"

    def _set_aside(self, record: Record, what: str, error: Exception) -> None:
        self.session.set_aside(record, str(error))
        if what not in self._warned:
            self._warned.add(what)
            log.warning(
                "MLflow refused %s, kept in %s: %s", what, self.session.folder / "refused.jsonl", error
            )


def next_batch(waiting: list[tuple[Record, int]]) -> Batch | None:
    """As many leading records as one call may carry; None when there are none."""
    batch = Batch()
    for record, end in waiting:
        if record["kind"] == "status":
            if batch.end == 0:
                batch.status, batch.end = record, end
            break
        items = unpack(record)
        if batch.items and not batch.takes(items):
            break
        batch.items += items
        batch.end = end
    return batch if batch.end else None


def unpack(record: Record) -> list[Item]:
    """A journal record's items; {"kind": "metric", "values": {key: value}, "time_ms", "step"} is one."""
    common: dict[str, Any] = {name: record[name] for name in ("time_ms", "step") if name in record}
    return [Item(record["kind"], key, value, **common) for key, value in record["values"].items()]
