"""Denoising errors, and what losses must do with them: log 2 at the start, signs, finiteness."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from nets import Net, logps, table
from torch import Tensor

from mmalign.core import presets
from mmalign.diffusion.estimators import DDIMInversion, ForwardNoise, Networks, Point, RowRNG
from mmalign.diffusion.inputs import Part
from mmalign.diffusion.process import NoiseProcess, RectifiedFlow, VPSchedule, zero_terminal
from mmalign.diffusion.scores import denoising_error

ON_PAIRS = ["diffusion_dpo", "smpo", "inpo", "diffusion_npo", "dcpo", "flow_dpo"]
PROCESSES: list[Any] = [
    *(table(kind) for kind in ("epsilon", "v_prediction", "sample")),
    VPSchedule(zero_terminal(table().table), "v_prediction"),
    RectifiedFlow(shift=3.0),
]


def point(target: Tensor, **extra: Any) -> Point:
    return Point(
        torch.zeros_like(target), torch.zeros(len(target), dtype=torch.int64), target, **extra
    )


def test_mean_and_sum() -> None:
    prediction, target = torch.randn(2, 3, 4, 5, 6)
    mean = denoising_error(prediction, point(target), table())
    torch.testing.assert_close(mean, (prediction - target).square().mean((1, 2, 3)))
    total = denoising_error(prediction, point(target), table(), reduction="sum")
    torch.testing.assert_close(total, mean * 4 * 5 * 6)
    weight = torch.tensor([1.0, 0.0, 2.0])
    weighted = denoising_error(prediction, point(target), table(), weight=weight)
    torch.testing.assert_close(weighted, mean * weight)


def test_pseudo_huber_is_exact_at_both_ends() -> None:
    gaps = torch.tensor([1e-6, 1e-3, 1.0, 1e4])
    target = torch.zeros(4, 1, 1, 1)
    got = denoising_error(gaps.view(4, 1, 1, 1), point(target), table(), distance="pseudo_huber")
    wide = gaps.double()
    expected = torch.sqrt(wide**2 + 1e-6) - 1e-3
    torch.testing.assert_close(got.double(), expected, rtol=1e-5, atol=0)


def test_half_predictions_are_squared_in_float32() -> None:
    prediction, target = torch.randn(2, 2, 4, 8, 8)
    half = prediction.bfloat16()
    got = denoising_error(half, point(target), table())
    assert got.dtype == torch.float32
    exact = denoising_error(half.double(), point(target.double()), table())
    torch.testing.assert_close(got.double(), exact, rtol=1e-6, atol=0)


@pytest.mark.parametrize("process", PROCESSES)
def test_clean_pictures_are_compared_where_the_point_says_so(process: NoiseProcess) -> None:
    t = process.timestep(torch.tensor([0.1, 0.6]))
    x0, noise = torch.randn(2, 2, 4, 3, 3, dtype=torch.float64)
    x_t, right = process.add_noise(x0, noise, t), process.target(x0, noise, t)
    at = Point(x_t, t, x0 + 0.5, in_x0=True)
    error = denoising_error(right, at, process)
    torch.testing.assert_close(error, torch.full((2,), 0.25, dtype=torch.float64))


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
@pytest.mark.parametrize("process", PROCESSES)
@pytest.mark.parametrize("name", ON_PAIRS)
def test_policy_equal_to_reference_gives_log_2(
    name: str, process: NoiseProcess, dtype: torch.dtype
) -> None:
    x0 = torch.randn(6, 4, 3, 3, dtype=dtype)
    t = process.timestep(RowRNG([1, 1, 2, 2, 3, 3]).uniform("t"))
    net = Net([0.3, 0.1], torch.randn(6, 5).to(dtype))
    at = ForwardNoise()(x0, t, RowRNG([1, 1, 2, 2, 3, 3]), process)
    error = denoising_error(net(at.x_t, process.timestep_input(t)).to(dtype), at, process)
    loss = presets.build(name)(logps(error, error.detach()))
    assert loss.value.item() == pytest.approx(math.log(2.0), abs=1e-7)
    assert loss.metrics["rewards/accuracies"] == 0.5  # all tied


@pytest.mark.parametrize("name", ON_PAIRS)
def test_exchanged_candidates_negate_the_logit_exactly(name: str) -> None:
    x0, cond = torch.randn(6, 4, 3, 3), torch.randn(6, 5)
    t, draws = torch.tensor([3, 3, 500, 500, 999, 999]), RowRNG([1, 1, 2, 2, 3, 3])
    other = torch.tensor([1, 0, 3, 2, 5, 4])
    process, objective = table(), presets.build(name)
    policy, reference = [0.3, 0.1], [0.25, 0.1]

    def logit(order: Tensor) -> Tensor:
        at = ForwardNoise()(x0[order], t, draws, process)
        errors = [
            denoising_error(Net(weights, cond[order])(at.x_t, t), at, process)
            for weights in (policy, reference)
        ]
        rewards = objective(logps(errors[0], errors[1].detach())).rewards
        assert rewards is not None
        return rewards[:, 0] - rewards[:, 1]

    straight = logit(torch.arange(6))
    assert torch.equal(logit(other), -straight)
    assert straight.abs().min() > 0


EXTREMES = st.sampled_from([0.0, 1e-30, 1e-8, 1.0, 1e4, 1e8])


@settings(max_examples=40, deadline=None)
@given(
    errors=st.lists(EXTREMES, min_size=8, max_size=8),
    name=st.sampled_from([*ON_PAIRS, "mapo", "diffusion_orpo", "ipo", "hinge", "rdpo", "self_npo"]),
)
def test_losses_of_extreme_errors_are_finite_with_finite_slopes(
    errors: list[float], name: str
) -> None:
    error = torch.tensor(errors[:4]).requires_grad_()
    loss = presets.build(name)(logps(error, torch.tensor(errors[4:]))).value
    (slope,) = torch.autograd.grad(loss, error)
    assert torch.isfinite(loss)
    assert torch.isfinite(slope).all()


@settings(max_examples=25, deadline=None)
@given(
    t=st.sampled_from([0, 1, 500, 998, 999]),
    size=st.sampled_from([0.0, 1.0, 1e4]),
    which=st.integers(0, 4),
    inverted=st.booleans(),
)
def test_extreme_pictures_and_timesteps_are_finite_with_finite_slopes(
    t: int, size: float, which: int, inverted: bool
) -> None:
    process = PROCESSES[which]
    at = process.timestep(torch.tensor([t / 1000.0 + 1e-6]))
    net = Net([0.3, 0.1], torch.ones(1, 5))
    estimator = DDIMInversion(4) if inverted else ForwardNoise()
    place = estimator(size * torch.ones(1, 4, 2, 2), at, RowRNG([t]), process, Networks(net))
    error = denoising_error(net(place.x_t, process.timestep_input(at)), place, process)
    slopes = torch.autograd.grad(error.sum(), [net.a, net.b])
    assert torch.isfinite(error).all()
    assert all(torch.isfinite(slope) for slope in slopes)


def test_the_size_of_a_picture_does_not_matter_to_the_mean() -> None:
    """Scaling the number of elements leaves the logit; under `sum` it grows with it."""
    small, target = torch.randn(2, 2, 4, 2, 2)
    large, wide = small.repeat(1, 1, 3, 3), target.repeat(1, 1, 3, 3)
    torch.testing.assert_close(
        denoising_error(large, point(wide), table()), denoising_error(small, point(target), table())
    )
    torch.testing.assert_close(
        denoising_error(large, point(wide), table(), reduction="sum"),
        9 * denoising_error(small, point(target), table(), reduction="sum"),
    )


def test_rows_of_one_shape_are_taken_by_their_places_in_the_batch() -> None:
    images = torch.arange(6.0).view(3, 2)  # rows 0, 2 and 5 of a batch, two candidates each
    part = Part(torch.tensor([0, 2, 5]), {"pixels": images})
    taken = part.take(torch.tensor([5, 1, 0]))
    assert taken.rows.tolist() == [0, 2]  # of the new batch
    assert taken.images["pixels"].tolist() == [[4.0, 5.0], [0.0, 1.0]]
    assert part.select(1).images["pixels"].tolist() == [[1.0], [3.0], [5.0]]
    wanted = torch.tensor([[1], [0], [0], [0], [0], [1]])
    assert part.columns(wanted).images["pixels"].tolist() == [[1.0], [2.0], [5.0]]
