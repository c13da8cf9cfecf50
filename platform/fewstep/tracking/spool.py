"""What a run has logged and MLflow has not confirmed yet, on local disk.

Everything goes through the spool, whether or not MLflow can be reached: every call appends to it, and one thread
delivers from it. So memory stays bounded however long the server is away, records arrive in the order of the file, and
a killed process leaves behind exactly what a later one has to send. (A power cut may lose the last records: nothing is
fsynced.)

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
"""One line of a journal."""

_READ_BYTES = 256 * 1024
_TRUNCATE_BYTES = 1024 * 1024


def spool_folder() -> Path:
    """The folder that all runs started from the current folder spool to, absolute."""
    return Path(".fewstep/spool").absolute()


class Journal:
    """An append-only file of JSON lines, and a second file that says how many bytes of it are delivered.

    `append` may be called from any thread; `read` and `confirm` from the one thread that delivers.

    Args:
        path: of the JSON lines; created if it does not exist.
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
        """Length of the file, in bytes."""
        return self._end

    @property
    def sent(self) -> int:
        """How many of its bytes are delivered."""
        return self._sent

    @property
    def waiting_bytes(self) -> int:
        """How many of its bytes are not delivered yet."""
        return self._end - self._sent

    def append(self, record: Record) -> None:
        """Add one record.

        Raises:
            OSError: the disk is full; the journal is as it was.
        """
        line = json.dumps(record, separators=(",", ":")).encode() + b"\n"
        with self._lock:
            try:
                written = self._file.write(line)
                if written != len(line):
                    raise OSError(f"only {written} of {len(line)} bytes fit on the disk of {self._path}")
            except OSError:
                # Half a record would spoil the next one, which would follow on the same line.
                self._file.truncate(self._end)
                raise
            self._end += len(line)

    def read(self) -> list[tuple[Record, int]]:
        """The oldest undelivered records, some 256 KiB of them.

        Returns:
            Each record, with the offset to `confirm` once it is delivered.
        """
        records: list[tuple[Record, int]] = []
        with open(self._path, "rb") as file:
            file.seek(self._sent)
            while file.tell() < min(self._sent + _READ_BYTES, self._end):
                line = file.readline()
                records.append((json.loads(line), file.tell()))
        return records

    def confirm(self, offset: int) -> None:
        """Note that everything before `offset` is delivered; a long file that is delivered to its end is emptied."""
        with self._lock:
            # Only now and then: emptying and moving the mark are two writes, and a kill between them costs a repair.
            if offset == self._end and offset > _TRUNCATE_BYTES:
                self._file.truncate(0)
                self._end = offset = 0
            self._move_mark(offset)

    def close(self) -> None:
        """Close the file; nothing can be appended any more."""
        self._file.close()

    def _move_mark(self, offset: int) -> None:
        # Replaced in one act: a process killed while it writes leaves the old number, never half of one.
        beside = self._mark_path.with_suffix(".new")
        beside.write_text(str(offset))
        os.replace(beside, self._mark_path)
        self._sent = offset

    def _drop_torn_line(self) -> None:
        """Cut off half a line, which a machine that lost power may leave; it never counted as logged."""
        content = self._path.read_bytes()
        whole = content.rfind(b"\n") + 1
        if whole < len(content):
            self._file.truncate(whole)
            self._end = whole


class Session:
    """One process's spool for one run; only the process that holds its lock may deliver it.

    Made by `create` or `adopt`.

    Attributes:
        folder: of its files.
        uri: tracking address.
        run_id: the MLflow run.
        records: metrics, params, tags and changes of status.
        uploads: files and folders.
    """

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
        """A new session in a folder of its own under `root`.

        Raises:
            OSError: the folder can't be written.
        """
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
        """The session that a dead process left in `folder`; None while its owner lives, or if it is gone."""
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
        """Whether nothing waits any more."""
        return self.records.waiting_bytes == 0 and self.uploads.waiting_bytes == 0

    def new_file(self, name: str) -> Path:
        """A free path, ending in `name`, for a file that is to be uploaded."""
        with self._file_lock:
            folder = self._files / f"{self._next_file:06d}"
            self._next_file += 1
        folder.mkdir()
        return folder / name

    def relative(self, path: Path) -> str:
        """A path inside the session's folder as its journal holds it."""
        return str(path.relative_to(self.folder))

    def discard_file(self, relative: str) -> None:
        """Delete a file that is uploaded, by its path in the journal."""
        shutil.rmtree((self.folder / relative).parent, ignore_errors=True)

    def set_aside(self, record: Record, reason: str) -> None:
        """Move a record that MLflow refuses for good to `refused.jsonl`, so that it does not hold up the others."""
        with open(self.folder / "refused.jsonl", "a") as file:
            file.write(json.dumps({"record": record, "reason": reason}) + "\n")

    def close(self) -> None:
        """Release the session, and delete it if all is delivered and nothing was refused."""
        self.records.close()
        self.uploads.close()
        if self.delivered and not (self.folder / "refused.jsonl").exists():
            shutil.rmtree(self.folder, ignore_errors=True)
        os.close(self._lock)


def sessions(root: Path) -> list[Path]:
    """Session folders under `root`, oldest first."""
    return sorted(path.parent for path in root.glob("*/session.json"))


def left_behind(root: Path, run_id: str | None = None) -> Iterator[Session]:
    """Sessions whose owner is dead, oldest first; the caller closes them.

    Args:
        root: the spool.
        run_id: of the run whose sessions are wanted; None for those of all runs.
    """
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
        # The kernel releases it when the process dies, however that happens; a file with a process id would stay.
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        os.close(descriptor)
        return None
    return descriptor
