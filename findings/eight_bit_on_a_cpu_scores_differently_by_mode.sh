#!/usr/bin/env bash
# Guess:   train() and eval() differ by dropout; an 8-bit model without any gives the same log-probabilities in both, so policy and reference of the
#          same frozen weights have a log-ratio of 0 before the first step, and a preference loss starts at log 2.
# So:      on a CPU the mode of an 8-bit layer chooses its arithmetic. In eval mode each input row is rounded to int8 too; in training mode the
#          weights are widened and the inputs kept as they are. It goes by train(), not by whether gradients are on. In float32 the only hint
#          is a log line in eval mode on a cast to float16.
# Version: bitsandbytes 0.50.2, transformers 5.24.0, torch 2.13.0 (CPU; the source takes the second way on CPU and XPU only, CUDA was not run)
# Why:     a policy in training mode beside a reference in eval mode (from_pretrained leaves it so), or reference log-probabilities stored in an eval pass, give
#          every pair a margin of pure rounding; evaluation during training scores another model than the one trained.
set -eu
work=$(mktemp -d)
trap 'rm -rf "$work"' EXIT
cd "$work"
python3 -m venv env
env/bin/pip install -q torch==2.13.0 numpy==2.4.6 transformers==5.24.0 accelerate==1.15.0 bitsandbytes==0.50.2
OMP_NUM_THREADS=1 HF_HUB_OFFLINE=1 CUDA_VISIBLE_DEVICES= env/bin/python -W ignore - <<'PY'
import logging

import bitsandbytes
import torch
import transformers
from transformers import AutoModelForCausalLM, BitsAndBytesConfig, LlamaConfig, LlamaForCausalLM

logging.disable(logging.WARNING)
transformers.utils.logging.disable_progress_bar()
print("bitsandbytes", bitsandbytes.__version__, "transformers", transformers.__version__)
torch.manual_seed(0)
LlamaForCausalLM(LlamaConfig(
    vocab_size=128, hidden_size=64, intermediate_size=128, num_hidden_layers=2, num_attention_heads=4, initializer_range=0.1)).save_pretrained("base")
ids = torch.randint(3, 128, (64, 13))


def load(**how):
    return AutoModelForCausalLM.from_pretrained("base", dtype=torch.float32, device_map="cpu", **how)


def scores(model, train, gradients=False):
    """Log-probability of the 12 last tokens of each row. B"""
    with torch.set_grad_enabled(gradients):
        logits = model.train(train)(ids).logits[:, :-1]
        return logits.log_softmax(-1).gather(-1, ids[:, 1:, None]).sum((1, 2)).detach()


def apart(a, b):
    return (a - b).abs().mean().item()


eight = BitsAndBytesConfig(load_in_8bit=True)
policy, reference, full = load(quantization_config=eight), load(quantization_config=eight), load()
loaded_in = "training" if reference.training else "eval"
train, evaluated = scores(policy, True), scores(reference, False)
gaps = {
    "float32 model, training against eval": apart(scores(full, True), scores(full, False)),
    "8-bit, training against training": apart(train, scores(reference, True)),
    "8-bit, eval against eval": apart(evaluated, scores(policy, False)),
    "8-bit, eval with against without gradients": apart(evaluated, scores(policy, False, gradients=True)),
    "8-bit, training against eval": apart(train, evaluated)}
print("from_pretrained leaves the model in", loaded_in, "mode; mean absolute log-ratio of 64 answers of 12 tokens:")
for name, gap in gaps.items():
    print(f"  {name:44}{gap:.4f}")
margin = (train - evaluated)[::2] - (train - evaluated)[1::2]
losses = -torch.nn.functional.logsigmoid(margin)
print(f"preference loss of 32 pairs at the start (beta 1, log 2 = 0.6931): lowest {losses.min():.4f}, highest {losses.max():.4f}")

layer = policy.model.layers[0].self_attn.q_proj
x = torch.randn(5, 64)
with torch.no_grad():
    outputs = {mode: layer.train(mode == "training")(x) for mode in ("training", "eval")}
weight = layer.state.CB.float() * layer.state.SCB.float()[:, None] / 127
scale = x.abs().amax(1, keepdim=True) / 127
made = {"inputs as they are": x @ weight.T, "inputs rounded to 255 levels a row": torch.round(x / scale) * scale @ weight.T}
error = {(mode, how): apart(outputs[mode], value) / value.abs().mean().item() for mode in outputs for how, value in made.items()}
for (mode, how), value in error.items():
    print(f"one layer in {mode:8} mode, distance to the product with {how:34}: {value:.5f} of its size")
as_is, rounded = made
held = (
    loaded_in == "eval" and all(gap < 1e-4 for name, gap in gaps.items() if name != "8-bit, training against eval")
    and gaps["8-bit, training against eval"] > 0.01 and error["training", as_is] < 0.3 * error["training", rounded]
    and error["eval", rounded] < 0.5 * error["eval", as_is])
raise SystemExit(not held)
PY

# Output seen:
#   bitsandbytes 0.50.2 transformers 5.24.0
#   from_pretrained leaves the model in eval mode; mean absolute log-ratio of 64 answers of 12 tokens:
#     float32 model, training against eval        0.0000
#     8-bit, training against training            0.0000
#     8-bit, eval against eval                    0.0000
#     8-bit, eval with against without gradients  0.0000
#     8-bit, training against eval                0.0399
#   preference loss of 32 pairs at the start (beta 1, log 2 = 0.6931): lowest 0.6028, highest 0.7458
#   one layer in training mode, distance to the product with inputs as they are                : 0.00000 of its size
#   one layer in training mode, distance to the product with inputs rounded to 255 levels a row: 0.00577 of its size
#   one layer in eval     mode, distance to the product with inputs as they are                : 0.00584 of its size
#   one layer in eval     mode, distance to the product with inputs rounded to 255 levels a row: 0.00189 of its size
