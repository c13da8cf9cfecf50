#!/usr/bin/env bash
# diffusers 0.42.1: FLUX's and Qwen-Image's transformers in bfloat16 round the time that they are given in float32.
#
# One would guess: the caller keeps the time in float32 because times near 1 lie close together, and the network's time
#   embedding, which is computed in float32, gets it as it is. At least FSDP2 with `cast_forward_inputs=False`, which
#   leaves inputs alone, leaves it.
# What happens: `forward` casts the time to the type of the hidden states first, and bfloat16 has 128 values from 0.5 to 1.
#   0.9987 becomes 1.0: the two give the same output bit for bit, and 301 times from 0.5 to 1 give 129 outputs or fewer.
#   A sampler with many or uneven steps, or a training loop that draws times, works with other times than it thinks.
set -euo pipefail
folder=$(mktemp -d); trap 'rm -rf "$folder"' EXIT
python3 -m venv "$folder/venv"
"$folder/venv/bin/pip" install -q --disable-pip-version-check torch==2.13.0
"$folder/venv/bin/pip" install -q --disable-pip-version-check diffusers==0.42.1
cat > "$folder/try.py" <<'P'
import diffusers
import torch
import torch.distributed as dist
from diffusers import FluxTransformer2DModel, QwenImageTransformer2DModel
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import MixedPrecisionPolicy, fully_shard

SMALL = {"num_layers": 1, "attention_head_dim": 16, "num_attention_heads": 2, "joint_attention_dim": 8}


def flux():
    return FluxTransformer2DModel(in_channels=4, num_single_layers=1, pooled_projection_dim=8,
                                  axes_dims_rope=(4, 4, 8), **SMALL)


def qwen_image():
    return QwenImageTransformer2DModel(in_channels=4, out_channels=4, axes_dims_rope=(4, 6, 6), **SMALL)


def output(network, time, dtype):
    def noise(*shape):
        return torch.randn(*shape, generator=torch.Generator().manual_seed(0)).to(dtype)

    time = torch.tensor([time], dtype=torch.float32)
    if isinstance(network, FluxTransformer2DModel):
        special = {"pooled_projections": noise(1, 8), "img_ids": torch.zeros(4, 3), "txt_ids": torch.zeros(3, 3)}
    else:
        special = {"img_shapes": [[(1, 2, 2)]]}
    inputs = {"hidden_states": noise(1, 4, 4), "encoder_hidden_states": noise(1, 3, 8), "timestep": time} | special
    with torch.no_grad():
        return network(**inputs).sample


def tell(name, network, dtype):
    same = torch.equal(output(network, 0.9987, dtype), output(network, 1.0, dtype))
    times = torch.linspace(0.5, 1, 301).tolist()
    outputs = {output(network, time, dtype).float().numpy().tobytes() for time in times}
    count = len(outputs) if len(outputs) > 129 else "129 or fewer"
    print(name, "- 0.9987 and 1.0 give", "the same" if same else "different outputs", "- of 301 outputs", count, "differ")


torch.set_num_threads(1)
dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
print("diffusers", diffusers.__version__)
for make in (flux, qwen_image):
    torch.manual_seed(0)
    network = make().eval()
    for parameter in network.parameters():
        torch.nn.init.normal_(parameter, std=0.3)
    weights = network.state_dict()
    tell(f"{make.__name__} float32", network, torch.float32)
    sharded = make().eval()
    sharded.load_state_dict(weights)
    policy = MixedPrecisionPolicy(param_dtype=torch.bfloat16, cast_forward_inputs=False)
    fully_shard(sharded, mesh=init_device_mesh("cpu", (1,)), mp_policy=policy)
    tell(f"{make.__name__} FSDP2", sharded, torch.bfloat16)
    tell(f"{make.__name__} bfloat16", network.to(torch.bfloat16), torch.bfloat16)
dist.destroy_process_group()
P
"$folder/venv/bin/python" -W ignore "$folder/try.py" 2>/dev/null | tee "$folder/seen"
diff "$folder/seen" - <<'SEEN'
diffusers 0.42.1
flux float32 - 0.9987 and 1.0 give different outputs - of 301 outputs 301 differ
flux FSDP2 - 0.9987 and 1.0 give the same - of 301 outputs 129 or fewer differ
flux bfloat16 - 0.9987 and 1.0 give the same - of 301 outputs 129 or fewer differ
qwen_image float32 - 0.9987 and 1.0 give different outputs - of 301 outputs 301 differ
qwen_image FSDP2 - 0.9987 and 1.0 give the same - of 301 outputs 129 or fewer differ
qwen_image bfloat16 - 0.9987 and 1.0 give the same - of 301 outputs 129 or fewer differ
SEEN
