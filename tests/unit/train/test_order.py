from __future__ import annotations

from collections import Counter

import pytest
import torch
from toy_adapter import toy_config

from mmalign.config import TrainConfig
from mmalign.core import Needs
from mmalign.data.sources import load_examples
from mmalign.errors import DataError
from mmalign.models.adapter import build_adapter
from mmalign.train.order import Order, batches, eval_batches


def stream(order: Order, num: int) -> list[int]:
    """Row numbers of the first `num` micro-batches over all processes, in order."""
    return [
        visit.row
        for index in range(num)
        for process in range(order.num_processes)
        for visit in order.micro_batch(index, process)
    ]


def test_every_epoch_holds_every_row_once_in_another_order() -> None:
    order = Order(num_rows=12, batch_size=2, accumulate=2, num_processes=3, seed=5)
    rows = stream(order, 4)  # 4 micro-batches of 3 processes of 2 rows: two epochs
    assert sorted(rows[:12]) == sorted(rows[12:]) == list(range(12))
    assert rows[:12] != rows[12:]
    assert rows[:12] != list(range(12))


def test_draws_depend_on_the_visit_alone() -> None:
    one = Order(num_rows=11, batch_size=4, accumulate=3, num_processes=1, seed=1)
    two = Order(num_rows=11, batch_size=2, accumulate=6, num_processes=1, seed=1)
    visits = [visit for i in range(10) for visit in one.micro_batch(i, 0)]
    assert visits == [visit for i in range(20) for visit in two.micro_batch(i, 0)]
    draws = [visit.draw for visit in visits]
    assert len(set(draws)) == len(draws)
    assert all(0 <= draw < 2**63 for draw in draws)
    other = Order(num_rows=11, batch_size=4, accumulate=3, num_processes=1, seed=2)
    assert {visit.draw for visit in other.micro_batch(0, 0)}.isdisjoint(draws)


def test_the_last_batch_of_an_epoch_is_filled_from_the_next() -> None:
    order = Order(num_rows=10, batch_size=4, accumulate=1, num_processes=1, seed=0)
    rows = stream(order, 5)
    assert Counter(rows) == {row: 2 for row in range(10)}
    assert all(len(order.micro_batch(i, 0)) == 4 for i in range(9))


def test_processes_share_what_one_process_sees_in_larger_batches() -> None:
    two = Order(num_rows=11, batch_size=2, accumulate=3, num_processes=2, seed=1)
    one = Order(num_rows=11, batch_size=4, accumulate=3, num_processes=1, seed=1)
    assert stream(two, 7) == stream(one, 7)
    assert two.rows_per_step == one.rows_per_step == 12


@pytest.mark.parametrize(
    ("settings", "expected"),
    [({"num_epochs": 1}, 3), ({"num_epochs": 2.5}, 7), ({"num_epochs": 2, "num_steps": 4}, 4)],
)
def test_number_of_steps(settings: dict[str, float], expected: int) -> None:
    order = Order(num_rows=21, batch_size=4, accumulate=2, num_processes=1, seed=0)
    assert order.num_steps(TrainConfig(**settings)) == expected  # 21 rows, 8 a step


def test_a_later_start_gives_the_same_batches_and_moves_no_random_stream(tmp_path) -> None:
    config = toy_config(tmp_path, num_rows=10)
    rows, _ = load_examples(config.data, Needs(rows="pair"), seed=0)
    adapter = build_adapter(config, Needs())
    order = Order(num_rows=10, batch_size=3, accumulate=2, num_processes=1, seed=3)
    options = {"process": 0, "stop": 6, "num_workers": 0}
    before = torch.get_rng_state()
    whole = [batch.ids for batch in batches(rows, adapter, order, start=0, **options)]
    rest = [batch.ids for batch in batches(rows, adapter, order, start=4, **options)]
    assert len(whole) == 12
    assert rest == whole[8:]
    assert torch.equal(before, torch.get_rng_state())


@pytest.mark.parametrize("num_workers", [0, 1])
def test_what_is_wrong_with_a_row_is_one_sentence_from_a_worker_too(num_workers: int) -> None:
    class Refusing:
        def collate(self, rows: object, draws: object) -> None:
            raise DataError("row 3: has no picture")

    order = Order(num_rows=4, batch_size=2, accumulate=1, num_processes=1, seed=0)
    options = {"process": 0, "start": 0, "stop": 2, "num_workers": num_workers}
    with pytest.raises(DataError) as caught:
        next(batches([None] * 4, Refusing(), order, **options))  # type: ignore[arg-type, list-item]
    assert str(caught.value) == "row 3: has no picture"


def test_held_out_batches_cover_all_rows_and_never_hold_one_row_alone() -> None:
    assert eval_batches(9, 4) == [range(0, 4), range(4, 9)]
    assert eval_batches(10, 4) == [range(0, 4), range(4, 8), range(8, 10)]
    assert eval_batches(1, 4) == [range(0, 1)]
    assert eval_batches(0, 4) == []
