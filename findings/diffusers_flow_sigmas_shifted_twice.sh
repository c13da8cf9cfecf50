#!/usr/bin/env bash
# diffusers 0.42.1: a flow scheduler with a shift that is asked for n steps shifts its last σ twice.
#
# One would guess: `set_timesteps(4)` gives the σ of four equal steps, shifted once, as the same steps given as `sigmas`.
# What happens: without `sigmas` the steps run from 1 to `sigma_min`, which the constructor has shifted already, and then
#   all are shifted (again). Stable Diffusion 3's pipeline calls it so: with its shift of 3, the last of four steps begins
#   at σ = 0.0089 and does next to nothing, and the third, from 0.60, does what two steps do in other pipelines.
set -euo pipefail
folder=$(mktemp -d); trap 'rm -rf "$folder"' EXIT
python3 -m venv "$folder/venv"
"$folder/venv/bin/pip" install -q --disable-pip-version-check torch==2.13.0 numpy
"$folder/venv/bin/pip" install -q --disable-pip-version-check diffusers==0.42.1 transformers==5.23.0
cat > "$folder/try.py" <<'P'
import diffusers
from diffusers import FlowMatchEulerDiscreteScheduler

print("diffusers", diffusers.__version__)
for shift in (1.0, 3.0):
    scheduler = FlowMatchEulerDiscreteScheduler(shift=shift)
    scheduler.set_timesteps(4)
    left = [round(sigma, 4) for sigma in scheduler.sigmas.tolist()]
    scheduler.set_timesteps(sigmas=[1.0, 0.75, 0.5, 0.25])
    given = [round(sigma, 4) for sigma in scheduler.sigmas.tolist()]
    print("shift", shift, "number of steps alone:", left, "the same steps as sigmas:", given)
P
"$folder/venv/bin/python" -W ignore "$folder/try.py" 2>/dev/null | tee "$folder/seen"
diff "$folder/seen" - <<'SEEN'
diffusers 0.42.1
shift 1.0 number of steps alone: [1.0, 0.667, 0.334, 0.001, 0.0] the same steps as sigmas: [1.0, 0.75, 0.5, 0.25, 0.0]
shift 3.0 number of steps alone: [1.0, 0.8577, 0.6022, 0.0089, 0.0] the same steps as sigmas: [1.0, 0.9, 0.75, 0.5, 0.0]
SEEN
