"""Tiny real tokenizers and models, built on the spot."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from mmalign.config import RunConfig

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerFast

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


def make_model(kind: str) -> PreTrainedModel:
    """A causal language model of two layers: llama, qwen3 or gpt2; float32, random weights."""
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


def run_config(**sections: Any) -> RunConfig:
    """A complete text config with some sections exchanged."""
    given: dict[str, Any] = {
        "model": {"path": "none"},
        "data": {"train": "none.jsonl"},
        "objective": {"name": "dpo"},
        "output": "none",
    }
    return RunConfig.model_validate({**given, **sections})
