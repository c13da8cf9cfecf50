#!/usr/bin/env bash
# torchao 0.18.0: an int8 weight made from bfloat16 says bfloat16 for ever, also after `.to(torch.float32)`.
#
# One would guess: the `dtype` of a tensor that `.to(torch.float32)` returned is torch.float32, and that of the weights of
#   a module after `module.to(torch.float32)` too, or the conversion is refused.
# What happens: the scales become float32, and the layer takes and gives float32, but the weight's `dtype` and what
#   `dequantize()` returns stay bfloat16. Code that makes inputs in the type of a parameter goes on
#   making bfloat16 ones.
set -euo pipefail
folder=$(mktemp -d); trap 'rm -rf "$folder"' EXIT
python3 -m venv "$folder/venv"
"$folder/venv/bin/pip" install -q --disable-pip-version-check torch==2.13.0
"$folder/venv/bin/pip" install -q --disable-pip-version-check torchao==0.18.0
cat > "$folder/try.py" <<'P'
import torch
import torchao
from torchao.quantization import Int8WeightOnlyConfig, quantize_

layer = torch.nn.Linear(64, 64, bias=False).to(torch.bfloat16)
quantize_(layer, Int8WeightOnlyConfig())
print("torchao", torchao.__version__.partition("+")[0])
print("weight.to(torch.float32).dtype", layer.weight.to(torch.float32).dtype)
layer.to(torch.float32)
print("layer.to(torch.float32): weight", layer.weight.dtype, "dequantized", layer.weight.dequantize().dtype, "scales",
      layer.weight.scale.dtype, "output", layer(torch.ones(1, 64)).dtype)
P
"$folder/venv/bin/python" -W ignore "$folder/try.py" 2>/dev/null | tee "$folder/seen"
diff "$folder/seen" - <<'SEEN'
torchao 0.18.0
weight.to(torch.float32).dtype torch.bfloat16
layer.to(torch.float32): weight torch.bfloat16 dequantized torch.bfloat16 scales torch.float32 output torch.float32
SEEN
