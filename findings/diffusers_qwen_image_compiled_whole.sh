#!/usr/bin/env bash
# diffusers 0.42.1 with torch 2.13.0: Qwen-Image's transformer, compiled as a whole with dynamic shapes, is compiled again
# for every number of texts' tokens and every batch size, and after eight of them runs uncompiled; its blocks do not.
#
# One would guess: torch.compile(…, dynamic=True), or torch's own switch to dynamic shapes at the second one, compiles once or
#   twice, as for FLUX's transformer of the same library, so a server whose captions differ in length runs compiled code.
# What happens: shapes stay part of what was compiled for, whatever `dynamic` says. The ninth length is over torch's limit of
#   recompilations; from then on the network runs as if it had not been compiled, and only a log line tells. Compiled
#   block by block, one or two graphs serve all lengths.
set -euo pipefail
folder=$(mktemp -d); trap 'rm -rf "$folder"' EXIT
python3 -m venv "$folder/venv"
"$folder/venv/bin/pip" install -q --disable-pip-version-check torch==2.13.0
"$folder/venv/bin/pip" install -q --disable-pip-version-check diffusers==0.42.1
cat > "$folder/try.py" <<'P'
import diffusers
import torch
from diffusers import FluxTransformer2DModel, QwenImageTransformer2DModel
from torch._dynamo.testing import CompileCounter

torch.set_grad_enabled(False)
SMALL = {"num_layers": 1, "attention_head_dim": 16, "num_attention_heads": 2, "joint_attention_dim": 8}


def qwen_image(batch, length):
    return {"img_shapes": [[(1, 4, 4)]] * batch,
            "encoder_hidden_states_mask": torch.ones(batch, length, dtype=torch.bool)}


def flux(batch, length):
    return {"pooled_projections": torch.randn(batch, 8), "img_ids": torch.zeros(16, 3), "txt_ids": torch.zeros(length, 3)}


NETWORKS = {
    "FLUX": (FluxTransformer2DModel(in_channels=4, num_single_layers=1, pooled_projection_dim=8,
                                    axes_dims_rope=(4, 4, 8), **SMALL), flux),
    "Qwen-Image": (QwenImageTransformer2DModel(in_channels=4, out_channels=4, axes_dims_rope=(4, 6, 6), **SMALL), qwen_image),
}


def graphs(name, part, dynamic, sizes):
    network, special = NETWORKS[name]
    torch._dynamo.reset()
    counter = CompileCounter()  # counts graphs, and runs them as they are: no C++ compiler is needed
    parts = [network] if part == "whole" else list(network.transformer_blocks)
    plain = [one.forward for one in parts]
    for one in parts:
        one.forward = torch.compile(one.forward, backend=counter, dynamic=dynamic)
    for batch, length in sizes:
        network(hidden_states=torch.randn(batch, 16, 4), encoder_hidden_states=torch.randn(batch, length, 8),
                timestep=torch.full((batch,), 0.5), **special(batch, length))
    for one, forward in zip(parts, plain):
        one.forward = forward
    return counter.frame_count


print("torch", torch.__version__.split("+")[0], "diffusers", diffusers.__version__)
for name in NETWORKS:
    for part in ("whole", "blocks"):
        for dynamic in (None, True):
            lengths = graphs(name, part, dynamic, [(2, length) for length in range(5, 20)])
            batches = graphs(name, part, dynamic, [(batch, 7) for batch in range(2, 17)])
            print(f"{name}, {part}, dynamic={dynamic}: {lengths} graphs for 15 lengths, {batches} for 15 batch sizes")
P
"$folder/venv/bin/python" -W ignore "$folder/try.py" 2>/dev/null | tee "$folder/seen"
diff "$folder/seen" - <<'SEEN'
torch 2.13.0 diffusers 0.42.1
FLUX, whole, dynamic=None: 2 graphs for 15 lengths, 2 for 15 batch sizes
FLUX, whole, dynamic=True: 1 graphs for 15 lengths, 1 for 15 batch sizes
FLUX, blocks, dynamic=None: 2 graphs for 15 lengths, 2 for 15 batch sizes
FLUX, blocks, dynamic=True: 1 graphs for 15 lengths, 1 for 15 batch sizes
Qwen-Image, whole, dynamic=None: 8 graphs for 15 lengths, 8 for 15 batch sizes
Qwen-Image, whole, dynamic=True: 8 graphs for 15 lengths, 8 for 15 batch sizes
Qwen-Image, blocks, dynamic=None: 2 graphs for 15 lengths, 2 for 15 batch sizes
Qwen-Image, blocks, dynamic=True: 1 graphs for 15 lengths, 1 for 15 batch sizes
SEEN
