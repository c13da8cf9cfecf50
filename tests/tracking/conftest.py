"""A real MLflow server, and a network that can break, for the tracking tests."""

from __future__ import annotations

import contextlib
import os
import signal
import socket
import sqlite3
import subprocess
import sys
import threading
import time
import urllib.request
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import pytest

from fewstep.tracking.address import check_reachable

STARTING_SECONDS = 90


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return probe.getsockname()[1]


class Server:
    """`mlflow server` as its own process group, on one port for its whole life."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.port = free_port()
        self.uri = f"http://127.0.0.1:{self.port}"
        self._process: subprocess.Popen[bytes] | None = None

    def start(self) -> None:
        command = [sys.executable, "-m", "mlflow", "server", "--host", "127.0.0.1", "--port", str(self.port)]
        command += ["--workers", "1", "--backend-store-uri", f"sqlite:///{self.folder}/server.db"]
        command += ["--artifacts-destination", str(self.folder / "artifacts")]
        with open(self.folder / "server.log", "ab") as output:
            self._process = subprocess.Popen(
                command,
                cwd=self.folder,
                stdout=output,
                stderr=output,
                start_new_session=True,
                env=os.environ | {"MLFLOW_SERVER_ENABLE_JOB_EXECUTION": "false"},
            )
        deadline = time.monotonic() + STARTING_SECONDS
        while time.monotonic() < deadline:
            with contextlib.suppress(OSError), urllib.request.urlopen(f"{self.uri}/health", timeout=2):
                return
            time.sleep(0.2)
        raise RuntimeError((self.folder / "server.log").read_text()[-2000:])

    def kill(self) -> None:
        if self._process is not None:
            with contextlib.suppress(ProcessLookupError):
                os.killpg(self._process.pid, signal.SIGKILL)
            self._process.wait()
            self._process = None


class Wire:
    """A TCP forwarder to the server: `cut` drops connections and refuses new ones, `hang` never answers."""

    def __init__(self, port: int) -> None:
        self._target = port
        self.port = free_port()
        self.uri = f"http://127.0.0.1:{self.port}"
        self._open: list[socket.socket] = []
        self._hanging = False
        self._listener: socket.socket | None = None
        self.mend()

    def mend(self) -> None:
        self.cut()
        self._hanging = False
        self._listen()

    def hang(self) -> None:
        self.cut()
        self._hanging = True
        self._listen()

    def cut(self) -> None:
        if self._listener is not None:
            with contextlib.suppress(OSError):
                self._listener.shutdown(socket.SHUT_RDWR)
            self._listener.close()
            self._listener = None
        for end in self._open:
            with contextlib.suppress(OSError):
                end.shutdown(socket.SHUT_RDWR)
            end.close()
        self._open = []

    def _listen(self) -> None:
        self._listener = socket.create_server(("127.0.0.1", self.port))
        threading.Thread(target=self._accept, args=(self._listener,), daemon=True).start()

    def _accept(self, listener: socket.socket) -> None:
        with contextlib.suppress(OSError):
            while True:
                near, _ = listener.accept()
                self._open.append(near)
                if not self._hanging:
                    far = socket.create_connection(("127.0.0.1", self._target))
                    self._open.append(far)
                    for source, sink in ((near, far), (far, near)):
                        threading.Thread(target=_pump, args=(source, sink), daemon=True).start()


def _pump(source: socket.socket, sink: socket.socket) -> None:
    with contextlib.suppress(OSError):
        while data := source.recv(65536):
            sink.sendall(data)
    for end in (source, sink):
        with contextlib.suppress(OSError):
            end.shutdown(socket.SHUT_RDWR)


@dataclass(frozen=True)
class Created:
    """A database that two processes created at the same time, and how the other one fared."""

    path: Path
    other_returncode: int
    other_output: str


@pytest.fixture(scope="session")
def created(tmp_path_factory: pytest.TempPathFactory) -> Created:
    """One database for all tests: MLflow takes seconds to create its schema."""
    path = tmp_path_factory.mktemp("sqlite") / "new" / "mlflow.db"
    command = "import sys; from fewstep.tracking.address import check_reachable; check_reachable(sys.argv[1])"
    other = subprocess.Popen(
        [sys.executable, "-c", command, f"sqlite:///{path}"],
        cwd=tmp_path_factory.mktemp("elsewhere"),
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        env=os.environ | {"PYTHONPATH": os.pathsep.join(sys.path)},
    )
    check_reachable(f"sqlite:///{path}")
    output = other.communicate(timeout=STARTING_SECONDS)[0]
    return Created(path, other.returncode, output)


@pytest.fixture(scope="session")
def database(created: Created) -> str:
    return f"sqlite:///{created.path}"


@pytest.fixture(scope="session")
def server(created: Created, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Server]:
    server = Server(tmp_path_factory.mktemp("mlflow-server"))
    with sqlite3.connect(created.path) as source, sqlite3.connect(server.folder / "server.db") as copy:
        source.backup(copy)
    try:
        server.start()
        yield server
    finally:
        server.kill()


@pytest.fixture
def wire(server: Server) -> Iterator[Wire]:
    wire = Wire(server.port)
    yield wire
    wire.cut()
