#!/usr/bin/env bash
# Ray 2.60.0: ending an actor that has infinite retries by `__ray_terminate__` is logged as a failure that will be
# retried, and is neither retried nor does the actor come back.
#
# One would guess: `actor.__ray_terminate__.remote()` is the orderly end of an actor. It either ends quietly; or, as
#   max_restarts=-1 and max_task_retries=-1 ask for, the actor is started again.
# What happens: the driver's log says "Task … __ray_terminate__ failed. There are infinite retries remaining, so the task
#   will be retried", like that of a crash; but the actor is dead for good (ActorDiedError), as wanted. The line is gone
#   if the call itself is made with `.options(max_task_retries=0)`.
set -euo pipefail
folder=$(mktemp -d); trap 'rm -rf "$folder"' EXIT
python3 -m venv "$folder/venv"
"$folder/venv/bin/pip" install -q --disable-pip-version-check 'ray[default]==2.60.0'
cat > "$folder/try.py" <<'P'
import os
import sys
import time

os.environ |= {"RAY_USAGE_STATS_ENABLED": "0", "RAY_AUTH_MODE": "disabled"}
import ray

ray.init(num_cpus=2, include_dashboard=False, logging_level="ERROR")


@ray.remote(max_restarts=-1, max_task_retries=-1, num_cpus=0)
class Encoder:
    def work(self):
        return "works"


encoder = Encoder.remote()
ray.get(encoder.work.remote())
retries = {} if sys.argv[1] == "its own" else {"max_task_retries": 0}
ended = encoder.__ray_terminate__.options(**retries).remote()
time.sleep(8)
try:
    state = ray.get(encoder.work.remote(), timeout=20)
except ray.exceptions.RayError as error:
    state = type(error).__name__
print("afterwards:", state)
P
for retries in "its own" "none"; do
  echo "retries of the last call: $retries"
  "$folder/venv/bin/python" "$folder/try.py" "$retries" > "$folder/said" 2>&1
  grep -q "__ray_terminate__ failed. There are infinite retries" "$folder/said" && echo "logged as a failure" || echo "nothing logged"
  grep afterwards "$folder/said"
done | tee "$folder/seen"
diff "$folder/seen" - <<'SEEN'
retries of the last call: its own
logged as a failure
afterwards: ActorDiedError
retries of the last call: none
nothing logged
afterwards: ActorDiedError
SEEN
