#!/usr/bin/env bash
# Guess:   PeftModel.from_pretrained tells when adapter and base do not fit: tensors of the file that find no module are an error, or a warning as
#          they are for missing ones.
# So:      only the other direction is told. A deeper base warns of missing tensors; a shallower one, or one that names its layers otherwise, loads
#          what happens to fit and leaves out the rest in silence. The list is there: load_adapter() returns it as unexpected_keys, and
#          from_pretrained looks at missing_keys alone.
# Version: peft 0.21.2, transformers 5.24.0
# Why:     one architecture is published with separate and with joined projections (q, k, v in one). An adapter made on one form and loaded on the other is
#          a fraction of itself, o_proj and down_proj; it is merged, scored or taken as a reference as if it were the trained policy.
set -eu
work=$(mktemp -d)
trap 'rm -rf "$work"' EXIT
cd "$work"
python3 -m venv env
env/bin/pip install -q torch==2.13.0 numpy==2.4.6 transformers==5.24.0 peft==0.21.2 accelerate==1.15.0
OMP_NUM_THREADS=1 HF_HUB_OFFLINE=1 CUDA_VISIBLE_DEVICES= env/bin/python -W ignore - <<'PY'
import logging
import warnings

import peft
import transformers
from peft import LoraConfig, PeftModel, get_peft_model
from safetensors.torch import load_file
from transformers import LlamaConfig, LlamaForCausalLM, Phi3Config, Phi3ForCausalLM

transformers.utils.logging.set_verbosity_error()
print("peft", peft.__version__, "transformers", transformers.__version__)
SIZE = {"vocab_size": 128, "hidden_size": 64, "intermediate_size": 128, "num_attention_heads": 4, "num_key_value_heads": 4}
NAMES = ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]


def llama(layers):
    return LlamaForCausalLM(LlamaConfig(num_hidden_layers=layers, **SIZE))


def joined(layers):
    return Phi3ForCausalLM(Phi3Config(num_hidden_layers=layers, pad_token_id=0, bos_token_id=1, eos_token_id=2, **SIZE))


said = []
listener = logging.Handler()
listener.emit = lambda record: said.append(record.getMessage()) if record.name.startswith("peft") else None
logging.getLogger().addHandler(listener)


def fits(base):
    """Tensors the loaded model has, whether anything on keys was said, and how many load_adapter itself reports as unexpected and missing."""
    said.clear()
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        model = PeftModel.from_pretrained(base, "adapter")
    told = any("adapter" in text.lower() or "key" in text.lower() for text in [str(one.message) for one in caught] + said)
    has = sum(".default." in name for name, _ in model.named_parameters())
    report = model.load_adapter("adapter", "again")
    return has, told, len(report.unexpected_keys), len(report.missing_keys)


get_peft_model(llama(4), LoraConfig(r=4, target_modules=NAMES, init_lora_weights=False)).save_pretrained("adapter")
print(len(load_file("adapter/adapter_model.safetensors")), "tensors in the file of an adapter for 4 layers with separate projections")
found = {
    "the base it was made on": fits(llama(4)), "a base of 5 layers": fits(llama(5)), "a base of 2 layers": fits(llama(2)),
    "joined projections": fits(joined(4))}
for name, (has, told, unexpected, missing) in found.items():
    print(f"{name:24}: {has} tensors in the model, {'a warning' if told else 'silence'}; load_adapter's list: {unexpected} unexpected, {missing} missing")
held = found == {
    "the base it was made on": (56, False, 0, 0), "a base of 5 layers": (70, True, 0, 14), "a base of 2 layers": (28, False, 28, 0),
    "joined projections": (16, False, 40, 0)}
raise SystemExit(not held)
PY

# Output seen:
#   peft 0.21.2 transformers 5.24.0
#   56 tensors in the file of an adapter for 4 layers with separate projections
#   the base it was made on : 56 tensors in the model, silence; load_adapter's list: 0 unexpected, 0 missing
#   a base of 5 layers      : 70 tensors in the model, a warning; load_adapter's list: 0 unexpected, 14 missing
#   a base of 2 layers      : 28 tensors in the model, silence; load_adapter's list: 28 unexpected, 0 missing
#   joined projections      : 16 tensors in the model, silence; load_adapter's list: 40 unexpected, 0 missing
