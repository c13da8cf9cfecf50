#!/usr/bin/env bash
# Ray 2.60.0, Tune and Data: in a trial that reserves less than a CPU, Ray Data maps rows with actors of a CPU, but can't sum them.
#
# One would guess: what a trial starts is either all inside its reservation, or all beside it; a pipeline of Ray Data, at any
#   rate, runs whole or not at all. And an actor of one's own that asks for a CPU waits until the cluster has one.
# What happens: a trial runs in a placement group that captures its children. An actor or task without a scheduling strategy
#   is refused at once with a ValueError where the trial reserved less than it asks for, however many CPUs are free. The actors
#   and tasks of Ray Data's map have a strategy of their own and run; the tasks of its aggregations have none, so that sum()
#   of the same rows is refused. An actor with scheduling_strategy="SPREAD" or "DEFAULT" runs, too.
set -euo pipefail
folder=$(mktemp -d); trap 'rm -rf "$folder"' EXIT
python3 -m venv "$folder/venv"
"$folder/venv/bin/pip" install -q --disable-pip-version-check "ray[data,tune]==2.60.0"
cat > "$folder/try.py" <<'P'
import ray
import ray.data
from ray import tune


@ray.remote(num_cpus=1)
class Own:
    def answer(self):
        return 42


class Mapper:
    def __call__(self, row):
        return {"id": row["id"] + 1}


def outcome(what):
    try:
        return str(what())
    except ValueError as error:
        return "refused: " + str(error)[:60]


def trial(config):
    rows = lambda: ray.data.range(3).map(Mapper, compute=ray.data.ActorPoolStrategy(size=1), num_cpus=1)
    tune.report({
        "plain": outcome(lambda: ray.get(Own.remote().answer.remote())),
        "spread": outcome(lambda: ray.get(Own.options(scheduling_strategy="SPREAD").remote().answer.remote())),
        "default": outcome(lambda: ray.get(Own.options(scheduling_strategy="DEFAULT").remote().answer.remote())),
        "map": outcome(lambda: [row["id"] for row in rows().iter_rows()]),
        "sum": outcome(lambda: rows().sum("id")),
    })


ray.init(num_cpus=4, log_to_driver=False, logging_level="ERROR")
ray.data.DataContext.get_current().enable_progress_bars = False
results = tune.Tuner(
    tune.with_resources(trial, {"cpu": 0.5}), run_config=tune.RunConfig(verbose=0, storage_path=__import__("os").environ["OUT"])
).fit()
for name in ("plain", "spread", "default", "map", "sum"):
    print(name, results[0].metrics[name])
P
OUT="$folder/out" RAY_TMPDIR="$folder/r" "$folder/venv/bin/python" "$folder/try.py" 2>/dev/null | grep -E '^(plain|spread|default|map|sum) ' > "$folder/seen"
cat "$folder/seen"
cat > "$folder/expected" <<'E'
plain refused: Cannot schedule Own with the placement group because the res
spread 42
default 42
map [1, 2, 3]
sum refused: Cannot schedule _shuffle_map_task with the placement group b
E
diff "$folder/seen" "$folder/expected"
