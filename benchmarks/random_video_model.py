"""A Qwen2.5-VL of random weights in the proportions of the real ones, and rows to train it on."""

from __future__ import annotations

import random
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from pathlib import Path

    from transformers import PreTrainedTokenizerFast

    from mmalign.data.example import Example

FRAMES, FPS = 16, 8
HEIGHT, WIDTH = 392, 504  # 8 x 14 x 18 = 2,016 tokens, each of 2 frames and 28 x 28 pixels
QUESTION, ANSWER = 20, 60  # tokens; the end token is an answer's last
VOCABULARY = 8192
DEPTHS = {"3b": 7, "7b": 3}
"""Vision layers beside 8 text layers, by the model whose proportions they are."""
TEMPLATE = (
    "{% for message in messages %}{{ '<|im_start|> ' + message['role'] + ' ' }}"
    "{% if message['content'] is string %}{{ message['content'] }}{% else %}"
    "{% for part in message['content'] %}{% if part['type'] == 'video' %}"
    "{{ '<|vision_start|><|video_pad|><|vision_end|>' }}"
    "{% elif part['type'] == 'text' %}{{ part['text'] }}{% endif %}{% endfor %}{% endif %}"
    "{{ '<|im_end|>' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|im_start|> assistant ' }}{% endif %}"
)
_MARKS = ["<|endoftext|>", "<|im_start|>", "<|im_end|>", "<|vision_start|>", "<|vision_end|>",
          "<|image_pad|>", "<|video_pad|>"]  # fmt: skip
_ROLES = ["<unk>", "system", "user", "assistant"]


def write_model(folder: Path, like: str) -> None:
    """Save model and processor.

    Args:
        folder: Of both.
        like: A key of `DEPTHS`.
    """
    import torch
    from transformers import (
        AutoConfig,
        AutoModelForImageTextToText,
        Qwen2_5_VLProcessor,
        Qwen2VLImageProcessor,
        Qwen2VLVideoProcessor,
    )

    tokenizer = _tokenizer()
    ids = {mark: tokenizer.convert_tokens_to_ids(mark) for mark in _MARKS}
    depth = DEPTHS[like]
    config = AutoConfig.for_model(
        "qwen2_5_vl",
        text_config={
            "vocab_size": VOCABULARY,
            "hidden_size": 512,
            "intermediate_size": 2752,
            "num_hidden_layers": 8,
            "num_attention_heads": 8,
            "num_key_value_heads": 2,
            "max_position_embeddings": 4096,
            "rope_parameters": {
                "rope_type": "default",
                "rope_theta": 1_000_000.0,
                "mrope_section": [8, 12, 12],
            },
            "bos_token_id": None,
            "eos_token_id": ids["<|im_end|>"],
            "pad_token_id": ids["<|endoftext|>"],
        },
        vision_config={
            "depth": depth,
            "hidden_size": 320,
            "intermediate_size": 856,
            "num_heads": 4,
            "out_hidden_size": 512,
            "fullatt_block_indexes": [depth - 1],
        },
        image_token_id=ids["<|image_pad|>"],
        video_token_id=ids["<|video_pad|>"],
        vision_start_token_id=ids["<|vision_start|>"],
        vision_end_token_id=ids["<|vision_end|>"],
        tie_word_embeddings=True,
    )
    torch.manual_seed(0)
    AutoModelForImageTextToText.from_config(config).save_pretrained(folder)
    area = FRAMES * HEIGHT * WIDTH
    size: dict[str, Any] = {"size": {"shortest_edge": 28 * 28, "longest_edge": area}}
    whole: dict[str, Any] = {"do_sample_frames": False, "cap_pixels_per_frame": False}
    Qwen2_5_VLProcessor(
        Qwen2VLImageProcessor(**size),
        tokenizer,
        Qwen2VLVideoProcessor(**size, **whole),
        chat_template=TEMPLATE,
    ).save_pretrained(folder)


def _tokenizer() -> PreTrainedTokenizerFast:
    """Whole words."""
    from tokenizers import Tokenizer, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    known = [*_MARKS, *_ROLES]
    words = known + [f"w{i}" for i in range(len(known), VOCABULARY)]
    backend = Tokenizer(models.WordLevel({w: i for i, w in enumerate(words)}, unk_token="<unk>"))
    backend.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    return PreTrainedTokenizerFast(
        tokenizer_object=backend,
        unk_token="<unk>",
        pad_token="<|endoftext|>",
        eos_token="<|im_end|>",
        extra_special_tokens=_MARKS,
    )


def make_rows(folder: Path, count: int) -> list[Example]:
    """Pairs of random words, each about a clip of its own, which is written where it lacks."""
    from mmalign.data.example import Candidate, Clip, Example, Media

    draw = random.Random(0)

    def text(length: int) -> str:
        return " ".join(f"w{draw.randrange(100, VOCABULARY)}" for _ in range(length))

    rows: list[Example] = []
    for number in range(count):
        clip = folder / f"clip{number}.mp4"
        if not clip.is_file():
            _write_clip(clip, number)
        answers = (Candidate(text(ANSWER - 1)), Candidate(text(ANSWER - 1)))
        media = Media((Clip(clip),))
        rows.append(Example(f"row-{number}", text(QUESTION), answers, (1.0, 0.0), media=media))
    return rows


def _write_clip(path: Path, seed: int) -> None:
    """A moving pattern of `FRAMES` frames."""
    import av
    import numpy as np

    x, y = np.meshgrid(np.arange(WIDTH), np.arange(HEIGHT))
    with av.open(path, "w") as container:
        stream: Any = container.add_stream("mpeg4", rate=FPS)
        stream.width, stream.height, stream.pix_fmt = WIDTH, HEIGHT, "yuv420p"
        for t in range(FRAMES):
            waves = [np.sin(x / (9 + seed) + t), np.cos(y / (7 + seed) - t), np.sin((x + y) / 31)]
            pixels = (127 * (1 + np.stack(waves, -1))).astype(np.uint8)
            container.mux(stream.encode(av.VideoFrame.from_ndarray(pixels, format="rgb24")))
        container.mux(stream.encode())
