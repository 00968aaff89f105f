"""Divergences: limits, refusals with their reasons, names, and the probe of a user's own."""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass

import pytest
import torch
from torch import Tensor

from mmalign.core import (
    DIVERGENCES,
    Alpha,
    ForwardKL,
    Hellinger,
    JensenShannon,
    LogOdds,
    MapoScore,
    ReverseKL,
    SkewedJensenShannon,
    presets,
    register_divergence,
    resolve_divergence,
)
from mmalign.core.divergence import ALIASES
from mmalign.core.numerics import expm1_linear
from mmalign.errors import ConfigError

GRID = torch.linspace(-8.0, 8.0, 161, dtype=torch.float64)


def test_alpha_has_its_limits() -> None:
    assert torch.equal(Alpha(0.0)(GRID), GRID)
    torch.testing.assert_close(Alpha(1e-9)(GRID), GRID, rtol=1e-7, atol=0.0)
    assert torch.equal(Alpha(1.0)(GRID), ForwardKL()(GRID))
    two = (1.0 - torch.exp(-2.0 * GRID)) / 2.0
    torch.testing.assert_close(Alpha(2.0)(GRID), two, rtol=1e-12, atol=1e-12)


def test_alpha_is_accurate_in_float32_where_the_naive_form_is_not() -> None:
    log_u = torch.tensor([0.3, -0.7, 2.0])
    exact = -torch.expm1(-1e-4 * log_u.double()) / 1e-4
    ours = Alpha(1e-4)(log_u).double()
    naive = ((1.0 - torch.exp(-1e-4 * log_u)) / 1e-4).double()
    assert ((ours - exact) / exact).abs().max() < 1e-6
    assert ((naive - exact) / exact).abs().max() > 1e-4


def test_trl_coefficient_is_one_minus_alpha() -> None:
    assert Alpha.from_trl(0.7) == Alpha(1.0 - 0.7)
    assert isinstance(Alpha.from_trl(1.0), Alpha)
    assert torch.equal(Alpha.from_trl(1.0)(GRID), GRID)


def test_relatives_are_scalings_of_each_other() -> None:
    torch.testing.assert_close(Hellinger()(GRID), 0.5 * Alpha(0.5)(GRID))
    torch.testing.assert_close(SkewedJensenShannon(0.5)(GRID), 0.5 * JensenShannon()(GRID))


@pytest.mark.parametrize("name", ["tv", "total_variation", "pearson", "chi2", "le_cam"])
def test_invalid_generators_are_refused_with_the_reason(name: str) -> None:
    with pytest.raises(ConfigError, match=r"f'\(0\) is finite"):
        presets.build("f_dpo", divergence=name)


def test_negative_alpha_is_refused_with_the_reason() -> None:
    with pytest.raises(ConfigError, match=r"objective.alpha is -0.5.*f'\(0\) is finite"):
        presets.build("f_dpo", divergence="alpha", alpha=-0.5)


@pytest.mark.parametrize("p", [0.0, 1.0, -0.1])
def test_skew_outside_the_open_interval_is_refused(p: float) -> None:
    with pytest.raises(ConfigError, match=r"objective.p is"):
        presets.build("f_dpo", divergence="skewed_js", p=p)


def test_unknown_name_suggests_the_nearest() -> None:
    with pytest.raises(ConfigError, match="Did you mean 'forward_kl'"):
        resolve_divergence("foward_kl")


def test_a_parameter_the_divergence_lacks_is_refused() -> None:
    with pytest.raises(ConfigError, match=r"alpha .* 'js' has no such parameter"):
        resolve_divergence("js", alpha=0.3)


def test_aliases_and_parameters_resolve() -> None:
    for alias, name in ALIASES.items():
        assert resolve_divergence(alias) == DIVERGENCES[name]
    assert resolve_divergence("JSD") == JensenShannon()
    assert resolve_divergence("alpha_divergence", alpha=0.2, p=None) == Alpha(0.2)
    assert resolve_divergence(Alpha(0.2), alpha=0.4) == Alpha(0.4)
    assert resolve_divergence(ReverseKL()) == ReverseKL()


def test_tangent_continuation_meets_the_exponential_smoothly() -> None:
    x = torch.tensor([29.999999, 30.0, 30.000001, 40.0, 500.0]).double().requires_grad_()
    value = expm1_linear(x)
    (slope,) = torch.autograd.grad(value.sum(), x, create_graph=True)
    torch.testing.assert_close(slope, torch.exp(x.detach().clamp(max=30.0)))
    assert (value.diff() > 0).all()
    assert value[-1].item() == pytest.approx(math.exp(30.0) * 471.0, rel=1e-12)
    (curvature,) = torch.autograd.grad(slope.sum(), x)
    assert curvature.isfinite().all()


def test_expm1_backward_keeps_its_digits_where_autograd_loses_them() -> None:
    x = torch.tensor([-30.0], dtype=torch.float32, requires_grad=True)
    (ours,) = torch.autograd.grad(expm1_linear(x).sum(), x)
    (plain,) = torch.autograd.grad(torch.expm1(x).sum(), x)
    assert ours.item() == pytest.approx(math.exp(-30.0), rel=1e-5)
    assert plain.item() == 0.0


def test_pairs_beyond_the_limit_still_learn() -> None:
    """A clamp would give these a zero gradient, and they are the worst pairs."""
    log_u = torch.tensor([-80.0, -150.0], requires_grad=True)
    (slope,) = torch.autograd.grad(ForwardKL()(log_u).sum(), log_u)
    assert (slope > 1e12).all()


def test_log_odds_stay_finite_at_certainty() -> None:
    log_p = torch.tensor([-200.0, -1.0, -1e-3, -1e-6, -1e-7, 0.0, 1e-7]).requires_grad_()
    odds = LogOdds()(log_p)
    (slope,) = torch.autograd.grad(odds.sum(), log_p)
    assert odds.isfinite().all()
    assert slope.isfinite().all()
    assert (odds.diff() >= 0).all()
    assert (slope >= 1.0).all()
    assert odds[1].item() == pytest.approx(-1.0 - math.log(-math.expm1(-1.0)), rel=1e-6)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
def test_mapo_score_joins_its_series_and_its_closed_form(dtype: torch.dtype) -> None:
    error = torch.tensor(
        [0.0, 1e-8, 1e-4, 0.3, 0.9999, 1.0, 1.0001, 5.0, 300.0, -300.0], dtype=dtype
    )
    log_u = (-0.5 * error).requires_grad_()
    score = MapoScore(0.5)(log_u)
    (slope,) = torch.autograd.grad(score.sum(), log_u)
    exact = torch.where(
        error == 0, 1.0, 0.5 * error.double() / torch.expm1(0.5 * error.double()).clamp(max=1e300)
    )
    tol = 1e-6 if dtype == torch.float32 else 1e-13
    torch.testing.assert_close(score.double(), exact, rtol=tol, atol=tol)
    assert slope.isfinite().all()
    assert slope[0].item() == pytest.approx(0.5, abs=1e-6)  # d/dlog_u = -2 d/de, d/de at 0 = -s/2


def test_mapo_score_of_a_diverged_error_stays_finite() -> None:
    log_u = torch.tensor([-5e5, 5e5], requires_grad=True)
    (slope,) = torch.autograd.grad(MapoScore(0.5)(log_u).sum(), log_u)
    assert slope.tolist() == [0.0, 1.0]


@dataclass(frozen=True)
class Shifted:
    """A valid transform of a user, or one of several invalid ones."""

    kind: str = "good"

    def __call__(self, log_u: Tensor) -> Tensor:
        if self.kind == "constant":
            return log_u + 1.0
        if self.kind == "decreasing":
            return -log_u
        if self.kind == "bounded_below":
            return expm1_linear(log_u)  # Pearson's u - 1
        if self.kind == "overflow":
            return 1.0 - torch.exp(-log_u)
        if self.kind == "summed":
            return log_u.sum()
        return 2.0 * log_u


@pytest.fixture
def _registry() -> Iterator[None]:
    before = dict(DIVERGENCES)
    yield
    DIVERGENCES.clear()
    DIVERGENCES.update(before)


@pytest.mark.usefixtures("_registry")
def test_a_valid_divergence_registers_and_builds() -> None:
    register_divergence("double_kl", Shifted())
    objective = presets.build("f_dpo", divergence="double_kl", beta=0.3)
    assert objective.terms["preference"].score.transform == Shifted()  # type: ignore[attr-defined]


@pytest.mark.usefixtures("_registry")
@pytest.mark.parametrize(
    ("kind", "reason"),
    [
        ("constant", r"f'\(1\) is 1"),
        ("decreasing", "not strictly increasing"),
        ("bounded_below", r"f'\(0\) is finite"),
        ("overflow", "not finite at log u"),
        ("summed", "not elementwise"),
    ],
)
def test_an_invalid_divergence_is_refused_with_the_reason(kind: str, reason: str) -> None:
    with pytest.raises(ConfigError, match=reason):
        register_divergence("mine", Shifted(kind))
    assert "mine" not in DIVERGENCES


@pytest.mark.parametrize("name", ["js", "jsd"])
def test_a_taken_name_is_refused(name: str) -> None:
    with pytest.raises(ConfigError, match="exists already"):
        register_divergence(name, Shifted())


def test_a_divergence_with_fields_is_the_older_spelling_in_one_argument() -> None:
    new = presets.build("hinge", divergence={"name": "alpha", "alpha": 0.3})
    old = presets.build("hinge", divergence="alpha", alpha=0.3)
    assert str(new) == str(old) == str(presets.hinge(divergence="alpha", alpha=0.3))
    assert resolve_divergence({"name": "skewed_js", "p": 0.2}) == SkewedJensenShannon(0.2)
    released = presets.hinge(divergence={"name": "alpha", "alpha": 0.3}, compat="trl-1.16")
    assert str(released) == str(presets.hinge(divergence={"name": "alpha", "alpha": 0.7}))
