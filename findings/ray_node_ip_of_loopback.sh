#!/usr/bin/env bash
# Ray 2.60.0 on Linux: `ray start --head --node-ip-address=127.0.0.1` starts a node at the machine's address in the network.
#
# One would guess: the option decides where the node's services listen, and 127.0.0.1 keeps them to this machine. The command
#   prints no other address as wrong, and on macOS it does so.
# What happens: Ray takes a loopback address for a slip, and replaces it by the machine's own: the node registers under that,
#   and services listen there. With RAY_ENABLE_WINDOWS_OR_OSX_CLUSTER=0, which says that this machine can be part of no
#   cluster and is about other systems by its name, the node stays on 127.0.0.1, as do all its ports.
set -euo pipefail
folder=$(mktemp -d); trap 'rm -rf "$folder"' EXIT
python3 -m venv "$folder/venv"
"$folder/venv/bin/pip" install -q --disable-pip-version-check "ray[default]==2.60.0" "psutil==7.2.2"
cat > "$folder/try.py" <<'P'
import os
import socket
import subprocess
import sys
import tempfile
import time

import psutil
import ray


def free_port():
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return probe.getsockname()[1]


def start(**environment):
    """Whether the node calls itself by a loopback address, and whether a port of it listens elsewhere."""
    port = free_port()
    command = [os.path.join(os.path.dirname(sys.executable), "ray"), "start", "--head", "--block", "--num-cpus=1",
               "--node-ip-address=127.0.0.1", f"--port={port}", f"--dashboard-port={free_port()}",
               f"--ray-client-server-port={free_port()}", f"--dashboard-agent-listen-port={free_port()}",
               f"--temp-dir={tempfile.mkdtemp(prefix='r', dir='/tmp')}", "--disable-usage-stats"]
    node = subprocess.Popen(command, env=os.environ | environment, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    try:
        ours = f"import ray; ray.init('127.0.0.1:{port}', log_to_driver=False); print(ray.nodes()[0]['NodeManagerAddress'])"
        for _ in range(30):
            time.sleep(2)
            asked = subprocess.run([sys.executable, "-c", ours], env=os.environ | environment, capture_output=True, text=True)
            if asked.returncode == 0:
                break
        name = asked.stdout.split()[-1]
        hosts = {one.laddr.ip for process in psutil.Process(node.pid).children(recursive=True)
                 for one in process.net_connections("tcp") if one.status == psutil.CONN_LISTEN}
    finally:
        node.terminate()
        node.wait()
    beyond = any(host not in ("127.0.0.1", "::1", "::ffff:127.0.0.1") for host in hosts)
    return f"node {'127.0.0.1' if name == '127.0.0.1' else 'at another address'}, ports {'beyond loopback' if beyond else 'on loopback alone'}"


print("ray", ray.__version__)
print("--node-ip-address=127.0.0.1:", start())
print("and RAY_ENABLE_WINDOWS_OR_OSX_CLUSTER=0:", start(RAY_ENABLE_WINDOWS_OR_OSX_CLUSTER="0"))
P
RAY_AUTH_MODE=disabled "$folder/venv/bin/python" -W ignore "$folder/try.py" 2>/dev/null | tee "$folder/seen"
diff "$folder/seen" - <<'SEEN'
ray 2.60.0
--node-ip-address=127.0.0.1: node at another address, ports beyond loopback
and RAY_ENABLE_WINDOWS_OR_OSX_CLUSTER=0: node 127.0.0.1, ports on loopback alone
SEEN
