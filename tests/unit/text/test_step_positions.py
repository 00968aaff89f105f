"""The tokens that a step's mean is taken over, counted before any of them is scored."""

from __future__ import annotations

import pytest
import torch
from tiny import CHATML, make_model, make_tokenizer, run_config

from mmalign.core import Needs, presets
from mmalign.data.example import Candidate, Example, Message
from mmalign.text.adapter import TextAdapter
from mmalign.train.backward import step_positions

ROWS = [
    ("Why is the sky blue?", "The air scatters blue sunlight.", "No."),
    ("Two?", "Four. Two and two make four.", "a"),
    ("Why is the sky blue?", "Blue.", "Once upon a time the cat liked it more than red."),
]


@pytest.mark.parametrize("shared_prefix", ["on", "off"])
@pytest.mark.parametrize(
    "needs", [Needs(candidates=2), Needs(candidates=2, prompt=True)], ids=["response", "prompt"]
)
def test_the_count_is_that_of_what_is_scored(needs: Needs, shared_prefix: str) -> None:
    config = run_config(text={"shared_prefix": shared_prefix})
    adapter = TextAdapter(config, needs, make_model("llama"), make_tokenizer())
    rows = [
        Example(f"row-{i}", prompt, (Candidate(chosen), Candidate(rejected)), (1.0, 0.0))
        for i, (prompt, chosen, rejected) in enumerate(ROWS)
    ]
    window = [adapter.collate(rows[:2]), adapter.collate(rows[2:])]
    found = step_positions(adapter, window, needs)
    total = torch.zeros(2, 2)
    for batch in window:
        with torch.no_grad():
            logps = adapter(batch, needs)
        total[:, 0] += logps.mask.sum((0, 2))
        if needs.prompt:
            assert logps.prompt_mask is not None
            total[:, 1] += logps.prompt_mask.sum((0, 2))
    assert found is not None
    torch.testing.assert_close(found.float(), total / 3)


@pytest.mark.parametrize("shared_prefix", ["on", "off"])
def test_turns_of_the_user_within_an_answer_are_not_counted(shared_prefix: str) -> None:
    needs = Needs(candidates=2)
    config = run_config(text={"shared_prefix": shared_prefix})
    adapter = TextAdapter(config, needs, make_model("llama"), make_tokenizer(CHATML))
    several = (
        Message("assistant", "The air."),
        Message("user", "Why the air?"),
        Message("assistant", "It scatters."),
    )
    row = Example("row", "Why is the sky blue?", (Candidate(several), Candidate("No.")), (1.0, 0.0))
    batch = adapter.collate([row])
    found = step_positions(adapter, [batch], needs)
    with torch.no_grad():
        scored = adapter(batch, needs).mask.sum((0, 2))
    assert found is not None
    assert found[:, 0].tolist() == scored.tolist()
    assert int(scored[0]) < int(batch.inputs.response_mask[0, 0].sum())


def test_only_token_means_ask_for_it() -> None:
    assert presets.build("sft").needs.token_mean
    assert presets.build_mix({"dpo": 1.0, "sft": 0.1}).needs.token_mean
    assert presets.build("orpo", compat="trl-1.16").needs.token_mean
    assert not presets.build("sft", reduce="mean").needs.token_mean
    assert not presets.build("dpo").needs.token_mean
