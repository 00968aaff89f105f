"""What rows and the config hand a chat template: tools, calls, keywords, files, the date, ends."""

from __future__ import annotations

import json
from typing import TYPE_CHECKING, Any

import pytest
import torch
from chat_templates import FAMILIES, make_family
from tiny import CHATML, make_tokenizer, run_config

from mmalign.config import dump, load
from mmalign.core import Needs
from mmalign.data.example import Asked, Candidate, Example, Message, Template
from mmalign.errors import ConfigError, DataError
from mmalign.text import cache
from mmalign.text.encode import Encoder
from mmalign.text.packing import arrange

if TYPE_CHECKING:
    from pathlib import Path

TOOLS = json.dumps([{"type": "function", "function": {"name": "weather", "parameters": {}}}])
CALL = [{"type": "function", "function": {"name": "weather", "arguments": '{"place": "Rome"}'}}]
AGENT = (
    "{% if tools %}<tools>{{ tools | tojson }}</tools>\n{% endif %}"
    "{% for m in messages %}<|im_start|>{{ m.role }}\n{{ m.content }}"
    "{% for c in m.tool_calls or [] %}<call>{{ c.function.name }} ARGS</call>{% endfor %}"
    "<|im_end|>\n{% endfor %}{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)


def encoder_of(template: str | None, **text: Any) -> Encoder:
    return Encoder(make_tokenizer(template), run_config(text=text))


def pair(chosen: Any, prompt: Any = "Why?", **options: Any) -> Example:
    return Example("row-1", prompt, (Candidate(chosen), Candidate("No.")), (1.0, 0.0), **options)


def calling(content: str = "") -> tuple[Message, ...]:
    return (Message("assistant", content, json.dumps({"tool_calls": CALL})),)


def said(encoder: Encoder, example: Example) -> str:
    return str(encoder.tokenizer.decode(encoder.encode_example(example)[0].response))


@pytest.mark.parametrize(
    ("way", "written"),
    [
        ("{{ c.function.arguments | tojson }}", '{"place": "Rome"}'),
        ("{% for k, v in c.function.arguments.items() %}{{ k }}={{ v }}{% endfor %}", "place=Rome"),
        ("{{ '' + c.function.arguments }}", '{"place": "Rome"}'),
        ("{{ c.function.arguments }}", '{"place": "Rome"}'),
    ],
    ids=["json", "items", "text", "printed"],
)
def test_calls_are_trained_however_a_template_takes_their_arguments(way: str, written: str) -> None:
    encoder = encoder_of(AGENT.replace("ARGS", way))
    answer = said(encoder, pair(calling(), template=Template(tools=TOOLS)))
    assert answer == f"<call>weather {written}</call><|im_end|>"


def test_tools_stand_in_the_context_of_training_and_sampling() -> None:
    encoder = encoder_of(AGENT)
    item = encoder.encode_example(pair("Yes.", template=Template(tools=TOOLS)))[0]
    assert '"name": "weather"' in encoder.tokenizer.decode(item.prompt)
    assert encoder.encode_prompt(Asked("Why?", Template(tools=TOOLS))) == item.prompt


def test_a_tool_turn_within_an_answer_is_seen_and_not_scored() -> None:
    encoder = encoder_of(AGENT)
    turns = (*calling(), Message("tool", "Sunny."), Message("assistant", "It is sunny."))
    item = encoder.encode_example(pair(turns))[0]
    shown = [t for t, scored in zip(item.response, item.mask, strict=True) if scored]
    text = encoder.tokenizer.decode(shown)
    assert text == "<call>weather ARGS</call><|im_end|>It is sunny.<|im_end|>"
    assert "Sunny." in encoder.tokenizer.decode(item.response)


@pytest.mark.parametrize(
    ("example", "key"),
    [
        (pair("Yes.", template=Template(tools=TOOLS)), "tools"),
        (pair(calling("Wait.")), "tool_calls"),
        (pair("Yes.", (Message("user", "Hi"), *calling("x"), Message("user", "y"))), "tool_calls"),
        (pair((Message("assistant", "Yes.", '{"reasoning": "Hm."}'),)), "reasoning"),
        (pair((Message("assistant", "Yes.", '{"tool_plan": "Hm."}'),)), "tool_plan"),
        (pair("Yes.", template=Template(options='{"style": 1}')), "style"),
    ],
)
@pytest.mark.parametrize("template", [CHATML, None], ids=["chatml", "no template"])
def test_what_a_template_does_not_write_is_refused_by_name(
    template: str | None, example: Example, key: str
) -> None:
    with pytest.raises(DataError, match=rf"^row-1: .*\b({key}|chat_template_kwargs)\b"):
        encoder_of(template).encode_example(example)


def test_keys_that_say_nothing_may_go_unread() -> None:
    turn = (Message("assistant", "Yes.", '{"name": "Ann", "tool_call_id": "1"}'),)
    encoder = encoder_of(CHATML)
    assert encoder.encode_example(pair(turn)) == encoder.encode_example(pair("Yes."))


def test_a_system_turn_that_a_template_passes_over_is_refused() -> None:
    silent = "{% for m in messages if m.role != 'system' %}{{ m.content }}<|im_end|>{% endfor %}"
    prompt = (Message("system", "Answer like a pirate."), Message("user", "Why?"))
    with pytest.raises(
        DataError, match="row-1: the chat template leaves out the turn of the system"
    ):
        encoder_of(silent).encode_example(pair("Yes.", prompt))


def test_a_row_switches_its_thoughts_off_and_on() -> None:
    family = make_family("qwen3", make_tokenizer())
    encoder = Encoder(family, run_config(text={"template_kwargs": {"enable_thinking": False}}))
    closed = "<think>\n\n</think>\n\n"
    item = encoder.encode_example(pair("Blue."))[0]
    assert str(family.decode(item.prompt)).endswith(closed)
    assert family.decode(item.response) == "Blue.<|im_end|>"
    on = Template(options='{"enable_thinking": true}')
    assert said(encoder, pair("Blue.", template=on)) == f"{closed}Blue.<|im_end|>"
    with pytest.raises(DataError, match="row-1: the response has a thought, but enable_thinking"):
        encoder.encode_example(pair("<think>\nHm.\n</think>\n\nBlue."))


def test_a_keyword_of_the_config_that_nothing_reads_is_refused() -> None:
    with pytest.raises(
        ConfigError, match=r"text\.template_kwargs: .* does not read enable_thinking"
    ):
        encoder_of(CHATML, template_kwargs={"enable_thinking": False})
    with pytest.raises(ConfigError, match=r"text\.template_kwargs is set, but no chat template"):
        encoder_of(None, template_kwargs={"enable_thinking": False})


def test_a_template_of_a_file_is_used_and_saved_with_the_tokenizer(tmp_path: Path) -> None:
    file = tmp_path / "mine.jinja"
    file.write_text(FAMILIES["zephyr"].template, encoding="utf-8")
    encoder = Encoder(make_tokenizer(), run_config(text={"chat_template": str(file)}))
    assert said(encoder, pair("Blue.")) == "Blue.</s>"
    assert encoder.tokenizer.chat_template == FAMILIES["zephyr"].template
    assert encoder.fingerprint() != encoder_of(CHATML).fingerprint()


@pytest.mark.parametrize(
    ("text", "message"),
    [
        (None, "cannot be read"),
        ("{% for m in %}", "is no Jinja template: line 1"),
        ("Hello", "does not read `messages`"),
    ],
)
def test_a_file_that_is_no_template_is_refused(
    tmp_path: Path, text: str | None, message: str
) -> None:
    file = tmp_path / "mine.jinja"
    if text is not None:
        file.write_text(text, encoding="utf-8")
    with pytest.raises(ConfigError, match=rf"text\.chat_template .*mine\.jinja: {message}"):
        encoder_of(CHATML, chat_template=str(file))


@pytest.mark.parametrize("fault", ["{{ messages[0].content.nothing() }}", "{{ 1 / 0 }}"])
def test_a_template_that_fails_is_one_sentence(fault: str) -> None:
    encoder = encoder_of("{% if messages | length == 3 %}" + fault + "{% endif %}" + CHATML)
    prompt = (Message("user", "a"), Message("assistant", "b"), Message("user", "c"))
    with pytest.raises(DataError, match=r"^row-1: the chat template refuses .*roles \['user'"):
        encoder.encode_example(pair("Yes.", prompt))


def test_the_date_is_that_of_the_config_and_part_of_the_fingerprint() -> None:
    def made(name: str, day: str) -> Encoder:
        text = {"date": day}
        return Encoder(make_family(name, make_tokenizer()), run_config(text=text))

    first, second = made("llama3.1", "2024-07-26"), made("llama3.1", "2024-07-27")
    assert "26 Jul 2024" in first.tokenizer.decode(first.encode_prompt("Why?"))
    assert first.fingerprint() != second.fingerprint()
    assert made("llama3", "2024-07-26").fingerprint() == made("llama3", "2024-07-27").fingerprint()


def test_the_date_of_a_cache_or_a_run_is_used_on_later_days(tmp_path: Path) -> None:
    model = tmp_path / "model"
    make_family("llama3.1", make_tokenizer()).save_pretrained(model)
    given: dict[str, Any] = {"model": {"path": str(model)}, "output": str(tmp_path / "run")}
    config = run_config(**given, reference={"kind": "cached"}, text={"date": "2024-07-26"})
    cache.keep(config)
    later = run_config(**given, reference={"kind": "cached"})
    assert cache.settle(later).text.date == config.text.date
    today = cache.settle(run_config(**given))
    assert today.text.date is not None
    assert config.text.date is not None
    assert today.text.date > config.text.date
    (tmp_path / "run").mkdir()
    (tmp_path / "run" / "config.yaml").write_text(dump(config), encoding="utf-8")
    assert load(tmp_path / "run" / "config.yaml").text.date == config.text.date
    assert cache.settle(run_config(**given)).text.date == config.text.date


@pytest.mark.parametrize(
    ("call", "text"),
    [
        ("'%B %-d, %Y'", "February 3, 2024"),
        ("'%d' ~ '/' ~ '%m'", "03/02"),
        ("format='%%d is %d'", "%d is 03"),
        ("''", ""),
        ("'today'", "today"),
    ],
)
def test_any_format_of_the_date_is_written(call: str, text: str) -> None:
    encoder = encoder_of(f"[{{{{ strftime_now({call}) }}}}]" + CHATML, date="2024-02-03")
    context = str(encoder.tokenizer.decode(encoder.encode_prompt("Why?")))
    assert context.startswith(f"[{text}]<|im_start|>")


@pytest.mark.parametrize("template", [None, "{% for m in messages %}{{ m.content }}{% endfor %}"])
def test_a_tokenizer_without_an_end_token(template: str | None, tmp_path: Path) -> None:
    def ending(stops: object) -> tuple[str, list[str]]:
        (tmp_path / "generation_config.json").write_text(json.dumps({"eos_token_id": stops}))
        tokenizer = make_tokenizer()
        tokenizer.eos_token, tokenizer.chat_template = None, template
        encoder = Encoder(tokenizer, run_config(model={"path": str(tmp_path)}))
        return said(encoder, pair("Blue.")), [note.partition(",")[0] for note in encoder.notes.said]

    assert ending(2) == ("Blue.</s>", ["the tokenizer has no end token; the model's"])
    none = ["neither tokenizer nor chat template has an end token"]
    assert ending(-1) == ending(None) == ending([2, 3]) == ("Blue.", none)


def test_a_template_without_a_date_leaves_the_config_as_it_is(tmp_path: Path) -> None:
    make_family("llama3", make_tokenizer()).save_pretrained(tmp_path)
    config = run_config(model={"path": str(tmp_path)})
    assert cache.settle(config) == config


def test_the_next_turns_opening_ends_an_answer_where_the_model_stops_there(tmp_path: Path) -> None:
    tokenizer = make_family("glm4", make_tokenizer())
    stops = [tokenizer.convert_tokens_to_ids(token) for token in ("<|endoftext|>", "<|user|>")]
    tokenizer.save_pretrained(tmp_path)
    settings = tmp_path / "generation_config.json"
    settings.write_text(json.dumps({"eos_token_id": stops}), encoding="utf-8")
    encoder = Encoder(tokenizer, run_config(model={"path": str(tmp_path)}))
    assert said(encoder, pair("Blue.")) == "Blue.<|user|>"
    assert encoder.end_ids == set(stops)
    adapter = tmp_path / "adapter"
    adapter.mkdir()
    (adapter / "adapter_config.json").write_text(
        json.dumps({"base_model_name_or_path": str(tmp_path)}), encoding="utf-8"
    )
    encoder = Encoder(tokenizer, run_config(model={"path": str(adapter)}))
    assert encoder.end_ids == set(stops)


def test_conversations_without_a_template_are_counted() -> None:
    encoder = encoder_of(None)
    encoder.encode_example(pair("Yes.", (Message("user", "Why?"),)))
    encoder.encode_example(pair("Yes."))
    assert encoder.counts == {"without_template": 1}


@pytest.mark.parametrize("layout", ["plain", "packed"])
def test_tokens_that_are_not_scored_are_fed_but_masked(layout: Any) -> None:
    encoder = encoder_of(CHATML)
    turns = (
        Message("assistant", "Sure."),
        Message("user", "Go on."),
        Message("assistant", "Blue."),
    )
    batch = encoder.collate([pair(turns)], Needs(candidates=2))
    items = encoder.encode_example(pair(turns))
    rows = arrange(batch.inputs, layout)
    assert rows.mask[0, 0].tolist() == items[0].mask
    assert rows.mask[0, 1].sum() == len(items[1].response)
    assert batch.inputs.response_mask[0, 0].all()
    scores = rows.responses(torch.arange(1.0, len(rows.targets) + 1))
    assert ((scores != 0) == rows.mask).all()
    fed = rows.targets[rows.slots[0, 0]].tolist()
    assert fed == items[0].response
