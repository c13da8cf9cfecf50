"""What Serve's controller knows of the running service."""

from __future__ import annotations

from ray import serve
from ray.serve.config import HTTPOptions

LIVING = ("RUNNING", "UPDATING", "PENDING_MIGRATION")
"""States of replicas that have started. One that takes a new `user_config`, or another rank because another replica has
died, is UPDATING for a moment."""


def living_replicas(application: str, deployment: str) -> int | None:
    """How many replicas of a deployment have started and live; None where the controller does not say."""
    status = serve.status().applications.get(application)
    if status is None:
        return 0
    if not status.deployments:  # while another configuration of the application is imported, whatever runs
        return None
    if deployment not in status.deployments:
        return 0
    states = status.deployments[deployment].replica_states
    return sum(count for state, count in states.items() if state in LIVING)


def http_options() -> HTTPOptions | None:
    """How Serve's HTTP listens; None where Serve does not run on this cluster."""
    # Private, because Ray 2.60 has no public way to learn it inside a replica: `serve.status()` lists proxies without
    # their address, `args` could say another one than `http_options`, and the REST API that tells it belongs to a
    # dashboard that a cluster need not have. Imported here, so that another Ray fails at this check alone.
    from ray.serve.context import _get_global_client

    client = _get_global_client(raise_if_no_controller_running=False)
    return None if client is None else client.http_config
