"""Guidance by two predictions, and the weights of a negative model, against the release."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from goldens import compare, tensor
from nets import GOLDEN
from safetensors.torch import load_file, save_file

from mmalign.diffusion.sample import guided
from mmalign.models.merge import merge_checkpoints

NPO = GOLDEN["npo"]


def test_guidance_of_two_models() -> None:
    case = NPO["cfg"]
    positive = tensor(case["eps_cond_from_positive_model"])
    negative = tensor(case["eps_uncond_from_negative_model"])
    got = {
        "eps": guided(positive, negative, case["guidance_scale"]),
        "eps_rescaled": guided(
            positive, negative, case["guidance_scale"], case["guidance_rescale"]
        ),
    }
    compare(case, got, skip={k: "input" for k in case if k not in got})


def test_guidance_one_is_the_positive_prediction() -> None:
    positive, negative = torch.randn(2, 2, 4, 3, 3)
    torch.testing.assert_close(guided(positive, negative, 1.0, 0.7), positive)
    assert torch.equal(guided(positive, positive, 7.5), positive)


def test_guidance_of_half_precision_is_float32() -> None:
    positive, negative = torch.randn(2, 1, 4, 3, 3)
    out = guided(positive.bfloat16(), negative.bfloat16(), 7.5, 0.5)
    assert out.dtype == torch.float32
    exact = guided(positive.bfloat16().double(), negative.bfloat16().double(), 7.5, 0.5)
    torch.testing.assert_close(out.double(), exact, rtol=1e-5, atol=1e-5)


def checkpoint(folder: Path, weights: dict[str, Any]) -> Path:
    folder.mkdir()
    tensors = {name: tensor(value) for name, value in weights.items()}
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
    (folder / "config.json").write_text("{}", encoding="utf-8")
    return folder


@pytest.mark.parametrize("name", ["mix_then_delta", "merge_state_dicts"])
def test_weights_of_the_negative_model(name: str, tmp_path: Path) -> None:
    """base + (1 - merge_weight) * (pos - base) + npo, the last as a delta or as a checkpoint."""
    case = NPO[name]
    base, positive = (checkpoint(tmp_path / side, case[side]) for side in ("base", "pos"))
    keeps = 1.0 - case["merge_weight"]
    if "npo_delta" in case:
        npo = {
            k: (tensor(v) + tensor(case["npo_delta"][k])).tolist() for k, v in case["base"].items()
        }
    else:
        npo = case["npo"]
    added = [(positive, keeps), (checkpoint(tmp_path / "npo", npo), 1.0)]
    out = load_file(merge_checkpoints(base, added, tmp_path / "out") / "model.safetensors")
    compare(case["negative"], out)
    if "mixed" in case:
        mixed = merge_checkpoints(base, added[:1], tmp_path / "mixed") / "model.safetensors"
        compare(case["mixed"], load_file(mixed))
