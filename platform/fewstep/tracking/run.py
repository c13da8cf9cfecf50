"""One MLflow run per job; logging to it never waits for MLflow."""

from __future__ import annotations

import json
import logging
import shutil
import threading
import time
from collections import deque
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path, PurePosixPath
from types import TracebackType
from typing import TYPE_CHECKING, Any, Literal

from fewstep.errors import UserError
from fewstep.tracking.address import (
    CHECK_SECONDS,
    absolute_uri,
    artifact_location,
    check_reachable,
    connect,
    mlflow_settings,
    readable,
)
from fewstep.tracking.delivery import MAX_ITEMS, MAX_PARAMS_OR_TAGS, Courier
from fewstep.tracking.spool import Record, Session, left_behind

if TYPE_CHECKING:
    import numpy as np
    from mlflow import MlflowClient
    from PIL.Image import Image

__all__ = ["TrackedRun", "Tracker", "check_reachable", "has_run"]

log = logging.getLogger(__name__)

Status = Literal["FINISHED", "FAILED", "KILLED"]

COALESCE_SECONDS = 1.0
"""How long records gather before they are sent together."""

FIRST_BACKOFF_SECONDS = 1.0
"""Wait after a failed delivery; doubled with each further failure."""

LONGEST_BACKOFF_SECONDS = 30.0
MOST_UNWRITTEN = 10_000
"""How many calls are kept in memory while the spool's disk is full; the oldest are lost beyond that."""
FLUSH_RETRY_SECONDS = 0.5
"""Wait between attempts while somebody waits for all to be delivered."""


@dataclass(frozen=True)
class TrackedRun:
    """Where a run is, for another process of the same job."""

    uri: str
    """Tracking address."""
    run_id: str
    spool: Path
    """Absolute folder for what is not delivered yet."""


class Tracker:
    """The MLflow run of a job.

    Every `log_…` call appends to a spool on local disk and returns; a background thread sends the spool in
    batches, in order, with the times and steps of the calls. While MLflow is away the spool grows and the
    thread retries; what a process could not send is sent by the next one that opens the same run, or by
    `python -m fewstep.tracking.resend SPOOL`. Once a run has started, no trouble with MLflow or the spool raises an
    exception: it is logged as a warning.

    Use as a context manager to end the run as FINISHED, FAILED (an exception) or KILLED (an interrupt).

    Made by `start` or `join`.

    Attributes:
        run_id: the MLflow run.
        uri: tracking address, as workers can use it.
    """

    def __init__(self, session: Session, earlier: list[Session], spool: Path) -> None:
        self.run_id = session.run_id
        self.uri = session.uri
        self._spool = spool
        self._session = session
        self._closed = False
        self._said: set[str] = set()
        self._unwritten: deque[Record] = deque(maxlen=MOST_UNWRITTEN)
        self._writing = threading.Lock()
        self._sender = Sender([Courier(one) for one in [*earlier, session]], self._session.uri)

    @classmethod
    def start(
        cls,
        uri: str,
        experiment: str,
        run_name: str,
        params: Mapping[str, Any],
        tags: Mapping[str, str],
        spool: Path,
        run_id: str | None = None,
    ) -> Tracker:
        """Create a run, or continue `run_id` under the same id.

        Args:
            uri: tracking address; sqlite paths are made absolute.
            experiment: created when it does not exist; beside an sqlite database its files go to the
                absolute folder `mlartifacts/<experiment>`.
            params: logged as strings; nested mappings become dotted keys.
            tags: run tags.
            spool: folder on a local disk for what is not delivered yet; runs may share it, processes too.
            run_id: a run to continue, even while MLflow can't be reached. What earlier processes of it left in
                `spool` is sent first.

        Raises:
            UserError: a new run can't be created, `run_id` does not exist, or `spool` can't be written.
        """
        _make_spool(spool := Path(spool).absolute())
        if run_id is None:
            uri = check_reachable(uri)
            with mlflow_settings(CHECK_SECONDS):
                run_id = _create_run(connect(uri), uri, experiment, run_name)
        elif not has_run(uri := absolute_uri(uri), run_id):
            raise UserError(
                f"MLflow at {uri} has no run {run_id!r}: correct the id or the address, or start a new run"
            )
        tracker = cls.join(TrackedRun(uri, run_id, spool))
        # A continued run may have ended before; `join` leaves the status to the process that started it.
        tracker._append({"kind": "status", "status": "RUNNING", "time_ms": _now_ms()})
        tracker.set_tags(tags)
        tracker.log_params(params)
        return tracker

    @classmethod
    def join(cls, run: TrackedRun) -> Tracker:
        """Log to a run that another process of the job has started and will end.

        What dead processes of it left in the spool is sent first. MLflow need not be reachable.

        Raises:
            UserError: the spool can't be written.
        """
        _make_spool(run.spool)
        earlier = list(left_behind(run.spool, run.run_id))
        return cls(Session.create(run.spool, run.uri, run.run_id), earlier, run.spool)

    @property
    def run(self) -> TrackedRun:
        """Where this run is; hand it to another process, which then can `join` it."""
        return TrackedRun(self.uri, self.run_id, self._spool)

    def log_metrics(self, values: Mapping[str, float], step: int, *, once: str | None = None) -> None:
        """Log numbers (anything `float` takes) at a step, with the time of this call.

        Args:
            values: by name.
            step: the optimizer step that they belong to.
            once: one of the names. Nothing is sent where MLflow has that very value of it at this step already: a run
                that goes on from a checkpoint takes the steps after it again.
        """
        # In parts that fit into one call to MLflow, so that delivering never has to split a record.
        numbers = {key: float(value) for key, value in values.items()}
        repeated = {} if once is None else {"once": [once, numbers[once]]}
        for part in _chunks(numbers, MAX_ITEMS):
            self._append(
                {"kind": "metric", "values": part, "time_ms": _now_ms(), "step": int(step), **repeated}
            )

    def log_params(self, params: Mapping[str, Any]) -> None:
        """Log settings; MLflow keeps the first value of a key for good."""
        for part in _chunks(dict(_flatten(params)), MAX_PARAMS_OR_TAGS):
            self._append({"kind": "param", "values": part})

    def set_tags(self, tags: Mapping[str, Any]) -> None:
        """Set tags; a later value replaces an earlier one."""
        for part in _chunks({key: str(value) for key, value in tags.items()}, MAX_PARAMS_OR_TAGS):
            self._append({"kind": "tag", "values": part})

    def log_image(self, image: Image | np.ndarray, name: str) -> None:
        """Log a picture, a PIL image or a (H, W, 3) or (H, W) uint8 array, as `name` ("samples/000100.png").

        The encoding happens here, in the caller's thread.
        """
        from PIL import Image as pillow

        picture = image if isinstance(image, pillow.Image) else pillow.fromarray(image)
        self._upload(name, lambda path: picture.save(path))

    def log_artifact(self, path: Path | str, folder: str | None = None) -> None:
        """Log a file or a folder under `folder`; it is copied now, so it may change afterwards."""
        source = Path(path)
        copy = shutil.copytree if source.is_dir() else shutil.copyfile
        self._upload("/".join(part for part in (folder, source.name) if part), lambda to: copy(source, to))

    def log_text(self, text: str, name: str) -> None:
        """Log a text file as `name` ("report/summary.md")."""
        self._upload(name, lambda path: path.write_text(text))

    def log_json(self, value: Any, name: str) -> None:
        """Log a value as a JSON file `name` ("recipe.json")."""
        self.log_text(json.dumps(value, indent=2, default=str) + "\n", name)

    def flush(self, timeout: float = 30.0) -> bool:
        """Wait until everything logged so far is in MLflow; False when `timeout` seconds were not enough."""
        written = self._write()
        return self._sender.flush(timeout) and written

    def finish(self, status: Status = "FINISHED", timeout: float = 30.0) -> bool:
        """End the run.

        Args:
            status: as what it ends.
            timeout: how long to wait for MLflow, in seconds.

        Returns:
            Whether MLflow took everything in that time; what it did not take stays in the spool.
        """
        if self._closed:
            return True
        self._append({"kind": "status", "status": status, "time_ms": _now_ms()})
        self._closed = True
        written = self._write()
        delivered = self._sender.flush(timeout) and written
        self._sender.stop()
        if not delivered:
            log.warning(
                "MLflow at %s has not taken all of run %s; send the rest with: "
                "python -m fewstep.tracking.resend %s",
                self.uri,
                self.run_id,
                self._spool,
            )
        return delivered

    def __enter__(self) -> Tracker:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if kind is None:
            self.finish("FINISHED")
        else:
            self.finish("FAILED" if issubclass(kind, Exception) else "KILLED")

    def _upload(self, name: str, write: Callable[[Path], object]) -> None:
        """Write a file into the spool and queue it as `name`."""
        target = PurePosixPath(name)
        folder = None if target.parent == PurePosixPath(".") else str(target.parent)
        try:
            # The copy is whole before it is queued: whoever delivers the queue never sees half a file.
            path = self._session.new_file(target.name)
            write(path)
        except OSError as error:
            self._say_once(f"could not keep {name} for MLflow, it is lost: {error}")
            return
        self._append({"kind": "upload", "file": self._session.relative(path), "folder": folder})

    def _append(self, record: Record) -> None:
        if self._closed:
            self._say_once(f"run {self.run_id} is finished, later calls are dropped")
            return
        with self._writing:
            self._unwritten.append(record)
        self._write()

    def _write(self) -> bool:
        """Move what waits in memory into the spool; False while its disk takes nothing."""
        with self._writing:
            try:
                while self._unwritten:
                    record = self._unwritten[0]
                    # Two journals, so that a file that can't be delivered is not in the way of metrics.
                    journal = self._session.uploads if record["kind"] == "upload" else self._session.records
                    journal.append(record)
                    self._unwritten.popleft()
            except OSError as error:
                self._say_once(
                    f"could not write to the spool {self._spool}, the last {MOST_UNWRITTEN} values and files wait in "
                    f"memory: {error}"
                )
            return not self._unwritten

    def _say_once(self, message: str) -> None:
        # A full disk fails every step of a training in the same way.
        if message not in self._said:
            self._said.add(message)
            log.warning("tracking: %s", message)


class Sender:
    """The thread that delivers.

    Metrics and files are retried independently, so that a broken file store delays no metrics.

    Args:
        couriers: of this process's session and of those that dead processes of the run left, oldest first.
        uri: tracking address, for messages.
    """

    def __init__(self, couriers: list[Courier], uri: str) -> None:
        self._couriers = couriers
        self._uri = uri
        self._changed = threading.Condition()
        self._flushing = 0
        self._stopping = False
        self._records = Lane("metrics", uri, self._send_records)
        self._uploads = Lane("files", uri, self._send_upload)
        # A daemon: a call to MLflow that hangs must not keep the process from ending.
        self._thread = threading.Thread(target=self._run, name="fewstep-tracking", daemon=True)
        self._thread.start()

    def flush(self, timeout: float) -> bool:
        """Wait until all is delivered; False when `timeout` seconds were not enough."""
        deadline = time.monotonic() + timeout
        with self._changed:
            self._flushing += 1  # the thread now retries sooner; several callers may wait at once
            self._changed.notify_all()
            while not self._delivered() and (left := deadline - time.monotonic()) > 0:
                self._changed.wait(left)
            self._flushing -= 1
            return self._delivered()

    def stop(self) -> None:
        """End the thread. One that hangs in a call to MLflow is not waited for; it ends with the process."""
        with self._changed:
            self._stopping = True
            self._changed.notify_all()
        self._thread.join(timeout=1.0)
        for courier in self._couriers:
            courier.session.close()

    def _send_records(self) -> bool:
        # A list, so that every courier sends; any() of a generator would stop after the first that had something.
        return any([courier.send_records() for courier in self._couriers])

    def _send_upload(self) -> bool:
        return any(courier.send_upload() for courier in self._couriers)

    def _delivered(self) -> bool:
        return all(courier.session.delivered for courier in self._couriers)

    def _run(self) -> None:
        while not self._stopping:
            # All records, then one upload, and so on: a long queue of files does not delay metrics.
            self._records.work(bool(self._flushing))
            uploaded = self._uploads.work(bool(self._flushing))
            with self._changed:
                self._changed.notify_all()
                if not (uploaded or self._stopping):
                    self._changed.wait(FLUSH_RETRY_SECONDS if self._flushing else COALESCE_SECONDS)


class Lane:
    """One kind of delivery, and how long it waits after a failure before it tries again.

    Args:
        what: is delivered, in words.
        uri: tracking address, for messages.
        send: delivers some, and says whether there was any.
    """

    def __init__(self, what: str, uri: str, send: Callable[[], bool]) -> None:
        self._what = what
        self._uri = uri
        self._send = send
        self._backoff = 0.0
        self._not_before = 0.0

    def work(self, hurry: bool) -> bool:
        """Try one delivery, unless a failure was too recent.

        Args:
            hurry: try in any case.

        Returns:
            Whether something was delivered.
        """
        if time.monotonic() < self._not_before and not hurry:
            return False
        try:
            delivered = self._send()
        except Exception as error:  # away, locked, unauthorised, full: whatever it is, training goes on
            if not self._backoff:
                log.warning(
                    "MLflow at %s does not take %s (%s); they wait on disk and are sent when it does",
                    self._uri,
                    self._what,
                    readable(error),
                )
            self._backoff = min(max(2 * self._backoff, FIRST_BACKOFF_SECONDS), LONGEST_BACKOFF_SECONDS)
            self._not_before = time.monotonic() + self._backoff
            return False
        if delivered and self._backoff:
            log.info("MLflow at %s takes %s again", self._uri, self._what)
            self._backoff = 0.0
        return delivered


def has_run(uri: str, run_id: str) -> bool:
    """Whether MLflow knows a run; True, with a warning, where it can't be reached."""
    from mlflow.exceptions import MlflowException

    try:
        with mlflow_settings(CHECK_SECONDS):
            connect(absolute_uri(uri)).get_run(run_id)
    except MlflowException as error:
        if error.error_code == "RESOURCE_DOES_NOT_EXIST":
            return False
        log.warning("MLflow at %s is away (%s); run %s goes on without it", uri, readable(error), run_id)
    return True


def _make_spool(folder: Path) -> None:
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise UserError(
            f"tracking spool {str(folder)!r} can't be written ({error}): choose a folder on a local disk"
        ) from error


def _create_run(client: MlflowClient, uri: str, experiment: str, run_name: str) -> str:
    from mlflow.exceptions import MlflowException

    try:
        found = client.get_experiment_by_name(experiment)
        if found is None:
            experiment_id = _create_experiment(client, uri, experiment)
        elif found.lifecycle_stage != "active":
            raise UserError(
                f"MLflow experiment {experiment!r} at {uri} is deleted: restore it with "
                f"'mlflow experiments restore --experiment-id {found.experiment_id}' or choose another name"
            )
        else:
            experiment_id = found.experiment_id
        return client.create_run(experiment_id, run_name=run_name).info.run_id
    except MlflowException as error:
        raise UserError(
            f"MLflow at {uri} did not create a run in experiment {experiment!r} ({readable(error)}): "
            "correct the address or the name, or start the server"
        ) from error


def _create_experiment(client: MlflowClient, uri: str, name: str) -> str:
    from mlflow.exceptions import MlflowException

    try:
        return client.create_experiment(name, artifact_location=artifact_location(uri, name))
    except MlflowException as error:
        exists = error.error_code == "RESOURCE_ALREADY_EXISTS"  # another process was first
        if exists and (found := client.get_experiment_by_name(name)) is not None:
            return found.experiment_id
        raise


def _now_ms() -> int:
    return time.time_ns() // 1_000_000


def _flatten(values: Mapping[str, Any], prefix: str = "") -> Iterator[tuple[str, str]]:
    for key, value in values.items():
        if isinstance(value, Mapping):
            yield from _flatten(value, f"{prefix}{key}.")
        else:
            yield f"{prefix}{key}", str(value)


def _chunks(values: dict[str, Any], size: int) -> Iterator[dict[str, Any]]:
    pairs = list(values.items())
    for start in range(0, len(pairs), size):
        yield dict(pairs[start : start + size])
