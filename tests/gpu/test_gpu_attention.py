"""Packed rows against plain ones on CUDA, in every attention that is there; and memory."""

from __future__ import annotations

import json
from typing import TYPE_CHECKING, Any

import pytest
import torch
from devices import HALF, NEEDS_CUDA, changed, exact, first_step, near, on, text_config
from torch.nn.attention import SDPBackend, sdpa_kernel

from mmalign.preflight.check import check_config
from mmalign.text.logps import Head, response_logps
from mmalign.train.backward import backward_joint
from mmalign.train.run import build_run

if TYPE_CHECKING:
    from pathlib import Path

pytestmark = NEEDS_CUDA

PACKS = {"auto": True, "sdpa": True, "eager": False, "flex_attention": False}
"""Attention, and whether rows of a batch are packed with it."""


@pytest.mark.parametrize("attention", PACKS)
@pytest.mark.parametrize("half", [False, True], ids=["float32", "mixed"])
def test_every_attention_scores_alike(
    attention: str, half: bool, gpu_llama: Path, tmp_path: Path
) -> None:
    model = {"attention": attention, "lora": None}
    config = text_config(tmp_path, gpu_llama, model=model, **(HALF if half else {}))
    apart = changed(config, text={"shared_prefix": "off"}, model={"attention": "eager"})
    bounds = {"loss": 0.03, "gradient": 0.1} if half else {"loss": 1e-4, "gradient": 1e-4}
    with exact():
        found, expected = first_step(config, "cuda"), first_step(apart, "cuda")
    assert expected.layout == "plain"
    assert found.layout == ("packed" if PACKS[attention] else "plain")
    near(found, expected, **bounds)
    gap = (found.logps - expected.logps).abs()
    assert float(gap.mean() if half else gap.max()) < (0.05 if half else 2e-3)


@pytest.mark.parametrize("backend", ["MATH", "EFFICIENT_ATTENTION", "FLASH_ATTENTION"])
def test_packed_rows_in_every_kernel(backend: str, gpu_llama: Path, tmp_path: Path) -> None:
    """Each kernel alone, and the slowest beside it where it takes no mask."""
    kernels = {getattr(SDPBackend, backend), SDPBackend.MATH}
    config = text_config(tmp_path, gpu_llama, model={"lora": None}, **HALF)
    plain = changed(config, text={"shared_prefix": "off"})
    with sdpa_kernel(list(kernels)):
        found = first_step(config, "cuda")
    assert found.layout == "packed"
    near(found, first_step(plain, "cuda"), loss=0.03, gradient=0.1)


@pytest.mark.parametrize("kind", ["qwen3", "gpt2"])
def test_other_classes(kind: str, tmp_path: Path) -> None:
    from tiny import CHATML, make_model, make_tokenizer

    torch.manual_seed(5)
    make_model(kind).save_pretrained(tmp_path / "model")
    make_tokenizer(CHATML).save_pretrained(tmp_path / "model")
    config = text_config(tmp_path, tmp_path / "model")
    with exact():
        near(first_step(config, "cuda"), first_step(config, "cpu"), loss=1e-4, gradient=2e-4)


def test_a_sliding_window(tmp_path: Path) -> None:
    """Masks of packed rows, made on the device: a window shorter than the prompts."""
    from tiny import CHATML, make_tokenizer
    from transformers import MistralConfig, MistralForCausalLM

    torch.manual_seed(5)
    settings = MistralConfig(
        vocab_size=320, hidden_size=64, intermediate_size=96, num_hidden_layers=2,
        num_attention_heads=4, num_key_value_heads=2, sliding_window=5, initializer_range=0.1,
        bos_token_id=1, eos_token_id=4, pad_token_id=0,
    )  # fmt: skip
    MistralForCausalLM(settings).save_pretrained(tmp_path / "model")
    make_tokenizer(CHATML).save_pretrained(tmp_path / "model")
    config = text_config(tmp_path, tmp_path / "model", model={"lora": None})
    with exact():
        found = first_step(config, "cuda")
        assert found.layout == "packed"
        near(found, first_step(config, "cpu"), loss=1e-4, gradient=2e-4)


TOKENS, VOCABULARY, WIDTH = 8192, 131_072, 256
LOGITS = 4 * TOKENS * VOCABULARY  # bytes, in float32 all at once: 4 GiB


@pytest.mark.parametrize("kl", [False, True])
@pytest.mark.parametrize("head_trains", [False, True])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_logits_never_exist_whole(kl: bool, head_trains: bool, dtype: torch.dtype) -> None:
    torch.manual_seed(0)
    place: dict[str, Any] = {"device": "cuda", "dtype": dtype}
    hidden = torch.randn(TOKENS, WIDTH, **place).requires_grad_()
    weight = (0.05 * torch.randn(VOCABULARY, WIDTH, **place)).requires_grad_(head_trains)
    targets = torch.randint(VOCABULARY, (TOKENS,), device="cuda")
    other = hidden.detach() + 0.01
    torch.cuda.synchronize()
    torch.cuda.reset_peak_memory_stats()
    before = torch.cuda.memory_allocated()
    stats = response_logps(hidden, Head(weight), targets, ref_hidden=other if kl else None, kl=kl)
    total = stats.policy.sum() if stats.kl is None else (stats.policy + stats.kl).sum()
    total.backward()
    torch.cuda.synchronize()
    added = torch.cuda.max_memory_allocated() - before
    # A block of 1,024 is an eighth of LOGITS; three or four of them exist at one time.
    assert added < (0.75 if kl else 0.55) * LOGITS, f"{added / LOGITS:.2f} of all logits"

    few = slice(0, 64)
    logits = (hidden[few].detach() @ weight.detach().T).float()
    expected = logits.log_softmax(-1).gather(-1, targets[few, None]).squeeze(-1)
    bound = 1e-3 if dtype == torch.float32 else 0.1
    assert float((stats.policy[few] - expected).abs().max()) < bound


def test_a_step_on_a_large_vocabulary(tmp_path: Path) -> None:
    """Model, loss and backward pass over 128 thousand tokens, in less than their logits take."""
    from tiny import CHATML, make_tokenizer
    from transformers import LlamaConfig, LlamaForCausalLM

    torch.manual_seed(0)
    settings = LlamaConfig(
        vocab_size=VOCABULARY, hidden_size=64, intermediate_size=96, num_hidden_layers=1,
        num_attention_heads=4, num_key_value_heads=2, max_position_embeddings=2048,
        bos_token_id=1, eos_token_id=4, pad_token_id=0, tie_word_embeddings=True,
    )  # fmt: skip
    LlamaForCausalLM(settings).save_pretrained(tmp_path / "model")
    make_tokenizer(CHATML).save_pretrained(tmp_path / "model")
    numbers = {"batch_size": 8, "mixed_precision": "bf16"}
    config = text_config(tmp_path, tmp_path / "model", model={"lora": None}, train=numbers)
    answer = "abcdefgh ijklmn opqrst uvwxyz " * 40
    rows = [{"prompt": f"{i}?", "chosen": f"{i} {answer}", "rejected": answer} for i in range(8)]
    (tmp_path / "train.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    with on("cuda"):
        run = build_run(config, check_config(config))
        batch = next(run.batches()).to("cuda")
        backward_joint(run.accelerator, run.model, run.objective, batch)  # the layout is chosen
        tokens = int(batch.inputs.response_mask.sum())
        assert tokens > 6000
        run.adapter.zero_grad(set_to_none=True)
        del batch
        batch = next(run.batches()).to("cuda")
        torch.cuda.synchronize()
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
        loss, _ = backward_joint(run.accelerator, run.model, run.objective, batch)
        added = torch.cuda.max_memory_allocated() - before
    assert loss.value.isfinite()
    assert added < 0.75 * 4 * tokens * VOCABULARY
