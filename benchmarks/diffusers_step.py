"""A Diffusion-DPO step the way diffusers' research scripts for SD and SDXL build it."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from turns import Turns

if TYPE_CHECKING:
    from collections.abc import Callable
    from pathlib import Path

    from torch import Tensor, nn

RANK, BETA, LR, DECAY = 16, 5000.0, 1e-5, 0.01
TARGETS = ["to_q", "to_k", "to_v", "to_out.0"]


def run_script(folder: Path, given: dict[str, Any]) -> None:
    """Take steps whenever the parent says so.

    Args:
        folder: The pipeline.
        given: model, device, dtype, resolution, threads, checkpointing.
    """
    import torch
    from diffusers import AutoencoderKL, DDPMScheduler, UNet2DConditionModel
    from peft import LoraConfig

    device, dtype = torch.device(given["device"]), getattr(torch, given["dtype"])
    is_xl = given["model"] == "sdxl"
    turns = Turns(given["device"])
    torch.set_num_threads(given["threads"])
    torch.manual_seed(0)
    unet = UNet2DConditionModel.from_pretrained(folder / "unet", torch_dtype=dtype).to(device)
    # The scripts keep SDXL's VAE in float32 unless they are given one that bears less.
    vae_dtype = torch.float32 if is_xl else dtype
    vae = AutoencoderKL.from_pretrained(folder / "vae", torch_dtype=vae_dtype).to(device)
    scheduler = DDPMScheduler.from_pretrained(folder, subfolder="scheduler")
    vae.requires_grad_(False)
    unet.requires_grad_(False)
    encode_text, ids = _script_text(folder, is_xl, device, dtype)
    unet.add_adapter(
        LoraConfig(r=RANK, lora_alpha=RANK, init_lora_weights="gaussian", target_modules=TARGETS)
    )
    trained = [p for p in unet.parameters() if p.requires_grad]
    for parameter in trained:
        parameter.data = parameter.float()
    if given["checkpointing"]:
        unet.enable_gradient_checkpointing()
    unet.train()
    optimizer = torch.optim.AdamW(trained, lr=LR, weight_decay=DECAY)
    side = given["resolution"]
    stacked = torch.rand(1, 6, side, side) * 2 - 1  # a pair, one image after the other
    cast = torch.autocast(device.type, dtype, enabled=dtype != torch.float32)

    def errors(predicted: Tensor, noise: Tensor) -> Tensor:
        return (predicted.float() - noise.float()).square().mean(dim=(1, 2, 3))

    while True:
        turns.begin()
        pixels = torch.cat(stacked.to(device, vae_dtype).chunk(2, dim=1))
        latents = vae.encode(pixels).latent_dist.sample() * vae.config.scaling_factor
        latents = latents.to(dtype)
        noise = torch.randn_like(latents[:1]).repeat(2, 1, 1, 1)
        t = torch.randint(scheduler.config.num_train_timesteps, (1,), device=device).repeat(2)
        noisy = scheduler.add_noise(latents, noise, t)
        told = encode_text(ids, side)
        with cast:
            error = errors(unet(noisy, t, **told).sample, noise)
        unet.disable_adapters()
        with torch.no_grad(), cast:
            before = errors(unet(noisy, t, **told).sample, noise)
        unet.enable_adapters()
        gap = (error[0] - error[1]) - (before[0] - before[1])
        loss = -torch.nn.functional.logsigmoid(-0.5 * BETA * gap)
        loss.backward()
        torch.nn.utils.clip_grad_norm_(trained, 1.0)
        optimizer.step()
        optimizer.zero_grad()
        turns.end()


def _script_text(
    folder: Path, is_xl: bool, device: Any, dtype: Any
) -> tuple[Callable[[list[Tensor], int], dict[str, Any]], list[Tensor]]:
    """What turns token ids into the U-Net's keywords, and the ids of one caption."""
    import torch
    from transformers import CLIPTextModel, CLIPTextModelWithProjection, CLIPTokenizer

    names = ["text_encoder", "text_encoder_2"] if is_xl else ["text_encoder"]
    kinds = [CLIPTextModel, CLIPTextModelWithProjection]
    encoders: list[nn.Module] = []
    ids: list[Tensor] = []
    for name, kind in zip(names, kinds, strict=False):
        encoder: Any = kind.from_pretrained(folder / name, dtype=dtype)
        encoders.append(encoder.to(device).requires_grad_(False))
        tokenizer = CLIPTokenizer.from_pretrained(
            folder / name.replace("text_encoder", "tokenizer")
        )
        caption = tokenizer(
            "picture number 0 of a benchmark",
            padding="max_length",
            max_length=77,
            truncation=True,
            return_tensors="pt",
        )
        ids.append(caption.input_ids.to(device))

    def encode(ids: list[Tensor], side: int) -> dict[str, Any]:
        if not is_xl:
            return {"encoder_hidden_states": encoders[0](ids[0])[0].repeat(2, 1, 1)}
        with torch.no_grad():
            found = [e(i, output_hidden_states=True) for e, i in zip(encoders, ids, strict=True)]
        states = torch.cat([one.hidden_states[-2] for one in found], dim=-1).repeat(2, 1, 1)
        sizes = torch.tensor([[side, side, 0, 0, side, side]] * 2, device=device, dtype=dtype)
        added = {"text_embeds": found[1].text_embeds.repeat(2, 1), "time_ids": sizes}
        return {"encoder_hidden_states": states, "added_cond_kwargs": added}

    return encode, ids
