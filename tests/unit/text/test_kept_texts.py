"""Texts and conversations that come again: rendered and tokenized once, and never changed."""

from __future__ import annotations

import datetime
from typing import Any

import pytest
from tiny import CHATML, make_tokenizer

from mmalign.data.example import Template
from mmalign.text import tokenizer as tokenizers
from mmalign.text.tokenizer import JinjaTemplate, TextTokenizer

TURNS = [{"role": "user", "content": "What is two and two?"}]
TODAY = datetime.date(2026, 1, 2)


def test_what_callers_do_to_ids_stays_with_them() -> None:
    tokenize = TextTokenizer(make_tokenizer())
    first = tokenize("The cat is red.", add_leading=False)
    before = [list(part) for part in first]
    for part in first:
        part.clear()
    again = tokenize("The cat is red.", add_leading=False)
    assert [list(part) for part in again] == before


def test_a_text_longer_than_all_that_is_kept_is_tokenised(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(tokenizers, "_KEPT", 4)
    tokenize = TextTokenizer(make_tokenizer())
    text = "The cat liked to play in the sun."
    expected = tokenize.inner(text, add_special_tokens=False)["input_ids"]
    assert len(expected) > 4
    assert [tokenize(text, add_leading=False)[0] for _ in range(2)] == [expected, expected]


def test_a_conversation_is_rendered_once(monkeypatch: pytest.MonkeyPatch) -> None:
    template = JinjaTemplate(make_tokenizer(CHATML), {}, TODAY)
    rendered = 0
    whole = template.owner.apply_chat_template

    def counted(*given: Any, **options: Any) -> Any:
        nonlocal rendered
        rendered += 1
        return whole(*given, **options)

    monkeypatch.setattr(template.owner, "apply_chat_template", counted)
    texts = [template.render(TURNS, Template(), "row", ask=ask) for ask in (True, True, False)]
    assert texts[0] == texts[1] != texts[2]
    assert rendered == 2


def test_one_and_true_are_two_keywords() -> None:
    owner = make_tokenizer("{{ mode }}{% for m in messages %}{{ m.content }}{% endfor %}")
    template = JinjaTemplate(owner, {}, TODAY)
    texts = [
        template.render(TURNS, Template(options=options), "row")
        for options in ('{"mode": 1}', '{"mode": true}', '{"mode": 1.0}', '{"mode": "1"}')
    ]
    assert [text.removesuffix(TURNS[0]["content"]) for text in texts] == ["1", "True", "1.0", "1"]
