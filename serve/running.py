"""A deployment of its own for a measurement or a test, gone when it is over."""

from __future__ import annotations

import time
import urllib.error
import urllib.request
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from ray import serve

from fewstep.errors import UserError
from serve.app import assemble
from serve.settings import Settings

READY_S = 180


def deploy(
    address: str,
    settings: dict[str, Any],
    *,
    name: str = "fewstep",
    prefix: str = "/",
    **generator_options: Any,
) -> None:
    """Run an application on a started Serve, and wait until it can generate.

    Args:
        address: where Serve's HTTP listens.
        settings: a `Settings` as plain data.
        generator_options: of the generator's deployment, as `num_replicas`.

    Raises:
        UserError: it did not become ready.
    """
    application = assemble(Settings.model_validate(settings), **generator_options)
    serve.run(application, name=name, route_prefix=prefix, logging_config={"enable_access_log": False})
    deadline = time.monotonic() + READY_S
    while time.monotonic() < deadline:
        try:
            with urllib.request.urlopen(f"{address}{prefix.rstrip('/')}/healthz", timeout=10):
                return
        except (urllib.error.URLError, OSError):
            time.sleep(0.2)
    raise UserError(f"the application {name!r} was not ready within {READY_S} s: `serve status` says why.")


@contextmanager
def deployment(settings: dict[str, Any], *, port: int, replicas: int = 1) -> Iterator[str]:
    """The address of an application on a port of its own; Serve is shut down afterwards.

    Raises:
        UserError: Serve already runs on this cluster, or the application did not become ready.
    """
    if serve.status().applications:
        raise UserError(
            "this Ray cluster already serves applications: give --address to use one of them, or run "
            "`serve shutdown` first."
        )
    serve.start(http_options={"host": "127.0.0.1", "port": port})
    try:
        deploy(
            f"http://127.0.0.1:{port}", settings, num_replicas=replicas, ray_actor_options={"num_cpus": 0.5}
        )
        yield f"http://127.0.0.1:{port}"
    finally:
        serve.shutdown()
