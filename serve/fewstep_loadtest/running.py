"""Deploy the service for a measurement or a test, and take it down when that is over."""

from __future__ import annotations

import time
import urllib.error
import urllib.request
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from ray import serve

from fewstep.errors import UserError
from fewstep_serve.app import assemble
from fewstep_serve.cluster import http_options
from fewstep_serve.config import ServeConfig

READY_S = 180
"""How long a deployment may take until it can generate."""


def deploy(
    address: str,
    config: dict[str, Any],
    *,
    name: str = "fewstep",
    prefix: str = "/",
    ingress_replicas: int = 1,
    **generator_options: Any,
) -> None:
    """Run an application on a started Serve, and wait until it can generate.

    Args:
        address: where Serve's HTTP listens.
        config: a `ServeConfig` as plain data.
        name: of the application.
        prefix: of its routes.
        ingress_replicas: of the HTTP ingress.
        generator_options: of the generator's deployment, as `num_replicas`.

    Raises:
        UserError: it did not become ready.
    """
    application = assemble(
        ServeConfig.model_validate(config), ingress_replicas=ingress_replicas, **generator_options
    )
    serve.run(application, name=name, route_prefix=prefix, logging_config={"enable_access_log": False})
    deadline = time.monotonic() + READY_S
    # `serve.run` returns when replicas run, which is before the proxy knows their routes.
    while time.monotonic() < deadline:
        try:
            with urllib.request.urlopen(f"{address}{prefix.rstrip('/')}/healthz", timeout=10):
                return
        except (urllib.error.URLError, OSError):
            time.sleep(0.2)
    raise UserError(f"the application {name!r} was not ready within {READY_S} s: `serve status` says why.")


@contextmanager
def deployment(config: dict[str, Any], *, port: int, replicas: int = 1) -> Iterator[str]:
    """The address of an application on a port of its own; Serve is shut down afterwards.

    Args:
        config: a `ServeConfig` as plain data.
        port: where HTTP listens, on loopback.
        replicas: of the generator.

    Raises:
        UserError: Serve already runs on this cluster, with applications or another port, or the application did not
            become ready.
    """
    if serve.status().applications:
        raise UserError(
            "this Ray cluster already serves applications: give --address to use one of them, or run "
            "`serve shutdown` first."
        )
    if (running := http_options()) is not None and running.port != port:
        raise UserError(
            f"Serve already runs on this Ray cluster, at port {running.port}, which it can't change: run `serve "
            "shutdown` first."
        )
    serve.start(http_options={"host": "127.0.0.1", "port": port})
    try:
        # Half a logical CPU each, or a small machine would have no place for two replicas.
        deploy(f"http://127.0.0.1:{port}", config, num_replicas=replicas, ray_actor_options={"num_cpus": 0.5})
        yield f"http://127.0.0.1:{port}"
    finally:
        serve.shutdown()
