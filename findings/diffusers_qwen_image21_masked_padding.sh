#!/usr/bin/env bash
# diffusers 0.42.1: masked padding after a caption moves the picture of Qwen-Image 2.1's network.
#
# One would guess: rows that `encoder_hidden_states_mask` leaves out do not affect the others, as in Qwen-Image.
# What happens: they are never attended to, but the image's position along the first axis is the length of the padded text,
#   so that the picture depends on the longest caption of its batch.
set -euo pipefail
folder=$(mktemp -d); trap 'rm -rf "$folder"' EXIT
python3 -m venv "$folder/venv"
"$folder/venv/bin/pip" install -q --disable-pip-version-check torch==2.13.0 numpy
"$folder/venv/bin/pip" install -q --disable-pip-version-check diffusers==0.42.1 transformers==5.23.0
cat > "$folder/try.py" <<'P'
import diffusers
import torch
from diffusers import QwenImage21Transformer2DModel

print("diffusers", diffusers.__version__)
torch.manual_seed(0)
network = QwenImage21Transformer2DModel(
    in_channels=8, out_channels=8, num_layers=2, attention_head_dim=16, num_attention_heads=4, context_in_dim=32,
    axes_dims_rope=(4, 6, 6),
).eval()
with torch.no_grad():
    for parameter in network.parameters():
        parameter.add_(torch.randn_like(parameter) * 0.3)  # so that attention is not nearly uniform
image, text, cells = torch.randn(1, 16, 8), torch.randn(1, 5, 32), 4


@torch.no_grad()
def answer(padding):
    """The velocity of a picture of 4 by 4 cells, with `padding` masked rows after the caption's five."""
    padded = torch.cat([text, torch.zeros(1, padding, 32)], dim=1)
    rows = padded.shape[1]
    slots = torch.cat([torch.zeros(1, rows, dtype=torch.bool), torch.ones(1, cells, dtype=torch.bool)], dim=1)
    mask = torch.arange(rows)[None] < text.shape[1]
    return network(
        image, padded, torch.tensor([0.5]), [[(1, 4, 4)]], slots, encoder_hidden_states_mask=mask, return_dict=False
    )[0][:, -16:]


alone = answer(0)
for padding in (0, 1, 8):
    moved = (answer(padding) - alone).norm() / alone.norm()
    print(padding, "masked rows change the answer by more than 1 %:", (moved > 0.01).item())
P
"$folder/venv/bin/python" -W ignore "$folder/try.py" 2>/dev/null | tee "$folder/seen"
diff "$folder/seen" - <<'SEEN'
diffusers 0.42.1
0 masked rows change the answer by more than 1 %: False
1 masked rows change the answer by more than 1 %: True
8 masked rows change the answer by more than 1 %: True
SEEN
