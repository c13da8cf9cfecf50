"""What a run has logged and MLflow has not confirmed yet, on local disk.

The spool is the queue itself, not a fallback: every call appends to it, and one thread delivers from it. So
memory stays bounded however long the server is away, order is the order of the file, and a killed process
leaves behind exactly what its successor has to send. (Killed processes, not power cuts: nothing is fsynced.)

    <root>/<time>-<pid>/        one session: one process writing one run
      session.json              {"uri", "run_id"}
      lock                      flock held by the owner; free once the owner is dead
      records.jsonl             metrics, params, tags, status   } beside each, NAME.sent: how many
      uploads.jsonl             files to upload                 } bytes of it are delivered
      files/<n>/<name>          copies of those files
      refused.jsonl             what MLflow declared invalid, with its reason
"""

from __future__ import annotations

import fcntl
import json
import os
import shutil
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

Record = dict[str, Any]

_READ_BYTES = 256 * 1024
_TRUNCATE_BYTES = 1024 * 1024


class Journal:
    """An append-only file of JSON lines and a mark of how far it has been delivered.

    `append` may be called from any thread; `read` and `confirm` belong to the one delivering thread.
    """

    def __init__(self, path: Path) -> None:
        self._path = path
        self._mark_path = path.with_suffix(".sent")
        self._lock = threading.Lock()
        self._file = open(path, "ab", buffering=0)  # noqa: SIM115 - stays open for the journal's life
        self._end = self._file.tell()
        self._drop_torn_line()
        self._sent = int(self._mark_path.read_text()) if self._mark_path.exists() else 0
        if self._sent > self._end:  # killed between emptying the file and moving the mark
            self._move_mark(0)

    @property
    def end(self) -> int:
        return self._end

    @property
    def sent(self) -> int:
        return self._sent

    @property
    def waiting_bytes(self) -> int:
        return self._end - self._sent

    def append(self, record: Record) -> None:
        """Add one record; raises OSError, leaving the journal as it was, when the disk is full."""
        line = json.dumps(record, separators=(",", ":")).encode() + b"\n"
        with self._lock:
            try:
                written = self._file.write(line)
                if written != len(line):
                    raise OSError(f"only {written} of {len(line)} bytes fit on the disk of {self._path}")
            except OSError:
                self._file.truncate(self._end)
                raise
            self._end += len(line)

    def read(self) -> list[tuple[Record, int]]:
        """The oldest undelivered records (some 256 KiB of them), each with the offset that confirms it."""
        records: list[tuple[Record, int]] = []
        with open(self._path, "rb") as file:
            file.seek(self._sent)
            while file.tell() < min(self._sent + _READ_BYTES, self._end):
                line = file.readline()
                records.append((json.loads(line), file.tell()))
        return records

    def confirm(self, offset: int) -> None:
        """Everything before `offset` is delivered. A long file is emptied once it is delivered to its end."""
        with self._lock:
            if offset == self._end and offset > _TRUNCATE_BYTES:
                self._file.truncate(0)
                self._end = offset = 0
            self._move_mark(offset)

    def close(self) -> None:
        self._file.close()

    def _move_mark(self, offset: int) -> None:
        beside = self._mark_path.with_suffix(".new")
        beside.write_text(str(offset))
        os.replace(beside, self._mark_path)
        self._sent = offset

    def _drop_torn_line(self) -> None:
        """A machine that lost power may leave half a line; it was never reported as logged."""
        content = self._path.read_bytes()
        whole = content.rfind(b"\n") + 1
        if whole < len(content):
            self._file.truncate(whole)
            self._end = whole


class Session:
    """One process's spool for one run. Whoever holds the lock delivers it."""

    def __init__(self, folder: Path, lock: int) -> None:
        self.folder = folder
        self._lock = lock
        described = json.loads((folder / "session.json").read_text())
        self.uri: str = described["uri"]
        self.run_id: str = described["run_id"]
        self.records = Journal(folder / "records.jsonl")
        self.uploads = Journal(folder / "uploads.jsonl")
        self._files = folder / "files"
        self._files.mkdir(exist_ok=True)
        self._file_lock = threading.Lock()
        self._next_file = 1 + max((int(path.name) for path in self._files.iterdir()), default=0)

    @classmethod
    def create(cls, root: Path, uri: str, run_id: str) -> Session:
        """A fresh session under `root`; raises OSError when the folder can't be written."""
        folder = root / f"{time.time_ns():020d}-{os.getpid()}"
        folder.mkdir(parents=True)
        lock = _try_lock(folder)
        assert lock is not None, "a fresh folder has no other owner"
        # Written last and whole: a folder without session.json is not a session yet.
        (folder / "session.new").write_text(json.dumps({"uri": uri, "run_id": run_id}))
        os.replace(folder / "session.new", folder / "session.json")
        return cls(folder, lock)

    @classmethod
    def adopt(cls, folder: Path) -> Session | None:
        """The session a dead process left in `folder`; None while its owner lives."""
        try:
            lock = _try_lock(folder)
        except FileNotFoundError:  # its owner has just delivered it and left
            return None
        if lock is None:
            return None
        try:
            return cls(folder, lock)
        except FileNotFoundError:
            os.close(lock)
            return None

    @property
    def delivered(self) -> bool:
        return self.records.waiting_bytes == 0 and self.uploads.waiting_bytes == 0

    def new_file(self, name: str) -> Path:
        """A free path, ending in `name`, for a file that waits to be uploaded."""
        with self._file_lock:
            folder = self._files / f"{self._next_file:06d}"
            self._next_file += 1
        folder.mkdir()
        return folder / name

    def relative(self, path: Path) -> str:
        return str(path.relative_to(self.folder))

    def discard_file(self, relative: str) -> None:
        shutil.rmtree((self.folder / relative).parent, ignore_errors=True)

    def set_aside(self, record: Record, reason: str) -> None:
        """Keep what MLflow refuses for good, out of the way of the rest."""
        with open(self.folder / "refused.jsonl", "a") as file:
            file.write(json.dumps({"record": record, "reason": reason}) + "\n")

    def close(self) -> None:
        """Release the session; a fully delivered one disappears, unless it holds refused records."""
        self.records.close()
        self.uploads.close()
        if self.delivered and not (self.folder / "refused.jsonl").exists():
            shutil.rmtree(self.folder, ignore_errors=True)
        os.close(self._lock)


def sessions(root: Path) -> list[Path]:
    """Session folders under `root`, oldest first."""
    return sorted(path.parent for path in root.glob("*/session.json"))


def left_behind(root: Path, run_id: str | None = None) -> Iterator[Session]:
    """Sessions whose owner is dead, of one run or of all, oldest first; the caller closes them."""
    for folder in sessions(root):
        if run_id in (None, _run_of(folder)) and (session := Session.adopt(folder)) is not None:
            yield session


def _run_of(folder: Path) -> str | None:
    try:
        return json.loads((folder / "session.json").read_text())["run_id"]
    except FileNotFoundError:
        return None


def _try_lock(folder: Path) -> int | None:
    descriptor = os.open(folder / "lock", os.O_CREAT | os.O_RDWR, 0o644)
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        os.close(descriptor)
        return None
    return descriptor
