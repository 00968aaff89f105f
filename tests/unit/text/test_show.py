"""`mmalign data show` colours what is scored, and nothing else."""

from __future__ import annotations

import pytest
from tiny import CHATML, make_tokenizer, run_config

from mmalign.data.example import Candidate, Example, Message
from mmalign.text.encode import Encoder
from mmalign.text.tools import CONTEXT, response, show

ANSWER = (
    Message("assistant", "The cat."),
    Message("user", "And then?"),
    Message("assistant", "The sun."),
)


@pytest.mark.parametrize("trained_on", ["all", "last"])
def test_turns_that_are_not_trained_on_look_like_context(trained_on: str) -> None:
    encoder = Encoder(make_tokenizer(CHATML), run_config(text={"train_on": trained_on}))
    example = Example("row-1", "Why?", (Candidate(ANSWER), Candidate("No.")), (1.0, 0.0))
    several, single = encoder.encode_example(example)
    text = response(encoder.tokenizer, encoder.end_ids, several)
    dim = "".join(text.plain[span.start : span.end] for span in text.spans if span.style == CONTEXT)
    assert "And then?" in dim
    assert ("The cat." in dim) is (trained_on == "last")
    assert "The sun." not in dim
    heads = show(encoder, [example]).renderables
    assert f"{sum(several.mask)} of them scored" in str(heads[3])
    assert "of them scored" not in str(heads[4]), "all tokens of a single turn are"
    assert not single.scored
