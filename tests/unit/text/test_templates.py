"""What is trained under the chat templates of released families: context, answer, end, thoughts."""

from __future__ import annotations

from dataclasses import replace
from typing import TYPE_CHECKING, Any

import pytest
from chat_templates import FAMILIES, make_family
from tiny import make_tokenizer, run_config

from mmalign.data.example import Candidate, Example, Message
from mmalign.text.encode import Encoder

if TYPE_CHECKING:
    from mmalign.text.encode import EncodedCandidate

ASK = Message("user", "Why is the sky blue?")
SYSTEM = Message("system", "Be brief.")
every_family = pytest.mark.parametrize("name", FAMILIES)


def encoder_of(name: str, **text: Any) -> Encoder:
    config = run_config(text=text, data={"train": "x", "max_prompt_length": 4000})
    return Encoder(make_family(name, make_tokenizer()), config)


def encoded(encoder: Encoder, prompt: Any, *answers: Any) -> tuple[EncodedCandidate, ...]:
    labels = (1.0, *(0.0 for _ in answers[1:]))
    return encoder.encode_example(Example("row", prompt, tuple(map(Candidate, answers)), labels))


def said(encoder: Encoder, item: EncodedCandidate) -> str:
    return str(encoder.tokenizer.decode(item.response))


def generation_prompt(encoder: Encoder, prompt: tuple[Message, ...]) -> list[int]:
    tokenizer: Any = encoder.tokenizer
    text = tokenizer.apply_chat_template(
        [turn.as_dict() for turn in prompt], tokenize=False, add_generation_prompt=True
    )
    return tokenizer(text, add_special_tokens=False)["input_ids"]


@every_family
def test_context_is_the_generation_prompt_for_training_and_sampling(name: str) -> None:
    encoder = encoder_of(name)
    before = (Message("user", "Hi."), Message("assistant", "Hello."), ASK)
    prompts = [(ASK,), before]
    if FAMILIES[name].system:
        prompts += [(SYSTEM, ASK), (SYSTEM, *before)]
    for prompt in prompts:
        first, second = encoded(encoder, prompt, "Blue.", "It is not.")
        assert first.prompt == second.prompt == generation_prompt(encoder, prompt)
        assert encoder.encode_prompt(prompt) == first.prompt
        text = str(encoder.tokenizer.decode(first.prompt))
        assert text.endswith(FAMILIES[name].opens)
        assert ("Be brief." in text) == (prompt[0] == SYSTEM)


@every_family
def test_answer_is_whole_and_its_end_is_where_generation_stops(name: str) -> None:
    encoder, family = encoder_of(name), FAMILIES[name]
    for item, answer in zip(
        encoded(encoder, (ASK,), "Blue.", "No."), ("Blue.", "No."), strict=True
    ):
        assert said(encoder, item) == family.plain.format(answer=answer) + family.end
        assert item.response[-1] in encoder.end_ids
        assert all(item.mask)


@every_family
def test_thoughts_are_scored_from_where_the_context_ends(name: str) -> None:
    encoder, family = encoder_of(name), FAMILIES[name]
    item, plain = encoded(encoder, (ASK,), "<think>\nLook.\n</think>\n\nBlue.", "No.")
    assert said(encoder, item) == family.thought + family.end
    assert item.prompt == plain.prompt == generation_prompt(encoder, (ASK,))


@every_family
def test_every_turn_of_a_long_answer_is_scored_with_its_end(name: str) -> None:
    encoder = encoder_of(name)
    turns = (
        Message("assistant", "Sure."),
        Message("user", "Go on."),
        Message("assistant", "Blue."),
    )
    item, other = encoded(encoder, (ASK,), turns, "No.")
    assert item.prompt == other.prompt
    shown = [t for t, scored in zip(item.response, item.mask, strict=True) if scored]
    hidden = [t for t, scored in zip(item.response, item.mask, strict=True) if not scored]
    text = str(encoder.tokenizer.decode(shown))
    assert "Sure." in text
    assert "Blue." in text
    assert "Go on." not in text
    assert "Go on." in encoder.tokenizer.decode(hidden)
    assert item.response[-1] in encoder.end_ids
    assert item.mask[-1]
    if name not in ("glm4", "glm4.5", "glm4.7", "llava1.5"):  # they end no turn but the last
        ends = {str(encoder.tokenizer.eos_token), "<|end|>", FAMILIES[name].end.strip()}
        assert any(text.count(end) >= 2 for end in ends) or (
            name == "gpt-oss" and "<|end|>" in text
        )
    only = encoder_of(name, train_on="last")
    last, _ = encoded(only, (ASK,), turns, "No.")
    assert last.response == item.response
    shown = [t for t, scored in zip(last.response, last.mask, strict=True) if scored]
    assert "Sure." not in only.tokenizer.decode(shown)
    assert "Blue." in only.tokenizer.decode(shown)


@pytest.mark.parametrize("name", ["qwen3", "qwen3.5", "glm4.5", "glm4.7", "nemotron3", "qwq"])
@pytest.mark.parametrize("key", ["reasoning_content", "thinking", "reasoning"])
def test_thought_under_a_key_is_that_of_the_text(name: str, key: str) -> None:
    encoder = encoder_of(name)
    turn = (Message("assistant", "Blue.", f'{{"{key}": "Look."}}'),)
    item, other = encoded(encoder, (ASK,), turn, "<think>\nLook.\n</think>\n\nBlue.")
    assert item == replace(other, spans=item.spans)
