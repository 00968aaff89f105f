"""What is trained under the chat templates of released families: context, answer, end, thoughts."""

from __future__ import annotations

import json
from dataclasses import replace
from typing import TYPE_CHECKING, Any

import pytest
from chat_templates import FAMILIES, make_family
from tiny import make_tokenizer, run_config

from mmalign.data.example import Candidate, Example, Message
from mmalign.errors import DataError
from mmalign.text.encode import Encoder

if TYPE_CHECKING:
    from mmalign.text.masks import EncodedCandidate

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


CALL = {"id": "call_0001", "type": "function", "function": {"name": "tell", "arguments": {"a": 1}}}
TELLS = "{% for c in m.tool_calls or [] %}<call>{{ c.function.name }}</call>{% endfor %}"


def with_calls(name: str, **text: Any) -> Encoder:
    """The family's template with calls written behind the words."""
    encoder = encoder_of(name, **text)
    template = str(encoder.tokenizer.chat_template)
    kept = ("{{ c }}", "{{ m.content.split('</think>')[-1] }}")
    if any(words in template for words in kept):
        for words in kept:
            template = template.replace(words, words + TELLS)
    else:
        before, words, after = template.rpartition("{{ m.content }}")
        template = before + words + TELLS + after
    encoder.tokenizer.chat_template = template
    return Encoder(encoder.tokenizer, encoder_config(**text))


def encoder_config(**text: Any) -> Any:
    return run_config(text=text, data={"train": "x", "max_prompt_length": 4000})


def turn(content: str = "", **further: Any) -> Message:
    return Message("assistant", content, json.dumps(further) if further else "")


@pytest.mark.parametrize("name", ["qwen3.5", "qwq", "deepseek-r1", "glm4.7", "step3.5"])
def test_a_call_without_words_closes_the_opened_thought_once(name: str) -> None:
    encoder = with_calls(name)
    item, other = encoded(encoder, (ASK,), (turn(tool_calls=[CALL]),), "No.")
    assert said(encoder, item) == said(encoder, other).replace("No.", "<call>tell</call>")
    thought, _ = encoded(encoder, (ASK,), (turn(tool_calls=[CALL], reasoning="Look."),), "No.")
    assert (
        said(encoder, thought)
        == FAMILIES[name].thought.replace("Blue.", "<call>tell</call>")
        + said(encoder, other).partition("No.")[2]
    )


@pytest.mark.parametrize("name", FAMILIES)
def test_the_last_of_several_turns_is_that_of_an_answer_of_its_own(name: str) -> None:
    """Its context is what inference sends, its thought is scored."""
    encoder = encoder_of(name)
    before = (ASK, Message("assistant", "Sure."), Message("user", "Go on."))
    words = "<think>\nLook.\n</think>\n\nBlue."
    alone, _ = encoded(encoder, before, words, "No.")
    several, _ = encoded(encoder, (ASK,), (turn("Sure."), before[-1], turn(words)), "No.")
    tail = len(alone.response)
    assert several.response[-tail:] == alone.response
    assert all(several.mask[-tail:])
    assert not several.mask[-tail - 1]


def test_thoughts_of_earlier_turns_that_are_left_out_are_counted() -> None:
    turns = (turn("Sure.", reasoning="Hm."), Message("user", "Go on."), turn("Blue."))
    encoder = encoder_of("qwen3")
    item, _ = encoded(encoder, (ASK,), turns, "No.")
    assert "Hm." not in said(encoder, item)
    assert encoder.counts == {"thoughts_left_out": 1}
    with pytest.raises(DataError, match="row: a turn has reasoning, which the chat template does"):
        encoded(encoder_of("llama3"), (ASK,), turns, "No.")
    last = (turn("Sure."), Message("user", "Go on."), turn("Blue.", thinking="Hm."))
    with pytest.raises(DataError, match="row: a turn has thinking, which the chat template does"):
        encoded(encoder_of("llama3"), (ASK,), last, "No.")
    off = encoder_of("qwen3", template_kwargs={"enable_thinking": False})
    with pytest.raises(DataError, match="row: the response has a thought, but enable_thinking is"):
        encoded(off, (ASK,), last, "No.")


def test_a_call_that_the_whole_conversation_writes_without_a_thought_is_scored() -> None:
    encoder = with_calls("qwen3")
    turns = (turn(tool_calls=[CALL]), Message("tool", "One."), turn("Blue."))
    item, _ = encoded(encoder, (ASK,), turns, "No.")
    shown = [t for t, scored in zip(item.response, item.mask, strict=True) if scored]
    text = encoder.tokenizer.decode(shown)
    assert text == "<call>tell</call><|im_end|><think>\n\n</think>\n\nBlue.<|im_end|>"


def test_a_tool_turn_that_ends_an_answer_leaves_nothing_to_train() -> None:
    encoder = with_calls("lfm2")
    call = turn("Wait.", tool_calls=[CALL])
    item, _ = encoded(encoder, (ASK,), (call, Message("tool", "One.")), "No.")
    only, _ = encoded(encoder, (ASK,), (call,), "No.")
    assert item == replace(only, spans=item.spans)


@pytest.mark.parametrize("name", ["qwen3", "qwen3.5", "glm4.7", "qwq", "llama3", "minimax-m2"])
def test_a_thought_that_never_ends_stands_behind_no_empty_one(name: str) -> None:
    encoder, family = encoder_of(name), FAMILIES[name]
    item, _ = encoded(encoder, (ASK,), "<think>\nLook. And look.", "No.")
    text = f"<think>\nLook. And look.{family.end}"
    assert said(encoder, item) == text.removeprefix(family.opens)


def test_a_switch_in_the_system_text_is_no_lost_word() -> None:
    template = (
        "{% for m in messages %}<|im_start|>{{ m.role }}\n{{ m.content.replace('/no_think', '') }}"
        "<|im_end|>\n{% endfor %}{% if add_generation_prompt %}<|im_start|>assistant\n"
        "{% if '/no_think' in messages[0].content %}<think></think>{% endif %}{% endif %}"
    )
    encoder = Encoder(make_tokenizer(template), encoder_config())
    for text in ("/no_think", "Be brief. /no_think"):
        item, _ = encoded(encoder, (Message("system", text), ASK), "Blue.", "No.")
        assert str(encoder.tokenizer.decode(item.prompt)).endswith("<think></think>")
        assert said(encoder, item) == "Blue.<|im_end|>"
    silent = template.replace("{% for m in messages %}", "{% for m in messages[1:] %}")
    encoder = Encoder(make_tokenizer(silent), encoder_config())
    with pytest.raises(DataError, match="leaves out the turn of the system"):
        encoded(encoder, (SYSTEM, ASK), "Blue.", "No.")
