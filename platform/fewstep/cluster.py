"""Joining the Ray cluster that a command works on."""

from __future__ import annotations

import os
import subprocess
import sys


def connect_ray(*, show_logs: bool = True, keep_node: bool = False) -> str | None:
    """Join the running Ray cluster, or start a local one.

    Args:
        show_logs: repeat what the workers print.
        keep_node: a local cluster that is started goes on after this process, until `ray stop`; otherwise it ends
            with the process.

    Returns:
        The HTTP address of the cluster's dashboard; None where it has none, or where this process had joined before.
    """
    # Not at the top: Ray takes seconds to import, and commands that need no cluster import this module too.
    import ray

    if ray.is_initialized():
        return None
    try:
        context = ray.init(address="auto", log_to_driver=show_logs)
    except ConnectionError:
        # On loopback alone, and so without the token that Ray would otherwise leave in ~/.ray: `ray start` would
        # find it there, demand it, and `ray job submit` would not send it.
        os.environ.setdefault("RAY_AUTH_MODE", "disabled")
        os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")  # nothing is reported to its authors
        # Two logical CPUs more than there are: the data pipeline needs slots beside workers that hold all CPUs.
        cpus = (os.cpu_count() or 1) + 2
        if keep_node:
            _start_node(cpus)
            context = ray.init(address="auto", log_to_driver=show_logs)
        else:
            context = ray.init(num_cpus=cpus, _node_ip_address="127.0.0.1", log_to_driver=show_logs)
    return f"http://{context.dashboard_url}" if context.dashboard_url else None


def _start_node(cpus: int) -> None:
    """Start a node of its own processes, as `ray start --head` does."""
    # As a module of this interpreter: the `ray` script of a virtual environment need not be on the path.
    command = [sys.executable, "-m", "ray.scripts.scripts", "start", "--head", "--node-ip-address=127.0.0.1"]
    command += [f"--num-cpus={cpus}"]
    subprocess.run(command, check=True, stdout=subprocess.DEVNULL)
