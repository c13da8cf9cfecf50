#!/usr/bin/env bash
# torchao 0.18.0 with torch 2.13.0: AdamW8bit's state can be saved by `save`, not by `async_save`, and cannot be copied.
#
# One would guess: what torch.distributed.checkpoint.save writes, async_save writes too, only later: it copies the state
#   first. And an optimizer's state_dict can be copied, as a training loop does to keep the best one.
# What happens: the tensors of 8 bits have neither `new_empty`, by which async_save makes room for its copy, nor `clone`.
#   Both ways end in NotImplementedError. A run that trained well fails at its first checkpoint. A plain `save` works,
#   and `torch.save` does.
set -euo pipefail
folder=$(mktemp -d); trap 'rm -rf "$folder"' EXIT
python3 -m venv "$folder/venv"
"$folder/venv/bin/pip" install -q --disable-pip-version-check torch==2.13.0 numpy
"$folder/venv/bin/pip" install -q --disable-pip-version-check torchao==0.18.0
cat > "$folder/try.py" <<'P'
import copy
import sys
import torch
import torch.distributed as dist
import torch.distributed.checkpoint as dcp
import torchao
from torchao.optim import AdamW8bit

dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)


def stepped(kind):
    weight = torch.nn.Parameter(torch.zeros(64, 64))
    optimizer = kind([weight], lr=1e-3)
    weight.grad = torch.ones(64, 64)
    with torch.compiler.set_stance("force_eager"):
        optimizer.step()
    return optimizer.state_dict()


print("torchao", torchao.__version__.partition("+")[0], "torch", torch.__version__.partition("+")[0])
for kind in (torch.optim.AdamW, AdamW8bit):
    state = stepped(kind)
    ways = {
        "save": lambda: dcp.save(state, checkpoint_id=f"{sys.argv[1]}/{kind.__name__}-save"),
        "async_save": lambda: dcp.async_save(state, checkpoint_id=f"{sys.argv[1]}/{kind.__name__}-async").result(),
        "torch.save": lambda: torch.save(state, f"{sys.argv[1]}/{kind.__name__}.pt"),
        "deepcopy": lambda: copy.deepcopy(state),
    }
    for name, way in ways.items():
        try:
            way()
            print(kind.__name__, name, "done")
        except NotImplementedError as error:
            print(kind.__name__, name, "NotImplementedError", str(error).partition("op='")[2].partition("'")[0])
dist.destroy_process_group()
P
"$folder/venv/bin/python" -W ignore "$folder/try.py" "$folder" 2>/dev/null | tee "$folder/seen"
diff "$folder/seen" - <<'SEEN'
torchao 0.18.0 torch 2.13.0
AdamW save done
AdamW async_save done
AdamW torch.save done
AdamW deepcopy done
AdamW8bit save done
AdamW8bit async_save NotImplementedError aten.new_empty
AdamW8bit torch.save done
AdamW8bit deepcopy NotImplementedError aten.clone
SEEN
