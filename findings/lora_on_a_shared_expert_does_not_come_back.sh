#!/usr/bin/env bash
# Guess:   a LoRA that peft saves is the one that peft loads again, on any class that both libraries support.
# So:      on Laguna the adapters of the shared expert are lost. The table by which transformers renames published weights (shared_expert becomes
#          shared_experts) is also put to the names of adapter tensors; it takes its dots for any character, so a name that is right already is
#          changed too and finds no module. The other tensors load, a warning lists the missing ones, and the model runs with part of its training.
# Version: peft 0.21.2, transformers 5.24.0
# Why:     the shared expert is the part of such a layer that every token passes. Whoever trains one, saves it and serves it by peft serves another
#          policy than was trained; merging before saving avoids it.
set -eu
work=$(mktemp -d)
trap 'rm -rf "$work"' EXIT
cd "$work"
python3 -m venv env
env/bin/pip install -q torch==2.13.0 numpy==2.4.6 transformers==5.24.0 peft==0.21.2 accelerate==1.15.0
OMP_NUM_THREADS=1 HF_HUB_OFFLINE=1 CUDA_VISIBLE_DEVICES= env/bin/python -W ignore - <<'PY'
import peft
import torch
import transformers
from peft import LoraConfig, PeftModel, get_peft_model
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM, LagunaConfig

transformers.utils.logging.set_verbosity_error()
transformers.utils.logging.disable_progress_bar()
print("peft", peft.__version__, "transformers", transformers.__version__)
torch.manual_seed(0)
config = LagunaConfig(
    vocab_size=128, hidden_size=32, intermediate_size=64, moe_intermediate_size=16, shared_expert_intermediate_size=16, num_hidden_layers=2,
    num_attention_heads=4, num_attention_heads_per_layer=[4, 4], num_key_value_heads=2, head_dim=8, num_experts=4, num_experts_per_tok=2,
    layer_types=["full_attention", "full_attention"], pad_token_id=0, bos_token_id=1, eos_token_id=2)
AutoModelForCausalLM.from_config(config).save_pretrained("base")
ids = torch.arange(3, 20)[None]


def base():
    return AutoModelForCausalLM.from_pretrained("base").eval()


def round_trip(names):
    """Tensors saved, adapter tensors that carry the saved values after loading, and the change of the logits."""
    torch.manual_seed(1)
    trained = get_peft_model(base(), LoraConfig(r=4, target_modules=names, init_lora_weights=False)).eval()
    trained.save_pretrained("adapter")
    loaded = PeftModel.from_pretrained(base(), "adapter").eval()
    values = {name: value for name, value in trained.named_parameters() if ".lora_" in name}
    same = sum(torch.equal(value, values[name]) for name, value in loaded.named_parameters() if ".lora_" in name)
    with torch.no_grad():
        change = float((trained(input_ids=ids).logits - loaded(input_ids=ids).logits).abs().max())
    return len(load_file("adapter/adapter_model.safetensors")), same, change > 1e-4


found = {"attention": round_trip(["q_proj", "o_proj"]), "shared expert": round_trip([r"shared_experts.gate_proj", r"shared_experts.down_proj"])}
for name, (saved, same, changed) in found.items():
    print(f"{name:13}: {saved} tensors saved, {same} come back, logits {'changed' if changed else 'equal'}")
saved, same, changed = found["shared expert"]
raise SystemExit(not (found["attention"] == (8, 8, False) and saved > 0 and same == 0 and changed))
PY

# Output seen:
#   peft 0.21.2 transformers 5.24.0
#   attention    : 8 tensors saved, 8 come back, logits equal
#   shared expert: 4 tensors saved, 0 come back, logits changed
