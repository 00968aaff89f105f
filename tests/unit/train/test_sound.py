"""Weights that are ruined are not saved."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from toy_adapter import toy_config

from mmalign.errors import NonFiniteLoss
from mmalign.preflight.check import check_config
from mmalign.train.check import require_sound
from mmalign.train.run import Run, build_run


@pytest.fixture
def run(tmp_path: Path) -> Run:
    config = toy_config(tmp_path)
    return build_run(config, check_config(config))


def test_good_weights_pass_and_no_random_number_is_used(run: Run) -> None:
    before = torch.get_rng_state()
    require_sound(run, None)
    assert torch.equal(torch.get_rng_state(), before)


@pytest.mark.parametrize("value", [torch.nan, torch.inf, -torch.inf])
def test_one_value_that_is_not_finite_is_found(run: Run, value: float, tmp_path: Path) -> None:
    with torch.no_grad():
        run.adapter.policy.head.weight[-1, -1] = value
    run.position.step = 7
    with pytest.raises(NonFiniteLoss) as caught:
        require_sound(run, tmp_path / "checkpoint-6")
    text = str(caught.value)
    assert text.startswith("step 7: 1 of ")
    assert "policy.head.weight" in text
    assert text.endswith(f"Last good checkpoint: {tmp_path / 'checkpoint-6'}")
    assert caught.value.exit_code == 3


def test_a_running_state_counts_as_well(run: Run) -> None:
    run.adapter.average[0].fill_(torch.nan)
    with pytest.raises(NonFiniteLoss, match="1 of "):
        require_sound(run, None)


def test_finite_weights_that_score_nothing_are_refused_too(run: Run) -> None:
    with torch.no_grad():
        run.adapter.policy.head.weight.fill_(3e38)
        run.adapter.policy.head.bias.fill_(3e38)
    with pytest.raises(NonFiniteLoss, match="no longer finite"):
        require_sound(run, None)
