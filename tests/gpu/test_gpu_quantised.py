"""Weights quantized to 4 and 8 bits, where bitsandbytes is there."""

from __future__ import annotations

import math
from typing import TYPE_CHECKING, Any

import pytest
from devices import HALF, NEEDS_CUDA, on, text_config
from typer.testing import CliRunner

from mmalign.cli import app
from mmalign.train.metrics import read_json

if TYPE_CHECKING:
    from pathlib import Path

pytest.importorskip("bitsandbytes")
pytestmark = NEEDS_CUDA


@pytest.mark.parametrize("bits", ["4bit", "8bit"])
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_a_lora_on_quantised_weights(
    bits: str, dtype: str, gpu_llama: Path, tmp_path: Path
) -> None:
    model = {"quantization": bits, "dtype": dtype}
    sections: dict[str, Any] = HALF if dtype == "bfloat16" else {}
    config = text_config(tmp_path, gpu_llama, model=model, **sections)
    path = str(tmp_path / "config.json")
    with on("cuda"):
        for words in (["train", path], ["eval", path]):
            result = CliRunner().invoke(app, words)
            assert result.exit_code == 0, f"{result.output}\n{result.exception!r}"
    steps = [line for line in read_json(config.output / "metrics.jsonl") if "loss" in line]
    assert steps[0]["loss"] == pytest.approx(math.log(2), abs=1e-2)
    assert all(line["grad_norm"] > 0.0 for line in steps)


def test_adam_of_8_bits(gpu_llama: Path, tmp_path: Path) -> None:
    numbers = {"optimizer": "adamw8bit", "lr": 1e-3}
    config = text_config(tmp_path, gpu_llama, model={"lora": None}, train=numbers)
    with on("cuda"):
        result = CliRunner().invoke(app, ["train", str(tmp_path / "config.json")])
        assert result.exit_code == 0, f"{result.output}\n{result.exception!r}"
    assert read_json(config.output / "metrics.jsonl")
