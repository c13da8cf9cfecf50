#!/usr/bin/env bash
# Ray Serve 2.60.0: an exception in `reconfigure` stops a healthy replica, and while it runs the replica gets no request.
#
# One would guess: `user_config` is the light-weight update of a running deployment. A configuration that a replica can't
#   take is refused, and the replica goes on with the former one; while it takes a good one, it serves.
# What happens: (1) an exception in `reconfigure` counts as a broken replica. It is stopped, its replacements begin with
#   the same configuration and fail too, and requests are not answered until somebody deploys a better configuration.
#   (2) while `reconfigure` takes its time, requests wait, even for an asynchronous `reconfigure` that only sleeps.
#   So: validate and return at once, load in the background, and swap when it is whole.
set -euo pipefail
folder=$(mktemp -d); trap 'rm -rf "$folder"' EXIT
python3 -m venv "$folder/venv"
"$folder/venv/bin/pip" install -q --disable-pip-version-check 'ray[serve]==2.60.0'
cat > "$folder/try.py" <<'P'
import asyncio
import os
import time
import urllib.error
import urllib.request

os.environ |= {"RAY_USAGE_STATS_ENABLED": "0", "RAY_AUTH_MODE": "disabled", "RAY_SERVE_LOG_TO_STDERR": "0"}
import ray
from ray import serve


@serve.deployment(ray_actor_options={"num_cpus": 0.1})
class Model:
    async def reconfigure(self, config):
        if config["name"] == "wrong":
            raise ValueError("no such model")
        await asyncio.sleep(config["seconds"])
        self.name = config["name"]

    async def __call__(self, request):
        return self.name


def answer():
    try:
        with urllib.request.urlopen("http://127.0.0.1:8765/", timeout=15) as response:
            return response.read().decode()
    except (urllib.error.HTTPError, TimeoutError):  # 503, or a wait without an end
        return "no answer"


def deploy(name, seconds=0):
    config = {"name": name, "seconds": seconds}
    serve._run(Model.options(user_config=config).bind(), _blocking=False)


ray.init(num_cpus=2, include_dashboard=False, log_to_driver=False, logging_level="ERROR")
serve.start(http_options={"host": "127.0.0.1", "port": 8765})
serve.run(Model.options(user_config={"name": "first", "seconds": 0}).bind())
print("ray", ray.__version__)
print("at first:", answer())
deploy("second", seconds=6)
time.sleep(2)
begun = time.monotonic()
name = answer()
print("while it takes 6 s to reconfigure:", name, "after a wait" if time.monotonic() - begun > 1 else "at once")
deploy("wrong")
deadline = time.monotonic() + 60
while (last := answer()) == "second" and time.monotonic() < deadline:
    time.sleep(0.5)
print("after a wrong configuration:", last)
serve.shutdown()
ray.shutdown()
P
"$folder/venv/bin/python" "$folder/try.py" 2>"$folder/errors" | grep -v raylet | tee "$folder/seen" || { tail -5 "$folder/errors"; exit 1; }
diff "$folder/seen" - <<'SEEN'
ray 2.60.0
at first: first
while it takes 6 s to reconfigure: second after a wait
after a wrong configuration: no answer
SEEN
