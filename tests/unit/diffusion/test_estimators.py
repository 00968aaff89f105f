"""Places to score at: per image, whatever the batch; exact ends; finite everywhere."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from nets import Net, table
from torch import Tensor

from mmalign.config import DiffusionConfig, EstimatorSpec
from mmalign.diffusion.estimators import (
    DDIMInversion,
    ForwardNoise,
    Networks,
    ReNoise,
    RowRNG,
    Truncated,
    build_estimator,
)
from mmalign.diffusion.process import (
    NoiseProcess,
    RectifiedFlow,
    VPSchedule,
    process_from,
    zero_terminal,
)
from mmalign.errors import ConfigError

INVERSIONS: list[Any] = [
    *(
        kind(inversion=s)
        for kind in (DDIMInversion, ReNoise)
        for s in ("diffusers_0_20", "diffusers")
    ),
    *(
        DDIMInversion(),
        ReNoise(),
        DDIMInversion(eta=0.1),
        DDIMInversion(inversion="diffusers", eta=0.1),
    ),
]
NAMES = [f"{type(e).__name__}-{e.inversion}-{e.eta}" for e in INVERSIONS]


def pictures(n: int, dtype: torch.dtype = torch.float64) -> Tensor:
    return torch.randn(n, 4, 3, 3, dtype=dtype)


def test_forward_noise_is_the_streams() -> None:
    x0, t = pictures(4), torch.tensor([5, 5, 700, 700])
    point = ForwardNoise()(x0, t, RowRNG([1, 1, 2, 2]), table())
    assert torch.equal(point.target[0], point.target[1])
    assert not torch.equal(point.target[1], point.target[2])
    assert torch.equal(point.x_t, table().add_noise(x0, point.target, t))
    apart = ForwardNoise()(x0, t, RowRNG([1, 2, 3, 4]), table())
    assert not torch.equal(apart.target[0], apart.target[1])


def test_the_offset_is_one_number_a_channel_and_shared_by_the_row() -> None:
    x0, t = pictures(2), torch.tensor([5, 5])
    draws = RowRNG([1, 1])
    plain = ForwardNoise()(x0, t, draws, table()).target
    moved = ForwardNoise(0.05)(x0, t, draws, table()).target
    offset = moved - plain
    assert torch.equal(moved[0], moved[1])
    torch.testing.assert_close(offset, offset[:, :, :1, :1].expand_as(offset))
    assert offset[0, :, 0, 0].unique().numel() == 4


def test_a_network_is_called_where_one_is_needed() -> None:
    x0, t, draws = pictures(2), torch.tensor([400, 500]), RowRNG([1, 2])
    policy, reference = (Net([a, 0.1], torch.ones(2, 3)) for a in (0.3, 0.2))
    networks = Networks(policy, reference)
    ForwardNoise()(x0, t, draws, table(), networks)
    assert not policy.called
    DDIMInversion()(x0, t, draws, table(), networks)
    assert policy.called
    assert not reference.called
    ReNoise(network="reference")(x0, t, draws, table(), networks)
    assert reference.called


@pytest.mark.parametrize("estimator", INVERSIONS, ids=NAMES)
def test_every_picture_has_its_own_path(estimator: DDIMInversion) -> None:
    x0, condition = pictures(5), torch.randn(5, 3, dtype=torch.float64)
    t, draws = torch.tensor([0, 1, 333, 950, 999]), RowRNG(range(5))
    together = estimator(x0, t, draws, table(), Networks(Net([0.3, 0.1], condition)))
    for i in range(5):
        net = Net([0.3, 0.1], condition[[i]])
        alone = estimator(x0[[i]], t[[i]], draws.rows([i]), table(), Networks(net))
        torch.testing.assert_close(together.x_t[i], alone.x_t[0])
        torch.testing.assert_close(together.target[i], alone.target[0])


@pytest.mark.parametrize("inversion", ["exact", "diffusers_0_20", "diffusers"])
@pytest.mark.parametrize("kind", [DDIMInversion, ReNoise])
def test_a_picture_that_has_arrived_is_not_given_to_the_network(kind: Any, inversion: Any) -> None:
    """As many evaluations as the images take one by one, and not the longest for all."""
    t, condition = torch.tensor([950, 30, 0, 450, 250]), torch.randn(5, 3)
    x0, draws = pictures(5), RowRNG(range(5))
    alone: list[list[float]] = []
    for i in range(5):
        net = Net([0.3, 0.1], condition[[i]])
        kind(inversion=inversion)(x0[[i]], t[[i]], draws.rows([i]), table(), Networks(net))
        alone += net.called
    net = Net([0.3, 0.1], condition)
    kind(inversion=inversion)(x0, t, draws, table(), Networks(net))
    together = [level for call in net.called for level in call]
    assert sorted(together) == sorted(level for call in alone for level in call)
    assert len(together) < 0.7 * 5 * len(net.called)


@pytest.mark.parametrize("process", [table(), table("v_prediction"), RectifiedFlow(shift=3.0)])
def test_landing_ends_at_the_drawn_timestep(process: NoiseProcess) -> None:
    """A network that always sees one noise: its sampler's path is the line through that noise."""
    x0, noise = pictures(6), pictures(6)
    t = process.timestep(torch.tensor([0.0, 0.001, 0.25, 0.5, 0.95, 0.9999]))

    def sees(x: Tensor, at: Tensor, rows: Tensor | None = None, /) -> Tensor:
        return noise if rows is None else noise[rows]

    for estimator in (DDIMInversion(7), ReNoise(3)):
        point = estimator(x0, t, RowRNG(range(6)), process, Networks(sees))
        start = process.level(torch.zeros_like(t), x0)  # where the path takes x0 to be
        alpha, sigma = process.level(t, x0)
        clean = (x0 - start[1] * noise) / start[0]
        torch.testing.assert_close(point.x_t, alpha * clean + sigma * noise)
        implied = process.eps_from(point.target, point.x_t, t)
        torch.testing.assert_close(alpha * x0 + sigma * implied, point.x_t)


def test_landing_calls_the_network_at_its_sources() -> None:
    x0 = pictures(1)
    for t, sources in [
        (0, []),
        (1, [0]),
        (2, [0, 1]),
        (101, [0, 1]),
        (102, [0, 1, 101]),
        (999, [0, *range(1, 902, 100)]),
    ]:
        net = Net([0.3, 0.1], torch.ones(1, 3))
        DDIMInversion(10)(x0, torch.tensor([t]), RowRNG([0]), table(), Networks(net))
        assert [call[0] for call in net.called if call[0] < t] == sources
    net = Net([0.3, 0.1], torch.ones(1, 3))
    ReNoise(10)(x0, torch.tensor([150]), RowRNG([0]), table(), Networks(net))
    assert [call[0] for call in net.called] == [0, 0, 1, 1, 101, 101]


def test_an_inversion_in_a_flow_is_eulers_method() -> None:
    process, x0 = RectifiedFlow(shift=3.0), pictures(1)
    t = torch.tensor([0.8], dtype=torch.float64)
    grid = [level for level in process.grid(5) if level < 0.8]

    def velocity(x: Tensor, at: Tensor) -> Tensor:
        return 0.3 * x * torch.cos(at).view(-1, 1, 1, 1) + 0.1

    def sees(x: Tensor, at: Tensor, rows: Tensor | None = None, /) -> Tensor:
        return process.eps_from(velocity(x, at), x, at)

    x = x0
    for source, goal in zip(grid, [*grid[1:], 0.8], strict=True):
        x = x + (goal - source) * velocity(x, torch.tensor([source]))
    point = DDIMInversion(5)(x0, t, RowRNG([0]), process, Networks(sees))
    torch.testing.assert_close(point.x_t, x)
    assert torch.isfinite(
        DDIMInversion(5, eta=0.1)(x0, t, RowRNG([0]), process, Networks(sees)).x_t
    ).all()


@pytest.mark.parametrize("prediction", ["epsilon", "v_prediction", "sample"])
def test_modern_is_the_inverse_scheduler_of_diffusers(prediction: Any) -> None:
    """It calls the network at the goal, and reads a velocity at the level the image is at."""
    from diffusers import DDIMInverseScheduler

    given = {"beta_start": 0.00085, "beta_end": 0.012, "beta_schedule": "scaled_linear"}
    scheduler = DDIMInverseScheduler(
        **given,
        prediction_type=prediction,
        clip_sample=False,
        set_alpha_to_one=False,
        steps_offset=1,
    )
    scheduler.set_timesteps(10)
    process = process_from({**given, "prediction_type": prediction})

    def network(x: Tensor, t: Any) -> Tensor:
        return torch.tanh(x.flip(-1)) * (0.3 + float(t) / 2000)

    def seen(x: Tensor, t: Tensor, rows: Tensor | None = None, /) -> Tensor:
        return process.eps_from(network(x, t[0]), x, t)

    start = x = pictures(2)
    for t in scheduler.timesteps:
        if t < 951:
            x = scheduler.step(network(x, t), int(t), x, return_dict=False)[0]
    ends = torch.full((2,), 951)
    found = DDIMInversion(10, "diffusers")(start, ends, RowRNG([1, 2]), process, Networks(seen))
    torch.testing.assert_close(found.x_t, x, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("inversion", ["diffusers_0_20", "diffusers"])
def test_released_grids_have_no_meaning_in_a_flow(inversion: Any) -> None:
    with pytest.raises(ConfigError, match=f"inversion is '{inversion}'.*flow model"):
        DDIMInversion(5, inversion)(
            pictures(1),
            torch.tensor([0.5]),
            RowRNG([0]),
            RectifiedFlow(),
            Networks(Net([0.1, 0.1], pictures(1))),
        )


@pytest.mark.parametrize("estimator", INVERSIONS, ids=NAMES)
@pytest.mark.parametrize("kind", ["epsilon", "v_prediction", "sample"])
def test_extremes_are_finite(estimator: DDIMInversion, kind: Any) -> None:
    x0 = 1e4 * pictures(4, torch.float32)
    t = torch.tensor([0, 1, 998, 999])
    for process in (table(kind), VPSchedule(zero_terminal(table().table), kind)):
        net = Net([0.3, 0.1], torch.ones(4, 3))
        point = estimator(x0, t, RowRNG(range(4)), process, Networks(net))
        assert point.x_t.dtype == torch.float32
        assert torch.isfinite(point.x_t).all()
        assert torch.isfinite(point.target).all()


@pytest.mark.runs
@pytest.mark.parametrize("num_steps", [1, pytest.param(999, marks=pytest.mark.slow), 1000])
@pytest.mark.parametrize("inversion", ["exact", "diffusers_0_20", "diffusers"])
def test_any_number_of_steps(num_steps: int, inversion: Any) -> None:
    estimator = DDIMInversion(num_steps, inversion, eta=0.1)
    net = Net([0.3, 0.1], torch.ones(1, 3))
    for t in (0, 999):
        point = estimator(pictures(1), torch.tensor([t]), RowRNG([0]), table(), Networks(net))
        assert torch.isfinite(point.x_t).all()


def test_no_gradient_flows_into_a_point() -> None:
    x0 = pictures(2).requires_grad_()
    net = Net([0.3, 0.1], torch.ones(2, 3))
    t = torch.tensor([400, 500])
    for estimator in (ForwardNoise(), DDIMInversion(), ReNoise()):
        point = estimator(x0, t, RowRNG([1, 2]), table(), Networks(net))
        assert not point.x_t.requires_grad
        assert not point.target.requires_grad


def test_built_from_a_configuration() -> None:
    def built(noise_offset: float = 0.0, **estimator: Any) -> Any:
        spec = EstimatorSpec.model_validate(estimator)
        return build_estimator(DiffusionConfig(estimator=spec, noise_offset=noise_offset))

    assert built(0.05) == ForwardNoise(0.05)
    assert built(kind="ddim_inversion") == DDIMInversion(10, "exact", 0.0)
    assert built(
        kind="ddim_inversion", eta=0.1, inversion="diffusers", num_steps=7
    ) == DDIMInversion(7, "diffusers", 0.1)
    assert built(kind="renoise") == ReNoise(5, "exact")
    with pytest.raises(ConfigError, match=r"noise_offset is 0.05.*only forward"):
        built(0.05, kind="renoise")
    assert built(kind="ddim_inversion", network="reference").network == "reference"
    assert built(kind="truncated") == Truncated(EstimatorSpec(kind="truncated"))
