"""`fewstep serve` as a user meets it: in the foreground until Ctrl-C, and where a configuration can't be deployed."""

from __future__ import annotations

import json
import os
import signal
import socket
import subprocess
import sys
import time
import urllib.request
from collections.abc import Iterator
from importlib.resources import files
from pathlib import Path
from typing import Any

import pytest
import yaml

FEWSTEP = Path(sys.executable).parent / "fewstep"


@pytest.fixture(scope="module")
def config(ray_cluster: str) -> Iterator[dict[str, Any]]:
    """The bundled configuration on a free port; Serve is shut down afterwards, because its port can't be changed."""
    from ray import serve

    serve.shutdown()
    config = yaml.safe_load((files("fewstep_serve") / "config.yaml").read_text())
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        config["http_options"]["port"] = probe.getsockname()[1]
    config["applications"][0]["deployments"][0]["ray_actor_options"]["num_cpus"] = 0.5
    yield config
    serve.shutdown()


def start(config: dict[str, Any], folder: Path, *flags: str) -> subprocess.Popen[str]:
    import ray

    file = folder / "config.yaml"
    file.write_text(yaml.safe_dump(config))
    return subprocess.Popen(
        [str(FEWSTEP), "serve", "--config", str(file), *flags], cwd=folder, text=True, stdout=subprocess.PIPE,
        stderr=subprocess.PIPE, env=os.environ | {"RAY_ADDRESS": ray.get_runtime_context().gcs_address},
    )  # fmt: skip


def applications() -> dict[str, str]:
    from ray import serve

    return {name: str(state.status.value) for name, state in serve.status().applications.items()}


def test_it_serves_until_ctrl_c(config: dict[str, Any], tmp_path: Path) -> None:
    process = start(config, tmp_path)
    try:
        assert process.stdout is not None
        line = process.stdout.readline()
        address = f"http://127.0.0.1:{config['http_options']['port']}"
        assert line.startswith(f"serving at {address} ")
        body = json.dumps({"prompt": "strawberry, fluent style", "seed": 1}).encode()
        request = urllib.request.Request(
            f"{address}/v1/images/generations", body, {"content-type": "application/json"}
        )
        with urllib.request.urlopen(request, timeout=60) as answer:
            assert json.load(answer)["data"][0]["b64_json"]
        assert process.poll() is None, "it serves as long as it is not told to stop"
    finally:
        process.send_signal(signal.SIGINT)
        _, errors = process.communicate(timeout=120)
    assert process.returncode == 0, errors
    assert "Traceback" not in errors
    assert applications() == {}, "the node goes on, without the application"


def test_detached_it_returns_when_it_is_ready_and_goes_on(config: dict[str, Any], tmp_path: Path) -> None:
    output, errors = start(config, tmp_path, "--detach").communicate(timeout=300)
    assert output.startswith("serving at http://127.0.0.1:"), errors
    assert applications() == {"fewstep": "RUNNING"}


@pytest.mark.parametrize("flags", [(), ("--detach",)], ids=["foreground", "detached"])
@pytest.mark.parametrize(
    ("models", "said"),
    [
        (
            [{"name": "emoji-student", "source": "nowhere"}],
            ["the application 'fewstep' goes on with its former models", "there is no folder 'nowhere'"],
        ),
        (  # seen in the file, before anything is asked of the service
            [{"name": "emoji-student", "source": "emoji-student"}] * 2,
            ["--config: ", "the name 'emoji-student' is given twice"],
        ),
    ],
    ids=["no such model", "no offer"],
)
def test_a_wrong_change_is_one_line_and_status_2_and_the_service_goes_on(
    config: dict[str, Any],
    tmp_path: Path,
    models: list[dict[str, str]],
    said: list[str],
    flags: tuple[str, ...],
) -> None:
    wrong = json.loads(json.dumps(config))
    wrong["applications"][0]["deployments"][0]["user_config"]["models"] = models
    process = start(wrong, tmp_path, *flags)
    _, errors = process.communicate(timeout=300)
    assert process.returncode == 2
    [line] = [line for line in errors.splitlines() if line.startswith("error: ")]
    for words in said:
        assert words in line
    assert "Traceback" not in errors
    assert applications() == {"fewstep": "RUNNING"}
    with urllib.request.urlopen(f"http://127.0.0.1:{config['http_options']['port']}/v1/models") as answer:
        assert json.load(answer)["data"][0]["source"] == "emoji64-student"


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (
            {"http_options": {"port": 1}},
            "http_options.port: 1 is asked for, but Serve already runs here with ",
        ),
        ({"http_options": {"root_path": "/x"}}, "http_options.root_path: /x is asked for"),
        ({"proxy_location": "HeadOnly"}, "proxy_location: HeadOnly is asked for"),
    ],
    ids=["port", "root path", "proxies"],
)
def test_what_a_running_serve_can_not_change_is_said_at_once_and_nothing_changes(
    config: dict[str, Any], tmp_path: Path, change: dict[str, Any], message: str
) -> None:
    changed = json.loads(json.dumps(config)) | {
        "http_options": config["http_options"] | change.pop("http_options", {})
    }
    changed |= change
    changed["applications"][0]["name"] = "another"  # would replace what runs, were it deployed
    process = start(changed, tmp_path)
    _, errors = process.communicate(timeout=120)
    assert process.returncode == 2
    [line] = [line for line in errors.splitlines() if line.startswith("error: ")]
    assert message in line
    assert "`serve shutdown`" in line
    assert applications() == {"fewstep": "RUNNING"}


def test_what_can_not_be_deployed_is_one_line_and_status_2(config: dict[str, Any], tmp_path: Path) -> None:
    from ray import serve

    serve.delete("fewstep")
    wrong = json.loads(json.dumps(config))
    wrong["applications"][0]["deployments"][0]["user_config"]["models"][0]["source"] = "nowhere"
    began = time.monotonic()
    process = start(wrong, tmp_path)
    _, errors = process.communicate(timeout=300)
    assert process.returncode == 2
    [line] = [line for line in errors.splitlines() if line.startswith("error: ")]
    assert "the application 'fewstep' could not be deployed: " in line
    assert "there is no folder 'nowhere'" in line
    assert "Traceback" not in errors
    assert time.monotonic() - began < 120, "it does not wait for a service that will not come"
    wrong["proxy_location"] = "Nowhere"
    process = start(wrong, tmp_path)
    _, errors = process.communicate(timeout=300)
    assert process.returncode == 2
    assert ": proxy_location: Input should be " in errors
    assert "(got 'Nowhere')" in errors
