"""`train.cpu_products`: measured once for a model of many weights, and kept by its run."""

from __future__ import annotations

import json
import time
from pathlib import Path

import pytest
import torch

from mmalign import config as configs
from mmalign.models import cpu
from mmalign.train import run as runs
from mmalign.train.loop import train

pytestmark = [
    pytest.mark.runs,
    pytest.mark.skipif(torch.accelerator.is_available(), reason="products run on a device here"),
]


def config_of(folder: Path, model: Path, steps: int, *options: str) -> configs.RunConfig:
    row = {"prompt": "a", "chosen": "b c", "rejected": "d"}
    (folder / "pairs.jsonl").write_text(json.dumps(row) + "\n")
    path = folder / "config.yaml"
    train_section = {"num_steps": steps, "batch_size": 1, "num_threads": 1}
    path.write_text(
        json.dumps(
            {
                "model": {"path": str(model)},
                "data": {"train": str(folder / "pairs.jsonl")},
                "objective": {"name": "dpo"},
                "train": train_section,
                "output": str(folder / "run"),
            }
        )
    )
    return configs.load(path, options)


def test_a_run_keeps_what_was_faster_when_it_began(
    tmp_path: Path, tiny_llama_dir: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(runs, "_MANY", 1)
    monkeypatch.setattr(cpu, "faster", lambda: "mkl")
    monkeypatch.setattr(cpu, "_library", "onednn")
    config = config_of(tmp_path, tiny_llama_dir, 2)
    assert config.train.cpu_products == "auto"
    train(config)
    assert cpu._library == "mkl"
    assert configs.begun_with(config.output, "train", "cpu_products") == "mkl"

    monkeypatch.setattr(cpu, "faster", lambda: pytest.fail("the run has chosen"))
    train(config, resume=True)
    assert cpu._library == "mkl"


def test_a_small_model_is_not_measured(
    tmp_path: Path, tiny_llama_dir: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(cpu, "_library", "mkl")
    monkeypatch.setattr(cpu, "faster", lambda: pytest.fail("not worth 2 s"))
    train(config_of(tmp_path, tiny_llama_dir, 1))
    assert cpu._library == "onednn"


def test_all_libraries_give_the_same_numbers(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(cpu, "SMALLEST", 1)
    layer, x = torch.nn.Linear(30, 20), torch.randn(2, 40, 30, requires_grad=True)
    cpu.use_onednn(layer)
    found: dict[str, list[torch.Tensor]] = {}
    for library in cpu.LIBRARIES:
        monkeypatch.setattr(cpu, "_library", library)
        out = layer(x)
        inputs = [x, *layer.parameters()]
        found[library] = [out.detach(), *torch.autograd.grad(out.square().sum(), inputs)]
    for library in ("mkl", "mixed"):
        torch.testing.assert_close(found[library], found["onednn"], rtol=1e-5, atol=1e-4)


@pytest.mark.parametrize("slow", [(), ("onednn",), ("mkl",), ("weights",)])
def test_what_is_measured_decides(slow: tuple[str, ...], monkeypatch: pytest.MonkeyPatch) -> None:
    """Each kind of product is made slow in turn, by more than any machine's noise."""
    product, gradient_of = cpu.product, cpu.gradient_of
    monkeypatch.setattr(cpu, "_library", "onednn")

    def slower(kind: str, made: object) -> object:
        if kind in slow or cpu._library in slow:
            time.sleep(0.2)
        return made

    monkeypatch.setattr(cpu, "product", lambda *given: slower("through", product(*given)))

    def weights(*given: torch.Tensor) -> object:
        return slower("weights" if cpu._library == "onednn" else "", gradient_of(*given))

    monkeypatch.setattr(cpu, "gradient_of", weights)
    found = cpu.faster.__wrapped__()
    expected = {("onednn",): {"mkl"}, ("mkl",): {"onednn"}, ("weights",): {"mixed", "mkl"}}
    assert found in expected.get(slow, set(cpu.LIBRARIES))
    assert cpu._library == "onednn"
