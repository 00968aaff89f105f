"""The cached reference: of one precision, and mended by the command that its errors name."""

from __future__ import annotations

import json
import re
from typing import TYPE_CHECKING, Any

import numpy as np
import pytest
import torch
from tiny import make_model, make_tokenizer, run_config

from mmalign.core import presets
from mmalign.data.sources import load_examples
from mmalign.errors import ConfigError
from mmalign.inference import write_cache
from mmalign.text.adapter import TextAdapter
from mmalign.text.cache import ReferenceCache

if TYPE_CHECKING:
    from pathlib import Path

    from mmalign.config import RunConfig

ROWS = [
    ("Why is the sky blue?", "The air scatters blue sunlight.", "No."),
    ("Two?", "Four. Two and two make four.", "a"),
    ("How does bread rise?", "Yeast makes bubbles.", "The cat liked to play in the sun."),
]
OBJECTIVE = presets.dpo()


@pytest.fixture
def sections(tmp_path: Path) -> dict[str, Any]:
    folder, data = tmp_path / "model", tmp_path / "rows.jsonl"
    make_model("llama").save_pretrained(folder)
    make_tokenizer().save_pretrained(folder)
    names = ("prompt", "chosen", "rejected")
    lines = [json.dumps(dict(zip(names, row, strict=True))) for row in ROWS]
    data.write_text("\n".join(lines), encoding="utf-8")
    return {
        "model": {"path": str(folder)},
        "data": {"train": str(data)},
        "reference": {"kind": "cached"},
        "output": str(tmp_path / "run"),
    }


def opened(config: RunConfig) -> tuple[TextAdapter, list[Any]]:
    rows, _ = load_examples(config.data, OBJECTIVE.needs, seed=0)
    adapter = TextAdapter.build(config, OBJECTIVE.needs)
    adapter.setup(rows)
    return adapter, rows


@pytest.mark.parametrize(
    "change",
    [
        {"model": {"dtype": "bfloat16"}},
        {"model": {"attention": "eager"}},
        {"train": {"mixed_precision": "bf16"}},
    ],
)
def test_values_of_another_precision_are_not_read(
    sections: dict[str, Any], change: dict[str, dict[str, str]]
) -> None:
    write_cache(run_config(**sections))
    opened(run_config(**sections))
    other = {name: {**sections.get(name, {}), **part} for name, part in change.items()}
    with pytest.raises(ConfigError, match="lacks ref_logps of 3 of 3 rows"):
        opened(run_config(**{**sections, **other}))


def test_the_cache_is_written_as_the_run_scores(sections: dict[str, Any]) -> None:
    """Under mixed precision the policy runs in bfloat16, so its reference has to."""
    config = run_config(**sections, train={"mixed_precision": "bf16"})
    write_cache(config)
    adapter, rows = opened(config)
    batch = adapter.collate(rows)
    with torch.autocast("cpu", torch.bfloat16), torch.no_grad():
        logps = adapter(batch, OBJECTIVE.needs)
    whole = TextAdapter.build(run_config(**sections | {"reference": {}}), OBJECTIVE.needs)
    with torch.no_grad():
        full = whole(batch, OBJECTIVE.needs)
    assert logps.reference is not None
    gap = (logps.policy - logps.reference)[logps.mask].abs().mean()
    rounding = (logps.policy - full.policy)[logps.mask].abs().mean()
    assert float(gap) < 0.2 * float(rounding), "rows meet others in a batch, and no more"


def test_a_damaged_value_is_named_and_the_command_mends_it(
    sections: dict[str, Any], tmp_path: Path
) -> None:
    config = run_config(**sections)
    assert "3 rows written" in write_cache(config)
    adapter, rows = opened(config)
    expected = adapter.collate(rows).inputs.ref_logps.clone()
    (shard,) = (tmp_path / "cache").glob("*.safetensors")
    cache = ReferenceCache(config, adapter.encoder, OBJECTIVE.needs)
    entry = cache.store.get(cache.key(rows[1]))
    assert entry is not None
    data = bytearray(shard.read_bytes())
    data[bytes(data).index(np.asarray(entry["ref_logps"]).tobytes())] ^= 1
    shard.write_bytes(data)

    with pytest.raises(
        ConfigError, match=r"lacks ref_logps of 1 of 3 rows .*, 1 of them damaged"
    ) as e:
        opened(config)
    assert "`mmalign cache CONFIG`" in str(e.value)
    with pytest.raises(ConfigError, match=re.escape(rows[1].id) + ".* is missing or damaged"):
        adapter.collate(rows)

    assert "1 rows written, 2 were there" in write_cache(config)
    again, _ = opened(config)
    assert torch.equal(again.collate(rows).inputs.ref_logps, expected)
    assert "0 rows written, 3 were there" in write_cache(config)
