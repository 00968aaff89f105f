"""Determinism of cuBLAS, which reads it when CUDA starts, and models that GPU kernels take."""

from __future__ import annotations

import os
from typing import TYPE_CHECKING

import pytest
import torch
from tiny import CHATML, make_tokenizer

if TYPE_CHECKING:
    from collections.abc import Iterator
    from pathlib import Path

os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")


@pytest.fixture(scope="session")
def gpu_llama(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A Llama of two layers whose heads have 16 numbers, the fewest that fused kernels take."""
    from transformers import LlamaConfig, LlamaForCausalLM

    folder = tmp_path_factory.mktemp("gpu_llama")
    with torch.random.fork_rng():
        torch.manual_seed(7)
        config = LlamaConfig(
            vocab_size=320,
            hidden_size=64,
            intermediate_size=96,
            num_hidden_layers=2,
            num_attention_heads=4,
            num_key_value_heads=2,
            max_position_embeddings=2048,
            initializer_range=0.1,
            bos_token_id=1,
            eos_token_id=4,
            pad_token_id=0,
        )
        LlamaForCausalLM(config).save_pretrained(folder)
    make_tokenizer(CHATML).save_pretrained(folder)
    return folder


@pytest.fixture
def deterministic() -> Iterator[None]:
    """PyTorch's deterministic kernels."""
    torch.use_deterministic_algorithms(True, warn_only=True)
    try:
        yield
    finally:
        torch.use_deterministic_algorithms(False)
