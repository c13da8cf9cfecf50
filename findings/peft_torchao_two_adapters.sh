#!/usr/bin/env bash
# peft 0.21.2 with torchao 0.18.0: two LoRA adapters cannot be merged into int8 weights; one can.
#
# One would guess: `merge_adapter(adapter_names=["a", "b"])` does for int8 weights what it does for bfloat16 ones, as
#   it does with one name: adds the adapters to the weights and quantises again.
# What happens: UnboundLocalError about a variable `weight`, from inside peft, after the first adapter has been merged:
#   the layer keeps it, and says so (`merged_adapters`). Merging one after the other, a call for each, works.
set -euo pipefail
folder=$(mktemp -d); trap 'rm -rf "$folder"' EXIT
python3 -m venv "$folder/venv"
"$folder/venv/bin/pip" install -q --disable-pip-version-check torch==2.13.0 numpy
"$folder/venv/bin/pip" install -q --disable-pip-version-check peft==0.21.2 torchao==0.18.0 \
    transformers==5.23.0 accelerate==1.15.0
cat > "$folder/try.py" <<'P'
import sys
import peft
import torch
from peft import LoraConfig, get_peft_model
from torchao.quantization import Int8WeightOnlyConfig
from transformers import LlamaConfig, LlamaForCausalLM, TorchAoConfig

IDS = torch.arange(8)[None]
torch.manual_seed(0)
LlamaForCausalLM(LlamaConfig(vocab_size=64, hidden_size=64, intermediate_size=128, num_hidden_layers=1,
                             num_attention_heads=4, num_key_value_heads=4)).save_pretrained(sys.argv[1])
lora = LoraConfig(target_modules=["q_proj"], r=4, init_lora_weights=False)
print("peft", peft.__version__)
for name, options in {"bfloat16": {}, "int8": {"quantization_config": TorchAoConfig(Int8WeightOnlyConfig())}}.items():
    for calls in ([["a"]], [["a", "b"]], [["a"], ["b"]]):
        model = LlamaForCausalLM.from_pretrained(sys.argv[1], dtype=torch.bfloat16, **options)
        model = get_peft_model(model, lora, "a")
        model.add_adapter("b", lora)
        model.base_model.set_adapter(sum(calls, []))
        with torch.no_grad():
            before = model(IDS).logits
            try:
                for names in calls:
                    model.merge_adapter(adapter_names=names)
                end = "merged, outputs close: " + str(torch.allclose(model(IDS).logits, before, atol=0.02))
            except UnboundLocalError:
                end = "UnboundLocalError, merged: " + str(model.model.model.layers[0].self_attn.q_proj.merged_adapters)
        print(name, *calls, end)
P
"$folder/venv/bin/python" -W ignore "$folder/try.py" "$folder/model" 2>/dev/null | tee "$folder/seen"
diff "$folder/seen" - <<'SEEN'
peft 0.21.2
bfloat16 ['a'] merged, outputs close: True
bfloat16 ['a', 'b'] merged, outputs close: True
bfloat16 ['a'] ['b'] merged, outputs close: True
int8 ['a'] merged, outputs close: True
int8 ['a', 'b'] UnboundLocalError, merged: ['a']
int8 ['a'] ['b'] merged, outputs close: True
SEEN
