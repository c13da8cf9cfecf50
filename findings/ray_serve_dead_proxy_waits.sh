#!/usr/bin/env bash
# Ray Serve 2.60.0: an HTTP proxy whose process is gone is started again only after three health checks, 10 seconds apart.
#
# One would guess: a dead proxy is back within seconds, as a dead controller is: Ray itself restarts the controller's actor,
#   and it knows of the proxy's death as soon.
# What happens: the controller asks proxies for their health every RAY_SERVE_PROXY_HEALTH_CHECK_PERIOD_S = 10 seconds, takes
#   the error of a dead one as a failed check, and replaces a proxy after three of them in a row; the three is no setting.
#   So the port is closed for 20 to 30 seconds. With a period of 1 second it is for a few. The variable is read by the
#   controller: it has to be set where Ray's node is started, and not where the application is deployed.
set -euo pipefail
folder=$(mktemp -d); trap 'rm -rf "$folder"' EXIT
python3 -m venv "$folder/venv"
"$folder/venv/bin/pip" install -q --disable-pip-version-check "ray[serve]==2.60.0" "psutil==7.2.2"
cat > "$folder/try.py" <<'P'
import os
import socket
import sys
import time
import urllib.request

import psutil
import ray
from ray import serve

with socket.socket() as probe:
    probe.bind(("127.0.0.1", 0))
    PORT = probe.getsockname()[1]


@serve.deployment(ray_actor_options={"num_cpus": 0})
class Hello:
    async def __call__(self, request):
        return "hello"


def answers():
    try:
        with urllib.request.urlopen(f"http://127.0.0.1:{PORT}/", timeout=2) as response:
            return response.read() == b"hello"
    except OSError:
        return False


def kill(title):
    begin = time.monotonic()
    for process in psutil.Process().children(recursive=True):
        if process.name().startswith(title) or "".join(process.cmdline()).startswith(title):
            process.kill()
    time.sleep(1)
    return begin


ray.init(num_cpus=1, log_to_driver=False, logging_level="ERROR")
serve.start(http_options={"port": PORT})
serve.run(Hello.bind())
while not answers():
    time.sleep(0.2)
time.sleep(15)  # the first health check is over

begin = kill("ray::ServeController")
while True:
    try:
        if serve.status().applications["default"].status == "RUNNING":
            break
    except Exception:
        pass
    time.sleep(0.2)
controller = time.monotonic() - begin
time.sleep(15)
begin = kill("ray::ProxyActor")
while not answers():
    time.sleep(0.2)
proxy = time.monotonic() - begin
print(f"{controller:.0f} {proxy:.0f}", file=sys.stderr)
print("controller: back within 15 s" if controller < 15 else "controller: later")
print("proxy: back within 15 s" if proxy < 15 else "proxy: later")
P
cd "$folder"
for period in 10 1; do
  echo "a health check every $period s"
  RAY_AUTH_MODE=disabled RAY_USAGE_STATS_ENABLED=0 RAY_SERVE_PROXY_HEALTH_CHECK_PERIOD_S=$period \
    RAY_TMPDIR="$(mktemp -d -p /tmp r.XXXX)" "$folder/venv/bin/python" -W ignore "$folder/try.py" 2>>"$folder/seconds"
done | grep -E "^(a health|controller:|proxy:)" | tee "$folder/seen"
diff "$folder/seen" - <<'SEEN'
a health check every 10 s
controller: back within 15 s
proxy: later
a health check every 1 s
controller: back within 15 s
proxy: back within 15 s
SEEN
