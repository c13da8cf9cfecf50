#!/usr/bin/env bash
# diffusers 0.42.1: AutoencoderKLWan takes several times the memory from a video's second latent frame on.
#
# One would guess: as it decodes latent frame by latent frame, a video's frames take little more memory at a time than a
#   single image of the same size, apart from the pictures themselves.
# What happens: the first latent frame is one picture, every later one four, and features of the frame before are kept for
#   each convolution: two latent frames peak at several times one frame's memory above the weights. A plan that measures an
#   image and adds the pictures is far too low; planning with two latent frames is right for any longer video.
set -euo pipefail
folder=$(mktemp -d); trap 'rm -rf "$folder"' EXIT
python3 -m venv "$folder/venv"
"$folder/venv/bin/pip" install -q --disable-pip-version-check torch==2.13.0 numpy
"$folder/venv/bin/pip" install -q --disable-pip-version-check diffusers==0.42.1 transformers==5.23.0
cat > "$folder/try.py" <<'P'
import resource
import sys

import diffusers
import torch
from diffusers import AutoencoderKLWan

torch.set_num_threads(1)
vae = AutoencoderKLWan().eval()
with torch.no_grad():
    vae.decode(torch.zeros(1, 16, 1, 4, 4))  # whatever is made once
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    vae.decode(torch.zeros(1, 16, int(sys.argv[1]), 32, 32))
print(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before)
P
peak() { MALLOC_MMAP_THRESHOLD_=65536 "$folder/venv/bin/python" -W ignore "$folder/try.py" "$1" 2>/dev/null; }
one=$(peak 1); two=$(peak 2); four=$(peak 4)
cat > "$folder/told.py" <<'P'
import sys

import diffusers

one, two, four = map(int, sys.argv[1:])
print("diffusers", diffusers.__version__)
print("two latent frames take more than 3 times one's memory:", two > 3 * one)
print("four take less than 1.5 times two's:", four < 1.5 * two)
P
echo "above the weights, in MB: $((one / 1024)), $((two / 1024)), $((four / 1024)) for 1, 2 and 4 latent frames of 32x32" >&2
"$folder/venv/bin/python" -W ignore "$folder/told.py" "$one" "$two" "$four" 2>/dev/null | tee "$folder/seen"
diff "$folder/seen" - <<'SEEN'
diffusers 0.42.1
two latent frames take more than 3 times one's memory: True
four take less than 1.5 times two's: True
SEEN
