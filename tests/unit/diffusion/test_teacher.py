"""Self-NPO: the teacher's walk, the student's place and loss, and the average."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from goldens import compare, tensor
from nets import GOLDEN, Net, table
from torch import nn

from mmalign.config import EstimatorSpec
from mmalign.core import CandidateLogps, presets
from mmalign.diffusion.estimators import Networks, RowRNG, Truncated
from mmalign.diffusion.process import RectifiedFlow, VPSchedule, zero_terminal
from mmalign.diffusion.scores import denoising_error
from mmalign.errors import ConfigError
from mmalign.models.reference import Ema, copy_of

CASES = GOLDEN["self_npo"]["cases"]
LATE, EARLY = CASES  # in the second all images arrive before the last evaluation
NONE = torch.empty(0)  # timesteps of the row, which a walk does not read


def teachers(cond: Any, empty: Any) -> Networks:
    return Networks(teacher=cond, teacher_empty=empty)


def truncated(case: dict[str, Any]) -> Truncated:
    hyper = case["hp"]
    spec = EstimatorSpec(
        kind="truncated",
        guidance=hyper["w"],
        num_steps=hyper["ddim_grid"],
        num_moves=hyper["teacher_evals"] - 1,
        distance={"huber": "pseudo_huber", "l2": "mse"}[hyper["loss"]],
        huber_c=hyper["huber_c"],
    )
    return Truncated(spec)


def walked(case: dict[str, Any], stop_early: bool) -> Any:
    process, t = table(), torch.tensor(case["start_timesteps"])
    x = process.add_noise(tensor(case["latents"]), tensor(case["noise"]), t)
    nets = [Net(case["teacher_ab"], tensor(case[given])) for given in ("cond", "uncond")]
    return truncated(case).walk(x, t, process, nets[0], nets[1], stop_early)


@pytest.mark.parametrize("case", CASES, ids=lambda case: f"w={case['hp']['w']}")
def test_self_npo(case: dict[str, Any]) -> None:
    process, estimator = table(), truncated(case)
    walk = walked(case, stop_early=True)
    s = torch.tensor(case["sampled_timesteps"])
    assert (walk.t + torch.tensor(case["sampled_offset"])).tolist() == s.tolist()
    point = estimator.student_point(walk, s, tensor(case["noise2"]), process)
    student = Net(case["student_ab"], tensor(case["cond"]))
    spec = estimator.spec
    error = denoising_error(
        student(point.x_t, point.t), point, process, distance=spec.distance, huber_c=spec.huber_c
    )
    columns = (-0.5 * error)[:, None, None]
    loss = presets.self_npo()(
        CandidateLogps(
            policy=columns,
            mask=torch.ones_like(columns, dtype=torch.bool),
            labels=torch.ones(len(columns), 1),
        )
    )
    slopes = torch.autograd.grad(loss.value, [student.a, student.b])
    got = {
        "x_end": walk.x,
        "end_timesteps": walk.t.double(),
        "target_x0": walk.x0,
        "student_input": point.x_t,
        "loss": loss.value,
        "dloss_da": slopes[0],
        "dloss_db": slopes[1],
    }
    compare(case, got, relative=True, skip={k: "input" for k in case if k not in got})


def test_the_release_stops_where_all_pictures_have_arrived_and_we_do_not() -> None:
    full, stopped = walked(EARLY, stop_early=False), walked(EARLY, stop_early=True)
    torch.testing.assert_close(full.x, stopped.x, rtol=0, atol=0)
    gap = (full.x0 - stopped.x0).abs().flatten(1).amax(1)
    assert gap[0] > 1e-5  # the last one to arrive
    assert not gap[1:].any()
    full, stopped = walked(LATE, stop_early=False), walked(LATE, stop_early=True)
    assert torch.equal(full.x0, stopped.x0)


def test_average() -> None:
    """teacher <- rate * teacher + (1 - rate) * student, after every step."""
    case = GOLDEN["self_npo"]["ema"]
    student = nn.Linear(2, 1, bias=False).double()
    weight = student.weight.data
    weight.copy_(tensor([case["target0"]]))
    teacher = Ema(copy_of(student), case["rate"])
    weight.copy_(tensor([case["source"]]))
    teacher.after_step(1)
    with teacher.active() as model:
        (average,) = model.parameters()
    compare(case, {"target1": average[0]}, skip=dict.fromkeys(("rate", "target0", "source"), "in"))


def test_a_row_does_not_depend_on_its_neighbours() -> None:
    process, estimator = table(), Truncated(EstimatorSpec(kind="truncated", guidance=-5.0))
    x0 = torch.randn(4, 4, 3, 3, dtype=torch.float64)
    cond, empty = torch.randn(2, 4, 5, dtype=torch.float64)
    draws = RowRNG([3, 4, 5, 6])

    def point(index: list[int]) -> Any:
        nets = [Net([0.3, 0.1], given[index]) for given in (cond, empty)]
        return estimator(x0[index], NONE, draws.rows(index), process, teachers(*nets))

    together = point([0, 1, 2, 3])
    assert together.in_x0
    assert (together.t >= 0).all()
    assert (together.t < 1000).all()
    for i in range(4):
        alone = point([i])
        assert alone.t.item() == together.t[i].item()
        torch.testing.assert_close(alone.x_t[0], together.x_t[i])
        torch.testing.assert_close(alone.target[0], together.target[i])


def test_guidance_minus_one_calls_the_empty_prompt_alone() -> None:
    def never(x: torch.Tensor, t: torch.Tensor) -> torch.Tensor:
        raise AssertionError("not needed")

    x0 = torch.randn(2, 4, 3, 3)
    net = Net([0.3, 0.1], torch.randn(2, 5))
    Truncated(EstimatorSpec(kind="truncated"))(
        x0, NONE, RowRNG([1, 2]), table(), teachers(never, net)
    )
    assert len(net.called) == 6
    zero = Truncated(EstimatorSpec(kind="truncated", guidance=0.0))
    zero(x0, NONE, RowRNG([1, 2]), table(), teachers(net, never))


@pytest.mark.parametrize("num_moves", [0, 5])
@pytest.mark.parametrize("num_steps", [1, 25, 1000])
def test_extreme_walks_stay_finite(num_steps: int, num_moves: int) -> None:
    spec = EstimatorSpec(kind="truncated", num_steps=num_steps, num_moves=num_moves)
    x0 = 1e4 * torch.randn(8, 4, 2, 2)
    net = Net([0.3, 0.1], torch.randn(8, 5))
    point = Truncated(spec)(x0, NONE, RowRNG(range(8)), table(), teachers(net, net))
    assert torch.isfinite(point.x_t).all()
    assert torch.isfinite(point.target).all()
    assert (point.t <= 999).all()


@pytest.mark.parametrize("process", [RectifiedFlow(), VPSchedule(zero_terminal(table().table))])
def test_processes_without_a_picture_at_the_end_are_refused(process: Any) -> None:
    net = Net([0.3, 0.1], torch.randn(1, 5))
    with pytest.raises(ConfigError, match="truncated, which starts at the last level"):
        Truncated(EstimatorSpec(kind="truncated"))(
            torch.randn(1, 4, 2, 2), NONE, RowRNG([0]), process, teachers(net, net)
        )
