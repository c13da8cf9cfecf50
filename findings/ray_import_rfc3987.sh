#!/usr/bin/env bash
# Ray 2.60.0 beside jsonschema 4.26.0 with its extra format-nongpl (which Jupyter's events, and CycloneDX's validation, ask for):
# `import ray` takes four times as long, in the driver and in every worker, agent and dashboard process of a node.
#
# One would guess: checks of formats such as IRIs cost something where a schema with such a format is validated, and
#   nothing in programs that have no such schema.
# What happens: ray.runtime_env imports jsonschema at its start, jsonschema imports every checker of formats that it
#   finds, and rfc3987_syntax builds a parser of the grammar of IRIs (by lark) as it is imported: most of the time
#   that `import ray` takes. An environment without that package starts Ray's processes so much sooner.
set -euo pipefail
folder=$(mktemp -d); trap 'rm -rf "$folder"' EXIT
python3 -m venv "$folder/venv"
pip=("$folder/venv/bin/pip" install -q --disable-pip-version-check)
"${pip[@]}" "ray==2.60.0" "jsonschema==4.26.0"
cat > "$folder/try.py" <<'P'
import statistics
import subprocess
import sys

PROGRAM = """
import sys, time
begin = time.process_time()
import ray
print(time.process_time() - begin, "rfc3987_syntax" in sys.modules)
"""
runs = [subprocess.run([sys.executable, "-c", PROGRAM], capture_output=True, text=True, check=True) for _ in range(8)]
found = [run.stdout.split() for run in runs[1:]]  # the first one compiles
print(statistics.median(float(seconds) for seconds, _ in found), found[0][1])
P
read -r before loaded_before < <("$folder/venv/bin/python" "$folder/try.py")
"${pip[@]}" "jsonschema[format-nongpl]==4.26.0" "rfc3987-syntax==1.1.0" "lark==1.3.1"
read -r after loaded_after < <("$folder/venv/bin/python" "$folder/try.py")
echo "without: $before s of CPU, rfc3987_syntax loaded: $loaded_before"
echo "with: $after s of CPU, rfc3987_syntax loaded: $loaded_after"
[ "$loaded_before" = False ] && [ "$loaded_after" = True ]
python3 -c "import sys; sys.exit(not $after > 1.5 * $before)"
# Seen:
#   without: 0.38592594 s of CPU, rfc3987_syntax loaded: False
#   with: 1.5392731709999998 s of CPU, rfc3987_syntax loaded: True
