"""The model card: files with their readers, what was found in the rows, and no gain from a tie."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from tiny import run_config

from mmalign.models.adapter import Saved
from mmalign.train.final import model_card

ENVIRONMENT: dict[str, Any] = {
    "mmalign": "0",
    "packages": {"torch": "2"},
    "data": {"train_rows": 3, "train_hash": "a", "eval_rows": 1, "eval_hash": "b"},
}


def card(**given: Any) -> str:
    environment = {**ENVIRONMENT, "data": {**ENVIRONMENT["data"], **given.pop("data", {})}}
    evaluations = given.pop("evaluations", [])
    return model_card(run_config(output=Path("runs/x")), environment, evaluations, 5, **given)


def test_a_table_says_who_reads_which_file() -> None:
    saved = Saved({"a.safetensors": "ComfyUI", "unet/": "diffusers"}, ("c is not written: no",))
    text = card(saved=saved)
    assert "| file | read by |\n| --- | --- |\n| `a.safetensors` | ComfyUI |\n" in text
    assert "| `unet/` | diffusers |\n\nc is not written: no.\n\n## Held-out" in text
    assert "## Files" not in card()


def test_what_was_left_out_stands_there() -> None:
    text = card(data={"notes": ["2 rows are left out: a,\nb", "1 row is long"]})
    assert "(`b`).\n\n- 2 rows are left out: a, b\n- 1 row is long\n\n## Configuration" in text


def test_a_tied_start_is_called_that() -> None:
    rows = [{"logps": [-1.0, -2.0], "ref_logps": [-1.0, -2.0]}]
    first = {"step": 0, "reward_accuracy": 0.5, "loss": 0.69, "intervals": {}, "rows": rows}
    last = {"step": 5, "reward_accuracy": 0.75, "loss": 0.5, "intervals": {}}
    text = card(evaluations=[first, last])
    assert "| reward accuracy (log-ratio) | all tied | 0.75 |" in text
    moved = {**first, "rows": [{"logps": [-1.0, -2.1], "ref_logps": [-1.0, -2.0]}]}
    assert "| reward accuracy (log-ratio) | 0.5 | 0.75 |" in card(evaluations=[moved, last])
