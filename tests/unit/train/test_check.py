from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from toy_adapter import toy_config

from mmalign.core import CandidateLogps, Needs
from mmalign.errors import ConfigError
from mmalign.preflight.check import check_config
from mmalign.train.check import (
    Scored,
    check_start,
    describe_non_finite,
    require_sensible,
    worse_than_guessing,
)
from mmalign.train.run import build_run


def start(folder: Path, *overrides: str, **knobs: Any) -> str:
    config = toy_config(folder, *overrides, **knobs)
    return check_start(build_run(config, check_config(config)))


@pytest.mark.parametrize("name", ["dpo", "tdpo2", "ipo", "sparse_po"])
def test_a_policy_that_is_its_reference_passes(tmp_path: Path, name: str) -> None:
    masks = ["text.masks={kind: learned}"] if name == "sparse_po" else []
    assert "agree" in start(tmp_path, f"objective={{name: {name}}}", *masks)


@pytest.mark.parametrize(
    ("knobs", "expected"),
    [({"shift": 0.5}, "reference does not have"), ({"dropout": 0.3}, "dropout is on")],
)
def test_a_policy_that_is_not_stops_with_the_causes(
    tmp_path: Path, knobs: dict[str, float], expected: str
) -> None:
    with pytest.raises(ConfigError, match=expected) as caught:
        start(tmp_path, **knobs)
    assert "nats a position" in str(caught.value)
    assert "check_reference" in str(caught.value)


def test_log_ratios_are_judged_as_the_loss_sees_them(tmp_path: Path) -> None:
    """A difference that no nat shows is one where beta is large, as for images."""
    assert "agree" in start(tmp_path, "objective={name: dpo, beta: 0.01}", shift=1e-5)
    with pytest.raises(ConfigError, match=r"times beta [\d.]+, on rows .*DoRA.*model\.dtype"):
        start(tmp_path, "objective={name: dpo, beta: 1000}", shift=1e-5)
    with pytest.raises(ConfigError, match="times beta"):
        start(tmp_path, "objective={name: ipo, tau: 1000}", shift=1e-5)


@pytest.mark.parametrize(
    ("override", "reason"),
    [
        ("train.check_reference=false", "check_reference"),
        ("reference.path=elsewhere", "another model, elsewhere"),
        ("objective={name: simpo}", "needs no reference"),
    ],
)
def test_where_they_may_differ_the_reason_is_told(
    tmp_path: Path, override: str, reason: str
) -> None:
    assert reason in start(tmp_path, override, shift=0.5)


@pytest.mark.parametrize(("nats", "told"), [(-2.0, False), (-6.5, False), (-12.0, True)])
def test_answers_that_a_model_finds_less_likely_than_a_guess(nats: float, told: bool) -> None:
    policy, mask = torch.full((2, 2, 3), nats), torch.ones(2, 2, 3, dtype=torch.bool)
    policy[:, 1] = -100.0  # a corrupted answer may be as unlikely as it likes
    logps = CandidateLogps(policy=policy, mask=mask, labels=torch.ones(2, 2))
    said = worse_than_guessing(logps, 512)
    assert bool(said) is told
    assert "guessing among its 512 tokens would give -6.2" in said or not told
    assert worse_than_guessing(logps, None) == ""


def test_the_check_leaves_the_random_stream_alone(tmp_path: Path) -> None:
    config = toy_config(tmp_path, noise=0.1)
    run = build_run(config, check_config(config))
    before = torch.get_rng_state()
    check_start(run)
    assert torch.equal(before, torch.get_rng_state())


def test_an_infinite_start_says_so(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"policy.* not finite before the first step"):
        start(tmp_path, "train.batch_size=24", bad_row=3)


def test_settings_that_would_be_ignored_are_refused(tmp_path: Path) -> None:
    config = toy_config(tmp_path, "train.optimizer=sgd", "train.betas=[0.8, 0.9]")
    with pytest.raises(ConfigError, match="sgd has no betas"):
        require_sensible(config, Needs())


@pytest.mark.parametrize("key", ["batch_size", "eval_batch_size"])
def test_a_mismatched_response_needs_two_rows(tmp_path: Path, key: str) -> None:
    config = toy_config(tmp_path, f"train.{key}=1")
    with pytest.raises(ConfigError, match="at least 2"):
        require_sensible(config, Needs(roles=("mismatched",)))
    require_sensible(config, Needs())


def test_the_report_names_rows_and_tensors() -> None:
    policy = torch.zeros(3, 2, 4)
    policy[1, 0, 2] = -torch.inf
    policy[1, 1, 0] = torch.nan
    broken = Scored(
        ids=("a", "b", "c"),
        value=torch.tensor(torch.nan),
        rows=torch.tensor([0.5, torch.nan, 0.5]),
        tensors={"policy": policy, "reference": torch.zeros(3, 2, 4)},
    )
    fine = Scored(("d",), torch.tensor(1.0), None, {"policy": torch.zeros(1, 2, 4)})
    text = describe_non_finite([fine, broken])
    assert text == ("Loss is nan for rows 'b': policy: 1 nan and 1 -inf of 24; reference: finite.")
