from __future__ import annotations

from itertools import pairwise
from typing import Any

import pytest
import torch
from torch import nn

from mmalign.config import TrainConfig
from mmalign.errors import ConfigError
from mmalign.train.run import build_optimizer, lr_scale, set_lr, warmup_steps


class Groups(nn.Module):
    def __init__(self, *groups: dict[str, Any]) -> None:
        super().__init__()
        self.groups = groups

    def parameter_groups(self, train: TrainConfig) -> list[dict[str, Any]]:
        return list(self.groups)


def parameter() -> nn.Parameter:
    return nn.Parameter(torch.ones(3))


def scales(**settings: Any) -> list[float]:
    train = TrainConfig(**settings)
    return [lr_scale(step, 10, train) for step in range(10)]


def test_linear_schedule_by_hand() -> None:
    expected = [0.5, 1.0, 1.0, 7 / 8, 6 / 8, 5 / 8, 4 / 8, 3 / 8, 2 / 8, 1 / 8]
    assert scales(schedule="linear", warmup=2) == pytest.approx(expected)


def test_cosine_schedule_by_hand() -> None:
    found = scales(schedule="cosine")
    assert found[0] == 1.0
    assert found[5] == pytest.approx(0.5)
    assert all(a > b > 0 for a, b in pairwise(found))


def test_constant_schedule_after_warmup() -> None:
    assert scales(schedule="constant", warmup=4) == [0.25, 0.5, 0.75, *[1.0] * 7]


def test_warmup_is_steps_from_1_on_and_a_share_below() -> None:
    assert warmup_steps(TrainConfig(warmup=3), 100) == 3
    assert warmup_steps(TrainConfig(warmup=0.03), 100) == 3


def test_groups_keep_their_own_rates_under_the_schedule() -> None:
    adapter = Groups({"params": [parameter()]}, {"params": [parameter()], "lr": 0.5})
    optimizer = build_optimizer(adapter, TrainConfig(lr=0.1))  # type: ignore[arg-type]
    assert set_lr(optimizer, 0.5) == pytest.approx(0.05)
    assert [group["lr"] for group in optimizer.param_groups] == pytest.approx([0.05, 0.25])
    assert set_lr(optimizer, 1.0) == pytest.approx(0.1), "always from the initial rate"


def test_a_restored_optimizer_continues_the_schedule() -> None:
    train = TrainConfig(lr=0.1)
    first = build_optimizer(Groups({"params": [parameter()]}), train)  # type: ignore[arg-type]
    set_lr(first, 0.25)
    second = build_optimizer(Groups({"params": [parameter()]}), train)  # type: ignore[arg-type]
    second.load_state_dict(first.state_dict())
    assert set_lr(second, 0.5) == pytest.approx(0.05)


@pytest.mark.parametrize("name", ["adamw", "adafactor", "sgd"])
def test_every_optimizer_goes_downhill(name: str) -> None:
    weight = parameter()
    train = TrainConfig(optimizer=name, lr=0.1)  # type: ignore[arg-type]
    optimizer = build_optimizer(Groups({"params": [weight]}), train)  # type: ignore[arg-type]
    for _ in range(3):
        optimizer.zero_grad()
        (weight**2).sum().backward()
        optimizer.step()
    assert bool((weight < 1).all())


def test_adafactor_takes_the_learning_rate_as_it_is() -> None:
    moved: list[float] = []
    for size in (1.0, 1e-2):
        weight = torch.nn.Parameter(torch.full((3, 4), size))
        train = TrainConfig(optimizer="adafactor", lr=1e-4)
        optimizer = build_optimizer(Groups({"params": [weight]}), train)  # type: ignore[arg-type]
        weight.sum().backward()
        optimizer.step()
        moved.append(size - float(weight.mean()))
    assert moved == pytest.approx([1e-4, 1e-4], rel=1e-2)


def test_a_model_without_trainable_parameters_is_refused() -> None:
    with pytest.raises(ConfigError, match="no trainable parameter"):
        build_optimizer(Groups({"params": []}), TrainConfig())  # type: ignore[arg-type]
