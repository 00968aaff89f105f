from __future__ import annotations

import json
import math
from pathlib import Path

import torch
from torch import tensor

from mmalign.evaluate import merge
from mmalign.train.metrics import (
    Averages,
    append_json,
    flatten,
    keep_until,
    last_values,
    means,
    read_json,
)


def test_lines_are_json_and_what_is_not_finite_becomes_null(tmp_path: Path) -> None:
    path = tmp_path / "metrics.jsonl"
    append_json(path, [{"step": 1, "loss": math.nan, "rows": [{"x": math.inf}]}])
    append_json(path, [{"step": 2, "loss": 0.5}, {"step": 3, "text": "größer\n"}])
    lines = path.read_text(encoding="utf-8").splitlines()
    assert [json.loads(line) for line in lines] == [
        {"step": 1, "loss": None, "rows": [{"x": None}]},
        {"step": 2, "loss": 0.5},
        {"step": 3, "text": "größer\n"},
    ]


def test_a_torn_last_line_is_left_out(tmp_path: Path) -> None:
    path = tmp_path / "metrics.jsonl"
    path.write_text('{"step": 1}\n{"step": 2, "lo', encoding="utf-8")
    assert read_json(path) == [{"step": 1}]
    keep_until(path, 5)
    append_json(path, [{"step": 2}])
    assert read_json(path) == [{"step": 1}, {"step": 2}]


def test_lines_after_the_resumed_step_go(tmp_path: Path) -> None:
    path = tmp_path / "metrics.jsonl"
    append_json(path, [{"step": step} for step in (0, 1, 2, 2, 3)])
    keep_until(path, 2)
    assert [line["step"] for line in read_json(path)] == [0, 1, 2, 2]
    keep_until(path, -1)
    assert read_json(path) == []
    keep_until(tmp_path / "absent.jsonl", 1)
    assert [p.name for p in tmp_path.iterdir()] == ["metrics.jsonl"]


def test_last_values_come_from_all_lines(tmp_path: Path) -> None:
    path = tmp_path / "metrics.jsonl"
    append_json(path, [{"step": 1, "eval_loss": 2.0}, {"step": 1, "loss": 1.0}])
    assert last_values(path) == {"step": 1, "eval_loss": 2.0, "loss": 1.0}


def test_averages_skip_nan_and_absent_metrics() -> None:
    averages = Averages()
    averages.add({"loss": tensor(1.0), "rewards/rejected": tensor(math.nan)})
    averages.add({"loss": tensor(3.0), "rewards/rejected": tensor(5.0), "rare": 7.0})
    assert means(averages.pop()) == {"loss": 2.0, "rewards/rejected": 5.0, "rare": 7.0}
    assert averages.pop() == {}


def test_averages_survive_a_checkpoint_and_join_over_processes() -> None:
    one, two, restored = Averages(), Averages(), Averages()
    one.add({"loss": tensor(1.0)})
    one.add({"loss": tensor(2.0)})
    two.add({"loss": tensor(6.0)})
    restored.load(json.loads(json.dumps(one.state())))
    restored.add({"loss": tensor(3.0)})
    assert means(merge([restored.pop(), two.pop()])) == {"loss": 3.0}


def test_averages_hold_no_graph() -> None:
    averages = Averages()
    averages.add({"loss": torch.ones((), requires_grad=True) * 2})
    assert averages.pop() == {"loss": (2.0, 1.0)}


def test_flatten_names_leaves_by_path() -> None:
    tree = {"a": {"b": 1, "c": {"d": [1, 2]}}, "e": {}}
    assert dict(flatten(tree)) == {"a.b": 1, "a.c.d": [1, 2], "e": {}}
