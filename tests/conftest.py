"""Fixtures that several suites share."""

from __future__ import annotations

from collections.abc import Iterator

import pytest


@pytest.fixture(scope="session")
def ray_cluster() -> Iterator[str]:
    """One local Ray node with four logical CPUs for the whole test session; gives the address of its job API."""
    import ray

    context = ray.init(address="local", num_cpus=4, include_dashboard=True, dashboard_port=0)
    yield f"http://{context.dashboard_url}"
    ray.shutdown()
