#!/usr/bin/env bash
# diffusers 0.42.1: a flow scheduler with `shift_terminal`, such as Qwen-Image's, has no schedule of one step.
#
# One would guess: one step goes from noise to data, σ = [1, 0].
# What happens: the schedule is stretched so that its last σ is the terminal one; that of one step has only σ = 1, the
#   stretch is 0/0, and the schedule is [nan, 0]. A pipeline goes on, and its latents are nan.
set -euo pipefail
folder=$(mktemp -d); trap 'rm -rf "$folder"' EXIT
python3 -m venv "$folder/venv"
"$folder/venv/bin/pip" install -q --disable-pip-version-check torch==2.13.0 numpy
"$folder/venv/bin/pip" install -q --disable-pip-version-check diffusers==0.42.1 transformers==5.23.0
cat > "$folder/try.py" <<'P'
import warnings

import diffusers
from diffusers import FlowMatchEulerDiscreteScheduler

warnings.simplefilter("ignore")
print("diffusers", diffusers.__version__)
scheduler = FlowMatchEulerDiscreteScheduler(use_dynamic_shifting=True, shift_terminal=0.02)
for steps in (1, 2, 4):
    scheduler.set_timesteps(sigmas=[1 - i / steps for i in range(steps)], mu=0.7)
    print(steps, [round(sigma, 4) for sigma in scheduler.sigmas.tolist()])
P
"$folder/venv/bin/python" -W ignore "$folder/try.py" 2>/dev/null | tee "$folder/seen"
diff "$folder/seen" - <<'SEEN'
diffusers 0.42.1
1 [nan, 0.0]
2 [1.0, 0.02, 0.0]
4 [1.0, 0.7674, 0.4565, 0.02, 0.0]
SEEN
