"""Momentum between rounds: exact for whole weights and for LoRAs, and the identity for alpha 0."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor

from mmalign.config import LoraSpec
from mmalign.config.rounds import BetweenSpec
from mmalign.errors import CheckpointError
from mmalign.models import lora
from mmalign.models.lora_files import read_lora
from mmalign.models.merge import merge_checkpoints
from mmalign.rounds.between import next_weights, truncated, weights_in
from mmalign.rounds.ledger import digest

ALPHA = 0.3


def momentum(**settings: Any) -> BetweenSpec:
    return BetweenSpec(kind="momentum", **{"alpha": ALPHA, **settings})


def adapter(base: Path, folder: Path, seed: int, **spec: Any) -> Path:
    from transformers import AutoModelForCausalLM

    torch.manual_seed(seed)
    model = AutoModelForCausalLM.from_pretrained(base)
    policy = lora.attach(model, LoraSpec(**{"rank": 3, "alpha": 8, **spec}))
    with torch.no_grad():
        for name, tensor in policy.named_parameters():
            if "lora_B" in name:
                tensor.normal_(std=0.05)
    lora.save(policy, folder)
    return folder


def weights(folder: Path) -> dict[str, Tensor]:
    return {
        k: v.double() for f in folder.glob("model*.safetensors") for k, v in load_file(f).items()
    }


def whole(base: Path, added: list[tuple[str | Path, float]], out: Path) -> dict[str, Tensor]:
    return weights(merge_checkpoints(base, added, out))


def test_no_momentum_is_another_name_of_the_same_weights(
    tiny_llama_dir: Path, tmp_path: Path
) -> None:
    hat = adapter(tiny_llama_dir, tmp_path / "run" / "final", 1)
    for number, spec in enumerate((BetweenSpec(), momentum(alpha=0.0))):
        out = tmp_path / f"next-{number}"
        assert next_weights(str(tiny_llama_dir), spec, hat, None, out) == ""
        assert not out.readlink().is_absolute()
        assert digest(out) == digest(hat)


def test_whole_weights_go_on_by_alpha(tiny_llama_dir: Path, tmp_path: Path) -> None:
    hats = [
        merge_checkpoints(tiny_llama_dir, [(one, 1.0)], tmp_path / f"hat{n}")
        for n, one in ((n, adapter(tiny_llama_dir, tmp_path / f"a{n}", n)) for n in (1, 2))
    ]
    out = tmp_path / "next"
    next_weights(str(tiny_llama_dir), momentum(), hats[1], hats[0], out)
    base, old, new, found = map(weights, (tiny_llama_dir, *hats, out))
    for name, tensor in found.items():
        wanted = (new[name] + ALPHA * (new[name] - old[name])).float().double()
        assert torch.equal(tensor, wanted) or (tensor - wanted).abs().max() < 1e-7, name
    next_weights(str(tiny_llama_dir), momentum(), hats[0], None, tmp_path / "first")
    first = weights(tmp_path / "first")
    for name, tensor in first.items():  # hat_0 is the base
        assert (tensor - (old[name] + ALPHA * (old[name] - base[name]))).abs().max() < 1e-7


def test_loras_go_on_by_their_products(tiny_llama_dir: Path, tmp_path: Path) -> None:
    """Also of two rounds whose ranks and scales differ."""
    old = adapter(tiny_llama_dir, tmp_path / "old", 1, rank=2, alpha=5)
    new = adapter(tiny_llama_dir, tmp_path / "new", 2)
    out = tmp_path / "next"
    assert next_weights(str(tiny_llama_dir), momentum(), new, old, out) == ""
    assert weights_in(out).adapter
    found = whole(tiny_llama_dir, [(out, 1.0)], tmp_path / "found")
    wanted = whole(tiny_llama_dir, [(new, 1 + ALPHA), (old, -ALPHA)], tmp_path / "wanted")
    gaps = [(found[name] - wanted[name]).abs().max().item() for name in wanted]
    assert max(gaps) < 1e-7
    ranks = {len(parts["A"]) for parts in read_lora(out, ()).parts.values()}
    assert ranks == {5}
    # The factors alone, extrapolated, would be something else.
    lone = read_lora(new, ()), read_lora(out, ())
    module = next(iter(lone[0].parts))
    assert lone[1].scale(module) == pytest.approx(lone[0].scale(module))


def test_a_lora_made_so_is_trained_on(tiny_llama_dir: Path, tmp_path: Path) -> None:
    from transformers import AutoModelForCausalLM

    old, new = (adapter(tiny_llama_dir, tmp_path / str(n), n) for n in (1, 2))
    next_weights(str(tiny_llama_dir), momentum(), new, old, tmp_path / "next")
    policy: Any = lora.load(AutoModelForCausalLM.from_pretrained(tiny_llama_dir), tmp_path / "next")
    ids = torch.arange(3, 11)[None]
    merged = merge_checkpoints(tiny_llama_dir, [(new, 1.3), (old, -0.3)], tmp_path / "merged")
    other: Any = AutoModelForCausalLM.from_pretrained(merged)
    assert torch.allclose(policy(ids).logits, other(ids).logits, atol=1e-4)
    assert sum(p.requires_grad for p in policy.parameters()) > 0


def test_a_rank_is_kept_and_what_is_lost_is_said(tiny_llama_dir: Path, tmp_path: Path) -> None:
    old, new = (adapter(tiny_llama_dir, tmp_path / str(n), n) for n in (1, 2))
    said = next_weights(str(tiny_llama_dir), momentum(rank=4), new, old, tmp_path / "next")
    assert "to keep rank 4" in said
    exact = whole(tiny_llama_dir, [(new, 1 + ALPHA), (old, -ALPHA)], tmp_path / "exact")
    found = whole(tiny_llama_dir, [(tmp_path / "next", 1.0)], tmp_path / "found")
    base = weights(tiny_llama_dir)
    lost = sum(((found[n] - exact[n]) ** 2).sum() for n in exact) ** 0.5
    norm = sum(((exact[n] - base[n]) ** 2).sum() for n in exact) ** 0.5
    assert float(said.split("%")[0].split()[-1]) / 100 == pytest.approx(
        float(lost / norm), abs=1e-4
    )
    assert 0 < lost / norm < 0.5
    said = next_weights(str(tiny_llama_dir), momentum(rank=6), new, old, tmp_path / "all")
    assert said == ""  # six columns are all


def test_the_best_factors_of_a_rank() -> None:
    torch.manual_seed(0)
    up, down = torch.randn(20, 6).double(), torch.randn(6, 11).double()
    b, a, cut, norm = truncated(up, down, 4)
    left, values, right = torch.linalg.svd(up @ down, full_matrices=False)
    best = left[:, :4] * values[:4] @ right[:4]
    assert torch.allclose(b @ a, best)
    assert cut == pytest.approx(float(values[4:].norm()))
    assert norm == pytest.approx(float((up @ down).norm()))


def test_what_has_no_product_is_refused(tiny_llama_dir: Path, tmp_path: Path) -> None:
    dora = adapter(tiny_llama_dir, tmp_path / "dora", 1, dora=True)
    with pytest.raises(CheckpointError, match=r"has A, B, magnitude, and momentum"):
        next_weights(str(tiny_llama_dir), momentum(), dora, None, tmp_path / "next")
    few = adapter(tiny_llama_dir, tmp_path / "few", 1, targets=["q_proj"])
    more = adapter(tiny_llama_dir, tmp_path / "more", 1)
    with pytest.raises(CheckpointError, match="adapt different layers"):
        next_weights(str(tiny_llama_dir), momentum(), more, few, tmp_path / "next")
    assert not (tmp_path / "next").exists()
