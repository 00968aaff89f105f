"""Gradients through quantized weights: those of the same weights written out, at any time."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import pytest
import torch
from tiny import make_tokenizer, run_config
from transformers import LlamaConfig, LlamaForCausalLM

from mmalign.core import Needs, presets
from mmalign.data.example import Candidate, Example
from mmalign.text.adapter import TextAdapter
from mmalign.text.model import causal_model

if TYPE_CHECKING:
    from pathlib import Path

bitsandbytes = pytest.importorskip("bitsandbytes")

ROWS = [
    ("Why is the sky blue?", "The air scatters blue sunlight.", "No."),
    ("Two?", "Four. Two and two make four.", "a"),
]


@pytest.fixture
def base(tmp_path: Path) -> Path:
    torch.manual_seed(0)
    shape: dict[str, Any] = {
        "vocab_size": 320, "hidden_size": 64, "intermediate_size": 96, "num_hidden_layers": 2,
        "num_attention_heads": 4, "num_key_value_heads": 2, "initializer_range": 0.2,
        "pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2,
    }  # fmt: skip
    LlamaForCausalLM(LlamaConfig(**shape)).save_pretrained(tmp_path / "base")
    make_tokenizer().save_pretrained(tmp_path / "base")
    return tmp_path / "base"


def build(folder: Path, quantization: str | None) -> TextAdapter:
    """A policy some steps from its start: the factors B are not 0."""
    model = {"path": str(folder), "quantization": quantization, "lora": {"rank": 4}}
    adapter = TextAdapter.build(run_config(model=model), Needs(reference=True, candidates=2))
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for name, parameter in adapter.named_parameters():
            if "lora_" in name:
                parameter.copy_(0.05 * torch.randn(parameter.shape, generator=generator))
    return adapter.train()


def gradients(adapter: TextAdapter) -> dict[str, torch.Tensor]:
    rows = [
        Example(f"row-{i}", prompt, (Candidate(chosen), Candidate(rejected)), (1.0, 0.0))
        for i, (prompt, chosen, rejected) in enumerate(ROWS)
    ]
    adapter.train().zero_grad()
    objective = presets.dpo(beta=0.5)
    objective(adapter(adapter.collate(rows), objective.needs)).value.backward()
    trained = {name: p for name, p in adapter.named_parameters() if p.requires_grad}
    assert all(p.grad is not None for p in trained.values())
    return {name: p.grad.clone() for name, p in trained.items() if p.grad is not None}


@torch.no_grad()
def evaluate(adapter: TextAdapter) -> None:
    rows = [Example("row", "Why?", (Candidate("Blue."), Candidate("No.")), (1.0, 0.0))]
    adapter.eval()
    adapter(adapter.collate(rows), Needs(reference=True, candidates=2))
    adapter.sample(["Why?"], max_new_tokens=2)


@torch.no_grad()
def written_out(adapter: TextAdapter, folder: Path) -> Path:
    """The quantized weights as a float32 model."""
    layers = {
        name.removesuffix(".base_layer"): module
        for name, module in causal_model(adapter.policy).named_modules()
        if isinstance(module, bitsandbytes.nn.Linear4bit | bitsandbytes.nn.Linear8bitLt)
    }
    assert len(layers) == 14, "seven in each of two layers"
    model = LlamaForCausalLM.from_pretrained(folder)
    for name, module in layers.items():
        weight: Any = module.weight
        if isinstance(module, bitsandbytes.nn.Linear4bit):
            whole = bitsandbytes.functional.dequantize_4bit(weight.data, weight.quant_state)
        else:
            scale = weight.SCB if weight.SCB is not None else module.state.SCB
            whole = weight.data.float() * (scale / 127.0)[:, None]
        model.get_submodule(name).weight.copy_(whole)
    target = folder.with_name("whole")
    model.save_pretrained(target)
    make_tokenizer().save_pretrained(target)
    return target


@pytest.mark.parametrize("cpu", ["as it is", "with AVX512-BF16"])
@pytest.mark.parametrize("quantization", ["4bit", "8bit"])
def test_an_eval_pass_changes_no_gradient(
    base: Path, quantization: str, cpu: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """bitsandbytes asks the CPU when a layer is made; a CPU that says yes makes it move weights."""
    if cpu != "as it is":
        monkeypatch.setattr("bitsandbytes.nn.modules.has_avx512bf16", lambda: True)
    adapter = build(base, quantization)
    expected = gradients(build(written_out(adapter, base), None))
    before = gradients(adapter)
    bytes_before = {n: p.detach().clone() for n, p in adapter.named_parameters()}
    evaluate(adapter)
    after = gradients(adapter)
    assert before.keys() == after.keys() == expected.keys()
    largest = max(float(value.abs().max()) for value in expected.values())
    for name, value in expected.items():
        torch.testing.assert_close(before[name], value, rtol=1e-3, atol=1e-4 * largest)
        torch.testing.assert_close(after[name], before[name], rtol=1e-6, atol=1e-7 * largest)
    for name, parameter in adapter.named_parameters():
        assert torch.equal(parameter, bytes_before[name]), name
