"""Tiny random pipelines of diffusers with the wiring of the true ones, written on the spot.

Each takes well under two seconds on one thread, loads with diffusers' own pipeline class (but for
the one without a VAE), and always has the same weights. Images are 32 or 64 pixels a side.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerFast

BEGIN, END = "<|startoftext|>", "<|endoftext|>"
MERGES = [("c", "a"), ("ca", "t</w>"), ("d", "o"), ("do", "g</w>"), ("r", "e"), ("re", "d</w>")]
LENGTH = 77

# The tables of the true models.
SD_SCHEDULE: dict[str, Any] = {
    "beta_start": 0.00085,
    "beta_end": 0.012,
    "beta_schedule": "scaled_linear",
    "num_train_timesteps": 1000,
    "steps_offset": 1,
}


def make_sd15(folder: Path, **unet: Any) -> Path:
    """Stable Diffusion 1.5: U-Net of 4 latent channels, one CLIP encoder, PNDM; 64 pixels a side.

    Args:
        folder: Where the pipeline goes.
        unet: Settings of the U-Net to change (`in_channels=9` for an inpainting model, ...).
    """
    from diffusers import AutoencoderKL, PNDMScheduler, UNet2DConditionModel

    with _seeded():
        shape: dict[str, Any] = {
            "sample_size": 8,
            "block_out_channels": (16, 32),
            "layers_per_block": 1,
            "down_block_types": ("CrossAttnDownBlock2D", "DownBlock2D"),
            "up_block_types": ("UpBlock2D", "CrossAttnUpBlock2D"),
            "cross_attention_dim": 32,
            "attention_head_dim": 2,
            "norm_num_groups": 4,
        }
        scheduler = PNDMScheduler(**SD_SCHEDULE, skip_prk_steps=True, set_alpha_to_one=False)
        return _write(
            folder,
            "StableDiffusionPipeline",
            unet=UNet2DConditionModel(**{**shape, **unet}),
            vae=AutoencoderKL(**_vae(latent_channels=4, scaling_factor=0.18215)),
            text_encoder=_clip(32, projected=False),
            tokenizer=clip_tokenizer(),
            scheduler=scheduler,
            safety_checker=None,
            feature_extractor=None,
        )


def make_sdxl(folder: Path, **unet: Any) -> Path:
    """SDXL: two CLIP encoders, pooled embeddings, six time ids, Euler; 64 pixels a side."""
    from diffusers import AutoencoderKL, EulerDiscreteScheduler, UNet2DConditionModel

    pooled, ids = 24, 8
    with _seeded():
        shape: dict[str, Any] = {
            "sample_size": 8,
            "block_out_channels": (16, 32),
            "layers_per_block": 1,
            "down_block_types": ("DownBlock2D", "CrossAttnDownBlock2D"),
            "up_block_types": ("CrossAttnUpBlock2D", "UpBlock2D"),
            "transformer_layers_per_block": (1, 2),
            "use_linear_projection": True,
            "cross_attention_dim": 32 + 48,
            "attention_head_dim": (2, 4),
            "norm_num_groups": 4,
            "addition_embed_type": "text_time",
            "addition_time_embed_dim": ids,
            "projection_class_embeddings_input_dim": pooled + 6 * ids,
        }
        return _write(
            folder,
            "StableDiffusionXLPipeline",
            unet=UNet2DConditionModel(**{**shape, **unet}),
            vae=AutoencoderKL(**_vae(latent_channels=4, scaling_factor=0.13025), force_upcast=True),
            text_encoder=_clip(32, projected=False),
            text_encoder_2=_clip(48, projected=True, projection=pooled, act="gelu"),
            tokenizer=clip_tokenizer(),
            tokenizer_2=clip_tokenizer(),
            scheduler=EulerDiscreteScheduler(**SD_SCHEDULE),
            options={"force_zeros_for_empty_prompt": True},
        )


def make_sd3(folder: Path, *, t5: bool = True) -> Path:
    """SD 3: flow transformer of 16 channels, two projected CLIP encoders and T5, shift 3."""
    from diffusers import AutoencoderKL, FlowMatchEulerDiscreteScheduler, SD3Transformer2DModel
    from transformers import T5Config, T5EncoderModel

    with _seeded():
        transformer = SD3Transformer2DModel(
            sample_size=8,
            patch_size=2,
            in_channels=16,
            out_channels=16,
            num_layers=2,
            attention_head_dim=8,
            num_attention_heads=4,
            joint_attention_dim=64,
            caption_projection_dim=32,
            pooled_projection_dim=24 + 16,
            pos_embed_max_size=16,
            qk_norm="rms_norm",
        )
        settings = T5Config(vocab_size=160, d_model=64, d_kv=16, d_ff=64, num_layers=1, num_heads=4)
        vae = _vae(latent_channels=16, scaling_factor=1.5305, shift_factor=0.0609)
        plain = {"use_quant_conv": False, "use_post_quant_conv": False}
        return _write(
            folder,
            "StableDiffusion3Pipeline",
            transformer=transformer,
            vae=AutoencoderKL(**vae, **plain),
            text_encoder=_clip(24, projected=True, projection=24),
            text_encoder_2=_clip(32, projected=True, projection=16, act="gelu"),
            text_encoder_3=T5EncoderModel(settings).eval() if t5 else None,
            tokenizer=clip_tokenizer(),
            tokenizer_2=clip_tokenizer(),
            tokenizer_3=t5_tokenizer() if t5 else None,
            scheduler=FlowMatchEulerDiscreteScheduler(shift=3.0),
        )


def make_flux(folder: Path, *, schnell: bool = False) -> Path:
    """FLUX.1 dev: packed latents, CLIP pooled, T5, a guidance scale, a shift by the image's size.

    Args:
        folder: Where the pipeline goes.
        schnell: No guidance scale and no shift, as in FLUX.1 schnell.
    """
    from diffusers import AutoencoderKL, FlowMatchEulerDiscreteScheduler, FluxTransformer2DModel
    from transformers import T5Config, T5EncoderModel

    with _seeded():
        transformer = FluxTransformer2DModel(
            in_channels=4 * 16,
            num_layers=1,
            num_single_layers=1,
            attention_head_dim=16,
            num_attention_heads=2,
            joint_attention_dim=64,
            pooled_projection_dim=24,
            guidance_embeds=not schnell,
            axes_dims_rope=(4, 6, 6),
        )
        settings = T5Config(vocab_size=160, d_model=64, d_kv=16, d_ff=64, num_layers=1, num_heads=4)
        vae = _vae(latent_channels=16, scaling_factor=0.3611, shift_factor=0.1159)
        plain = {"use_quant_conv": False, "use_post_quant_conv": False}
        shift = {"shift": 1.0} if schnell else {"shift": 3.0, "use_dynamic_shifting": True}
        return _write(
            folder,
            "FluxPipeline",
            transformer=transformer,
            vae=AutoencoderKL(**vae, **plain),
            text_encoder=_clip(24, projected=False),
            text_encoder_2=T5EncoderModel(settings).eval(),
            tokenizer=clip_tokenizer(),
            tokenizer_2=t5_tokenizer(),
            scheduler=FlowMatchEulerDiscreteScheduler(**shift),
        )


def make_digits_like(folder: Path) -> Path:
    """A pipeline on pixels: no VAE, one channel of 8 x 8, a cosine table; as the demo's digits."""
    from diffusers import DDPMScheduler, UNet2DConditionModel

    with _seeded():
        unet = UNet2DConditionModel(
            sample_size=8,
            in_channels=1,
            out_channels=1,
            block_out_channels=(16, 32),
            layers_per_block=1,
            down_block_types=("DownBlock2D", "CrossAttnDownBlock2D"),
            up_block_types=("CrossAttnUpBlock2D", "UpBlock2D"),
            cross_attention_dim=32,
            attention_head_dim=4,
            norm_num_groups=4,
        )
        return _write(
            folder,
            "StableDiffusionPipeline",
            unet=unet,
            vae=None,
            text_encoder=_clip(32, projected=False),
            tokenizer=clip_tokenizer(),
            scheduler=DDPMScheduler(beta_schedule="squaredcos_cap_v2"),
            safety_checker=None,
            feature_extractor=None,
        )


def clip_tokenizer() -> PreTrainedTokenizerFast:
    """CLIP's tokenizer over bytes and a few words: cat, dog and red are one token each."""
    from tokenizers.pre_tokenizers import ByteLevel
    from transformers import CLIPTokenizer

    letters = sorted(ByteLevel.alphabet())
    words = [*letters, *(f"{letter}</w>" for letter in letters), *map("".join, MERGES), BEGIN, END]
    vocab = {word: index for index, word in enumerate(words)}
    return CLIPTokenizer(vocab=vocab, merges=MERGES, model_max_length=LENGTH)  # pyright: ignore


def t5_tokenizer() -> PreTrainedTokenizerFast:
    """T5's tokenizer over single letters."""
    from transformers import T5Tokenizer

    special = [("<pad>", 0.0), ("</s>", 0.0), ("<unk>", 0.0), ("▁", -2.0)]
    letters = [(letter, -3.0) for letter in "abcdefghijklmnopqrstuvwxyz0123456789,."]
    return T5Tokenizer(vocab=special + letters, model_max_length=512)  # pyright: ignore


def _clip(
    hidden: int, *, projected: bool, projection: int | None = None, act: str = "quick_gelu"
) -> Any:
    from transformers import CLIPTextConfig, CLIPTextModel, CLIPTextModelWithProjection

    size = 2 * 256 + len(MERGES) + 2
    config = CLIPTextConfig(
        vocab_size=size,
        hidden_size=hidden,
        intermediate_size=2 * hidden,
        num_hidden_layers=2,
        num_attention_heads=2,
        max_position_embeddings=LENGTH,
        hidden_act=act,
        projection_dim=projection or hidden,
        bos_token_id=size - 2,
        eos_token_id=size - 1,
        pad_token_id=size - 1,
    )
    kind = CLIPTextModelWithProjection if projected else CLIPTextModel
    return kind(config).eval()


def _vae(**settings: Any) -> dict[str, Any]:
    """A true VAE's wiring in miniature: three halvings."""
    kinds = {
        "down_block_types": ("DownEncoderBlock2D",) * 4,
        "up_block_types": ("UpDecoderBlock2D",) * 4,
    }
    shape = {"block_out_channels": (8, 8, 8, 16), "layers_per_block": 1, "norm_num_groups": 4}
    return {**kinds, **shape, "sample_size": 64, **settings}


def _seeded() -> Any:
    """The same weights each time, without touching the caller's random numbers."""
    from contextlib import contextmanager

    @contextmanager
    def seeded() -> Any:
        with torch.random.fork_rng():
            torch.manual_seed(7)
            yield

    return seeded()


def _write(
    folder: Path, pipeline: str, *, options: dict[str, Any] | None = None, **parts: Any
) -> Path:
    """Write parts and model_index.json; a part of None is one that the pipeline does without."""
    import diffusers

    index: dict[str, Any] = {"_class_name": pipeline, "_diffusers_version": diffusers.__version__}
    index |= options or {}
    if "safety_checker" in parts:
        index["requires_safety_checker"] = False
    for name, part in parts.items():
        if part is None:
            index[name] = [None, None]
            continue
        part.save_pretrained(folder / name)
        library = "diffusers" if hasattr(diffusers, type(part).__name__) else "transformers"
        index[name] = [library, type(part).__name__]
    text = json.dumps(index, indent=2, sort_keys=True)
    (folder / "model_index.json").write_text(text + "\n", encoding="utf-8")
    return folder
