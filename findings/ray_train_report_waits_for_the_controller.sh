#!/usr/bin/env bash
# Ray Train 2.60.0: a second ray.train.report within two seconds waits until the controller has looked at the worker.
#
# One would guess: report hands metrics over and returns at once, as in a loop that reports after each step.
# What happens: the controller asks its workers every 2 s (RAY_TRAIN_HEALTH_CHECK_INTERVAL_S), a worker holds one report
#   for it, and the next report blocks until that one was taken. Ten reports in a row take some twenty seconds, and with
#   the interval set to 0.2 some two.
set -euo pipefail
folder=$(mktemp -d); trap 'rm -rf "$folder"' EXIT
python3 -m venv "$folder/venv"
"$folder/venv/bin/pip" install -q --disable-pip-version-check 'ray[train]==2.60.0'
cat > "$folder/try.py" <<'P'
import os
import time

import ray
import ray.train
from ray.train import RunConfig, ScalingConfig
from ray.train.v2.api.data_parallel_trainer import DataParallelTrainer

ray.init(num_cpus=3, include_dashboard=False, logging_level="ERROR", log_to_driver=False)


def loop(config):
    begun = time.perf_counter()
    for step in range(10):
        ray.train.report({"step": step})
    open(os.environ["TOOK"], "w").write(str(time.perf_counter() - begun))


DataParallelTrainer(
    loop, train_loop_config={}, scaling_config=ScalingConfig(num_workers=1),
    run_config=RunConfig(storage_path=os.environ["RUNS"], name=os.environ["NAME"],
                         worker_runtime_env={"env_vars": {"TOOK": os.environ["TOOK"]}}),
).fit()
P
for interval in 2 0.2; do
  RAY_TRAIN_HEALTH_CHECK_INTERVAL_S=$interval TOOK="$folder/took" RUNS="$folder/runs" NAME="run-$interval" \
    RAY_USAGE_STATS_ENABLED=0 RAY_AUTH_MODE=disabled "$folder/venv/bin/python" "$folder/try.py" > "$folder/log" 2>&1 || { tail -20 "$folder/log"; exit 1; }
  echo "$interval s between looks: ten reports took $(printf '%.1f' "$(cat "$folder/took")") s"
  awk -v least="$interval" '{ exit !($1 > 8 * least && $1 < 8 * least + 25) }' "$folder/took"
done
