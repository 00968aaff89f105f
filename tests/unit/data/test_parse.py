"""Canonical records to Examples, and what is wrong with them."""

from __future__ import annotations

import json
import pickle

import pytest
from hypothesis import given
from hypothesis import strategies as st

from mmalign.data import Candidate, Example, Message, parse_record
from mmalign.data.parse import read_record
from mmalign.errors import DataError

PAIR = {"prompt": "2 + 2?", "chosen": "4", "rejected": "5"}
LIST = {"prompt": "2 + 2?", "responses": ["5", "4", "3"], "scores": [0.5, 2, -1]}
UNPAIRED = {"prompt": "2 + 2?", "response": "4", "desirable": True}
USER = {"role": "user", "content": "2 + 2?"}
ANSWER = {"role": "assistant", "content": "4"}


def problems(record: dict[str, object]) -> list[str]:
    example, found = read_record(record, where="f.jsonl:1")
    assert (example is None) == bool(found)
    return [str(problem) for problem in found]


def test_pair() -> None:
    assert parse_record(PAIR | {"id": 7, "source": "me"}, where="f.jsonl:1") == Example(
        id="7",
        prompt="2 + 2?",
        candidates=(Candidate("4"), Candidate("5")),
        labels=(1.0, 0.0),
        kind="pair",
        meta={"source": "me"},
    )


def test_a_record_without_id_is_named_by_its_place() -> None:
    assert parse_record(PAIR, where="f.jsonl:1").id == "f.jsonl:1"


def test_list_keeps_the_order_of_the_data() -> None:
    row = parse_record(LIST, where="")
    assert [c.response for c in row.candidates] == ["5", "4", "3"]
    assert (row.labels, row.kind) == ((0.5, 2.0, -1.0), "list")


@pytest.mark.parametrize(("desirable", "label"), [(True, 1.0), (False, 0.0), (0, 0.0)])
def test_unpaired(desirable: object, label: float) -> None:
    row = parse_record(UNPAIRED | {"desirable": desirable}, where="")
    assert (row.labels, row.kind) == ((label,), "unpaired")


def test_plain() -> None:
    row = parse_record({"prompt": "Hi", "response": "Hello"}, where="")
    assert (row.labels, row.kind) == ((1.0,), "plain")


@pytest.mark.parametrize(
    ("extra", "p"),
    [
        ({"p_chosen": 0.8}, 0.8),
        ({"agreement": 0.75}, 0.75),
        ({"votes_chosen": 2, "votes_rejected": 1}, 2 / 3),
        ({"votes_chosen": 2, "votes_rejected": 0, "votes_tie": 1}, 2.5 / 3),
        ({"tie": True, "votes_chosen": 2, "votes_tie": 3}, 0.5),
        ({"tie": False}, 1.0),
    ],
    ids=["p", "agreement", "votes", "tie votes", "tie", "no tie"],
)
def test_soft_labels(extra: dict[str, object], p: float) -> None:
    row = parse_record(PAIR | extra, where="")
    assert row.labels == pytest.approx((p, 1 - p))
    assert row.is_tie == (p == 0.5)


def test_graded_labels_of_a_pair_need_not_add_to_one() -> None:
    record = PAIR | {"label_chosen": 0.9, "label_rejected": 0.4}
    assert parse_record(record, where="").labels == (0.9, 0.4)


def test_conversations() -> None:
    answers = [ANSWER, {"role": "user", "content": "sure?"}, ANSWER]
    row = parse_record({"prompt": [USER], "chosen": answers, "rejected": "5"}, where="")
    assert row.prompt == (Message("user", "2 + 2?"),)
    assert row.candidates[0].response == tuple(Message(t["role"], t["content"]) for t in answers)


def test_messages_keep_every_key() -> None:
    call = {"type": "function", "function": {"name": "add", "arguments": {"a": 2, "b": 2}}}
    asked = [USER, {"role": "assistant", "content": None, "tool_calls": [call], "name": None}]
    answer = {"role": "assistant", "reasoning_content": "Two and two.", "content": "4"}
    row = parse_record({"prompt": asked, "chosen": [answer], "rejected": "5"}, where="")
    assert [turn.as_dict() for turn in row.prompt if isinstance(turn, Message)] == [
        USER,
        {"role": "assistant", "content": "", "tool_calls": [call]},
    ]
    assert row.candidates[0].response == (
        Message("assistant", "4", '{"reasoning_content": "Two and two."}'),
    )


@pytest.mark.parametrize("as_text", [False, True])
def test_what_a_row_hands_its_chat_template(as_text: bool) -> None:
    tools = [{"type": "function", "function": {"name": "add", "parameters": {}}}]
    given = {"tools": tools, "chat_template_kwargs": {"enable_thinking": False}}
    texts = {key: json.dumps(value) for key, value in given.items()}
    row = parse_record(PAIR | (texts if as_text else given), where="")
    assert json.loads(row.template.tools) == tools
    assert row.template.options == '{"enable_thinking": false}'
    assert row.meta == {}


def test_no_tools_are_none() -> None:
    assert not parse_record(PAIR | {"tools": [], "chat_template_kwargs": ""}, where="").template


def test_each_side_may_have_its_own_prompt() -> None:
    record = {"prompt_chosen": "be brief", "prompt_rejected": "be long"}
    row = parse_record(record | {"chosen": "ok", "rejected": "ok"}, where="")
    assert [c.prompt for c in row.candidates] == ["be brief", "be long"]


def test_cut_responses_learn_no_end() -> None:
    row = parse_record(PAIR | {"rejected_cut": True}, where="")
    assert [c.complete for c in row.candidates] == [True, False]
    listed = parse_record(LIST | {"cut": [False, True, False]}, where="")
    assert [c.complete for c in listed.candidates] == [True, False, True]


def test_spans_and_steps() -> None:
    row = parse_record(PAIR | {"chosen": "so 4", "spans_chosen": [[3, 4]]}, where="")
    assert [c.spans for c in row.candidates] == [((3, 4),), ()]
    steps = [[[0, 1]], [[0, 1]], []]
    listed = parse_record(LIST | {"steps": steps}, where="")
    assert [c.steps for c in listed.candidates] == [((0, 1),), ((0, 1),), ()]


def test_extra_roles_follow_the_rated_candidates() -> None:
    extra = {
        "calibration": "four",
        "rationale": "because",
        "rationale_prompt": "why?",
        "online": ["x", "y"],
    }
    row = parse_record(PAIR | extra, where="")
    roles = ["", "", "calibration", "rationale", "online", "online"]
    assert [c.role for c in row.candidates] == roles
    assert row.candidates[3].prompt == "why?"
    assert row.labels == (1.0, 0.0, 0.0, 1.0, 0.0, 0.0)
    assert row.num_rated == 2


@pytest.mark.parametrize(
    ("record", "expected"),
    [
        ({"prompt": "a"}, "no response: give chosen and rejected, responses and scores"),
        (
            PAIR | {"response": "x"},
            "more than one kind of record at once, but found pair and",
        ),
        ({"prompt": "a", "chosen": "b"}, "rejected is missing"),
        (PAIR | {"prompt": None}, "prompt is missing"),
        (PAIR | {"prompt": "  "}, "prompt is empty"),
        (PAIR | {"rejected": "\n"}, "rejected is empty"),
        (PAIR | {"rejected": "4"}, "chosen equals rejected"),
        (PAIR | {"rejected": 5}, "rejected must be text or a list of messages, but is 5"),
        (PAIR | {"rejected": []}, "rejected is empty"),
        (PAIR | {"rejected": [{"role": "user"}]}, "rejected must hold messages with a text"),
        (PAIR | {"rejected": [USER]}, "a response must start with an assistant turn"),
        (PAIR | {"rejected": [ANSWER, USER]}, "a response must end with an assistant turn"),
        (PAIR | {"rejected": [ANSWER | {"name": {1}}]}, "a message of rejected holds what JSON"),
        (PAIR | {"tools": "look_up"}, "tools must be a list of objects, or the JSON text of one"),
        (PAIR | {"tools": ["look_up"]}, "tools must be a list of objects, or the JSON text of one"),
        (PAIR | {"chat_template_kwargs": [1]}, "chat_template_kwargs must be an object, or the"),
        (PAIR | {"rejected": "\ud800"}, "rejected holds half of a surrogate pair"),
        (PAIR | {"p_chosen": 1.5}, "p_chosen must be a finite number between 0 and 1, but is 1.5"),
        (PAIR | {"p_chosen": True}, "p_chosen must be a finite number"),
        (PAIR | {"p_chosen": "0.9"}, "p_chosen must be a finite number"),
        (PAIR | {"p_chosen": 10**400}, "p_chosen must be a finite number"),
        (
            PAIR | {"p_chosen": 0.9, "agreement": 0.6},
            "p_chosen and agreement contradict each",
        ),
        (PAIR | {"votes_chosen": 0}, "votes must not all be 0"),
        (PAIR | {"votes_chosen": -1}, "votes_chosen must be a finite number of at least 0"),
        (PAIR | {"label_chosen": 1}, "label_chosen and label_rejected must be given together"),
        (PAIR | {"tie": "yes"}, "tie must be true or false, but is 'yes'"),
        (PAIR | {"weight": -1}, "weight must be a finite number of at least 0, but is -1"),
        (PAIR | {"weight": float("nan")}, "weight must be a finite number"),
        (PAIR | {"spans_chosen": [[0, 2]]}, "[0] is [0, 2) and the response has 1 characters"),
        (PAIR | {"spans_chosen": [[1, 1]]}, "spans_chosen must lie inside the response"),
        (PAIR | {"spans_chosen": [0, 1]}, "spans_chosen must be a list of [start, end) pairs"),
        (PAIR | {"spans_chosen": [[0.0, 1]]}, "spans_chosen must be a list of [start, end) pairs"),
        (PAIR | {"id": 1.5}, "id must be text or a whole number"),
        (PAIR | {"meta": 3}, "meta must be an object"),
        (PAIR | {"p_choosen": 0.9}, "unknown key 'p_choosen'; did you mean 'p_chosen'?"),
        (PAIR | {"spans": [[0, 1]]}, "the key 'spans' means nothing in a record of kind pair"),
        (PAIR | {"rationale": "so"}, "rationale_prompt is missing"),
        (PAIR | {"online": "x"}, "online must be a list of texts"),
        (LIST | {"responses": ["1"], "scores": [1]}, "responses must hold at least two texts"),
        (LIST | {"scores": [1, 2]}, "scores must have one number a response, but 2 for 3"),
        (LIST | {"scores": [1, 2, None]}, "scores must be a list of finite numbers"),
        (LIST | {"responses": ["1", "", "2"]}, "a text of responses is empty"),
        (LIST | {"cut": [True]}, "cut must have one entry a response"),
        (UNPAIRED | {"desirable": 2}, "desirable must be true or false, but is 2"),
    ],
)
def test_problem(record: dict[str, object], expected: str) -> None:
    found = problems(record)
    assert len(found) == 1, found
    assert expected in found[0]


def test_all_problems_of_a_record_are_named_at_once() -> None:
    with pytest.raises(DataError) as error:
        parse_record({"id": "x", "chosen": "", "rejected": 1, "weight": -1}, where="f.jsonl:9")
    message = str(error.value)
    assert message.startswith("f.jsonl:9 (id 'x'): ")
    for part in ("prompt is missing", "chosen is empty", "rejected must be text", "weight"):
        assert part in message


def test_example_survives_pickling_for_loader_workers() -> None:
    row = parse_record(PAIR | {"source": "me"}, where="f:1")
    assert pickle.loads(pickle.dumps(row)) == row


TEXT = st.text(st.characters(exclude_categories=("Cs",)), min_size=1).filter(str.strip)


@given(prompt=TEXT, chosen=TEXT, rejected=TEXT, p=st.floats(0, 1), weight=st.floats(0, 1e6))
def test_a_good_pair_always_parses(
    prompt: str, chosen: str, rejected: str, p: float, weight: float
) -> None:
    record = {"prompt": prompt, "chosen": chosen, "rejected": rejected + "!" + chosen}
    row = parse_record(record | {"p_chosen": p, "weight": weight}, where="f:1")
    order = [chosen, record["rejected"]] if p >= 0.5 else [record["rejected"], chosen]
    assert [c.response for c in row.candidates] == order
    likely = max(p, 1 - p)
    assert (row.prompt, row.labels, row.weight) == (prompt, (likely, 1 - likely), weight)
