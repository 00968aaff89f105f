"""The end of a run: the trained weights in their library's own layout, with a model card."""

from __future__ import annotations

import shutil
from typing import TYPE_CHECKING, Any

from mmalign.errors import CheckpointError
from mmalign.models.adapter import Saved, build_adapter
from mmalign.train.card import model_card
from mmalign.train.checkpoint import publish
from mmalign.train.metrics import read_json

if TYPE_CHECKING:
    from collections.abc import Mapping
    from pathlib import Path

    from mmalign.models.adapter import Adapter
    from mmalign.train.run import Run


def save_final(run: Run, environment: Mapping[str, Any]) -> Path:
    """Write `final/`; it appears complete or not at all. Called by every process."""
    output = run.config.output
    target, temporary = output / "final", output / ".final.tmp"
    adapter = run.adapter
    if run.is_sharded:
        whole = run.accelerator.get_state_dict(run.model)  # every process gives its part
        if run.accelerator.is_main_process:
            adapter = build_adapter(run.config, run.objective.needs)
            _take_over(adapter, whole)
    if run.accelerator.is_main_process:
        shutil.rmtree(temporary, ignore_errors=True)
        temporary.mkdir()
        saved = adapter.save(temporary) or Saved()
        evaluations = read_json(output / "eval.jsonl")
        card = model_card(run.config, environment, evaluations, run.position.step, saved)
        (temporary / "README.md").write_text(card, encoding="utf-8")
        publish(temporary, target)
        for note in saved.notes:
            run.accelerator.print(note)
    run.accelerator.wait_for_everyone()
    return target


def _take_over(adapter: Adapter, whole: Mapping[str, Any]) -> None:
    """Put the parts of all processes, gathered, into a model that is not sharded."""
    missing = set(adapter.load_state_dict(whole, strict=False).missing_keys)
    lost = [name for name, p in adapter.named_parameters() if p.requires_grad and name in missing]
    if lost:
        raise CheckpointError(
            f"{len(lost)} trained tensors were not gathered from the processes, e.g. {lost[0]}, so "
            "final/ would hold their start; the checkpoints are whole"
        )
