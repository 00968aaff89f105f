"""One candidate's activations at a time, and several micro-batches a step: the same gradient."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from toy_adapter import toy_config

from mmalign.errors import ConfigError
from mmalign.preflight.check import check_config
from mmalign.train.backward import backward_joint, backward_per_candidate
from mmalign.train.run import Run, build_run

pytestmark = pytest.mark.usefixtures("toy")

LEARNED = "text.masks={kind: learned}"  # the toy then supplies one weight for reward and KL


def step(run: Run, name: str) -> tuple[dict[str, torch.Tensor], float]:
    """Gradients and loss of the run's first micro-batch, and the random stream after it."""
    torch.manual_seed(3)
    batch = next(run.batches())
    run.adapter.zero_grad()
    if name == "joint":
        loss, _ = backward_joint(run.accelerator, run.model, run.objective, batch)
    else:
        loss, _ = backward_per_candidate(
            run.accelerator, run.model, run.objective, batch, tolerance=1e-6
        )
    gradients = {n: p.grad.clone() for n, p in run.adapter.named_parameters() if p.grad is not None}
    return gradients, float(loss.value.detach())


@pytest.mark.parametrize(
    "overrides",
    [
        ["objective={name: dpo}"],
        ["objective={name: tdpo2}"],
        ["objective={name: simpo}"],
        ["objective={name: kto}"],
        ["objective={name: bco}"],
        ["objective={name: sparse_po, l1_reward: 0.01, l1_kl: 0.02}", LEARNED],
        ["objective={mix: {dpo: 1, sft: 0.5}}"],
    ],
    ids=lambda overrides: overrides[0].split("name: ")[-1].split(",")[0].strip("}"),
)
def test_the_gradient_is_the_same(tmp_path: Path, overrides: list[str]) -> None:
    """With noise drawn in forward, once a row, as a diffusion model draws it."""
    config = toy_config(
        tmp_path, "model.dtype=float64", "train.batch_size=6", *overrides, noise=0.1
    )
    run = build_run(config, check_config(config))
    with torch.no_grad():  # away from the start, where many gradients vanish
        for parameter in run.adapter.policy.parameters():
            parameter += 0.3 * torch.randn_like(parameter)
    state = {name: value.clone() for name, value in run.objective.state_dict().items()}
    expected, loss = step(run, "joint")
    after = torch.rand(1)
    run.objective.load_state_dict(state)
    found, same_loss = step(run, "per_candidate")

    assert same_loss == pytest.approx(loss, rel=1e-14)
    assert torch.equal(torch.rand(1), after), "the random stream goes on as with joint"
    assert found.keys() == expected.keys()
    assert any(float(value.abs().max()) > 1e-3 for value in expected.values())
    for name, value in expected.items():
        torch.testing.assert_close(found[name], value, rtol=1e-11, atol=1e-13)


def test_activations_of_one_candidate_at_a_time(tmp_path: Path) -> None:
    """What autograd keeps for the backward pass, in bytes, at its peak."""

    def peak(name: str) -> int:
        held = most = 0

        def pack(tensor: torch.Tensor) -> torch.Tensor:
            nonlocal held, most
            held += tensor.nbytes
            most = max(most, held)
            return tensor

        def unpack(tensor: torch.Tensor) -> torch.Tensor:
            nonlocal held
            held -= tensor.nbytes
            return tensor

        with torch.autograd.graph.saved_tensors_hooks(pack, unpack):
            step(run, name)
        return most

    config = toy_config(tmp_path)
    run = build_run(config, check_config(config))
    assert peak("per_candidate") < 0.65 * peak("joint")


def test_dropout_is_refused(tmp_path: Path) -> None:
    config = toy_config(tmp_path, "train.check_reference=false", dropout=0.2)
    run = build_run(config, check_config(config))
    with pytest.raises(ConfigError, match="Dropout"):
        step(run, "per_candidate")


def weights_after(folder: Path, *overrides: str) -> dict[str, Any]:
    from mmalign.train.loop import train

    folder.mkdir()
    result = train(toy_config(folder, "model.dtype=float64", *overrides))
    from safetensors.torch import load_file

    assert result.final_dir is not None
    return load_file(result.final_dir / "model.safetensors")


@pytest.mark.runs
@pytest.mark.parametrize(
    "objective",
    [
        pytest.param("{name: dpo}", marks=pytest.mark.slow),
        "{name: tdpo2}",
        pytest.param("{name: simpo}", marks=pytest.mark.slow),
        "{name: sft}",  # a mean over the tokens of the whole step
        "{name: cpo, nll_reduce: batch_token}",
        pytest.param("{mix: {dpo: 1, sft: 0.5}}", marks=pytest.mark.slow),
    ],
)
def test_accumulation_equals_a_larger_batch(tmp_path: Path, objective: str) -> None:
    common = (f"objective={objective}", "train.optimizer=sgd", "train.num_steps=4")
    whole = weights_after(tmp_path / "whole", *common, "train.batch_size=6")
    parts = weights_after(tmp_path / "parts", *common, "train.batch_size=2", "train.accumulate=3")
    turns = weights_after(
        tmp_path / "turns",
        *common,
        "train.batch_size=3",
        "train.accumulate=2",
        "train.backward=per_candidate",
    )
    for name, value in whole.items():
        torch.testing.assert_close(parts[name], value, rtol=1e-11, atol=1e-13)
        torch.testing.assert_close(turns[name], value, rtol=1e-11, atol=1e-13)
