"""Which noise levels are drawn."""

from __future__ import annotations

import pytest
import torch
from nets import table
from pydantic import ValidationError

from mmalign.config import TimestepSpec
from mmalign.diffusion.process import RectifiedFlow, draw_timesteps

EVEN = (torch.arange(2000, dtype=torch.float64) + 0.5) / 2000


def test_uniform_draws_every_level_equally() -> None:
    t = draw_timesteps(TimestepSpec(), table(), EVEN)
    assert t.dtype == torch.int64
    assert t.bincount().tolist() == [2] * 1000


def test_a_share_of_the_schedule() -> None:
    t = draw_timesteps(TimestepSpec(low=0.2, high=0.8), table(), EVEN)
    assert (t.min(), t.max()) == (200, 799)
    sigma = draw_timesteps(TimestepSpec(low=0.2, high=0.8), RectifiedFlow(), EVEN)
    assert sigma.min() == pytest.approx(0.201)
    assert sigma.max() == pytest.approx(0.8)


def test_refiner_is_the_remainder_of_200() -> None:
    t = draw_timesteps(TimestepSpec(kind="refiner"), table(), EVEN)
    assert t.bincount().tolist() == [10] * 200


def test_turbo_levels() -> None:
    t = draw_timesteps(TimestepSpec(kind="turbo"), table(), EVEN)
    levels, counts = t.unique(return_counts=True)
    assert levels.tolist() == [249, 499, 749, 999]
    assert counts.tolist() == [500] * 4
    sigma = draw_timesteps(TimestepSpec(kind="turbo"), RectifiedFlow(), EVEN)
    torch.testing.assert_close(sigma.unique(), torch.tensor([0.25, 0.5, 0.75, 1.0]))


def test_logit_normal() -> None:
    spec = TimestepSpec(kind="logit_normal", mean=0.5, std=0.8)
    sigma = draw_timesteps(spec, RectifiedFlow(), EVEN).double()
    logit = torch.logit(sigma.clamp(max=0.999))
    assert logit.median().item() == pytest.approx(0.5, abs=0.01)
    assert logit.std().item() == pytest.approx(0.8, abs=0.02)
    ends = torch.tensor([0.0, 1.0 - 2.0**-53], dtype=torch.float64)
    t = draw_timesteps(TimestepSpec(kind="logit_normal"), table(), ends)
    assert t.tolist() == [0, 999]


@pytest.mark.parametrize("kind", ["uniform", "refiner", "turbo", "logit_normal"])
def test_timesteps_rise_with_the_quantile(kind: str) -> None:
    """So that equally spaced quantiles are strata of the distribution."""
    for process in (table(), RectifiedFlow(shift=3.0)):
        t = draw_timesteps(TimestepSpec.model_validate({"kind": kind}), process, EVEN)
        assert (t.diff() >= 0).all()


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"mean": 1.0}, "only read with kind: logit_normal"),
        ({"kind": "turbo", "low": 0.1}, "only read with kind: uniform"),
        ({"gamma": 3.0}, "only read with weighting: min_snr"),
        ({"low": 0.9, "high": 0.3}, r"low \(0.9\) must be below high"),
    ],
)
def test_settings_that_a_kind_does_not_read(settings: dict[str, object], message: str) -> None:
    with pytest.raises(ValidationError, match=message):
        TimestepSpec.model_validate(settings)
