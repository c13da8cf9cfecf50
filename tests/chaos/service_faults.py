"""Faults of a service: what is broken while it is asked for images, and how it is mended again."""

from __future__ import annotations

import contextlib
import json
import socket
import time
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager
from pathlib import Path

from proxy import Trouble
from service_site import TORN, ServiceSite

from fewstep_loadtest.soak import MODEL

Fault = Callable[[ServiceSite], AbstractContextManager[None]]
"""Begins when the context is entered, and is mended when it is left."""

AWAY_SECONDS = 20.0
"""How long registry and bucket are away."""
SLOW_CLIENTS, IDLE_CONNECTIONS, LEAVING_CLIENTS = 50, 1000, 200
SLOW_SECONDS = 15.0
"""How long slow and idle clients stay."""
BODY = json.dumps({"model": MODEL, "prompt": "owl, noto style", "n": 3, "seed": 1}).encode()


def killed(title: str) -> Fault:
    """SIGKILL of a process, by how its title begins."""

    @contextmanager
    def fault(site: ServiceSite) -> Iterator[None]:
        site.processes(title)[-1].kill()
        yield

    return fault


@contextmanager
def node_killed(site: ServiceSite) -> Iterator[None]:
    """A machine with a replica is gone at once, and another comes."""
    site.kill_node(site.nodes[-1])
    yield
    site.add_node()


@contextmanager
def gcs_killed(site: ServiceSite) -> Iterator[None]:
    """The cluster's head service is killed, and started again with its state."""
    site.restart_gcs()
    yield


@contextmanager
def head_killed(site: ServiceSite) -> Iterator[None]:
    """The head's machine is gone at once, with proxy and controller, and comes again with its state."""
    site.restart_head()
    yield


def starting_without(service: str, trouble: Trouble) -> Fault:
    """A replica is killed, and the next one starts while the registry (`mlflow`) or the bucket (`s3`) is in trouble."""

    @contextmanager
    def fault(site: ServiceSite) -> Iterator[None]:
        with _trouble(site, service, trouble):
            site.processes("ray::ServeReplica:fewstep:Generator")[-1].kill()
            time.sleep(AWAY_SECONDS)
            assert not site.is_whole(), "a replica has started without it"
        yield

    return fault


def moving_without(service: str, trouble: Trouble) -> Fault:
    """The alias moves while the registry or the bucket is in trouble."""

    @contextmanager
    def fault(site: ServiceSite) -> Iterator[None]:
        with _trouble(site, service, trouble):
            site.point("2")
            time.sleep(AWAY_SECONDS)
        yield

    return fault


@contextmanager
def torn(site: ServiceSite) -> Iterator[None]:
    """The alias moves to a version whose weights are cut, and back."""
    asked = len(site.s3.asked)
    site.point(TORN)
    time.sleep(AWAY_SECONDS)
    weights = [one.line for one in site.s3.asked[asked:] if ".safetensors" in one.line]
    assert any(one.startswith(f"GET {site.torn}") for one in weights), f"nobody has fetched them: {weights}"
    yield
    site.point("1")


@contextmanager
def alias_moved(site: ServiceSite) -> Iterator[None]:
    """The alias moves, and nothing is broken."""
    site.point("2")
    yield


@contextmanager
def slow_senders(site: ServiceSite) -> Iterator[None]:
    """Clients that send a byte a second."""
    request = _request(BODY)
    with _connections(site, SLOW_CLIENTS) as sockets:
        for position in range(int(SLOW_SECONDS)):
            for one in sockets:
                with contextlib.suppress(OSError):
                    one.send(request[position : position + 1])
            time.sleep(1)
        yield


@contextmanager
def slow_readers(site: ServiceSite) -> Iterator[None]:
    """Clients that read a byte a second of their answer."""
    with _connections(site, SLOW_CLIENTS, receive=1024) as sockets:
        for one in sockets:
            one.send(_request(BODY))
        for _ in range(int(SLOW_SECONDS)):
            for one in sockets:
                one.setblocking(False)
                with contextlib.suppress(OSError):
                    one.recv(1)
            time.sleep(1)
        assert _held_up(site.port) >= SLOW_CLIENTS // 2, "the answers were taken at once"
        yield


@contextmanager
def idle_connections(site: ServiceSite) -> Iterator[None]:
    """Clients that connect and send nothing."""
    with _connections(site, IDLE_CONNECTIONS):
        time.sleep(SLOW_SECONDS)
        yield


@contextmanager
def leaving_clients(site: ServiceSite) -> Iterator[None]:
    """Clients that ask and leave before the answer, some of them with previews under way."""
    body = json.dumps(json.loads(BODY) | {"stream": True, "partial_images": 3}).encode()
    for number in range(LEAVING_CLIENTS):
        with socket.create_connection(("127.0.0.1", site.port), timeout=10) as one:
            one.send(_request(body if number % 2 else BODY))
            time.sleep(0.05)
    yield


def _request(body: bytes) -> bytes:
    head = "POST /v1/images/generations HTTP/1.1\r\nHost: x\r\nContent-Type: application/json\r\n"
    return f"{head}Content-Length: {len(body)}\r\n\r\n".encode() + body


@contextmanager
def _connections(site: ServiceSite, count: int, receive: int | None = None) -> Iterator[list[socket.socket]]:
    """Open connections; `receive`: bytes that each takes in before it is read from."""
    with contextlib.ExitStack() as closing:
        sockets = []
        for _ in range(count):
            one = closing.enter_context(socket.socket())
            if receive is not None:  # before the connection, whose window depends on it
                one.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, receive)
            one.settimeout(30)
            one.connect(("127.0.0.1", site.port))
            sockets.append(one)
        yield sockets


def _held_up(port: int) -> int:
    """How many connections of a port of this machine have bytes that their client has not taken."""
    count = 0
    for line in Path("/proc/net/tcp").read_text().splitlines()[1:]:
        local, queues = line.split()[1], line.split()[4]
        count += int(local.split(":")[1], 16) == port and int(queues.split(":")[0], 16) > 0
    return count


@contextmanager
def _trouble(site: ServiceSite, service: str, trouble: Trouble) -> Iterator[None]:
    proxy = getattr(site, service)
    proxy.set(trouble)
    try:
        yield
    finally:
        proxy.set("pass")


FAULTS: dict[str, Fault] = {
    "nothing": lambda site: contextlib.nullcontext(),
    "alias moved": alias_moved,
    "replica killed": killed("ray::ServeReplica:fewstep:Generator"),
    "ingress killed": killed("ray::ServeReplica:fewstep:Ingress"),
    "proxy killed": killed("ray::ProxyActor"),
    "controller killed": killed("ray::ServeController"),
    "node killed, another comes": node_killed,
    "GCS killed and restarted": gcs_killed,
    "head killed and restarted": head_killed,
    "replica starts, MLflow away": starting_without("mlflow", "away"),
    "replica starts, MLflow answers 503": starting_without("mlflow", "503"),
    "replica starts, S3 away": starting_without("s3", "away"),
    "replica starts, S3 cuts answers": starting_without("s3", "cut"),
    "alias moved, MLflow away": moving_without("mlflow", "away"),
    "alias moved, S3 away": moving_without("s3", "away"),
    "alias moved, S3 cuts answers": moving_without("s3", "cut"),
    "alias moved to a torn version": torn,
    "50 clients that send a byte a second": slow_senders,
    "50 clients that read a byte a second": slow_readers,
    "1,000 idle connections": idle_connections,
    "200 clients that leave": leaving_clients,
}

MOVING = {"alias moved", "alias moved, MLflow away", "alias moved, S3 away", "alias moved, S3 cuts answers"}
"""The faults after which the alias means another version."""
