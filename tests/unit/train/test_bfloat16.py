"""Weights in bfloat16 take steps far below their spacing, whatever the optimizer."""

from __future__ import annotations

import io
import math
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from accelerate.utils import DistributedType
from torch import Tensor, nn
from toy_adapter import toy_config

from mmalign.config import TrainConfig
from mmalign.core import Needs
from mmalign.errors import ConfigError
from mmalign.preflight.check import check_config
from mmalign.train import run as training
from mmalign.train.check import Movement, require_sensible
from mmalign.train.loop import train
from mmalign.train.run import (
    Bfloat16Optimizer,
    build_optimizer,
    build_run,
    round_stochastically,
    set_lr,
)

SIZE = (100, 200)
LR = 1e-6
OPTIMIZERS = ["adamw", "adafactor", "sgd"]


class Groups(nn.Module):
    def __init__(self, *groups: dict[str, Any]) -> None:
        super().__init__()
        self.groups = groups

    def parameter_groups(self, train: TrainConfig) -> list[dict[str, Any]]:
        return list(self.groups)


def weights(dtype: torch.dtype = torch.bfloat16) -> nn.Parameter:
    """About 0.02 in size, where bfloat16's spacing is 1e-4: a hundred steps of 1e-6."""
    generator = torch.Generator().manual_seed(0)
    start = 0.02 + 0.005 * torch.randn(SIZE, generator=generator)
    return nn.Parameter(start.bfloat16().to(dtype))


def optimizer(*weight: nn.Parameter, **settings: Any) -> Any:
    settings = {"lr": LR, "optimizer": "adamw", **settings}
    groups = [{"params": [one]} for one in weight]
    return build_optimizer(Groups(*groups), TrainConfig(**settings))  # type: ignore[arg-type]


def gradients(step: int) -> Tensor:
    generator = torch.Generator().manual_seed(step)
    return (1.0 + 0.1 * torch.randn(SIZE, generator=generator)).bfloat16()


def steps(optim: Any, weight: nn.Parameter, first: int, last: int) -> None:
    for step in range(first, last):
        weight.grad = gradients(step).to(weight.dtype)
        optim.step()
        optim.zero_grad()


def moved(weight: nn.Parameter) -> float:
    return float((weight.detach().double() - weights().detach().double()).mean())


def test_random_rounding_gives_a_neighbour_and_the_mean_exactly() -> None:
    generator = torch.Generator().manual_seed(1)
    for value in (1.0 + 1e-4, -0.02 - 3e-6, 3.14159, -1e-30):
        drawn = round_stochastically(torch.full((400_000,), value), generator).double()
        exact = torch.tensor(value).double()
        below, above = sorted({float(x) for x in drawn.unique()})
        assert below < exact < above
        assert (
            torch.tensor(below)
            .bfloat16()
            .view(torch.int16)
            .sub(torch.tensor(above).bfloat16().view(torch.int16))
            .abs()
            == 1
        ), "neighbours in bfloat16"
        assert float(drawn.mean()) == pytest.approx(float(exact), abs=3e-3 * (above - below))
    whole = weights().detach().float()
    assert torch.equal(round_stochastically(whole, generator).float(), whole), "nothing to round"


@pytest.mark.parametrize("name", OPTIMIZERS)
def test_a_hundred_small_steps_come_to_what_float32_makes_of_them(name: str) -> None:
    exact = weights(torch.float32)
    steps(optimizer(exact, optimizer=name), exact, 0, 100)
    random = weights()
    steps(optimizer(random, optimizer=name), random, 0, 100)
    rounded = weights()
    steps(optimizer(rounded, optimizer=name, bf16_weights="nearest"), rounded, 0, 100)
    assert moved(exact) == pytest.approx(-1e-4, rel=0.02)
    assert moved(random) == pytest.approx(moved(exact), rel=0.02)
    assert abs(moved(rounded)) < 0.05 * abs(moved(exact)), "what this is there to prevent"


@pytest.mark.parametrize("name", OPTIMIZERS)
def test_master_weights_are_those_of_a_float32_run(name: str) -> None:
    exact, weight = weights(torch.float32), weights()
    steps(optimizer(exact, optimizer=name), exact, 0, 30)
    optim = optimizer(weight, optimizer=name, bf16_weights="master")
    steps(optim, weight, 0, 30)
    assert torch.equal(optim.held(weight), exact)
    assert torch.equal(weight, exact.bfloat16())


def test_the_second_moment_can_fall() -> None:
    """In bfloat16 a factor of 0.999 is rounded to 1, and one large gradient is never forgotten."""
    weight = weights()
    optim = optimizer(weight)
    for size in (100.0, *[1e-3] * 700):
        weight.grad = torch.full_like(weight, size)
        optim.step()
    (state,) = optim.state_dict()["inner"]["state"].values()
    assert state["exp_avg_sq"].dtype == torch.float32
    assert float(state["exp_avg_sq"].mean()) == pytest.approx(10.0 * 0.999**700, rel=1e-3)


@pytest.mark.parametrize("mode", ["stochastic", "master"])
@pytest.mark.parametrize("name", OPTIMIZERS)
def test_a_restored_optimizer_goes_on_with_the_same_bits(name: str, mode: str) -> None:
    settings: dict[str, Any] = {"optimizer": name, "bf16_weights": mode, "seed": 3}
    whole = weights()
    steps(optimizer(whole, **settings), whole, 0, 8)

    broken = weights()
    first = optimizer(broken, **settings)
    steps(first, broken, 0, 5)
    file = io.BytesIO()
    torch.save(first.state_dict(), file)
    file.seek(0)
    again = nn.Parameter(broken.detach().clone())
    second = optimizer(again, **settings)
    second.load_state_dict(second.state_dict())  # as accelerate does before the first step
    second.load_state_dict(torch.load(file, weights_only=True))
    torch.manual_seed(11)  # what else is drawn does not matter
    steps(second, again, 5, 8)
    assert torch.equal(again, whole)

    other = weights()
    steps(optimizer(other, **{**settings, "seed": 4}), other, 0, 8)
    assert torch.equal(other, whole) == (mode == "master"), "the seed decides what is drawn"


def test_many_at_a_time_or_few_is_the_same(monkeypatch: pytest.MonkeyPatch) -> None:
    def run() -> list[Tensor]:
        parts: list[Tensor] = [nn.Parameter(part.detach().clone()) for part in weights().split(25)]
        optim = build_optimizer(Groups({"params": parts}), TrainConfig(lr=LR))  # type: ignore[arg-type]
        for step in range(3):
            for part, gradient in zip(parts, gradients(step).split(25), strict=True):
                part.grad = gradient
            optim.step()
        return parts

    together = run()
    monkeypatch.setattr(training, "_CHUNK", 6_000)
    assert all(torch.equal(a, b) for a, b in zip(run(), together, strict=True))


def test_float32_weights_beside_them_and_rates_of_groups_are_kept() -> None:
    half, full = weights(), weights(torch.float32)
    groups = Groups({"params": [half]}, {"params": [full], "lr": 0.5, "weight_decay": 0.1})
    optim = build_optimizer(groups, TrainConfig(lr=0.25))  # type: ignore[arg-type]
    alone = weights(torch.float32)
    other = build_optimizer(
        Groups({"params": [alone], "lr": 0.5, "weight_decay": 0.1}),  # type: ignore[arg-type]
        TrainConfig(lr=0.25),
    )
    for optimiser in (optim, other):
        set_lr(optimiser, 0.5)
    assert [group["lr"] for group in optim.param_groups] == [0.125, 0.25]
    half.grad, full.grad, alone.grad = gradients(0), gradients(0).float(), gradients(0).float()
    optim.step()
    other.step()
    assert torch.equal(full, alone)
    assert moved(half) == pytest.approx(-0.125, rel=0.01)
    assert not isinstance(other, Bfloat16Optimizer), "nothing changes without bfloat16"


def test_a_weight_without_a_gradient_stays() -> None:
    used, unused = weights(), weights()
    optim = optimizer(used, unused)
    steps(optim, used, 0, 3)
    assert torch.equal(unused, weights())
    assert not torch.equal(used, weights())


def test_eight_bit_states_too() -> None:
    pytest.importorskip("bitsandbytes")
    weight = weights()
    steps(optimizer(weight, optimizer="adamw8bit"), weight, 0, 100)
    assert moved(weight) == pytest.approx(-1e-4, rel=0.05)


@pytest.mark.parametrize("override", ["model.dtype=float32", "model.lora={rank: 4}"])
def test_the_setting_is_refused_where_nothing_reads_it(tmp_path: Path, override: str) -> None:
    config = toy_config(tmp_path, "model.dtype=bfloat16", "train.bf16_weights=master", override)
    with pytest.raises(ConfigError, match="bf16_weights is master, but no weight is trained in"):
        require_sensible(config, Needs())


def test_sharded_weights_are_refused_by_name(tmp_path: Path) -> None:
    accelerator: Any = SimpleNamespace(distributed_type=DistributedType.FSDP)
    for mode, refused in (("stochastic", True), ("nearest", False)):
        config = toy_config(
            tmp_path, "model.dtype=bfloat16", f"train.bf16_weights={mode}", average=False
        )
        adapter = build_run(config, check_config(config)).adapter
        if not refused:
            training.ready_for_sharding(accelerator, adapter, config)
            continue
        with pytest.raises(ConfigError, match=r"bf16_weights is stochastic, but FSDP shards"):
            training.ready_for_sharding(accelerator, adapter, config)


HALF = (
    "model.dtype=bfloat16",
    "train.lr=1e-7",
    "train.num_steps=25",
    "train.check_reference=false",
)


def test_a_run_whose_weights_do_not_move_says_so(
    tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    train(toy_config(tmp_path, *HALF, "train.bf16_weights=nearest"))
    said = [line for line in capfd.readouterr().err.splitlines() if "have moved" in line]
    (line,) = said
    assert line.startswith("warning: after 20 steps ")
    assert "of 952 weights have moved, with a learning rate of at most 1e-07" in line
    assert "train.bf16_weights: stochastic or master" in line


@pytest.mark.runs
@pytest.mark.parametrize(
    "overrides",
    [
        (*HALF, "train.bf16_weights=stochastic"),
        (*HALF, "train.bf16_weights=master"),
        pytest.param(("train.lr=1e-7", "train.num_steps=25"), marks=pytest.mark.slow),
        ("train.lr=1e-7", "train.num_steps=25", "train.warmup=1000"),
        pytest.param((), marks=pytest.mark.slow),
    ],
)
def test_one_whose_weights_move_says_nothing(
    tmp_path: Path, capfd: pytest.CaptureFixture[str], overrides: tuple[str, ...]
) -> None:
    train(toy_config(tmp_path, *overrides))
    assert "have moved" not in capfd.readouterr().err


def test_the_cause_is_the_true_one(tmp_path: Path) -> None:
    config = toy_config(tmp_path, "train.num_steps=40")
    run = build_run(config, check_config(config))
    movement = Movement(run)
    told = [movement.after_step(step, 1e-30, torch.tensor(0.5)) for step in range(1, 41)]
    assert [step for step, text in enumerate(told, 1) if text] == [20]
    assert told[19] == (
        "after 20 steps 0 of 952 weights have moved, with a learning rate of at most 1e-30: the "
        "steps are too small for their precision (gradient norm 0.5); raise train.lr"
    )
    still = Movement(run)
    told = [still.after_step(step, 0.1, torch.tensor(0.0)) for step in range(1, 21)]
    assert told[19] is not None
    assert "every gradient was 0" in told[19]
    run.position.step = 30  # a resumed run looks 20 steps ahead, which it does not have
    rest = Movement(run)
    assert not any(rest.after_step(step, 0.1, torch.tensor(0.0)) for step in range(31, 41))


def test_a_few_of_many_are_looked_at(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("mmalign.train.check._SAMPLED", 100)
    config = toy_config(tmp_path)
    movement = Movement(build_run(config, check_config(config)))
    text = [movement.after_step(step, 0.1, torch.tensor(math.pi)) for step in range(1, 9)][-1]
    assert text is not None
    assert "after 8 steps 0 of 10" in text
