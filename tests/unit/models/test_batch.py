"""Typed inputs: rows and candidates are taken from each tensor by the axes that its field names."""

from __future__ import annotations

import pickle
from dataclasses import dataclass, field

import torch
from torch import Tensor

from mmalign.models.batch import ON_CPU, ROWS, WHOLE, Batch, ModelInputs


@dataclass(frozen=True, slots=True)
class Group(ModelInputs):
    values: Tensor
    whole: dict[str, Tensor] = field(metadata=WHOLE)


@dataclass(frozen=True, slots=True)
class Toy(ModelInputs):
    ids: Tensor  # [B, K, L]
    times: Tensor = field(metadata=ROWS)
    seeds: Tensor = field(metadata=ON_CPU)
    groups: tuple[Group, ...] = ()
    name: str = ""
    weight: Tensor | None = None


def batch() -> Batch[Toy]:
    ids = torch.arange(12).view(2, 3, 2)
    groups = (Group(ids * 10, {"table": torch.arange(5)}),)
    return Batch(Toy(ids, torch.tensor([7, 8]), ids[..., 0], groups, "toy"),
                 torch.arange(6.0).view(2, 3), torch.tensor([1.0, 2.0]), ("a", "b"))  # fmt: skip


def test_one_candidate_of_each_row() -> None:
    one = batch().select(1)
    assert one.inputs.ids.tolist() == [[[2, 3]], [[8, 9]]]
    assert one.inputs.groups[0].values.tolist() == [[[20, 30]], [[80, 90]]]
    assert one.inputs.times.tolist() == [7, 8]
    assert one.inputs.groups[0].whole["table"].tolist() == [0, 1, 2, 3, 4]
    assert one.labels.tolist() == [[1.0], [4.0]]
    assert one.ids == ("a", "b")


def test_other_candidates_in_each_row() -> None:
    some = batch().columns(torch.tensor([[2, 0], [1, 1]]))
    assert some.inputs.ids[..., 0].tolist() == [[4, 0], [8, 8]]
    assert some.inputs.groups[0].values[..., 0].tolist() == [[40, 0], [80, 80]]
    assert some.labels.tolist() == [[2.0, 0.0], [4.0, 4.0]]
    assert some.inputs.times.tolist() == [7, 8]


def test_some_rows() -> None:
    last = batch().take(torch.tensor([1]))
    assert last.inputs.ids.tolist() == [[[6, 7], [8, 9], [10, 11]]]
    assert (last.inputs.times.tolist(), last.ids) == ([8], ("b",))
    assert last.row_weight is not None
    assert last.row_weight.tolist() == [2.0]
    assert len(last.inputs.groups[0].whole["table"]) == 5


def test_what_stays_on_the_cpu_and_what_moves() -> None:
    moved = batch().to("meta")
    devices = {name: value.device.type for name, value in moved.inputs.flat().items()}
    assert devices == {
        "ids": "meta", "times": "meta", "seeds": "cpu", "groups.0.values": "meta",
        "groups.0.whole.table": "meta",
    }  # fmt: skip
    assert moved.labels.device.type == "meta"
    assert (moved.inputs.name, moved.inputs.weight) == ("toy", None)


def test_processes_hand_batches_over() -> None:
    again = pickle.loads(pickle.dumps(batch()))
    for name, value in batch().inputs.flat().items():
        assert torch.equal(again.inputs.flat()[name], value)
    assert again.inputs["times"].tolist() == [7, 8]
