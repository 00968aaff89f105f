"""Tokenizer and model: only tokens that rows really use must be among those that the model has."""

from __future__ import annotations

import logging
from typing import TYPE_CHECKING, Any

import pytest
from tiny import CHATML, make_model, make_tokenizer, run_config

from mmalign.core import Needs
from mmalign.data.example import Candidate, Example
from mmalign.errors import ConfigError, DataError
from mmalign.text.adapter import TextAdapter

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerFast


def adapter(tokenizer: PreTrainedTokenizerFast, rows: int = 320, **settings: Any) -> TextAdapter:
    """One whose model embeds `rows` tokens."""
    model = make_model("llama")
    model.resize_token_embeddings(rows)
    for name, value in settings.items():
        setattr(model.config, name, value)
        setattr(model.generation_config, name, value)
    return TextAdapter(run_config(), Needs(), model, tokenizer)


def pair(prompt: str, chosen: str) -> Example:
    return Example("row-7", prompt, (Candidate(chosen), Candidate("No.")), (1.0, 0.0))


def larger(chat_template: str | None = None) -> PreTrainedTokenizerFast:
    """A tokenizer with one token more than the model, for images."""
    tokenizer = make_tokenizer(chat_template)
    tokenizer.add_tokens(["<picture>"], special_tokens=True)
    assert tokenizer.convert_tokens_to_ids("<picture>") == 320
    return tokenizer


@pytest.mark.parametrize("template", [None, CHATML])
def test_a_token_that_no_row_uses_is_no_problem(template: str | None) -> None:
    made = adapter(larger(template))
    batch = made.collate([pair("Why is the sky blue?", "The air scatters blue sunlight.")])
    assert made(batch, Needs()).policy.isfinite().all()
    assert len(made.sample(["Why?"], max_new_tokens=2)) == 1


@pytest.mark.parametrize("texts", [("See <picture>", "Blue."), ("Why?", "A <picture> of it.")])
def test_a_row_that_uses_it_is_named_with_it(texts: tuple[str, str]) -> None:
    made = adapter(larger())
    with pytest.raises(DataError, match=r"row-7: has the token '<picture>' \(id 320\).*embeds 320"):
        made.collate([pair(*texts)])


def test_a_question_that_uses_it_is_refused_too() -> None:
    with pytest.raises(DataError, match=r"'<picture>' \(id 320\)"):
        adapter(larger()).sample(["See <picture>"], max_new_tokens=2)


def test_what_is_cut_off_is_not_used() -> None:
    made = adapter(larger())
    made.encoder.data = made.encoder.data.model_copy(update={"max_response_length": 3})
    made.collate([pair("Why?", "The air scatters blue <picture>")])


def test_without_a_model_nothing_is_known() -> None:
    from mmalign.text.encode import Encoder

    encoder = Encoder(larger(), run_config())
    assert 320 in encoder.encode_prompt("See <picture>")


def test_padding_takes_a_token_that_the_model_has() -> None:
    tokenizer = make_tokenizer(pad=None)
    tokenizer.add_special_tokens({"pad_token": "<padding>"})
    assert tokenizer.pad_token_id == 320
    made = adapter(tokenizer)
    rows = [pair("Why is the sky blue?", "The air scatters blue sunlight."), pair("Two?", "a")]
    batch = made.collate(rows)
    assert max(batch.inputs[f"{name}_ids"].max() for name in ("prompt", "response")) < 320
    assert made(batch, Needs()).policy.isfinite().all()
    prompts = ["Why is the sky blue?", "Two?"]
    assert made.sample(prompts, max_new_tokens=3) == [
        made.sample([prompt], max_new_tokens=3)[0] for prompt in prompts
    ]
    assert tokenizer.pad_token_id == 320, "what is saved stays the tokenizer's own"


def test_an_end_token_that_the_model_lacks_is_refused_at_once() -> None:
    tokenizer = make_tokenizer()
    tokenizer.add_special_tokens({"eos_token": "<end>"})
    with pytest.raises(ConfigError, match=r"written with '<end>' \(id 320\).*embeds 320 tokens"):
        adapter(tokenizer)


def test_a_template_that_writes_such_a_token_is_refused_at_once() -> None:
    tokenizer = make_tokenizer(CHATML.replace("<|im_start|>", "<turn>"))
    tokenizer.add_tokens(["<turn>"], special_tokens=True)
    with pytest.raises(ConfigError, match=r"written with '<turn>' \(id 320\)"):
        adapter(tokenizer)


def test_a_reference_needs_the_tokens_too() -> None:
    made = adapter(larger(), rows=321)
    made.collate([pair("See <picture>", "Blue.")])
    made.encoder.use_ids_below(320)
    with pytest.raises(DataError, match="embeds 320"):
        made.collate([pair("See <picture>", "Blue.")])


@pytest.mark.parametrize(
    ("template", "ids", "named", "rows"),
    [
        (None, 2, (), 320),
        (None, [7, 2], (), 320),
        (CHATML, 4, (), 320),
        (CHATML, [2, 4], (), 320),
        (None, None, (), 320),
        (None, 4, ("'</s>' (id 2)", "'<|im_end|>' (id 4)"), 320),
        (CHATML, [2, 1], (), 320),  # the template's own end, which the tokenizer was given for it
        (CHATML, [2, 1], ("'<|im_end|>' (id 4)", "'<s>' (id 1), '</s>' (id 2)"), 400),
        (CHATML, [2, 70], ("'<|im_end|>' (id 4)", "(id 70)"), 320),
    ],
)
def test_an_end_that_the_model_knows_nothing_of_is_named(
    template: str | None, ids: Any, named: tuple[str, ...], rows: int, caplog
) -> None:
    with caplog.at_level(logging.WARNING, logger="mmalign"):
        adapter(make_tokenizer(template), rows, eos_token_id=ids)
    said = [record.message for record in caplog.records if "tokenizer" in record.message]
    assert len(said) == bool(named)
    assert all(name in said[0] for name in named)


@pytest.mark.parametrize(("rows", "count"), [(320, 0), (512, 0), (2000, 1)])
def test_a_model_of_far_more_tokens_is_named(rows: int, count: int, caplog) -> None:
    with caplog.at_level(logging.WARNING, logger="mmalign"):
        adapter(make_tokenizer(), rows)
    said = [record.message for record in caplog.records if "embeds" in record.message]
    assert len(said) == count
    assert all("320 tokens" in line and "2000" in line for line in said)
