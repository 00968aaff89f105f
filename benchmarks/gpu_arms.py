"""What `text_vs_trl.py` compares on a GPU: model, data, and the settings of every arm.

A Llama of 1.24 billion parameters, the shape of Llama 3.2 1B, vocabulary 128,256, random weights;
8 pairs a step, the same ones every time. Products are bfloat16's in all arms. A LoRA of rank 16 on
all linear layers has its base in bfloat16; where all weights are trained they are float32 under
autocast, or bfloat16 in the arms named so, whose steps TRL rounds off and we round at random.
`trl` has TRL's defaults, gradient checkpointing among them. Lengths are those of the CPU's
comparison, and unequal ones as those of real answers.
"""

from __future__ import annotations

import random
from typing import Any

PAIRS = 8
VOCABULARY = 128_256
MODEL: dict[str, Any] = {
    "vocab_size": VOCABULARY,
    "hidden_size": 2048,
    "intermediate_size": 8192,
    "num_hidden_layers": 16,
    "num_attention_heads": 32,
    "num_key_value_heads": 8,
    "head_dim": 64,
    "max_position_embeddings": 2048,
    "tie_word_embeddings": True,
}
RANK = 16

_LORA = {"lora": True, "dtype": "bfloat16"}
_HALF = {"dtype": "bfloat16"}
ARMS: dict[str, dict[str, tuple[str, dict[str, Any]]]] = {
    "lora": {
        "trl": ("trl", {**_LORA, "checkpointing": True}),
        "trl, no checkpointing": ("trl", {**_LORA, "checkpointing": False}),
        "mmalign": ("mmalign", _LORA),
        "mmalign, plain rows": ("mmalign", {**_LORA, "shared_prefix": "off"}),
        "mmalign tdpo2": ("mmalign", {**_LORA, "objective": "tdpo2"}),
    },
    "full": {
        "trl": ("trl", {"dtype": "float32", "checkpointing": True}),
        "trl, no checkpointing": ("trl", {"dtype": "float32", "checkpointing": False}),
        "trl, bfloat16": ("trl", {**_HALF, "checkpointing": False}),
        "mmalign": ("mmalign", {}),
        "mmalign, bfloat16": ("mmalign", _HALF),
    },
}
SHAPES: dict[str, tuple[int, int] | None] = {
    "long prompt": (512, 64),
    "long answers": (32, 256),
    "unequal": None,
}
COMPARISONS = (
    ("lora", "unequal"),
    ("full", "unequal"),
    ("lora", "long prompt"),
    ("lora", "long answers"),
)


def lengths(shape: str, draw: random.Random) -> list[tuple[int, int, int]]:
    """Tokens of prompt, chosen and rejected answer of each pair."""
    given = SHAPES[shape]
    if given is not None:
        return [(given[0], given[1], given[1])] * PAIRS

    def length(median: int, spread: float, most: int) -> int:
        return max(8, min(most, round(median * draw.lognormvariate(0.0, spread))))

    def pair() -> tuple[int, int, int]:
        return length(120, 0.8, 448), length(180, 0.7, 512), length(180, 0.7, 512)

    return [pair() for _ in range(PAIRS)]
