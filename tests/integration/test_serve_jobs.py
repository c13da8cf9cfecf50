"""Jobs and traces on real Ray Serve."""

from __future__ import annotations

import json
import time
import urllib.request
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from fewstep_loadtest.running import deploy
from processes import free_port, kill_one

PARTS = {"encode", "queue", "network", "policy", "decode"}
SLOW = {"prompt": "owl", "seed": 5, "n": 10, "sampler": "teacher", "num_inference_steps": 64}
"""Some seconds of work."""


@pytest.fixture(scope="module")
def service(ray_cluster: str, tmp_path_factory: pytest.TempPathFactory) -> Iterator[str]:
    """The bundled student of small images with jobs; every request is traced to files."""
    from ray import serve

    port = free_port()
    serve.start(
        http_options={"host": "127.0.0.1", "port": port},
        tracing_config={"enabled": True, "sampling_ratio": 1.0},
    )
    jobs = {"storage": str(tmp_path_factory.mktemp("jobs")), "lease_s": 3, "poll_s": 0.2}
    address = f"http://127.0.0.1:{port}"
    models = [{"name": "emoji-student", "source": "emoji-student"}]
    deploy(address, {"jobs": jobs, "offer": {"models": models}}, ray_actor_options={"num_cpus": 0.5})
    yield address
    serve.shutdown()


def ask(address: str, method: str, path: str, **body: Any) -> dict[str, Any]:
    content = json.dumps(body).encode() if body else None
    request = urllib.request.Request(
        f"{address}{path}", content, {"content-type": "application/json"}, method=method
    )
    with urllib.request.urlopen(request) as response:
        return json.load(response)


def test_a_job_outlives_the_replica_that_runs_it(service: str) -> None:
    job = ask(service, "POST", "/v1/images/jobs", **SLOW)["id"]
    deadline, status = time.monotonic() + 200, "queued"
    while status == "queued":
        assert time.monotonic() < deadline
        status = ask(service, "GET", f"/v1/images/jobs/{job}")["status"]
    assert status == "running"
    assert kill_one("ray::ServeReplica:fewstep:Ingress") == 1
    found: dict[str, Any] = {"status": status}
    while found["status"] == "running":
        assert time.monotonic() < deadline
        time.sleep(0.5)
        try:
            found = ask(service, "GET", f"/v1/images/jobs/{job}")
        except OSError:  # as long as there is no ingress
            continue
    assert found["status"] == "succeeded", found
    files = [image["b64_json"] for image in found["result"]["data"]]
    assert [
        image["b64_json"] for image in ask(service, "POST", "/v1/images/generations", **SLOW)["data"]
    ] == files


def test_a_request_is_traced_into_its_parts(service: str) -> None:
    import ray

    ask(service, "POST", "/v1/images/generations", prompt="owl")
    folder = Path(ray._private.worker._global_node.get_session_dir_path()) / "logs/serve/spans"
    deadline, spans = time.monotonic() + 60, {}
    while not {span["name"] for span in spans.values() if span["parent_id"] in spans} >= PARTS:
        assert time.monotonic() < deadline, spans
        time.sleep(0.5)
        found = [span for file in folder.glob("*Generator*") for span in documents(file.read_text())]
        spans = {span["context"]["span_id"]: span for span in found}
    # The last one: those before are of jobs, which Serve numbers by itself.
    network = max(
        (span for span in spans.values() if span["name"] == "network"), key=lambda span: span["start_time"]
    )
    replica = spans[network["parent_id"]]
    assert replica["attributes"]["request_id"] == network["attributes"]["request_id"]


def documents(text: str) -> Iterator[dict[str, Any]]:
    """JSON objects that follow each other."""
    decoder, text = json.JSONDecoder(), text.strip()
    while text:
        found, end = decoder.raw_decode(text)
        yield found
        text = text[end:].strip()
