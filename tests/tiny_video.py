"""Tiny real video language models with their processors, and short clips, built on the spot."""

from __future__ import annotations

from fractions import Fraction
from typing import TYPE_CHECKING, Any

import numpy as np
from tiny_video_text import (
    KINDS,
    LLAVA,
    OMNI,
    OMNI_MARKS,
    SMOL,
    chat_template,
    make_media_tokenizer,
)

if TYPE_CHECKING:
    from pathlib import Path

    from transformers import PreTrainedConfig, PreTrainedTokenizerFast, ProcessorMixin

__all__ = ["KINDS", "SMOL", "make_video_model", "write_clip"]

WIDTH = 32
SIDE = 56  # pixels a side of every image in the LLaVA classes: 4 x 4 patches of 14
PINPOINTS = [[56, 56], [56, 112]]


def make_video_model(kind: str, folder: Path) -> Path:
    """Save a model of two text and two vision layers, random weights, with its processor.

    Args:
        kind: One of `KINDS` or `SMOL`, the `model_type` of the config.
        folder: Made where missing.

    Returns:
        The folder, for `AutoProcessor` and `AutoModelForImageTextToText`.
    """
    import torch
    from transformers import AutoModelForImageTextToText

    tokenizer = make_media_tokenizer(kind)
    with torch.random.fork_rng():
        torch.manual_seed(7)
        model = AutoModelForImageTextToText.from_config(_config(kind, tokenizer))
        for parameter in model.parameters():
            # Wider than the classes' own, which give almost uniform predictions whatever is seen.
            if parameter.dim() > 1:
                fan_in = parameter[0].numel()
                torch.nn.init.normal_(parameter, std=1.2 * fan_in**-0.5)
        model.save_pretrained(folder)
    _processor(kind, tokenizer).save_pretrained(folder)
    return folder


def write_clip(
    path: Path,
    *,
    frames: int = 16,
    fps: int = 8,
    size: tuple[int, int] = (64, 64),
    sound: bool = True,
    seed: int = 0,
) -> Path:
    """Write an mp4 of a disc that moves over a plain ground, with a tone; both by the seed.

    Args:
        path: The file, mpeg4 video and mono aac at 16 kHz.
        frames: How many.
        fps: Frames a second.
        size: Width and height, pixels, both even.
        sound: False leaves out the audio stream.
        seed: Of colours, place, speed and pitch.
    """
    import av

    with av.open(path, "w") as container:
        video: Any = container.add_stream("mpeg4", rate=fps)
        video.width, video.height, video.pix_fmt = *size, "yuv420p"
        video.bit_rate = 1_000_000
        audio: Any = container.add_stream("aac", rate=16_000, layout="mono") if sound else None
        for pixels in _disc(frames, size, seed):
            container.mux(video.encode(av.VideoFrame.from_ndarray(pixels, format="rgb24")))
        container.mux(video.encode())
        if audio is not None:
            wave = _tone(frames / fps, seed)[None]
            block = av.AudioFrame.from_ndarray(wave, format="fltp", layout="mono")
            block.sample_rate, block.pts, block.time_base = 16_000, 0, Fraction(1, 16_000)
            container.mux(audio.encode(block))
            container.mux(audio.encode())
    return path


def _disc(frames: int, size: tuple[int, int], seed: int) -> np.ndarray[Any, Any]:
    """[T, H, W, 3] uint8."""
    rng = np.random.default_rng(seed)
    ground, colour = rng.integers(0, 256, (2, 3))
    start, speed = rng.uniform(0.2, 0.8, 2), rng.uniform(-0.08, 0.08, 2)
    x, y = np.meshgrid(np.arange(size[0]) / size[0], np.arange(size[1]) / size[1])
    shown = []
    for t in range(frames):
        place = (start + t * speed) % 1.0
        inside = (x - place[0]) ** 2 + (y - place[1]) ** 2 < 0.04
        shown.append(np.where(inside[..., None], colour, ground).astype(np.uint8))
    return np.stack(shown)


def _tone(seconds: float, seed: int) -> np.ndarray[Any, Any]:
    """[S] float32 at 16 kHz; a semitone up with every seed."""
    time = np.arange(round(seconds * 16_000)) / 16_000
    return (0.3 * np.sin(2 * np.pi * 220 * 2 ** (seed / 12) * time)).astype(np.float32)


def _config(kind: str, tokenizer: PreTrainedTokenizerFast) -> PreTrainedConfig:
    text: dict[str, Any] = {
        "vocab_size": len(tokenizer),
        "hidden_size": WIDTH,
        "intermediate_size": 64,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "max_position_embeddings": 2048,
        "pad_token_id": tokenizer.pad_token_id,
        "eos_token_id": tokenizer.eos_token_id,
        "bos_token_id": tokenizer.bos_token_id,
    }
    make = _llava_config if kind in LLAVA else _smol_config if kind == SMOL else _qwen_config
    return make(kind, text, tokenizer)


def _llava_config(
    kind: str, text: dict[str, Any], tokenizer: PreTrainedTokenizerFast
) -> PreTrainedConfig:
    """A tower of SigLIP or CLIP before a Qwen 2 or Llama."""
    from transformers import AutoConfig

    siglip = kind == "llava_onevision"
    vision: dict[str, Any] = {
        "model_type": "siglip_vision_model" if siglip else "clip_vision_model",
        "hidden_size": WIDTH,
        "intermediate_size": 64,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "image_size": SIDE,
        "patch_size": 14,
    }
    if siglip:
        vision["vision_use_head"] = False
    own: dict[str, Any] = {"image_grid_pinpoints": PINPOINTS}
    if kind == "video_llava":
        own = {"image_seq_length": 16, "video_seq_length": 8 * 17}
    return AutoConfig.for_model(
        kind,
        text_config={**text, "model_type": "llama" if kind == "video_llava" else "qwen2"},
        vision_config=vision,
        image_token_index=tokenizer.convert_tokens_to_ids("<image>"),
        video_token_index=tokenizer.convert_tokens_to_ids("<video>"),
        vision_feature_layer=-1 if siglip else -2,
        vision_feature_select_strategy="full" if siglip else "default",
        tie_word_embeddings=False,
        **own,
    )


def _smol_config(
    kind: str, text: dict[str, Any], tokenizer: PreTrainedTokenizerFast
) -> PreTrainedConfig:
    """A tower of SigLIP before a Llama; a frame takes 4 tokens."""
    from transformers import AutoConfig

    return AutoConfig.for_model(
        kind,
        text_config={**text, "model_type": "llama"},
        vision_config={
            "hidden_size": WIDTH,
            "intermediate_size": 64,
            "num_hidden_layers": 2,
            "num_attention_heads": 4,
            "image_size": SIDE,
            "patch_size": 14,
        },
        image_token_id=tokenizer.convert_tokens_to_ids("<image>"),
        scale_factor=2,
        tie_word_embeddings=False,
    )


def _qwen_config(
    kind: str, text: dict[str, Any], tokenizer: PreTrainedTokenizerFast
) -> PreTrainedConfig:
    """A tower of the family's own, and one for sound in Omni."""
    from transformers import AutoConfig

    rope: dict[str, Any] = {
        "rope_type": "default",
        "rope_theta": 10_000.0,
        "mrope_section": [2, 1, 1],  # pairs of a head's 8 dimensions: time, height, width
    }
    vision: dict[str, Any] = {"depth": 2, "num_heads": 4, "hidden_size": WIDTH}
    if kind == "qwen2_vl":
        vision |= {"embed_dim": WIDTH, "mlp_ratio": 2}
    else:
        vision |= {"intermediate_size": 64, "out_hidden_size": WIDTH}
    if kind in ("qwen2_5_vl", OMNI):
        vision |= {"window_size": 56, "fullatt_block_indexes": [1]}
    if kind == "qwen3_vl":
        vision |= {"num_position_embeddings": 64, "deepstack_visual_indexes": [0]}
        text = {**text, "head_dim": 8}
        rope["mrope_interleaved"] = True

    names = {"image_token_id": "<|image_pad|>", "video_token_id": "<|video_pad|>"}
    names |= {"vision_start_token_id": "<|vision_start|>", "vision_end_token_id": "<|vision_end|>"}
    sound: dict[str, Any] = {}
    if kind == OMNI:
        names = {f"{medium}_token_index": marks[1] for medium, marks in OMNI_MARKS.items()}
        for sense in ("vision", "audio"):
            names[f"{sense}_start_token_id"] = f"<|{sense}_bos|>"
            names[f"{sense}_end_token_id"] = f"<|{sense}_eos|>"
        audio = {"num_mel_bins": 16, "encoder_layers": 2, "encoder_attention_heads": 4}
        sound["audio_config"] = {
            **audio,
            "encoder_ffn_dim": 64,
            "d_model": WIDTH,
            "output_dim": WIDTH,
        }
    return AutoConfig.for_model(
        kind,
        text_config={**text, "rope_parameters": rope},
        vision_config=vision,
        tie_word_embeddings=False,
        **{name: tokenizer.convert_tokens_to_ids(token) for name, token in names.items()},
        **sound,
    )


def _processor(kind: str, tokenizer: PreTrainedTokenizerFast) -> ProcessorMixin:
    make = (
        _llava_processor if kind in LLAVA else _smol_processor if kind == SMOL else _qwen_processor
    )
    return make(kind, tokenizer, chat_template(kind))


def _smol_processor(kind: str, tokenizer: PreTrainedTokenizerFast, chat: str) -> ProcessorMixin:
    """Frames become squares; of an image, up to four tiles and the whole. It needs num2words."""
    import transformers as hf

    size: dict[str, Any] = {
        "size": {"longest_edge": 2 * SIDE},
        "max_image_size": {"longest_edge": SIDE},
    }
    return hf.SmolVLMProcessor(
        hf.SmolVLMImageProcessor(**size),
        tokenizer,
        hf.SmolVLMVideoProcessor(**size, do_sample_frames=False),
        image_seq_len=4,
        chat_template=chat,
    )


def _llava_processor(kind: str, tokenizer: PreTrainedTokenizerFast, chat: str) -> ProcessorMixin:
    """Every frame of one size."""
    import transformers as hf

    if kind == "llava_onevision":
        size: dict[str, Any] = {"size": {"height": SIDE, "width": SIDE}}
        return hf.LlavaOnevisionProcessor(
            hf.LlavaOnevisionImageProcessor(**size, image_grid_pinpoints=PINPOINTS),
            tokenizer,
            hf.LlavaOnevisionVideoProcessor(**size),
            num_image_tokens=16,
            vision_feature_select_strategy="full",
            chat_template=chat,
        )
    size = {"size": {"shortest_edge": SIDE}, "crop_size": {"height": SIDE, "width": SIDE}}
    shape: dict[str, Any] = {
        "patch_size": 14,
        "num_additional_image_tokens": 1,
        "vision_feature_select_strategy": "default",
        "chat_template": chat,
    }
    if kind == "video_llava":
        image = hf.VideoLlavaImageProcessor(**size)
        return hf.VideoLlavaProcessor(
            image, hf.VideoLlavaVideoProcessor(**size), tokenizer, **shape
        )
    image = hf.LlavaNextImageProcessor(**size, image_grid_pinpoints=PINPOINTS)
    video = hf.LlavaNextVideoVideoProcessor(**size)
    return hf.LlavaNextVideoProcessor(video, image, tokenizer, **shape)


def _qwen_processor(kind: str, tokenizer: PreTrainedTokenizerFast, chat: str) -> ProcessorMixin:
    """Frames of their own shape, at most 128 tokens a clip."""
    import transformers as hf

    patch = 16 if kind == "qwen3_vl" else 14
    unit = (2 * patch) ** 2  # pixels of one token
    size: dict[str, Any] = {
        "patch_size": patch,
        "size": {"shortest_edge": unit, "longest_edge": 128 * unit},
    }
    chosen: dict[str, Any] = {"do_sample_frames": False, "cap_pixels_per_frame": False}
    image = hf.Qwen2VLImageProcessor(**size)
    if kind == "qwen3_vl":
        video = hf.Qwen3VLVideoProcessor(**size, **chosen)
        return hf.Qwen3VLProcessor(image, tokenizer, video, chat_template=chat)
    video = hf.Qwen2VLVideoProcessor(**size, **chosen)
    if kind == OMNI:
        sound = hf.WhisperFeatureExtractor(feature_size=16, return_attention_mask=True)
        return hf.Qwen2_5OmniProcessor(image, video, sound, tokenizer, chat_template=chat)
    make = hf.Qwen2VLProcessor if kind == "qwen2_vl" else hf.Qwen2_5_VLProcessor
    return make(image, tokenizer, video, chat_template=chat)
