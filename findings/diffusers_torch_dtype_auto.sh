#!/usr/bin/env bash
# diffusers 0.42.1: `from_pretrained(torch_dtype="auto")` gives float32, whatever the file holds.
#
# One would guess: as in transformers, "auto" is the type of the checkpoint.
# What happens: a warning that "auto" is no torch.dtype goes to the log, and a bfloat16 checkpoint is loaded in float32, in
#   twice the memory.
set -euo pipefail
folder=$(mktemp -d); trap 'rm -rf "$folder"' EXIT
python3 -m venv "$folder/venv"
"$folder/venv/bin/pip" install -q --disable-pip-version-check torch==2.13.0 numpy
"$folder/venv/bin/pip" install -q --disable-pip-version-check diffusers==0.42.1 transformers==5.23.0
cat > "$folder/try.py" <<'P'
import tempfile

import diffusers
import torch
from diffusers import UNet2DModel

print("diffusers", diffusers.__version__)
torch.manual_seed(0)
network = UNet2DModel(sample_size=8, block_out_channels=(32, 32), down_block_types=("DownBlock2D",) * 2, up_block_types=("UpBlock2D",) * 2)
with tempfile.TemporaryDirectory() as folder:
    network.to(torch.bfloat16).save_pretrained(folder)
    for dtype in (None, "auto", torch.bfloat16):
        print("torch_dtype", dtype, "gives", UNet2DModel.from_pretrained(folder, torch_dtype=dtype).dtype)
P
"$folder/venv/bin/python" -W ignore "$folder/try.py" 2>/dev/null | tee "$folder/seen"
diff "$folder/seen" - <<'SEEN'
diffusers 0.42.1
torch_dtype None gives torch.float32
torch_dtype auto gives torch.float32
torch_dtype torch.bfloat16 gives torch.bfloat16
SEEN
