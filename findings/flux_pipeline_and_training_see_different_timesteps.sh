#!/usr/bin/env bash
# Guess:   in bfloat16 FLUX's denoiser sees the same timestep when its pipeline samples and when a training script calls it with the pipeline's own
#          timestep over 1000, as the published LoRA scripts do.
# So:      the pipeline rounds t to bfloat16 before it divides, a script divides in float32; the transformer casts what it gets and multiplies by 1000
#          in bfloat16. Of the timesteps 1 to 1000 the pipeline's way leaves 500 distinct values, and the script's differs from it at 183.
#          In float32 both agree to the last digits.
# Version: diffusers 0.42.1, transformers 5.24.0
# Why:     a loss that compares a policy with a reference at one timestep is computed beside the points at which images are sampled; the transformer's
#          embedding of time reads the rounded number, so no later step undoes it.
set -eu
work=$(mktemp -d)
trap 'rm -rf "$work"' EXIT
cd "$work"
python3 -m venv env
env/bin/pip install -q torch==2.13.0 numpy==2.4.6 transformers==5.24.0 diffusers==0.42.1 accelerate==1.15.0
OMP_NUM_THREADS=1 HF_HUB_OFFLINE=1 CUDA_VISIBLE_DEVICES= env/bin/python -W ignore - <<'PY'
import diffusers
import torch
from diffusers import AutoencoderKL, FlowMatchEulerDiscreteScheduler, FluxPipeline, FluxTransformer2DModel

print("diffusers", diffusers.__version__)
diffusers.utils.logging.set_verbosity_error()


def denoiser(dtype):
    torch.manual_seed(0)
    model = FluxTransformer2DModel(
        patch_size=1, in_channels=4, num_layers=1, num_single_layers=1, attention_head_dim=16, num_attention_heads=2,
        joint_attention_dim=32, pooled_projection_dim=32, axes_dims_rope=[4, 4, 8], guidance_embeds=False,
    ).to(dtype)
    seen = []
    model.time_text_embed.register_forward_pre_hook(lambda module, given: seen.append(float(given[0][0])))
    return model, seen


def sampled(dtype):
    """What the model sees when the pipeline samples at the timesteps 1000, 999, ... 1."""
    model, seen = denoiser(dtype)
    vae = AutoencoderKL(latent_channels=1, block_out_channels=(4,), layers_per_block=1, norm_num_groups=1, sample_size=4,
                        use_quant_conv=False, use_post_quant_conv=False, shift_factor=0.0, scaling_factor=1.0).to(dtype)
    pipe = FluxPipeline(
        scheduler=FlowMatchEulerDiscreteScheduler(num_train_timesteps=1000, shift=1.0), vae=vae, text_encoder=None, tokenizer=None,
        text_encoder_2=None, tokenizer_2=None, transformer=model,
    )
    pipe.set_progress_bar_config(disable=True)
    pipe(
        prompt_embeds=torch.zeros(1, 2, 32, dtype=dtype), pooled_prompt_embeds=torch.zeros(1, 32, dtype=dtype), height=16, width=16,
        sigmas=[step / 1000 for step in range(1000, 0, -1)], output_type="latent", generator=torch.Generator().manual_seed(0),
    )
    return seen[::-1]


def trained(dtype):
    """What it sees when it is called as a training script calls it: a float32 timestep over 1000."""
    model, seen = denoiser(dtype)
    ids = torch.zeros(1, 3)
    for timestep in range(1, 1001):
        with torch.no_grad():
            model(
                hidden_states=torch.zeros(1, 1, 4, dtype=dtype), timestep=torch.tensor([float(timestep)]) / 1000, guidance=None,
                encoder_hidden_states=torch.zeros(1, 2, 32, dtype=dtype), pooled_projections=torch.zeros(1, 32, dtype=dtype),
                txt_ids=torch.zeros(2, 3), img_ids=ids,
            )
    return seen


for dtype in (torch.bfloat16, torch.float32):
    one, other = sampled(dtype), trained(dtype)
    assert len(one) == len(other) == 1000
    differ = [t for t, (a, b) in enumerate(zip(one, other), 1) if abs(a - b) > 1e-3]
    print(f"{dtype}: {len(set(one))} distinct values when sampling, {len(set(other))} in a script, other values at {len(differ)} of 1000 timesteps")
    for t in differ[:3]:
        print(f"    t = {t}: {one[t - 1]} and {other[t - 1]}")
    if dtype is torch.bfloat16:
        assert len(differ) > 100 and len(set(one)) < 600, "the pipeline no longer rounds before it divides"
    else:
        assert not differ, "float32 differs too"
PY
