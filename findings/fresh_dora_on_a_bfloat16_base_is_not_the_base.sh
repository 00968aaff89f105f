#!/usr/bin/env bash
# Guess:   a fresh DoRA changes nothing, as a fresh LoRA: B is 0 and the magnitudes are the norms of the weights. The adapter in float32, peft's
#          default on a bfloat16 base, can only be nearer to that than one in bfloat16.
# So:      the norms are taken while the adapter still has the type of the base, in bfloat16, and are cast to float32 as rounded; the forward takes the
#          type from the inputs, which are cast for the float32 adapter, and divides by norms in float32. Every output of every layer starts
#          scaled, by up to 0.4 %. With autocast_adapter_dtype=False both are rounded alike and the start is exact; so it is on a float32 base.
# Version: peft 0.21.2, transformers 5.24.0, torch 2.13.0 (CPU)
# Why:     preference training with adapters takes the base for the reference (the adapter switched off), and relies on a log-ratio of 0 at the start, a
#          loss of log 2. Here each pair has a margin before step 1, about as large as all that bfloat16 changes in the base. Setting the
#          magnitudes to norms in float32 mends it.
set -eu
work=$(mktemp -d)
trap 'rm -rf "$work"' EXIT
cd "$work"
python3 -m venv env
env/bin/pip install -q torch==2.13.0 numpy==2.4.6 transformers==5.24.0 peft==0.21.2 accelerate==1.15.0
OMP_NUM_THREADS=1 HF_HUB_OFFLINE=1 CUDA_VISIBLE_DEVICES= env/bin/python -W ignore - <<'PY'
import logging

import peft
import torch
import transformers
from peft import LoraConfig, get_peft_model
from transformers import AutoModelForCausalLM, LlamaConfig, LlamaForCausalLM

logging.disable(logging.WARNING)
transformers.utils.logging.disable_progress_bar()
print("peft", peft.__version__, "transformers", transformers.__version__, "torch", torch.__version__.split("+")[0])
torch.manual_seed(0)
LlamaForCausalLM(LlamaConfig(
    vocab_size=512, hidden_size=128, intermediate_size=256, num_hidden_layers=4, num_attention_heads=4, initializer_range=0.08)).save_pretrained("base")
ids = torch.randint(3, 512, (16, 65))


def base(dtype):
    return AutoModelForCausalLM.from_pretrained("base", dtype=dtype).eval()


@torch.no_grad()
def scores(model):
    """Log-probability of the 64 last tokens of each row. B"""
    return model(ids).logits[:, :-1].float().log_softmax(-1).gather(-1, ids[:, 1:, None]).sum((1, 2))


def fresh(dtype, dora=True, mended=False, **how):
    """Log-ratio of a fresh adapter and its base, B, and how far the factor of an output is from 1 at most."""
    torch.manual_seed(1)
    model = get_peft_model(base(dtype), LoraConfig(r=4, target_modules="all-linear", use_dora=dora), **how).eval()
    off = 0.0
    for module in model.modules():
        if "default" in getattr(module, "lora_magnitude_vector", {}):
            magnitude, weight = module.lora_magnitude_vector["default"].weight, module.get_base_layer().weight
            norm = torch.linalg.norm(weight.detach().float(), dim=1)
            if mended:
                magnitude.data.copy_(norm)
            off = max(off, (magnitude.detach().float() / norm - 1).abs().max().item())
    with model.disable_adapter():
        reference = scores(model)
    return scores(model) - reference, off


rounding = (scores(base(torch.bfloat16)) - scores(base(torch.float32))).abs().mean().item()
print(f"bfloat16 base against float32 base, 16 answers of 64 tokens: mean absolute log-ratio {rounding:.4f}")
found = {
    "LoRA, bfloat16 base": fresh(torch.bfloat16, dora=False),
    "DoRA, float32 base": fresh(torch.float32),
    "DoRA, bfloat16 base": fresh(torch.bfloat16),
    "the same, adapter in bfloat16": fresh(torch.bfloat16, autocast_adapter_dtype=False),
    "the same, float32 norms put in": fresh(torch.bfloat16, mended=True)}
gap = {}
for name, (ratio, off) in found.items():
    gap[name] = ratio.abs().mean().item()
    loss = -torch.nn.functional.logsigmoid(0.1 * (ratio[::2] - ratio[1::2]))
    print(
        f"{name:31}: magnitudes off by up to {off:.2%}, mean absolute log-ratio {gap[name]:.4f}, loss of a pair (beta 0.1) {loss.min():.4f} to"
        f" {loss.max():.4f}")
wrong = gap.pop("DoRA, bfloat16 base")
raise SystemExit(not (wrong > 0.3 * rounding and found["DoRA, bfloat16 base"][1] > 1e-3 and max(gap.values()) < 0.01 * wrong))
PY

# Output seen:
#   peft 0.21.2 transformers 5.24.0 torch 2.13.0
#   bfloat16 base against float32 base, 16 answers of 64 tokens: mean absolute log-ratio 0.0598
#   LoRA, bfloat16 base            : magnitudes off by up to 0.00%, mean absolute log-ratio 0.0000, loss of a pair (beta 0.1) 0.6931 to 0.6931
#   DoRA, float32 base             : magnitudes off by up to 0.00%, mean absolute log-ratio 0.0000, loss of a pair (beta 0.1) 0.6931 to 0.6931
#   DoRA, bfloat16 base            : magnitudes off by up to 0.38%, mean absolute log-ratio 0.0528, loss of a pair (beta 0.1) 0.6814 to 0.6980
#   the same, adapter in bfloat16  : magnitudes off by up to 0.38%, mean absolute log-ratio 0.0000, loss of a pair (beta 0.1) 0.6931 to 0.6931
#   the same, float32 norms put in : magnitudes off by up to 0.00%, mean absolute log-ratio 0.0000, loss of a pair (beta 0.1) 0.6931 to 0.6931
