"""Monitoring: every query of the dashboard and the alerts is answered by metrics that a real cluster has."""

from __future__ import annotations

import asyncio
import json
import time
import urllib.request
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import promql_parser
import pytest
import yaml
from prometheus_client.parser import text_string_to_metric_families

from fewstep.train.gauges import RunGauges
from fewstep_loadtest.client import Client
from fewstep_loadtest.running import deploy
from fewstep_serve.metrics import RequestMetrics
from processes import free_port

ROOT = Path(__file__).parents[2]
MONITORING = ROOT / "infra" / "monitoring"
ON_GPUS = {"ray_node_gram_used", "ray_node_gpus_utilization"}
"""Metrics that a node without GPUs does not have; their names are compared with Ray's own list."""
PROMETHEUS = {"up": {"job", "instance"}}
"""Metrics that Prometheus itself makes."""
SCRAPED = {"job", "instance"}
"""Labels that Prometheus adds to what it scrapes."""


def dashboard_queries() -> dict[str, str]:
    """Panel and query → the query."""
    board = json.loads((MONITORING / "grafana.json").read_text())
    return {
        f"{panel['title']} {target['refId']}": target["expr"]
        for panel in board["panels"]
        for target in panel.get("targets", [])
    }


def alert_queries() -> dict[str, str]:
    """Alert → its query."""
    groups = yaml.safe_load((MONITORING / "alerts.yaml").read_text())["groups"]
    return {rule["alert"]: rule["expr"] for group in groups for rule in group["rules"]}


def walk(expression: Any) -> Iterator[Any]:
    """An expression and all within it."""
    yield expression
    for name in ("expr", "lhs", "rhs", "param", "vector_selector"):
        inner = getattr(expression, name, None)
        if inner is not None and not isinstance(inner, str | float | int):
            yield from walk(inner)
    for inner in getattr(expression, "args", None) or []:
        yield from walk(inner)


def wanted(query: str) -> tuple[dict[str, set[str]], set[str]]:
    """The metrics that a query names, with the labels it selects by, and the labels it groups by."""
    metrics: dict[str, set[str]] = {}
    grouped: set[str] = set()
    for part in walk(promql_parser.parse(query)):
        if isinstance(part, promql_parser.VectorSelector):
            labels = {matcher.name for matcher in part.matchers.matchers}
            metrics.setdefault(part.name, set()).update(labels)
        elif isinstance(part, promql_parser.AggregateExpr) and part.modifier is not None:
            grouped |= set(part.modifier.labels)
    return metrics, grouped


def scrape(address: str) -> dict[str, set[str]]:
    """Name → labels of all samples at an address."""
    with urllib.request.urlopen(address, timeout=10) as response:
        families = text_string_to_metric_families(response.read().decode())
        found: dict[str, set[str]] = {}
        for family in families:
            for sample in family.samples:
                found.setdefault(sample.name, set()).update(sample.labels)
        return found


def train_with_data(go_on: Path, storage: Path) -> Callable[[], None]:
    """Start a training run of one worker that reads a dataset, reports, and goes on until a file is there."""
    import threading

    import ray
    from ray.train import RunConfig, ScalingConfig, report
    from ray.train import get_dataset_shard as shard
    from ray.train.v2.api.data_parallel_trainer import DataParallelTrainer

    def loop(config: dict[str, str]) -> None:
        list(shard("train").iter_batches(batch_size=10))
        report({"loss": 1.0})
        while not Path(config["go_on"]).exists():
            time.sleep(0.2)

    trainer = DataParallelTrainer(
        loop,
        train_loop_config={"go_on": str(go_on)},
        datasets={"train": ray.data.range(100)},
        scaling_config=ScalingConfig(num_workers=1, resources_per_worker={"CPU": 0.5}),
        run_config=RunConfig(name="monitored", storage_path=str(storage)),
    )
    thread = threading.Thread(target=trainer.fit)
    thread.start()

    def finish() -> None:
        go_on.touch()
        thread.join(60)

    return finish


@pytest.fixture(scope="module")
def address() -> str:
    """Where the service is to listen."""
    return f"http://127.0.0.1:{free_port()}"


@pytest.fixture(scope="module")
def metrics(
    ray_cluster: str, address: str, tmp_path_factory: pytest.TempPathFactory
) -> Iterator[dict[str, set[str]]]:
    """The metrics of a node that serves, answers one good and one bad request, and trains."""
    import ray
    from ray import serve

    folder = tmp_path_factory.mktemp("monitored")
    serve.start(http_options={"host": "127.0.0.1", "port": int(address.rpartition(":")[2])})
    models = [{"name": "emoji-student", "source": "emoji-student"}]
    deploy(address, {"offer": {"models": models}, "access": {"metrics": "anybody"}},
           num_replicas=1, ray_actor_options={"num_cpus": 0.5})  # fmt: skip

    async def ask() -> None:
        async with Client(address) as client:
            await client.generate(prompt="owl, noto style")
            await client.generate(prompt="owl, noto style", model="nobody")

    asyncio.run(ask())
    RequestMetrics().retried()  # as where a replica dies; without a first one this counter is not exported
    readings = ("loss", "samples_per_second", "seconds_waiting_for_data")
    RunGauges("monitored").show(1, {f"train/{name}": 1.0 for name in readings})
    finish = train_with_data(folder / "go-on", folder)
    needed = {name for query in (dashboard_queries() | alert_queries()).values() for name in wanted(query)[0]}
    needed -= ON_GPUS | set(PROMETHEUS)
    url = f"http://127.0.0.1:{ray.nodes()[0]['MetricsExportPort']}/metrics"
    found: dict[str, set[str]] = {}
    deadline = time.monotonic() + 90
    while needed - set(found) and time.monotonic() < deadline:
        time.sleep(1)
        found |= scrape(url)
    yield found
    finish()
    serve.shutdown()


@pytest.mark.parametrize("what", [*dashboard_queries(), *alert_queries()])
def test_every_query_asks_for_what_is_there(what: str, metrics: dict[str, set[str]]) -> None:
    from ray.dashboard.modules.reporter.reporter_agent import METRICS_GAUGES

    named, grouped = wanted((dashboard_queries() | alert_queries())[what])
    assert named
    labels: set[str] = set()
    for name, selected in named.items():
        if name in ON_GPUS:
            gauge = METRICS_GAUGES[name.removeprefix("ray_")]
            there = set(gauge.tags if hasattr(gauge, "tags") else SCRAPED)
        else:
            there = PROMETHEUS.get(name) or metrics.get(name, set())
            assert name in metrics or name in PROMETHEUS, f"{name} is no metric of this cluster"
        assert selected <= there | SCRAPED, f"{name} has the labels {sorted(there)}"
        labels |= there
    assert grouped <= labels | SCRAPED | {"le"}, f"grouped by {grouped}, there are {sorted(labels)}"


def test_the_service_s_own_port_answers_its_queries_too(metrics: dict[str, set[str]], address: str) -> None:
    there = scrape(f"{address}/metrics")
    ours = {
        name for query in dashboard_queries().values() for name in wanted(query)[0] if "_fewstep_" in name
    }
    ours = {name for name in ours if not name.startswith("ray_fewstep_train_")} - {
        "ray_fewstep_retries_total"
    }
    assert ours <= set(there)
    assert all(there[name] == metrics[name] for name in ours)
    assert {name for name in there if not name.startswith("ray_fewstep_")} == {"fewstep_silent_nodes"}


def test_a_query_of_another_metric_is_found_out() -> None:
    assert wanted('sum by (a) (rate(ray_nothing_total{b="1"}[5m])) / x > 2') == (
        {"ray_nothing_total": {"b"}, "x": set()},
        {"a"},
    )


def test_prometheus_finds_the_node_that_ray_started(metrics: dict[str, set[str]]) -> None:
    """Ray's head writes the file of `file_sd_configs` below its temporary folder, /tmp/ray by default."""
    import ray

    config = yaml.safe_load((MONITORING / "prometheus.yaml").read_text())
    assert config["rule_files"] == ["alerts.yaml"]
    [ours] = [job for job in config["scrape_configs"] if job["job_name"] == "ray"]
    name = Path(ours["file_sd_configs"][0]["files"][0])
    assert name.parent == Path("/tmp/ray")
    written = Path(ray._private.worker._global_node.get_session_dir_path()).parent / name.name
    targets = [target for group in json.loads(written.read_text()) for target in group["targets"]]
    port = ray.nodes()[0]["MetricsExportPort"]
    assert any(target.endswith(f":{port}") for target in targets)


def test_the_pods_of_kubernetes_have_the_port_that_is_scraped() -> None:
    config = yaml.safe_load((MONITORING / "prometheus.yaml").read_text())
    [ours] = [job for job in config["scrape_configs"] if job["job_name"] == "kuberay"]
    [rule] = [rule for rule in ours["relabel_configs"] if rule.get("action") == "keep"]
    for name in ("cluster", "job", "service"):
        text = (ROOT / "infra/kubernetes/base" / f"{name}.yaml").read_text()
        assert text.count(f"containerPort: 8080, name: {rule['regex']}") == 2
        assert text.count('metrics-export-port: "8080"') == 2


def test_every_alert_has_its_page_in_the_runbook() -> None:
    headings = {
        line.removeprefix("## ").strip().lower().replace(" ", "-")
        for line in (ROOT / "docs" / "runbook.md").read_text().splitlines()
        if line.startswith("## ")
    }
    groups = yaml.safe_load((MONITORING / "alerts.yaml").read_text())["groups"]
    for rule in (rule for group in groups for rule in group["rules"]):
        page, _, place = rule["annotations"]["runbook"].partition("#")
        assert page == "docs/runbook.md"
        assert place in headings, rule["alert"]
