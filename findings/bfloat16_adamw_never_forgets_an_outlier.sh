#!/usr/bin/env bash
# Guess:   AdamW on bfloat16 parameters is coarser than on float32 ones and otherwise alike: one outlier gradient shrinks the steps for some thousand
#          steps (the second moment halves every 693 at beta2 = 0.999), then they are what they were.
# So:      exp_avg_sq takes the parameter's type, and 0.999 * v, whatever v, rounds back to v in bfloat16: it can grow and can never fall. After one
#          outlier the steps of that weight stay small for good, in the loop, foreach and fused implementations alike (the last computes wider
#          and still stores bfloat16). A beta2 of 0.99 forgets, up to the rounding; so does 0.999 with float32 parameters.
# Version: torch 2.13.0 (CPU)
# Why:     training with bfloat16 weights and no float32 copy is how a large policy is made to fit, and preference losses have such outliers (one broken
#          pair). Nothing becomes nan and gradient norms look right, while the weights that were hit hardly learn again. Clipping before
#          the step limits the damage; a beta2 of 0.99 or float32 weights avoid it.
set -eu
work=$(mktemp -d)
trap 'rm -rf "$work"' EXIT
cd "$work"
python3 -m venv env
env/bin/pip install -q torch==2.13.0 numpy==2.4.6
OMP_NUM_THREADS=1 CUDA_VISIBLE_DEVICES= env/bin/python - <<'PY'
import torch

print("torch", torch.__version__.split("+")[0])
LR, STEPS = 1e-3, 20000


def after(dtype, beta2, **how):
    """Second moment and length of the last step (in learning rates) of a calm weight and of one whose first gradient was 1000 times the rest."""
    weight = torch.nn.Parameter(torch.zeros(2, dtype=dtype))
    optimizer = torch.optim.AdamW([weight], lr=LR, betas=(0.9, beta2), weight_decay=0, **how)
    for step in range(STEPS):
        weight.grad = torch.tensor([0.01, 10.0 if step == 0 else 0.01], dtype=dtype)
        weight.data.zero_()  # so that the weight's own rounding plays no part: what it is after the step is the step
        optimizer.step()
    second = optimizer.state[weight]["exp_avg_sq"]
    assert second.dtype == dtype
    return second.tolist(), (weight.detach().float().abs() / LR).tolist()


ways = {"loop": {"foreach": False, "fused": False}, "foreach": {"foreach": True}, "fused": {"fused": True}}
held = True
for name, how in ways.items():
    for dtype, beta2 in ((torch.float32, 0.999), (torch.bfloat16, 0.999), (torch.bfloat16, 0.99)):
        second, length = after(dtype, beta2, **how)
        print(
            f"{name:7} {str(dtype)[6:]:8} beta2 {beta2:<5}: after {STEPS} steps second moment calm {second[0]:.1e}, hit once {second[1]:.1e};"
            f" step calm {length[0]:.2f}, hit once {length[1]:.2f} learning rates")
        stuck = dtype == torch.bfloat16 and beta2 == 0.999
        held &= (second[1] > 0.09 and length[1] < 0.05 < 0.5 < length[0]) if stuck else length[1] > 0.5
values = torch.arange(0x0080, 0x7F80, dtype=torch.int16).view(torch.bfloat16)  # every positive normal number of the format
normal = values[values > 1e-36]
same = int((normal * 0.999 == normal).sum())
print(f"{same} of {len(normal)} positive bfloat16 numbers times 0.999 are themselves")
raise SystemExit(not (held and same == len(normal)))
PY

# Output seen:
#   torch 2.13.0
#   loop    float32  beta2 0.999: after 20000 steps second moment calm 1.0e-04, hit once 1.0e-04; step calm 1.00, hit once 1.00 learning rates
#   loop    bfloat16 beta2 0.999: after 20000 steps second moment calm 3.1e-05, hit once 1.0e-01; step calm 1.77, hit once 0.03 learning rates
#   loop    bfloat16 beta2 0.99 : after 20000 steps second moment calm 7.2e-05, hit once 2.8e-04; step calm 1.15, hit once 0.61 learning rates
#   foreach float32  beta2 0.999: after 20000 steps second moment calm 1.0e-04, hit once 1.0e-04; step calm 1.00, hit once 1.00 learning rates
#   foreach bfloat16 beta2 0.999: after 20000 steps second moment calm 3.1e-05, hit once 1.0e-01; step calm 1.77, hit once 0.03 learning rates
#   foreach bfloat16 beta2 0.99 : after 20000 steps second moment calm 6.2e-05, hit once 1.2e-04; step calm 1.24, hit once 0.92 learning rates
#   fused   float32  beta2 0.999: after 20000 steps second moment calm 1.0e-04, hit once 1.0e-04; step calm 1.00, hit once 1.00 learning rates
#   fused   bfloat16 beta2 0.999: after 20000 steps second moment calm 3.1e-05, hit once 1.0e-01; step calm 1.77, hit once 0.03 learning rates
#   fused   bfloat16 beta2 0.99 : after 20000 steps second moment calm 7.7e-05, hit once 1.5e-04; step calm 1.11, hit once 0.84 learning rates
#   31701 of 31701 positive bfloat16 numbers times 0.999 are themselves
