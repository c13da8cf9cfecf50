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
"$folder/venv/bin/pip" install -q --disable-pip-version-check 'ray[default,serve]==2.60.0'
cat > "$folder/application.py" <<'P'
import asyncio
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


application = Model.bind()
P
cat > "$folder/try.py" <<'P'
import os
import time
import urllib.error
import urllib.request

os.environ |= {"RAY_USAGE_STATS_ENABLED": "0", "RAY_AUTH_MODE": "disabled", "RAY_SERVE_LOG_TO_STDERR": "0"}
import ray
from ray.dashboard.modules.serve.sdk import ServeSubmissionClient


def answer(seconds=15):
    try:
        with urllib.request.urlopen("http://127.0.0.1:8765/", timeout=seconds) as response:
            return response.read().decode()
    except (urllib.error.URLError, TimeoutError):  # 503, or a wait without an end
        return "no answer"


def wait_for(wanted):
    deadline = time.monotonic() + 60
    while (last := answer()) != wanted and time.monotonic() < deadline:
        time.sleep(0.5)
    return last


def deploy(name, seconds=0):
    # As `serve deploy` does with a file: of these changes Ray Serve says that they reconfigure replicas in place.
    deployments = [{"name": "Model", "user_config": {"name": name, "seconds": seconds}}]
    one = {"name": "default", "import_path": "application:application", "deployments": deployments}
    client.deploy_applications({"http_options": {"host": "127.0.0.1", "port": 8765}, "applications": [one]})


context = ray.init(num_cpus=2, include_dashboard=True, log_to_driver=False, logging_level="ERROR")
client = ServeSubmissionClient(f"http://{context.dashboard_url}")
print("ray", ray.__version__)
deploy("first")
print("at first:", wait_for("first"))
deploy("second", seconds=12)
time.sleep(5)
begun = time.monotonic()
name = answer(30)
print("while it takes 12 s to reconfigure:", name, "after a wait" if time.monotonic() - begun > 1 else "at once")
deploy("wrong")
print("after a wrong configuration:", wait_for("no answer"))
client.delete_applications()
ray.shutdown()
P
export PYTHONPATH=$folder
"$folder/venv/bin/python" "$folder/try.py" 2>"$folder/errors" | grep -v raylet | tee "$folder/seen" || { tail -5 "$folder/errors"; exit 1; }
diff "$folder/seen" - <<'SEEN'
ray 2.60.0
at first: first
while it takes 12 s to reconfigure: second after a wait
after a wrong configuration: no answer
SEEN
