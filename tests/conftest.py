"""Shared fixtures: determinism, tiny models and a tiny real tokenizer, all built on the spot."""

from __future__ import annotations

import os
from pathlib import Path
from typing import TYPE_CHECKING

import pytest

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerFast

os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")

REPOSITORY = Path(__file__).resolve().parent.parent
SHARED = REPOSITORY.parent / "shared" / "data"


@pytest.fixture(autouse=True)
def _deterministic() -> None:
    import torch

    torch.manual_seed(0)
    torch.set_num_threads(1)


@pytest.fixture(scope="session")
def shared_data() -> Path:
    """The folder of real data beside the checkout."""
    if not SHARED.is_dir():
        pytest.skip("real data is not beside this checkout")
    return SHARED


TINY_TEXT = [
    "Why is the sky blue? The air scatters blue sunlight more than red.",
    "User: What is two plus two? Assistant: Four. Two and two make four.",
    "Once upon a time there was a little cat. The cat liked to play in the sun.",
    "Explain how bread rises. Yeast makes small bubbles of gas that lift the dough.",
]

CHATML = (
    "{% for message in messages %}"
    "{{ '<|im_start|>' + message['role'] + '\\n' + message['content'] + '<|im_end|>\\n' }}"
    "{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|im_start|>assistant\\n' }}{% endif %}"
)


def make_tokenizer(
    chat_template: str | None = None, *, bos: bool = False, pad: str | None = "<pad>"
) -> PreTrainedTokenizerFast:
    """A byte-level BPE tokenizer of 320 tokens, trained on the spot; `bos` adds one to texts."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors, trainers
    from transformers import PreTrainedTokenizerFast

    special = ["<pad>", "<s>", "</s>", "<|im_start|>", "<|im_end|>"]
    backend = Tokenizer(models.BPE())
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    backend.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=320,
        special_tokens=special,
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    backend.train_from_iterator(TINY_TEXT, trainer)
    if bos:
        backend.post_processor = processors.TemplateProcessing(
            single="<s> $A", pair="<s> $A <s> $B", special_tokens=[("<s>", 1)]
        )
    return PreTrainedTokenizerFast(
        tokenizer_object=backend,
        bos_token="<s>",
        eos_token="<|im_end|>" if chat_template else "</s>",
        pad_token=pad,
        chat_template=chat_template,
    )


@pytest.fixture
def tiny_tokenizer() -> PreTrainedTokenizerFast:
    """A tiny real tokenizer without a chat template; end token `</s>`, no bos added."""
    return make_tokenizer()


@pytest.fixture
def tiny_chat_tokenizer() -> PreTrainedTokenizerFast:
    """The same with a ChatML template; end token `<|im_end|>`."""
    return make_tokenizer(CHATML)


def _causal(kind: str) -> PreTrainedModel:
    from transformers import AutoConfig, AutoModelForCausalLM

    shape: dict[str, int] = {
        "hidden_size": 32,
        "intermediate_size": 48,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "head_dim": 8,
        "max_position_embeddings": 256,
    }
    if kind == "gpt2":
        shape = {"n_embd": 32, "n_layer": 2, "n_head": 4, "n_positions": 256}
    tokens = {"vocab_size": 320, "bos_token_id": 1, "eos_token_id": 2, "pad_token_id": 0}
    config = AutoConfig.for_model(kind, **shape, **tokens)
    config.initializer_range = 0.2  # the default gives almost uniform predictions
    config.tie_word_embeddings = kind == "gpt2"
    return AutoModelForCausalLM.from_config(config).eval()


@pytest.fixture
def tiny_llama() -> PreTrainedModel:
    """Two layers, hidden size 32, vocabulary 320 (as `tiny_tokenizer`), float32, random."""
    return _causal("llama")


@pytest.fixture
def tiny_qwen() -> PreTrainedModel:
    """As `tiny_llama`, of the Qwen 3 class (norms on queries and keys)."""
    return _causal("qwen3")


@pytest.fixture
def tiny_gpt2() -> PreTrainedModel:
    """As `tiny_llama`, of the GPT-2 class: learned positions, tied head, one fused qkv Conv1D."""
    return _causal("gpt2")


@pytest.fixture(scope="session")
def tiny_llama_dir(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A saved checkpoint of the tiny Llama with the chat tokenizer, for `model.path`."""
    import torch

    folder = tmp_path_factory.mktemp("tiny_llama")
    with torch.random.fork_rng():
        torch.manual_seed(7)
        _causal("llama").save_pretrained(folder)
    make_tokenizer(CHATML).save_pretrained(folder)
    return folder
