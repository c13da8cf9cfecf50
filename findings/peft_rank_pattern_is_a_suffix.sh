#!/usr/bin/env bash
# peft 0.21.2: a key of `rank_pattern` and `alpha_pattern` also sets layers whose names merely end with it.
#
# One would guess: the key "proj_out" is the name of the module `proj_out`, as it stands in `named_modules`.
# What happens: keys are regular expressions that match the whole name or its end after a dot. In a diffusion transformer
#   whose last layer is `proj_out` and whose blocks have a `proj_out` each (FLUX), the last layer's rank goes to all of
#   them. A file with a rank per layer then loads with wrong shapes. "^" before the escaped name means the one layer.
set -euo pipefail
folder=$(mktemp -d); trap 'rm -rf "$folder"' EXIT
python3 -m venv "$folder/venv"
"$folder/venv/bin/pip" install -q --disable-pip-version-check torch==2.13.0
"$folder/venv/bin/pip" install -q --disable-pip-version-check peft==0.21.2
cat > "$folder/try.py" <<'P'
import re
import peft
from peft import LoraConfig, inject_adapter_in_model
from torch import nn


class Block(nn.Module):
    def __init__(self):
        super().__init__()
        self.proj_out = nn.Linear(8, 8)


class Network(nn.Module):
    def __init__(self):
        super().__init__()
        self.blocks = nn.ModuleList([Block()])
        self.proj_out = nn.Linear(8, 8)


def ranks(key):
    config = LoraConfig(r=2, target_modules=["proj_out"], rank_pattern={key: 4})
    network = inject_adapter_in_model(config, Network())
    return {name.removesuffix(".lora_A.default"): module.out_features
            for name, module in network.named_modules() if name.endswith("lora_A.default")}


print("peft", peft.__version__)
print("proj_out", ranks("proj_out"))
print("^proj_out", ranks("^" + re.escape("proj_out")))
P
"$folder/venv/bin/python" -W ignore "$folder/try.py" 2>/dev/null | tee "$folder/seen"
diff "$folder/seen" - <<'SEEN'
peft 0.21.2
proj_out {'blocks.0.proj_out': 4, 'proj_out': 4}
^proj_out {'blocks.0.proj_out': 2, 'proj_out': 4}
SEEN
