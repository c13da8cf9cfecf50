#!/usr/bin/env bash
# bitsandbytes 0.50.2 on CPU: `quantize_blockwise` stores an exact 0 as something else, though its map has an exact 0.
#
# One would guess: each value becomes the nearest of the map's 256 values, so a 0 comes back as 0.
# What happens: with the map of unsigned values, a 0 beside a 1 comes back as 1.5625e-05, the map's entry number 7, and
#   so does every smaller value: entries 0 to 6 are never used. With the map of signed values it comes back as 2.125e-05.
#   float32, float16 and bfloat16 are alike. A tensor of few values among zeros comes back without a zero.
set -euo pipefail
folder=$(mktemp -d); trap 'rm -rf "$folder"' EXIT
python3 -m venv "$folder/venv"
"$folder/venv/bin/pip" install -q --disable-pip-version-check torch==2.13.0 numpy
"$folder/venv/bin/pip" install -q --disable-pip-version-check bitsandbytes==0.50.2
cat > "$folder/try.py" <<'P'
import bitsandbytes
import torch
from bitsandbytes.functional import create_dynamic_map, dequantize_blockwise, quantize_blockwise

print("bitsandbytes", bitsandbytes.__version__)
for signed in (False, True):
    code = create_dynamic_map(signed=signed)
    for dtype in (torch.float32, torch.float16, torch.bfloat16):
        values = torch.linspace(0, 1, 65536).pow(4).view(-1, 256).to(dtype)
        values[:, 0], values[:, 1] = 0, 1  # a 0 in each block, and each block's scale is 1
        numbers, state = quantize_blockwise(values, code=code, blocksize=256)
        state.dtype = torch.float32  # the type to give back
        back = dequantize_blockwise(numbers, state)[0, 0].item()
        print("signed" if signed else "unsigned", "map has a 0:", (code == 0).any().item(), "-", dtype, "0 becomes",
              f"{back:.4g}, number {numbers[0, 0].item()}, smallest number {numbers.min().item()}")
P
"$folder/venv/bin/python" -W ignore "$folder/try.py" 2>/dev/null | tee "$folder/seen"
diff "$folder/seen" - <<'SEEN'
bitsandbytes 0.50.2
unsigned map has a 0: True - torch.float32 0 becomes 1.562e-05, number 7, smallest number 7
unsigned map has a 0: True - torch.float16 0 becomes 1.562e-05, number 7, smallest number 7
unsigned map has a 0: True - torch.bfloat16 0 becomes 1.562e-05, number 7, smallest number 7
signed map has a 0: True - torch.float32 0 becomes 2.125e-05, number 131, smallest number 131
signed map has a 0: True - torch.float16 0 becomes 2.125e-05, number 131, smallest number 131
signed map has a 0: True - torch.bfloat16 0 becomes 2.125e-05, number 131, smallest number 131
SEEN
