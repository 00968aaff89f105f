"""A video language model of 0.18 million parameters, its word-level tokenizer, its processor.

The class is LLaVA-OneVision's, as `transformers` ships it; only the sizes and the start are small.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch
from torch import nn

from mmalign.models.files import usual_mode
from mmalign.quickstart.clip_questions import vocabulary
from mmalign.quickstart.clips import NUM_FRAMES, SIDE

if TYPE_CHECKING:
    from pathlib import Path

_PATCH = 8  # pixels
_WIDTH, _MLP, _LAYERS, _HEADS = 64, 128, 2, 4  # of the tower and of the language model
_MEAN, _STD = [0.15] * 3, [0.25] * 3  # dark backgrounds come to lie near zero
_ROPE_BASE = 100.0  # for 50 tokens; with the usual 10,000 few frequencies tell frames apart
_PAD, _UNKNOWN, _END, _VIDEO, _IMAGE = "<pad>", "<unk>", "<eos>", "<video>", "<image>"
_QUESTION, _ANSWER = "<q>", "<a>"
NUM_TOKENS = NUM_FRAMES * (SIDE // _PATCH // 2) ** 2 + 1
"""Tokens of a clip: four a frame after pooling, and a newline."""

_TEMPLATE = (
    "{% for message in messages %}"
    "{% for part in message['content'] %}{% if part['type'] == 'video' %}<video> {% endif %}"
    "{% endfor %}"
    "{{ '<q> ' if message['role'] == 'user' else '<a> ' }}"
    "{% for part in message['content'] %}{% if part['type'] == 'text' %}{{ part['text'] }}"
    "{% endif %}{% endfor %}"
    "{{ ' ' if message['role'] == 'user' else ' <eos>' }}"
    "{% endfor %}"
    "{% if add_generation_prompt %}{{ '<a> ' }}{% endif %}"
)


def make_processor() -> Any:
    """A LLaVA-OneVision processor for clips of 32 x 32 pixels and a closed list of words."""
    from tokenizers import Tokenizer, models, pre_tokenizers
    from transformers import (
        LlavaOnevisionImageProcessor,
        LlavaOnevisionProcessor,
        LlavaOnevisionVideoProcessor,
        PreTrainedTokenizerFast,
    )

    words = [_PAD, _UNKNOWN, _END, _VIDEO, _IMAGE, _QUESTION, _ANSWER, *vocabulary()]
    backend = Tokenizer(models.WordLevel({w: i for i, w in enumerate(words)}, unk_token=_UNKNOWN))
    backend.pre_tokenizer = pre_tokenizers.WhitespaceSplit()  # type: ignore[assignment]
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=backend,
        pad_token=_PAD,
        unk_token=_UNKNOWN,
        eos_token=_END,
        extra_special_tokens={"video_token": _VIDEO, "image_token": _IMAGE},
    )
    size = {"height": SIDE, "width": SIDE}
    pixels: dict[str, Any] = {"size": size, "image_mean": _MEAN, "image_std": _STD}
    return LlavaOnevisionProcessor(
        image_processor=LlavaOnevisionImageProcessor(**pixels, image_grid_pinpoints=[[SIDE, SIDE]]),
        tokenizer=tokenizer,
        video_processor=LlavaOnevisionVideoProcessor(**pixels, do_sample_frames=False),
        num_image_tokens=(SIDE // _PATCH) ** 2,
        vision_feature_select_strategy="full",
        chat_template=_TEMPLATE,
    )


def make_model(processor: Any, seed: int) -> Any:
    """The model with fresh weights.

    The library's start, a standard deviation of 0.02, is too small at this width: with it the
    directions of movement are not learned in the time there is.

    Args:
        processor: Its tokenizer says how many words there are, and which stand for media.
        seed: Of the weights.
    """
    from transformers import LlavaOnevisionConfig, LlavaOnevisionForConditionalGeneration

    tokenizer = processor.tokenizer
    sizes = {
        "hidden_size": _WIDTH,
        "intermediate_size": _MLP,
        "num_hidden_layers": _LAYERS,
        "num_attention_heads": _HEADS,
    }
    vision = {
        **sizes,
        "model_type": "siglip_vision_model",
        "image_size": SIDE,
        "patch_size": _PATCH,
        "vision_use_head": False,
    }
    text = {
        **sizes,
        "model_type": "qwen2",
        "num_key_value_heads": _HEADS,
        "vocab_size": len(tokenizer),
        "max_position_embeddings": 256,
        "rope_parameters": {"rope_type": "default", "rope_theta": _ROPE_BASE},
        "tie_word_embeddings": False,
        "bos_token_id": None,
        "eos_token_id": tokenizer.eos_token_id,
        "pad_token_id": tokenizer.pad_token_id,
    }
    config = LlavaOnevisionConfig(
        vision_config=vision,
        text_config=text,
        image_token_index=processor.image_token_id,
        video_token_index=processor.video_token_id,
        vision_feature_select_strategy="full",
        vision_feature_layer=-1,
        image_grid_pinpoints=[[SIDE, SIDE]],
        tie_word_embeddings=False,
    )
    torch.manual_seed(seed)
    model = LlavaOnevisionForConditionalGeneration(config)
    _start(model)
    return model


def save(folder: Path, model: Any, processor: Any) -> None:
    """Write both as a folder that the library's Auto classes read."""
    model.save_pretrained(folder)
    processor.save_pretrained(folder)
    usual_mode(folder)


def _start(model: Any) -> None:
    """Every matrix and convolution with 1 / sqrt(inputs), tables with what suits them."""
    for module in model.modules():
        if isinstance(module, nn.Linear | nn.Conv2d):
            inputs = module.weight[0].numel()
            nn.init.normal_(module.weight, std=inputs**-0.5)
    nn.init.normal_(model.get_input_embeddings().weight, std=0.3)
    nn.init.normal_(model.model.vision_tower.embeddings.position_embedding.weight, std=1.0)
    nn.init.normal_(model.get_output_embeddings().weight, std=0.02)
