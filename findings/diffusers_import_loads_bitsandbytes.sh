#!/usr/bin/env bash
# diffusers 0.42.1, peft 0.21.2, bitsandbytes 0.50.2: importing one transformer loads all three, and torch's compiler.
#
# One would guess: a network's class needs torch and diffusers' own modules; peft is loaded where an adapter is, and
#   bitsandbytes where weights are quantised, as diffusers loads its modules lazily.
# What happens: diffusers' models import its hooks, and one of these, for layerwise casting, imports peft wherever it is
#   installed. peft imports bitsandbytes wherever that is installed, whose operators import torch._inductor.compile_fx.
#   transformers' modeling_utils is loaded in any case. So each process that needs the class, such as every worker of
#   Ray, imports libraries that it may never use; only an environment without them is spared.
set -euo pipefail
folder=$(mktemp -d); trap 'rm -rf "$folder"' EXIT
python3 -m venv "$folder/venv"
pip() { "$folder/venv/bin/pip" install -q --disable-pip-version-check "$@"; }
cat > "$folder/try.py" <<'P'
import sys
from importlib.metadata import version

from diffusers.models.transformers.transformer_qwenimage import QwenImageTransformer2DModel

assert QwenImageTransformer2DModel.__mro__
names = ("peft", "transformers.modeling_utils", "bitsandbytes", "torch._inductor.compile_fx")
print(sys.argv[1], "diffusers", version("diffusers"), *(f"{name}: {name in sys.modules}" for name in names), sep=" | ")
P
pip torch==2.13.0
pip diffusers==0.42.1 transformers==5.23.0 accelerate==1.15.0
"$folder/venv/bin/python" -W ignore "$folder/try.py" "alone" 2>/dev/null | tee "$folder/seen"
pip peft==0.21.2
"$folder/venv/bin/python" -W ignore "$folder/try.py" "with peft" 2>/dev/null | tee -a "$folder/seen"
pip bitsandbytes==0.50.2
"$folder/venv/bin/python" -W ignore "$folder/try.py" "with bitsandbytes" 2>/dev/null | tee -a "$folder/seen"
diff "$folder/seen" - <<'SEEN'
alone | diffusers | 0.42.1 | peft: False | transformers.modeling_utils: True | bitsandbytes: False | torch._inductor.compile_fx: False
with peft | diffusers | 0.42.1 | peft: True | transformers.modeling_utils: True | bitsandbytes: False | torch._inductor.compile_fx: False
with bitsandbytes | diffusers | 0.42.1 | peft: True | transformers.modeling_utils: True | bitsandbytes: True | torch._inductor.compile_fx: True
SEEN
