"""Nobody in the network reaches Ray: nodes of one machine listen on loopback alone, others ask for a token."""

from __future__ import annotations

import json
import os
import re
import signal
import subprocess
import sys
import tempfile
import time
import urllib.error
import urllib.request
from collections.abc import Iterator
from contextlib import contextmanager
from copy import deepcopy
from ipaddress import ip_address
from pathlib import Path

import psutil
import pytest
import yaml
from ray.autoscaler._private.util import prepare_config, validate_config

from processes import free_port

ROOT = Path(__file__).parents[2]
VARIABLE = "RAY_ENABLE_WINDOWS_OR_OSX_CLUSTER"
TOKEN = "0123456789abcdef" * 4
PROGRAM = """
import os, sys
from fewstep.cluster import connect_ray
connect_ray(show_logs=False)
import psutil, ray
@ray.remote
def seven():
    return 7
assert ray.get(seven.remote()) == 7
own = [psutil.Process(), *psutil.Process().children(recursive=True)]
print(*sorted({c.laddr.ip for one in own for c in one.net_connections("tcp") if c.status == "LISTEN"}))
"""


def texts() -> dict[str, str]:
    """Our files in which somebody may start Ray."""
    listed = subprocess.run(
        ["git", "ls-files"], cwd=ROOT, check=True, capture_output=True, text=True
    ).stdout.split("\n")
    kinds = (".md", ".yaml", ".py", ".sh", ".ipynb", "Makefile", "Dockerfile", ".ci/run")
    names = [name for name in listed if name.endswith(kinds) and not name.startswith(("tests/", "findings/"))]
    return {name: (ROOT / name).read_text() for name in names if (ROOT / name).exists()}


def environment(folder: Path | None = None, **more: str) -> dict[str, str]:
    """The variables of this process without those of Ray."""
    kept = {name: value for name, value in os.environ.items() if not name.startswith("RAY_")}
    kept |= {"RAY_USAGE_STATS_ENABLED": "0", **more}
    return kept if folder is None else kept | {"HOME": str(folder), "RAY_TMPDIR": str(folder)}


@contextmanager
def node(command: list[str], variables: dict[str, str]) -> Iterator[tuple[int, set[str], str]]:
    """Run a line that starts a node, on free ports; gives dashboard's port, listening addresses, the GCS address."""
    port, dashboard, agent, client = (free_port() for _ in range(4))
    folder = tempfile.mkdtemp(prefix="ray-", dir="/tmp")
    command = [
        sys.executable, "-m", "ray.scripts.scripts", *command[1:], "--block", f"--port={port}", f"--temp-dir={folder}",
        f"--dashboard-port={dashboard}", f"--dashboard-agent-listen-port={agent}",
        f"--ray-client-server-port={client}", "--disable-usage-stats",
    ]  # fmt: skip
    head = subprocess.Popen(command, env=variables, start_new_session=True, stdout=subprocess.DEVNULL)
    try:
        deadline = time.monotonic() + 180
        # The agents come up last: dashboard's, the job agent's and the client server's ports are then all open.
        while not {dashboard, agent, client, port} <= {where[1] for where in listening(head.pid)}:
            assert head.poll() is None
            assert time.monotonic() < deadline
            time.sleep(0.5)
        yield dashboard, {where[0] for where in listening(head.pid)}, f"127.0.0.1:{port}"
    finally:
        head.send_signal(signal.SIGTERM)
        head.wait(120)


def listening(pid: int) -> set[tuple[str, int]]:
    """Addresses and ports that a process and those that it started listen on."""
    found = set()
    # Not all of this process's: other tests' clusters may be among them.
    head = psutil.Process(pid)
    for process in [head, *head.children(recursive=True)]:
        try:
            for one in process.net_connections("tcp"):
                if one.status == psutil.CONN_LISTEN:
                    found.add((one.laddr.ip, one.laddr.port))
        except psutil.Error:
            continue
    return found


def is_loopback(address: str) -> bool:
    parsed = ip_address(address)
    return (getattr(parsed, "ipv4_mapped", None) or parsed).is_loopback


def test_every_line_that_starts_ray_keeps_it_closed() -> None:
    seen = 0
    for name, text in texts().items():
        assert not re.search(r"dashboard[-_]host[ =\"',:]+(0\.0\.0\.0|::)", text), name
        for line in re.findall(r"^.*\bray start --head --.*(?:\n    --.*)*", text, re.M):
            if name == "CHANGELOG.md":
                continue
            seen += 1
            if "RAY_AUTH_MODE=token" in line:
                assert "--dashboard-host 127.0.0.1" in line, f"{name}: {line}"
            else:
                assert "--node-ip-address=127.0.0.1" in line, f"{name}: {line}"
                assert f"export {VARIABLE}" in text, f"{name}: {line}"
    assert seen >= 4


def test_a_node_of_our_commands_listens_on_loopback_alone(tmp_path: Path) -> None:
    done = subprocess.run(
        [sys.executable, "-c", PROGRAM], env=environment(RAY_TMPDIR=tempfile.mkdtemp(prefix="r-", dir="/tmp")),
        capture_output=True, text=True, timeout=300, cwd=tmp_path,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    addresses = done.stdout.split()
    assert addresses
    assert all(map(is_loopback, addresses)), addresses


def test_a_node_of_the_readme_listens_on_loopback_alone_and_takes_our_commands(tmp_path: Path) -> None:
    text = (ROOT / "README.md").read_text()
    [line] = re.findall(r"^ray start --head.*$", text, re.M)
    [setting] = re.findall(rf"^export ({VARIABLE}=\S+)$", text, re.M)
    variables = environment(RAY_AUTH_MODE="disabled") | dict([setting.split("=")])
    with node(line.split(), variables) as (_, addresses, address):
        assert all(map(is_loopback, addresses)), addresses
        # As a command of ours in another shell, which knows nothing of the variable.
        done = subprocess.run(
            [sys.executable, "-c", PROGRAM], env=environment(RAY_ADDRESS=address, RAY_AUTH_MODE="disabled"),
            capture_output=True, text=True, timeout=300, cwd=tmp_path,
        )  # fmt: skip
        assert done.returncode == 0, done.stderr
        assert all(map(is_loopback, done.stdout.split())), done.stdout


def test_the_launcher_s_file_is_valid_and_its_head_asks_for_the_token(tmp_path: Path) -> None:
    config = yaml.safe_load((ROOT / "infra/ray-cluster.yaml").read_text())
    validate_config(prepare_config(deepcopy(config)))  # as `ray up` does
    assert config["file_mounts"] == {"~/.ray/auth_token": "~/.ray/auth_token"}
    for line in (*config["head_start_ray_commands"], *config["worker_start_ray_commands"]):
        assert line == "ray stop" or line.startswith("RAY_AUTH_MODE=token ray start ")
    [start] = [line for line in config["head_start_ray_commands"] if "ray start" in line]
    setting, *command = start.split()
    kept = [word for word in command if word not in ("--port", "6379", "~/ray_bootstrap_config.yaml")]
    kept.remove("--autoscaling-config")  # the launcher's own file, which only `ray up` writes
    (tmp_path / ".ray").mkdir()
    (tmp_path / ".ray" / "auth_token").write_text(TOKEN)
    variables = environment(HOME=str(tmp_path)) | dict([setting.split("=")])
    with node(kept, variables) as (dashboard, _, _):
        jobs = f"http://127.0.0.1:{dashboard}/api/jobs/"
        with pytest.raises(urllib.error.HTTPError, match="401"):
            urllib.request.urlopen(jobs, timeout=30)
        order = urllib.request.Request(jobs, json.dumps({"entrypoint": "true"}).encode(), method="POST")
        with pytest.raises(urllib.error.HTTPError, match="401"):
            urllib.request.urlopen(order, timeout=30)
        asked = urllib.request.Request(jobs, headers={"Authorization": f"Bearer {TOKEN}"})
        with urllib.request.urlopen(asked, timeout=60) as answer:
            assert json.load(answer) == []
