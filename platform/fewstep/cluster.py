"""Joining the Ray cluster that a command works on."""

from __future__ import annotations

import os
import socket
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any, cast

ADDRESS = "RAY_ADDRESS"
"""Name of the environment variable with the address of the cluster that is meant."""
API_SERVER = "RAY_API_SERVER_ADDRESS"
"""Name of the environment variable with the address of the dashboard that is meant, which goes before the other."""
ONLY_HERE = {"RAY_ENABLE_WINDOWS_OR_OSX_CLUSTER": "0"}
"""The variable that makes Ray keep to loopback.

Ray takes `--node-ip-address=127.0.0.1` for a slip on Linux, and listens on the machine's address in the network
instead, unless it is told that this machine can be part of no cluster, as it assumes on macOS and Windows.
"""
NOBODY = "http://127.0.0.1:9"
"""An address that nobody serves."""


def connect_ray(*, show_logs: bool = True, keep_node: bool = False) -> str | None:
    """Join the cluster of `RAY_ADDRESS` or the node that `ray start` left running here, or start a local one.

    A node that another command started for its own time is not joined: it ends with that command.

    Args:
        show_logs: repeat what the workers print.
        keep_node: a local cluster that is started goes on after this process, until `ray stop`; otherwise it ends
            with the process.

    Returns:
        The HTTP address of the cluster's dashboard; None where it has none, or where this process had joined before.
    """
    # Not at the top: Ray takes seconds to import, and commands that need no cluster import this module too.
    import ray

    # Not public, but `address="auto"` would take any node whose processes it finds.
    from ray._private.services import canonicalize_bootstrap_address, get_ray_address_from_environment

    if ray.is_initialized():
        return None
    try:
        if _is_only_here(get_ray_address_from_environment(cast(Any, None), None)):  # annotated as strs alone
            _keep_to_loopback()
        address = canonicalize_bootstrap_address(cast(Any, None))
        if address is None:
            raise ConnectionError("no node was started")
        context = ray.init(address=address, log_to_driver=show_logs)
    except ConnectionError:
        # On loopback alone, and so without the token that Ray would otherwise leave in ~/.ray: `ray start` would
        # find it there, demand it, and `ray job submit` would not send it.
        os.environ.setdefault("RAY_AUTH_MODE", "disabled")
        _keep_to_loopback()
        os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")  # nothing is reported to its authors
        # Serve starts a dead proxy again after three of these checks, which are 10 seconds apart by default.
        os.environ.setdefault("RAY_SERVE_PROXY_HEALTH_CHECK_PERIOD_S", "1")
        # Two logical CPUs more than there are: the data pipeline needs slots beside workers that hold all CPUs.
        cpus = (os.cpu_count() or 1) + 2
        if keep_node:
            _start_node(cpus)
            context = ray.init(address="auto", log_to_driver=show_logs)
        else:
            context = ray.init(num_cpus=cpus, _node_ip_address="127.0.0.1", log_to_driver=show_logs)
    return f"http://{context.dashboard_url}" if context.dashboard_url else None


@contextmanager
def told_own_cluster() -> Iterator[None]:
    """A context in which Ray Train tells the processes of a run which cluster they are of: the one this process joined.

    A helper of Ray Train asks every second whether the run's controller lives, and it asks the cluster that was started
    last on its machine. If that is another one, it would take the run for dead, and remove its workers' resources.
    """
    import ray

    # Not public, but the only list of variables that Ray Train gives to its controller, and so to the helper. A cluster
    # that was joined before can't be given a runtime environment any more, which would do the same.
    from ray.train.v2._internal.constants import ENV_VARS_TO_PROPAGATE

    told = {ADDRESS: ray.get_runtime_context().gcs_address}
    if not ray._private.worker.get_dashboard_url():
        # The helper asks the cluster's dashboard. Where there is none, it would try the port that dashboards usually
        # have, which may be another cluster's; without an answer it leaves the run alone.
        told[API_SERVER] = NOBODY
    before = {name: os.environ.get(name) for name in told}
    os.environ.update(told)
    ENV_VARS_TO_PROPAGATE.update(told)
    try:
        yield
    finally:
        ENV_VARS_TO_PROPAGATE.difference_update(told)
        for name, value in before.items():
            if value is None:
                del os.environ[name]
            else:
                os.environ[name] = value


def _is_only_here(address: str | None) -> bool:
    """Whether a node's address is one of loopback, and its port can't be reached by this machine's other address."""
    from ray._private.services import get_node_ip_address

    host, _, port = (address or "").rpartition(":")
    if host not in ("127.0.0.1", "localhost", "[::1]") or not port.isdigit():
        return False
    try:
        with socket.create_connection((get_node_ip_address(), int(port)), timeout=1):
            return False
    except OSError:
        return True


def _keep_to_loopback() -> None:
    """Let this process, and what it starts, be reached by loopback alone (see `ONLY_HERE`)."""
    from ray._private import ray_constants

    os.environ.update(ONLY_HERE)
    # Ray has read the variable when it was imported, which others may have done long ago.
    ray_constants.ENABLE_RAY_CLUSTER = False


def _start_node(cpus: int) -> None:
    """Start a node of its own processes, as `ray start --head` does."""
    # As a module of this interpreter: the `ray` script of a virtual environment need not be on the path.
    command = [sys.executable, "-m", "ray.scripts.scripts", "start", "--head", "--node-ip-address=127.0.0.1"]
    command += [f"--num-cpus={cpus}"]
    subprocess.run(command, check=True, stdout=subprocess.DEVNULL)
