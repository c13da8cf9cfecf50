#!/usr/bin/env bash
# transformers 5.23.0, torchao 0.18.0: `get_memory_footprint()` of a model in int8 says what it took in bfloat16.
#
# One would guess: a model that is loaded with int8 weights says half of what it says in bfloat16. The method "will return
#   the memory footprint of the current model in bytes", and `nbytes` of a tensor says what it holds.
# What happens: the footprint is that of bfloat16, and so are `nbytes` and `untyped_storage().nbytes()` of a weight: they
#   come from the shape and the type that the tensor claims to have. What is held is half. Who sizes a machine by these
#   numbers, or checks by them that quantising did something, is misled. Count the inner tensors instead.
set -euo pipefail
folder=$(mktemp -d); trap 'rm -rf "$folder"' EXIT
python3 -m venv "$folder/venv"
"$folder/venv/bin/pip" install -q --disable-pip-version-check torch==2.13.0 numpy
"$folder/venv/bin/pip" install -q --disable-pip-version-check torchao==0.18.0 transformers==5.23.0 accelerate==1.15.0
cat > "$folder/try.py" <<'P'
import sys
import torch
import torchao
import transformers
from torchao.quantization import Int8WeightOnlyConfig
from transformers import LlamaConfig, LlamaForCausalLM, TorchAoConfig

SHAPE = {"vocab_size": 64, "hidden_size": 256, "intermediate_size": 1024, "num_hidden_layers": 4,
         "num_attention_heads": 4, "num_key_value_heads": 4}


def held(tensor):
    """Bytes of a tensor, or of the tensors that it is made of."""
    if hasattr(tensor, "__tensor_flatten__"):
        return sum(held(getattr(tensor, name)) for name in tensor.__tensor_flatten__()[0])
    return tensor.numel() * tensor.element_size()


def tell(name, model):
    tensors = [*model.parameters(), *model.buffers()]
    weight = model.model.layers[0].mlp.up_proj.weight
    print(name, "- footprint", round(model.get_memory_footprint() / 1e6, 1), "MB, held",
          round(sum(map(held, tensors)) / 1e6, 1), "MB - a weight's nbytes", weight.nbytes, "storage",
          weight.untyped_storage().nbytes(), "held", held(weight))


print("transformers", transformers.__version__, "torchao", torchao.__version__.partition("+")[0])
model = LlamaForCausalLM(LlamaConfig(**SHAPE)).to(torch.bfloat16)
tell("bfloat16", model)
model.save_pretrained(sys.argv[1])
quantization = TorchAoConfig(Int8WeightOnlyConfig())
tell("int8", LlamaForCausalLM.from_pretrained(sys.argv[1], dtype=torch.bfloat16, quantization_config=quantization))
P
"$folder/venv/bin/python" -W ignore "$folder/try.py" "$folder/model" 2>/dev/null | tee "$folder/seen"
diff "$folder/seen" - <<'SEEN'
transformers 5.23.0 torchao 0.18.0
bfloat16 - footprint 8.5 MB, held 8.5 MB - a weight's nbytes 524288 storage 524288 held 524288
int8 - footprint 8.5 MB, held 4.3 MB - a weight's nbytes 524288 storage 524288 held 267264
SEEN
