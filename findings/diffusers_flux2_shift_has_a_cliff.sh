#!/usr/bin/env bash
# diffusers 0.42.1: the time shift of FLUX.2's pipelines falls off a cliff at 4,300 image tokens.
#
# One would guess: log of the shift grows with the number of image tokens, as FLUX.1's does.
# What happens: up to 4,300 tokens it is about 2.3 for 4 steps and 2.0 for 50 (a shift of 10 and 7.7); from 4,301 tokens on
#   1.185 (3.3), for any number of steps. So pictures of 1,024 by 1,056 pixels (4,224 tokens) and 1,024 by 1,088 (4,352)
#   are sampled at quite different times, and a student that learned at one size meets another teacher at the other.
set -euo pipefail
folder=$(mktemp -d); trap 'rm -rf "$folder"' EXIT
python3 -m venv "$folder/venv"
"$folder/venv/bin/pip" install -q --disable-pip-version-check torch==2.13.0 numpy
"$folder/venv/bin/pip" install -q --disable-pip-version-check diffusers==0.42.1 transformers==5.23.0
cat > "$folder/try.py" <<'P'
import diffusers
from diffusers.pipelines.flux2.pipeline_flux2 import compute_empirical_mu

print("diffusers", diffusers.__version__)
for tokens in (4096, 4290, 4300, 4301, 4400):
    print(tokens, "tokens:", ", ".join(f"{steps} steps {compute_empirical_mu(tokens, steps):.3f}" for steps in (4, 28, 50)))
P
"$folder/venv/bin/python" -W ignore "$folder/try.py" 2>/dev/null | tee "$folder/seen"
diff "$folder/seen" - <<'SEEN'
diffusers 0.42.1
4096 tokens: 4 steps 2.291, 28 steps 2.151, 50 steps 2.023
4290 tokens: 4 steps 2.308, 28 steps 2.170, 50 steps 2.044
4300 tokens: 4 steps 2.308, 28 steps 2.171, 50 steps 2.045
4301 tokens: 4 steps 1.185, 28 steps 1.185, 50 steps 1.185
4400 tokens: 4 steps 1.201, 28 steps 1.201, 50 steps 1.201
SEEN
