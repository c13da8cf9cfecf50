#!/usr/bin/env bash
# Ray Train 2.60.0: what is given as train_loop_config is unpickled by Ray Train's controller, too, which so imports the
# modules of its classes; what is bound to the training function by functools.partial is unpickled by the workers alone.
#
# One would guess: the configuration of the training loop is opaque to the controller, and only workers, which run the
#   loop, need the modules of its objects.
# What happens: the process of the controller imports them as well, with all that they import. For a class in a module
#   that imports torch and diffusers, that is seconds of CPU and hundreds of MB in a process that never uses them.
set -euo pipefail
folder=$(mktemp -d); trap 'rm -rf "$folder"' EXIT
python3 -m venv "$folder/venv"
"$folder/venv/bin/pip" install -q --disable-pip-version-check 'ray[train]==2.60.0'
mkdir "$folder/lib"
cat > "$folder/lib/settings.py" <<'P'
import os
import sys

# In each process that imports this module: what kind of process it is, by the title that Ray gives it.
import ray._private.worker

with open(os.environ["SEEN"], "a") as file:
    mode = "worker" if ray._private.worker.global_worker.mode == ray.WORKER_MODE else "driver"
    title = ray._raylet.getproctitle() if mode == "worker" else mode
    file.write(title.split(".")[0] + "\n")


class Settings:
    pass
P
cat > "$folder/try.py" <<'P'
import functools
import os
import sys

import ray
from ray.train import RunConfig, ScalingConfig
from ray.train.v2.api.data_parallel_trainer import DataParallelTrainer

ray.init(num_cpus=3, include_dashboard=False, logging_level="ERROR", log_to_driver=False,
         runtime_env={"env_vars": {"SEEN": os.environ["SEEN"], "PYTHONPATH": os.environ["PYTHONPATH"]}})
from settings import Settings


def loop(config):
    assert isinstance(config["settings"], Settings)


def bound(config, none=None):
    loop(config)


config = {"settings": Settings()}
run = {"scaling_config": ScalingConfig(num_workers=1), "run_config": RunConfig(storage_path=os.environ["RUNS"], name=sys.argv[1])}
if sys.argv[1] == "config":
    DataParallelTrainer(loop, train_loop_config=config, **run).fit()
else:
    DataParallelTrainer(functools.partial(bound, config), **run).fit()
P
for how in config partial; do
  SEEN="$folder/$how" RUNS="$folder/runs" PYTHONPATH="$folder/lib" RAY_USAGE_STATS_ENABLED=0 RAY_AUTH_MODE=disabled \
    "$folder/venv/bin/python" "$folder/try.py" "$how" > "$folder/log" 2>&1 || { tail -20 "$folder/log"; exit 1; }
  echo "$how: imported by the controller: $(grep -c 'TrainController' "$folder/$how" || true)"
done | tee "$folder/result"
diff "$folder/result" - <<'SEEN'
config: imported by the controller: 1
partial: imported by the controller: 0
SEEN
