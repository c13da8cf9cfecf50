#!/usr/bin/env bash
# torchao 0.18.0: AdamW8bit and AdamWFp8 take steps far larger than the learning rate where gradients are small.
#
# One would guess: Adam with averages in 8 bits moves every weight about as float32 Adam does, roughly by `lr` a step,
#   because a weight's step doesn't depend on how large its gradients are.
# What happens: 256 neighbours share one scale. A weight whose gradient is 3e-4 of its neighbour's has a squared gradient
#   of 9e-8 of it. AdamW8bit stores that as 0, while the average of the gradient itself is kept. (1) When the next
#   gradient is 0, as in rows that a batch doesn't use, the average is divided by eps alone: at lr 1e-3 the weight leaps
#   to -12.7. (2) When the gradient stays the same for 100 steps, the weight goes six times as far as with float32.
#   AdamW4bit errs the other way: after 100 steps the weight has gone a hundredth of the way.
set -euo pipefail
folder=$(mktemp -d); trap 'rm -rf "$folder"' EXIT
python3 -m venv "$folder/venv"
"$folder/venv/bin/pip" install -q --disable-pip-version-check torch==2.13.0
"$folder/venv/bin/pip" install -q --disable-pip-version-check torchao==0.18.0
cat > "$folder/try.py" <<'P'
import torch
import torchao
from torchao.optim import AdamW4bit, AdamW8bit, AdamWFp8

SMALL = torch.arange(4096) % 2 == 1


def moved(kind, later_gradient, steps):
    """How far a weight went whose first gradient is 3e-4, beside weights whose gradients are 1."""
    weight = torch.nn.Parameter(torch.zeros(4096))
    optimizer = kind([weight], lr=1e-3, weight_decay=0.0)
    with torch.compiler.set_stance("force_eager"):  # no compiler is needed to see it
        for step in range(steps):
            weight.grad = torch.ones(4096).masked_fill(SMALL, later_gradient if step else 3e-4)
            optimizer.step()
    if kind is AdamW8bit and steps == 2:
        averages = (optimizer.state[weight][name].dequantize()[1].item() for name in ("exp_avg", "exp_avg_sq"))
        print("AdamW8bit's averages after two steps:", *(f"{average:.1e}" for average in averages))
    return f"{weight[1].item():.4f}"


print("torchao", torchao.__version__.partition("+")[0])
for kind in (torch.optim.AdamW, AdamW8bit, AdamWFp8, AdamW4bit):
    print(kind.__name__, "- then one of 0:", moved(kind, 0.0, 2), "- 100 alike:", moved(kind, 3e-4, 100))
P
"$folder/venv/bin/python" -W ignore "$folder/try.py" 2>/dev/null | tee "$folder/seen"
diff "$folder/seen" - <<'SEEN'
torchao 0.18.0
AdamW - then one of 0: -0.0017 - 100 alike: -0.1000
AdamW8bit's averages after two steps: 3.0e-05 0.0e+00
AdamW8bit - then one of 0: -12.7313 - 100 alike: -0.6000
AdamWFp8 - then one of 0: -14.8697 - 100 alike: -0.6888
AdamW4bit - then one of 0: -0.0010 - 100 alike: -0.0010
SEEN
