"""`GET /metrics`: what all replicas of the service count, in the text format of Prometheus."""

from __future__ import annotations

import asyncio
import re
import time
from collections.abc import Iterable, Mapping
from concurrent.futures import ThreadPoolExecutor
from http.client import HTTPException
from typing import Any
from urllib.request import ProxyHandler, build_opener

import ray
from prometheus_client import generate_latest
from prometheus_client.core import GaugeMetricFamily, Metric
from prometheus_client.parser import text_string_to_metric_families

PREFIX = "ray_fewstep_"
"""How the names of our metrics begin at the metrics ports of Ray's nodes."""
NODE_TIME_LIMIT_S = 2.0
"""How long a node may take to tell its metrics."""
KEPT_S = 1.0
"""How old an answer may be."""
NODES_AT_ONCE = 16
"""How many nodes are asked at a time."""


class ServiceMetrics:
    """The metrics of one application, as the metrics ports of all nodes of the Ray cluster have them.

    A replica of the ingress has only its own counts, and a load balancer asks any of them. But all replicas, of the
    ingress and of generators, report to their nodes, so every replica answers with the counts of all.

    Args:
        application: its name in Ray Serve.
    """

    def __init__(self, application: str) -> None:
        self._application = application
        self._text, self._known_at = b"", float("-inf")
        self._asking = asyncio.Lock()

    async def text(self) -> bytes:
        """The metrics now, at most a second old; `fewstep_silent_nodes` tells from how many nodes they are missing."""
        # One question at a time, remembered for a moment: who asks often must not burden the nodes.
        async with self._asking:
            if time.monotonic() - self._known_at > KEPT_S:
                self._text = await asyncio.to_thread(self._read)
                self._known_at = time.monotonic()
        return self._text

    def _read(self) -> bytes:
        nodes = [node for node in ray.nodes() if node["Alive"]]
        with ThreadPoolExecutor(NODES_AT_ONCE) as threads:
            texts = [text for text in threads.map(_node_metrics, nodes) if text is not None]
        return merged(texts, self._application, len(nodes) - len(texts))


class Families(list[Metric]):
    """Families of metrics, as prometheus_client wants to be given them."""

    def collect(self) -> list[Metric]:
        """All of them."""
        return self


def merged(texts: Iterable[str], application: str, silent_nodes: int) -> bytes:
    """The metrics of an application out of those of several nodes, as one text.

    Args:
        texts: what the metrics port of each node has.
        application: its name in Ray Serve.
        silent_nodes: how many nodes did not answer.
    """
    families: dict[str, Metric] = {}
    for text in texts:
        # Of what a node tells ours is a small part, and the parser is slow.
        ours = "\n".join(line for line in text.splitlines() if re.match(f"(# (HELP|TYPE) )?{PREFIX}", line))
        for family in text_string_to_metric_families(ours):
            mine = [sample for sample in family.samples if sample.labels.get("application") == application]
            family.samples = []
            if mine:
                families.setdefault(family.name, family).samples += mine
    silent = GaugeMetricFamily(
        "fewstep_silent_nodes",
        "Ray nodes that did not tell their metrics, which are missing here.",
        silent_nodes,
    )
    return generate_latest(Families([*families.values(), silent]))


def _node_metrics(node: Mapping[str, Any]) -> str | None:
    """What the metrics port of a Ray node has; None where it does not answer."""
    host = node["NodeManagerAddress"]
    host = f"[{host}]" if ":" in host else host
    try:
        # Nodes are reached directly, whatever proxy the environment names.
        opener = build_opener(ProxyHandler({}))
        with opener.open(
            f"http://{host}:{node['MetricsExportPort']}/metrics", timeout=NODE_TIME_LIMIT_S
        ) as answer:
            return answer.read().decode()
    except (OSError, HTTPException):
        return None
