"""Every trap of tokenization that could move a label."""

from __future__ import annotations

import logging
import pickle
from dataclasses import replace
from typing import TYPE_CHECKING, Any

import pytest
import torch
from tiny import CHATML, make_tokenizer, run_config

from mmalign.core import Needs
from mmalign.data.example import Candidate, Example, Message
from mmalign.errors import ConfigError, DataError, NeedsError
from mmalign.text.encode import Encoder
from mmalign.text.tokenizer import load_tokenizer
from mmalign.text.tools import show

if TYPE_CHECKING:
    from pathlib import Path

    from transformers import PreTrainedTokenizerFast

    from mmalign.models.batch import Batch

PAIR = Needs(candidates=2, rows="pair")
PROMPT, CHOSEN, REJECTED = "Why is the sky blue?", "The air scatters blue.", "It is."

# Templates with the habits that break naive masking, each as found in a released model.
THINK_WHEN_ALONE = CHATML.replace("assistant\\n' }}", "assistant\\n<think>\\n' }}")
SYSTEM_WHEN_ALONE = (
    "{% if messages | length == 1 %}{{ '<|im_start|>system\\nBe kind.<|im_end|>\\n' }}{% endif %}"
) + CHATML
NO_GENERATION_PROMPT = CHATML.partition("{% if add_generation_prompt %}")[0]
BOS_IN_TEMPLATE = "{{ bos_token }}" + CHATML
EMPTY_THINKING = CHATML.replace(
    "message['content'] + '<|im_end|>",
    "('<think>\\n\\n</think>\\n\\n' if message['role'] == 'assistant' else '') "
    "+ message['content'] + '<|im_end|>",
)
DROPS_THOUGHTS = CHATML.replace("message['content']", "message['content'].split('</think>')[-1]")
STRIPS = CHATML.replace("message['content']", "message['content'] | trim")
NO_END = CHATML.replace("<|im_end|>", "")


def pair(
    chosen: str = CHOSEN, rejected: str = REJECTED, prompt: Any = PROMPT, **chosen_options: Any
) -> Example:
    candidates = (Candidate(chosen, **chosen_options), Candidate(rejected))
    return Example("row-1", prompt, candidates, (1.0, 0.0))


def texts(encoder: Encoder, example: Example) -> list[tuple[str, str]]:
    decode = encoder.tokenizer.decode
    return [(decode(c.prompt), decode(c.response)) for c in encoder.encode_example(example)]


def chat(template: str = CHATML, **sections: Any) -> Encoder:
    return Encoder(make_tokenizer(template), run_config(**sections))


def plain(**sections: Any) -> Encoder:
    return Encoder(make_tokenizer(), run_config(**sections))


def data(**options: Any) -> dict[str, Any]:
    return {"data": {"train": "none.jsonl", **options}}


# The ends of responses


def test_plain_text_gets_its_end_token_which_is_scored() -> None:
    assert texts(plain(), pair()) == [(PROMPT, f"{CHOSEN}</s>"), (PROMPT, f"{REJECTED}</s>")]


def test_plain_text_that_has_its_end_token_gets_no_second_one() -> None:
    assert texts(plain(), pair(f"{CHOSEN}</s>"))[0][1] == f"{CHOSEN}</s>"


def test_conversation_ends_in_the_templates_end_token_and_not_in_what_follows_it() -> None:
    (prompt, chosen), _ = texts(chat(), pair())
    assert prompt == f"<|im_start|>user\n{PROMPT}<|im_end|>\n<|im_start|>assistant\n"
    assert chosen == f"{CHOSEN}<|im_end|>"  # without the template's line break


@pytest.mark.parametrize("encoder", [plain(), chat()], ids=["plain", "chat"])
def test_cut_response_learns_no_end(encoder: Encoder) -> None:
    assert texts(encoder, pair(complete=False))[0][1] == CHOSEN


def test_template_without_end_token_gets_the_eos_which_is_said_once(
    caplog: pytest.LogCaptureFixture,
) -> None:
    """The eos ends the answer in place of the line break, which no model would learn to stop at."""
    encoder = chat(NO_END)
    encoder.encode_example(pair())
    assert texts(encoder, pair())[0][1] == f"{CHOSEN}<|im_end|>"
    assert caplog.text.count("no end token") == 1


def test_pad_equal_to_eos_leaves_the_real_end_token_scored() -> None:
    tokenizer = make_tokenizer(pad=None)
    tokenizer.pad_token = tokenizer.eos_token
    batch = Encoder(tokenizer, run_config()).collate([pair()], PAIR)
    ids, mask = batch.inputs.response_ids, batch.inputs.response_mask
    lengths = [mask[0, k].sum().item() for k in range(2)]
    assert lengths[0] > lengths[1]
    for k, length in enumerate(lengths):
        assert ids[0, k, length - 1] == tokenizer.eos_token_id
        assert (ids[0, k, length:] == tokenizer.eos_token_id).all()  # padding looks the same


# The start of prompts


def test_bos_comes_once_for_plain_text() -> None:
    encoder = Encoder(make_tokenizer(bos=True), run_config())
    assert texts(encoder, pair())[0][0] == f"<s>{PROMPT}"
    assert texts(encoder, pair(prompt=f"<s>{PROMPT}"))[0][0] == f"<s>{PROMPT}"


def test_bos_comes_once_where_the_template_writes_it() -> None:
    encoder = Encoder(make_tokenizer(BOS_IN_TEMPLATE, bos=True), run_config())
    for item in encoder.encode_example(pair()):
        assert item.prompt.count(encoder.tokenizer.bos_token_id) == 1
        assert encoder.tokenizer.bos_token_id not in item.response


def test_empty_prompt_starts_from_bos_or_eos() -> None:
    encoder = plain()
    assert texts(encoder, pair(prompt=""))[0] == ("<s>", f"{CHOSEN}</s>")
    assert encoder.counts["prompts_empty"] == 1
    tokenizer = make_tokenizer()
    tokenizer.bos_token = None
    assert texts(Encoder(tokenizer, run_config()), pair(prompt=""))[0][0] == "</s>"


def test_empty_prompt_without_any_start_token_is_refused() -> None:
    tokenizer = make_tokenizer()
    tokenizer.bos_token = tokenizer.eos_token = None
    with pytest.raises(DataError, match=r"row-1.*prompt is empty.*give a prompt"):
        Encoder(tokenizer, run_config()).encode_example(pair(prompt=""))


def test_empty_response_is_refused_unless_it_is_an_end() -> None:
    assert texts(plain(), pair(chosen=""))[0][1] == "</s>"
    with pytest.raises(DataError, match="row-1: a response has no token"):
        plain().encode_example(pair(chosen="", complete=False))


# The boundary between prompt and response


def test_boundary_merge_moves_the_start_of_both_responses(
    caplog: pytest.LogCaptureFixture,
) -> None:
    # " sun" is one token; " s" and "un" tokenized apart give other ids than joined.
    encoder = plain()
    example = pair(chosen="ky is blue.", rejected="un is red.", prompt="Why is the s")
    with caplog.at_level(logging.WARNING):
        chosen, rejected = encoder.encode_example(example)
        encoder.encode_example(replace(example, id="row-2"))
    joined = encoder.tokenizer("Why is the sky is blue.")["input_ids"]
    assert chosen.prompt + chosen.response[:-1] == joined
    assert chosen.prompt == rejected.prompt
    assert encoder.tokenizer.decode(chosen.prompt) == "Why is the"
    assert encoder.tokenizer.decode(rejected.response) == " sun is red.</s>"
    assert encoder.counts["boundary_moved"] == 2
    assert caplog.text.count("responses start early") == 1  # warned once


def test_boundary_of_one_side_alone_moves_the_other_side_too() -> None:
    encoder = plain()
    chosen, rejected = encoder.encode_example(pair("un.", "\nNo.", prompt="Why is the s"))
    assert chosen.prompt == rejected.prompt
    assert encoder.tokenizer.decode(rejected.response) == " s\nNo.</s>"


def test_tokeniser_that_prepends_a_space_marker_keeps_the_joined_ids(shared_data: Path) -> None:
    config = run_config(model={"path": str(shared_data / "models" / "stories260k")})
    encoder = Encoder(load_tokenizer(config), config)
    for item, text in zip(
        encoder.encode_example(pair(" a dog ran", "ly", prompt="Once upon a time")),
        ("Once upon a time a dog ran", "Once upon a timely"),
        strict=True,
    ):
        assert item.prompt + item.response[:-1] == encoder.tokenizer(text)["input_ids"]
        assert item.response[-1] == encoder.tokenizer.eos_token_id
    assert item.prompt[0] == encoder.tokenizer.bos_token_id


# Chat templates


@pytest.mark.parametrize(
    "template",
    [CHATML, BOS_IN_TEMPLATE, SYSTEM_WHEN_ALONE, STRIPS],
    ids=["chatml", "bos", "system_when_alone", "strips"],
)
def test_response_is_the_answer_and_its_end_whatever_the_template_does(template: str) -> None:
    encoder = chat(template)
    for (prompt, response), answer in zip(texts(encoder, pair()), (CHOSEN, REJECTED), strict=True):
        assert response == f"{answer}<|im_end|>"
        assert prompt.endswith("<|im_start|>assistant\n")
        assert prompt.count("assistant") == 1
    context = encoder.encode_prompt(PROMPT)
    assert encoder.tokenizer.decode(context) == prompt  # sampling starts from what was trained on


def test_header_that_no_generation_prompt_writes_is_the_models_to_write(
    caplog: pytest.LogCaptureFixture,
) -> None:
    """Inference sends the prompt without it, whatever asks."""
    encoder = chat(NO_GENERATION_PROMPT)
    (prompt, response), _ = texts(encoder, pair())
    assert prompt == f"<|im_start|>user\n{PROMPT}<|im_end|>\n"
    assert response == f"<|im_start|>assistant\n{CHOSEN}<|im_end|>"
    assert encoder.tokenizer.decode(encoder.encode_prompt(PROMPT)) == prompt
    encoder.encode_example(replace(pair(), id="row-2"))
    assert caplog.text.count("no generation prompt") == 1


def test_system_text_of_the_prompt_alone_stays_in_the_context() -> None:
    (prompt, response), _ = texts(chat(SYSTEM_WHEN_ALONE), pair())
    assert prompt.startswith("<|im_start|>system\nBe kind.<|im_end|>\n<|im_start|>user\n")
    assert response == f"{CHOSEN}<|im_end|>"


def test_answer_without_a_thought_closes_the_one_that_the_prompt_opens(
    caplog: pytest.LogCaptureFixture,
) -> None:
    encoder = chat(THINK_WHEN_ALONE)
    (prompt, response), _ = texts(encoder, pair())
    assert prompt.endswith("<|im_start|>assistant\n<think>\n")
    assert response == f"\n</think>\n\n{CHOSEN}<|im_end|>"
    encoder.encode_example(replace(pair(), id="row-2"))
    assert caplog.text.count("closed at once") == 1
    assert encoder.counts == {"thoughts_closed": 2}


def test_empty_thinking_block_before_an_answer_is_for_the_model_to_write() -> None:
    (prompt, response), _ = texts(chat(EMPTY_THINKING), pair())
    assert prompt.endswith("<|im_start|>assistant\n")
    assert response == f"<think>\n\n</think>\n\n{CHOSEN}<|im_end|>"


def test_template_that_loses_a_part_of_the_answer_is_refused() -> None:
    with pytest.raises(DataError, match=r"row-1: the chat template drops a part of the response"):
        chat(DROPS_THOUGHTS).encode_example(pair("Let me think.</think>The air."))


def test_conversation_with_several_turns_is_context_up_to_the_last() -> None:
    turns = (Message("user", "Hi"), Message("assistant", "Hello"), Message("user", PROMPT))
    (prompt, chosen), _ = texts(chat(), pair(prompt=turns))
    assert "assistant\nHello<|im_end|>" in prompt
    assert chosen == f"{CHOSEN}<|im_end|>"


def test_answer_given_as_a_message_equals_the_same_answer_as_text() -> None:
    example = pair()
    message = replace(example.candidates[0], response=(Message("assistant", CHOSEN),))
    other = replace(example, candidates=(message, example.candidates[1]))
    assert chat().encode_example(other) == chat().encode_example(example)


def test_prompt_that_ends_in_an_assistant_turn_is_continued() -> None:
    turns = (Message("user", PROMPT), Message("assistant", "The air"))
    (prompt, chosen), _ = texts(chat(), pair(" scatters.", prompt=turns))
    assert prompt.endswith("<|im_start|>assistant\nThe air")
    assert chosen == " scatters.<|im_end|>"


def test_system_prompt_is_added_where_there_is_none() -> None:
    encoder = chat(text={"system_prompt": "Be brief."})
    assert texts(encoder, pair())[0][0].startswith("<|im_start|>system\nBe brief.<|im_end|>")
    own = (Message("system", "Be long."), Message("user", PROMPT))
    assert "Be brief" not in texts(encoder, pair(prompt=own))[0][0]


def test_system_prompt_without_a_template_is_refused() -> None:
    with pytest.raises(ConfigError, match=r"text\.system_prompt is set, but no chat template"):
        plain(text={"system_prompt": "Be brief."})


def test_role_that_the_template_refuses_is_named() -> None:
    template = "{{ raise_exception('no system role') if messages[0]['role'] == 'system' }}" + CHATML
    example = pair(prompt=(Message("system", "x"), Message("user", "y")))
    with pytest.raises(DataError, match=r"roles \['system', 'user'\]: no system role"):
        chat(template).encode_example(example)


# Limits


@pytest.mark.parametrize("side", ["left", "right"])
def test_tokenizers_own_truncation_is_never_used(side: str) -> None:
    tokenizer = make_tokenizer()
    expected = Encoder(tokenizer, run_config()).encode_example(pair())
    tokenizer.truncation_side = side
    tokenizer.model_max_length = 4
    tokenizer.backend_tokenizer.enable_truncation(3, direction=side)
    tokenizer.backend_tokenizer.enable_padding(length=64)
    assert Encoder(tokenizer, run_config()).encode_example(pair()) == expected


@pytest.mark.parametrize(
    ("keep", "part"), [("keep_end", slice(-4, None)), ("keep_start", slice(4))]
)
def test_prompt_limit_cuts_the_same_prompt_for_both_sides(keep: str, part: slice) -> None:
    whole = plain().encode_example(pair())
    encoder = plain(**data(max_prompt_length=4, truncate_prompt=keep))
    cut = encoder.encode_example(pair())
    assert cut[0].prompt == cut[1].prompt == whole[0].prompt[part]
    assert [c.response for c in cut] == [c.response for c in whole]
    encoder.encode_example(pair())  # the second epoch counts no row twice
    assert encoder.counts == {"prompts_cut": 1}


def test_prompt_cut_at_its_start_keeps_bos() -> None:
    tokenizer = make_tokenizer(bos=True)
    whole = Encoder(tokenizer, run_config()).encode_prompt(PROMPT)
    cut = Encoder(tokenizer, run_config(**data(max_prompt_length=4))).encode_prompt(PROMPT)
    assert cut == [tokenizer.bos_token_id, *whole[-3:]]


def test_response_limit_cuts_the_end_token_too() -> None:
    encoder = plain(**data(max_response_length=5))
    whole = plain().encode_example(pair(rejected="No"))
    cut = encoder.encode_example(pair(rejected="No"))
    assert cut[0].response == whole[0].response[:5]
    assert cut[1].response == whole[1].response  # short enough, end token kept
    assert encoder.counts == {"responses_cut": 1}


# Batches


def row(batch: Batch, name: str, index: int, candidate: int) -> list[int]:
    mask = batch.inputs[f"{name}_mask"][index, candidate]
    return batch.inputs[f"{name}_ids"][index, candidate][mask].tolist()


def test_collate_pads_right_to_the_longest_and_masks_by_length() -> None:
    encoder = plain()
    examples = [pair(), replace(pair("No.", prompt="Why?"), id="row-2", weight=0.5)]
    batch = encoder.collate(examples, PAIR)
    longest = max(len(c.response) for e in examples for c in encoder.encode_example(e))
    assert batch.inputs.response_ids.shape == (2, 2, longest)
    for index, example in enumerate(examples):
        for k, item in enumerate(encoder.encode_example(example)):
            assert row(batch, "prompt", index, k) == item.prompt
            assert row(batch, "response", index, k) == item.response
            mask = batch.inputs.response_mask[index, k].long()
            assert (mask.diff() <= 0).all()  # True first, then False
    assert batch.labels.tolist() == [[1.0, 0.0], [1.0, 0.0]]
    assert batch.row_weight is not None
    assert batch.row_weight.tolist() == [1.0, 0.5]
    assert batch.ids == ("row-1", "row-2")


def test_one_shift_scores_every_response_token(tiny_llama: Any) -> None:
    """Position l of the response is predicted by the token before it, end token included."""
    item = plain().encode_example(pair())[0]
    ids = torch.tensor([item.prompt + item.response])
    logps = tiny_llama(ids).logits[0].log_softmax(-1)
    by_hand = [logps[len(item.prompt) + i - 1, t] for i, t in enumerate(item.response)]
    labels = ids.clone()
    labels[:, : len(item.prompt)] = -100
    mean_nll = tiny_llama(ids, labels=labels).loss  # the library's own shift
    torch.testing.assert_close(-torch.stack(by_hand).mean(), mean_nll)


def test_mismatched_answers_are_those_of_the_row_before() -> None:
    encoder = plain()
    answers = ["One.", "Two.", "Three."]
    rows = [
        Example(f"r{i}", f"Prompt {i}?", (Candidate(text),), (float(i % 2),), kind="unpaired")
        for i, text in enumerate(answers)
    ]
    batch = encoder.collate(rows, Needs(candidates=2, rows="unpaired", roles=("mismatched",)))
    decode = encoder.tokenizer.decode
    assert [decode(row(batch, "response", i, 1)) for i in range(3)] == [
        "Three.</s>",
        "One.</s>",
        "Two.</s>",
    ]
    assert [decode(row(batch, "prompt", i, 1)) for i in range(3)] == [r.prompt for r in rows]
    assert batch.labels.tolist() == [[0.0, 0.0], [1.0, 0.0], [0.0, 0.0]]


def test_lone_row_has_no_mismatched_answer() -> None:
    encoder = plain()
    lone = Example("r0", PROMPT, (Candidate("One."),), (1.0,), kind="unpaired")
    batch = encoder.collate([lone], Needs(candidates=2, roles=("mismatched",)))
    assert not batch.inputs.response_mask[0, 1].any()
    assert batch.inputs.response_mask[0, 0].any()
    assert encoder.counts["without_mismatch"] == 1


def test_labels_of_a_row_do_not_depend_on_its_neighbours() -> None:
    """A mismatched answer that merges with the prompt must not move the row's own answer."""
    mine = Example("r0", "Why is the s", (Candidate("\nNo."),), (1.0,), kind="unpaired")
    other = Example("r1", "Why?", (Candidate("un."),), (1.0,), kind="unpaired")
    batch = plain().collate([mine, other], Needs(candidates=2, roles=("mismatched",)))
    assert row(batch, "response", 0, 0) == plain().encode_example(mine)[0].response


def test_extra_roles_follow_in_the_order_of_the_needs() -> None:
    extra = (
        Candidate("why", prompt="Which is better?", role="rationale"),
        Candidate("sampled one", role="online"),
        Candidate("calm", role="calibration"),
        Candidate("sampled two", role="online"),
    )
    example = replace(
        pair(), candidates=pair().candidates + extra, labels=(1.0, 0.0, 1.0, 0.0, 0.0, 0.0)
    )
    encoder = plain()
    decode = encoder.tokenizer.decode

    def responses(*roles: str) -> list[str]:
        batch = encoder.collate([example], Needs(candidates=2, roles=roles))
        return [decode(row(batch, "response", 0, k)) for k in range(2, 2 + len(roles))]

    assert responses() == []
    assert responses("calibration") == ["calm</s>"]
    assert responses("online", "online") == ["sampled one</s>", "sampled two</s>"]
    batch = encoder.collate([example], Needs(candidates=2, roles=("rationale",)))
    assert decode(row(batch, "prompt", 0, 2)) == "Which is better?"
    assert batch.labels.tolist() == [[1.0, 0.0, 1.0]]
    with pytest.raises(NeedsError, match=r"needs 3 'online' response.* has 2"):
        responses("online", "online", "online")


def test_rows_of_unequal_size_are_refused() -> None:
    three = replace(pair(), candidates=(*pair().candidates, Candidate("x")), labels=(2.0, 1.0, 0.0))
    with pytest.raises(NeedsError, match=r"have \[2, 3\] candidates"):
        plain().collate([pair(), three], PAIR)
    with pytest.raises(NeedsError, match="at least 4"):
        plain().collate([three], Needs(candidates=4))


# Spans and steps


@pytest.mark.parametrize("template", [None, CHATML, EMPTY_THINKING, STRIPS])
def test_spans_cover_the_tokens_that_overlap_them(template: str | None) -> None:
    encoder = Encoder(make_tokenizer(template), run_config(text={"masks": {"kind": "spans"}}))
    response = " The cat liked the sun."
    start = response.index("cat")
    example = pair(response, spans=((start, start + 3),))
    item = encoder.encode_example(example)[0]
    marked = [token for token, hit in zip(item.response, item.spans, strict=True) if hit]
    assert encoder.tokenizer.decode(marked).strip() == "cat"
    batch = encoder.collate([example], PAIR)
    assert batch.inputs.span_mask.sum() == len(marked)
    assert chat().collate([example], PAIR).inputs.span_mask is None


def test_spans_inside_characters_of_several_tokens_mark_all_of_them() -> None:
    encoder = plain(text={"masks": {"kind": "spans"}})
    item = encoder.encode_example(pair("ab é cd", spans=((3, 4),)))[0]
    assert sum(item.spans) >= 2  # é is two bytes
    marked = [token for token, hit in zip(item.response, item.spans, strict=True) if hit]
    assert encoder.tokenizer.decode(marked).strip() == "é"


@pytest.mark.parametrize("template", [None, CHATML])
def test_steps_are_lines_unless_the_record_gives_them(template: str | None) -> None:
    encoder = Encoder(make_tokenizer(template), run_config(text={"masks": {"kind": "steps"}}))
    response = "Two and two.\n\nMake four.\nSo four."

    def step_texts(**options: Any) -> list[str]:
        item = encoder.encode_example(pair(response, **options))[0]
        end = encoder.tokenizer.eos_token
        groups = [
            [t for t, s in zip(item.response, item.steps, strict=True) if s == step]
            for step in range(max(item.steps) + 1)
        ]
        return [encoder.tokenizer.decode(group).replace(end, "<end>") for group in groups]

    assert step_texts() == ["", "Two and two.\n\n", "Make four.\n", "So four.<end>"]
    first, second = response.index("Two"), response.index("So")
    given = ((first, second), (second, len(response)))
    assert step_texts(steps=given) == ["", "Two and two.\n\nMake four.\n", "So four.<end>"]


# Tokenizers


def test_missing_pad_token_is_filled_without_a_new_token(tmp_path: Path) -> None:
    make_tokenizer(pad=None).save_pretrained(tmp_path)
    tokenizer = load_tokenizer(run_config(model={"path": str(tmp_path)}))
    assert tokenizer.pad_token_id == tokenizer.eos_token_id
    assert len(tokenizer) == 320


def test_missing_tokenizer_is_a_config_error(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"model\.path .*cannot read a tokenizer"):
        load_tokenizer(run_config(model={"path": str(tmp_path)}))
    with pytest.raises(
        ConfigError, match=r"'no/such': is not a folder here, and cannot be"
    ) as told:
        load_tokenizer(run_config(model={"path": "no/such"}))
    assert "\n" not in str(told.value)


def test_fingerprint_changes_with_everything_that_changes_tokens() -> None:
    def made(tokenizer: PreTrainedTokenizerFast, **sections: Any) -> str:
        return Encoder(tokenizer, run_config(**sections)).fingerprint()

    base = made(make_tokenizer(CHATML))
    same = Encoder(make_tokenizer(CHATML), run_config(train={"lr": 1.0}))
    same.encode_example(pair())  # calls change the tokenizer's inner state
    assert same.fingerprint() == base
    others = [
        made(make_tokenizer(STRIPS)),
        made(make_tokenizer(CHATML, bos=True)),
        made(make_tokenizer(CHATML), text={"chat_template": False}),
        made(make_tokenizer(CHATML), text={"system_prompt": "x"}),
        made(make_tokenizer(CHATML), **data(max_prompt_length=9)),
        made(make_tokenizer(CHATML), **data(max_response_length=9)),
        made(make_tokenizer(CHATML), **data(truncate_prompt="keep_start")),
    ]
    assert len({base, *others}) == 1 + len(others)


def test_encoder_travels_to_loader_workers() -> None:
    encoder = chat()
    again = pickle.loads(pickle.dumps(encoder))
    assert again.encode_example(pair()) == encoder.encode_example(pair())


def test_generation_stops_where_answers_end() -> None:
    """And not at every special token: some open a part of the answer."""
    tokenizer = make_tokenizer(CHATML)
    tokenizer.eos_token = "</s>"
    ids = Encoder(tokenizer, run_config()).end_ids
    assert {tokenizer.decode([token]) for token in ids} == {"</s>", "<|im_end|>"}
    tokenizer = make_tokenizer(bos=True)
    assert Encoder(tokenizer, run_config()).end_ids == {tokenizer.eos_token_id}


def test_show_colours_what_is_scored() -> None:
    from rich.console import Console

    encoder = plain(text={"masks": {"kind": "spans"}})
    console = Console(width=120, force_terminal=True, color_system="standard", record=True)
    console.print(show(encoder, [pair("The cat sat.", spans=((4, 7),))]))
    html = console.export_html(inline_styles=True)
    for text in ("The", " cat", " sat.", "&lt;/s&gt;"):
        assert f">{text}<" in html  # each in a style of its own
    assert html.count(PROMPT) == 1


def test_a_conversation_without_a_template_is_a_transcript() -> None:
    turns = (
        Message("system", "Be kind."),
        Message("user", "Hello"),
        Message("assistant", "Hi"),
        Message("user", "Why?"),
    )
    encoder = Encoder(make_tokenizer(), run_config())
    expected = "Be kind.\n\nHuman: Hello\n\nAssistant: Hi\n\nHuman: Why?\n\nAssistant:"
    (context, chosen), (_, rejected) = texts(encoder, pair("Because.", " So.", prompt=turns))
    assert context + chosen == expected + " Because.</s>"
    assert context + rejected == expected + " So.</s>"
    assert encoder.tokenizer.decode(encoder.encode_prompt(turns)).startswith("Be kind.\n\nHuman:")


def test_a_transcript_refuses_roles_it_cannot_write() -> None:
    encoder = Encoder(make_tokenizer(), run_config())
    with pytest.raises(ConfigError, match=r"turns of \['tool'\].*no chat template"):
        encoder.encode_example(pair(prompt=(Message("tool", "42"),)))
