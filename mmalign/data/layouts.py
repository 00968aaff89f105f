"""The public layouts of text records, each turned into a canonical record (see `parse.py`).

A reader takes the columns it understands out of the row it is given and returns the canonical keys
they amount to; what it leaves in the row is carried along by `convert.to_record`.
"""

from __future__ import annotations

import re
from difflib import get_close_matches
from typing import Any

from mmalign.data.fields import as_list, as_object, number, show
from mmalign.data.media_layouts import MEDIA_LAYOUTS, PICTURE_LAYOUTS, Layout, order_of, taken
from mmalign.data.parse_media import KINDS, MEDIA_KEYS, WHOLE_KEYS
from mmalign.data.turns import (
    Columns,
    Turns,
    answer_of,
    are_messages,
    contrast,
    exchange,
    prompt_of,
    response_of,
    shared_words,
    split,
    transcript,
    turns,
)
from mmalign.data.words import listed
from mmalign.errors import DataError
from mmalign.safe import printable

_OPINIONS = frozenset(listed("feedback critique critiques rationale rationales explanation"))
_BOOKKEEPING = _OPINIONS | frozenset(
    listed(
        "id ids uid idx index uuid hash at source sources origin dataset datasets subset category "
        "categories domain topic task type tag tags language lang license url version date "
        "timestamp created updated annotator annotators annotations model models generator score "
        "scores rating ratings reward rewards rank ranks difficulty length tokens count metadata "
        "ratio difference utc tstamp severity level sha 256"
    )
)
"""Last words of names that say where a row comes from, or what somebody thought of it.

Nobody expects such a column to be trained on, and public files all have some: `data check` lists
them and a run logs them as information, but neither warns of them. Any other name may be a slip,
and is one.
"""
_SIDE = frozenset(("chosen", "rejected", *"ab012"))
_WORD = re.compile(r"[A-Z]?[a-z]+|[A-Z]+(?![a-z])|\d+")


def is_bookkeeping(name: str) -> bool:
    """Whether a column is named like an id, a source, a score: not like anything to train on."""
    words = [word.lower() for word in _WORD.findall(name)]
    while len(words) > 1 and words[-1] in _SIDE:
        words.pop()
    if not name or name.startswith(("__", "Unnamed: ")):  # what pandas and arrow add
        return True
    flag = len(words) > 1 and words[0] in ("num", "is", "are", "has")
    return flag or (bool(words) and words[-1] in _BOOKKEEPING)


def is_opinion(name: str) -> bool:
    """Whether a column is named like what somebody wrote about the answers."""
    return bool(_OPINIONS & {word.lower() for word in _WORD.findall(name)})


ASKING = (
    *("question", "query", "problem", "input", "user", "user_input", "user_prompt", "user_message"),
    *("human", "post", "context", "history", "messages", "conversation", "trajectory", "dialogue"),
)
"""Columns that ask where there is no `prompt`; `instruction` with `input` comes before them."""

SYSTEM = ("system", "system_prompt", "system_message")
_LABEL = 6
"""Words that a name of a source or a category may have; a question has more."""

_OWN_PROMPTS = ("prompt_chosen", "prompt_rejected")
_NO_PROMPTS = (
    *(*MEDIA_KEYS, *WHOLE_KEYS, *SYSTEM, *_OWN_PROMPTS, "id", "split", "meta", "tools", "tie"),
    *("chat_template_kwargs", "weight", "winner", "chosen_masked", "rejected_masked", "rationale"),
    *("rationale_prompt", "calibration", "online", "rejected_irrelevant", "clues", "objects"),
)


def asked(row: Columns) -> Any:
    """What a row asks, taken out of it: the prompt column, or the one column that stands for it.

    Returns:
        Text or messages; None where no column asks.

    Raises:
        DataError: Several columns could be the prompt.
    """
    if "prompt" in row:
        return _after_history(row, prompt_of(row.pop("prompt")))
    if "instruction" in row:
        words = [row.pop(name) for name in ("instruction", "input") if name in row]
        words = [part for part in words if part != ""]
        if not all(isinstance(part, str) for part in words):
            raise DataError(f"instruction and input must be text, but are {show(words)}")
        return _after_history(row, "\n".join(words))
    names = [name for name in ASKING if _can_ask(row.get(name))]
    if len(names) > 1:
        raise DataError(
            f"there is no prompt column, and {_listed(names)} could each be it; name the right "
            "one `prompt`, or join them"
        )
    return _after_history(row, prompt_of(row.pop(names[0]))) if names else None


def _can_ask(value: Any) -> bool:
    """Whether a value is text, or messages that end with a turn to answer."""
    if isinstance(value, str):
        return bool(value.strip())
    return are_messages(value) and turns(value, "")[-1]["role"] != "assistant"


def _after_history(row: Columns, query: Any) -> Any:
    """The query after a history of [question, answer] or of messages, where the row has one."""
    history = row.get("history")
    if as_list(history) is None:
        return query
    del row["history"]
    head: Turns = turns(history, "history") if are_messages(history) else []
    for item in [] if head else as_list(history) or ():
        pair = as_list(item) or []
        if len(pair) != 2 or not all(isinstance(text, str) for text in pair):
            raise DataError(
                f"history must hold [question, answer] of texts, but holds {show(item)}"
            )
        head += exchange(pair[0], pair[1])
    asked = [{"role": "user", "content": query}] if isinstance(query, str) else query
    return [*head, *asked] if head else query


def could_ask(row: Columns) -> list[str]:
    """The columns whose text might be the prompt that a row lacks."""
    return [name for name in row if name not in _NO_PROMPTS and _says_words(name, row[name])]


def _says_words(name: str, value: Any) -> bool:
    """Whether a column holds words; those of a column named like bookkeeping only if it is long."""
    if is_bookkeeping(name):
        return isinstance(value, str) and _is_sentence(value) and not is_opinion(name)
    return bool(value.strip() if isinstance(value, str) else as_list(value) or as_object(value))


def _is_sentence(text: str) -> bool:
    """Whether a text is more than a name."""
    count = len(text.split())
    return count > _LABEL or (count > 1 and text.rstrip().endswith((".", "?", "!", ":")))


def check_is_said(row: Columns) -> None:
    """Refuse a row whose column for the prompt is there and empty."""
    empty = [name for name in ASKING if isinstance(row.get(name), str)]
    if empty:
        verb = "are" if empty[1:] else "is"
        raise DataError(f"there is no prompt: {_listed(empty)} {verb} empty")


def no_shared_words(names: list[str]) -> DataError:
    """The words that both answers share are no prompt while a column could be it."""
    near = next((name for name in names if get_close_matches("prompt", [name], 1, 0.8)), None)
    hint = f" (is {printable(near)} meant to be it?)" if near else ""
    return DataError(
        f"there is no prompt column, and the words that both answers begin with are not taken for "
        f"one where {_listed(names)} could be it{hint}; name the right column `prompt`, or leave "
        "out what is not read"
    )


def with_system(row: Columns, record: Columns) -> Columns:
    """The record with a `system` column of the row as a system turn before each of its prompts.

    Raises:
        DataError: The column is not text, or a prompt has another system text.
    """
    texts: dict[str, str] = {}
    for name in SYSTEM:
        text = row.pop(name, "")
        if not isinstance(text, str):
            raise DataError(f"{name} must be text, but is {show(text)}")
        if text.strip():
            texts.setdefault(text, name)
    if len(texts) > 1:
        raise DataError(f"{_listed(list(texts.values()))} say different things; give one of them")
    prompts = {key: row.pop(key) for key in _OWN_PROMPTS if key in row}
    whole = record | {key: turns_or_text(value, key) for key, value in prompts.items()}
    for text, name in texts.items():
        for key in ("prompt", *_OWN_PROMPTS):
            if whole.get(key):
                whole[key] = _headed(whole[key], text, name)
    return whole


def _headed(prompt: Any, text: str, name: str) -> Turns:
    if isinstance(prompt, str):
        prompt = [{"role": "user", "content": prompt}]
    rest = turns(prompt, "prompt")
    if rest[0]["role"] != "system":
        return [{"role": "system", "content": text}, *rest]
    if rest[0]["content"] != text:
        raise DataError(f"the column {name} and the system turn of the prompt say different things")
    return rest


def turns_or_text(value: Any, column: str) -> Any:
    """Messages in the standard form; what is none stays, and is judged when the record is read."""
    return turns(value, column) if are_messages(value) else value


def _listed(names: list[str]) -> str:
    return " and ".join(f"`{printable(name)}`" for name in names)


def read_pair(row: Columns) -> Columns:
    """chosen and rejected: TRL, UltraFeedback-binarized, HH-RLHF, and mmalign's own."""
    chosen, rejected = row.pop("chosen", None), row.pop("rejected", None)
    if chosen is None or rejected is None:
        return {"prompt": asked(row), "chosen": chosen, "rejected": rejected}
    if not (isinstance(chosen, str) and isinstance(rejected, str)):
        return _conversations(row, _said(chosen, "chosen"), _said(rejected, "rejected"))
    spoken, answered = transcript(chosen), transcript(rejected)
    if spoken and answered and _is_asked_in(row.get("prompt", ""), chosen, spoken):
        row.pop("prompt", None)
        return contrast(None, spoken, answered)
    prompt = asked(row)
    if prompt is None and not ("prompt_chosen" in row and "prompt_rejected" in row):
        others = could_ask(row)
        if others:
            raise no_shared_words(others)
        check_is_said(row)
        return shared_words(chosen, rejected)
    return {"prompt": prompt, "chosen": chosen, "rejected": rejected}


def _is_asked_in(prompt: Any, text: str, conversation: Turns) -> bool:
    """Whether a transcript begins with the prompt, or has it as a turn."""
    asked = str(prompt).strip()
    return text.startswith(str(prompt)) or any(t["content"] == asked for t in conversation)


def _said(response: Any, column: str) -> Turns:
    """A response as turns; text is one of the assistant."""
    if isinstance(response, str):
        return [{"role": "assistant", "content": response}]
    return turns(response, column)


def _conversations(row: Columns, chosen: Turns, rejected: Turns) -> Columns:
    """Two conversations, or answers as messages to what a column of the row asks."""
    answers = all(side and side[0]["role"] == "assistant" for side in (chosen, rejected))
    own = "prompt_chosen" in row and "prompt_rejected" in row
    if answers and own and "prompt" not in row:
        return {"chosen": response_of(chosen), "rejected": response_of(rejected)}
    prompt = asked(row) if answers or "prompt" in row else None
    pair = contrast(prompt, chosen, rejected)
    if isinstance(prompt, str) and all(turn["content"] != prompt for turn in pair["prompt"]):
        row["prompt"] = prompt  # the conversations say what was asked; this goes to meta
    return pair


def read_choice(row: Columns) -> Columns:
    """Two responses and which one won; without a winner, a tie."""
    names, both = taken(row, CHOICES, "one of the two responses is missing")
    won = order_of(row, names)
    row["chosen"], row["rejected"] = both[won], both[1 - won]
    return read_pair(row)


def read_ranked(row: Columns) -> Columns:
    """K responses with scores, or with ranks where 1 is best."""
    column = next(name for name in LISTS if name in row)
    items = as_list(row.pop(column))
    if items is None:
        raise DataError(f"{column} must be a list of responses")
    scores = as_list(row.pop("scores", row.pop("ratings", row.pop("rating", None))))
    ranks = as_list(row.pop("ranks", None))
    texts: list[Any] = []
    inside: list[Any] = []
    for item in items:
        parts = as_object(item) or {}
        named = next((parts[k] for k in LISTED if k in parts and "role" not in parts), item)
        texts.append(named if isinstance(named, str) else response_of(turns(named, column)))
        inside.append(next((parts[k] for k in SCORED if k in parts), None))
        ranks = ranks if "rank" not in parts else [*(ranks or []), parts["rank"]]
    if scores is None and ranks is not None:
        scores = [None if (n := number(rank)) is None else -n for rank in ranks]
    if scores is None and any(score is not None for score in inside):
        scores = inside
    return {"prompt": asked(row), "responses": texts, "scores": scores}


def read_single(row: Columns) -> Columns:
    """One response: rated (KTO's completion and label) or not."""
    response = next(row.pop(name) for name in _RESPONSES if name in row)
    record = {"prompt": asked(row), "response": response}
    if not isinstance(response, str):
        record["response"] = response_of(turns(response, "completion"))
    if isinstance(record["prompt"], str) and not isinstance(response, str):
        record["prompt"] = [{"role": "user", "content": record["prompt"]}]
    return record | _rating(row)


def _rating(row: Columns) -> Columns:
    """`desirable` from the names it has elsewhere."""
    given = {name: row.pop(name) for name in ("desirable", "label", "kto_tag") if name in row}
    for name, rating in given.items():
        if not isinstance(rating, bool) and number(rating) not in (0.0, 1.0):
            raise DataError(f"{name} must be true or false, but is {show(rating)}")
    return {"desirable": next(iter(given.values()))} if given else {}


def read_alpaca(row: Columns) -> Columns:
    """LLaMA-Factory's alpaca: instruction, input, system, history; chosen/rejected or output.

    Beside a pair a column `prompt` is the prompt, and the instruction is left over.
    """
    if "chosen" in row:
        if "prompt" not in row:
            row["prompt"] = asked(row)
        return read_pair(row)
    beside = {"prompt": row.pop("prompt")} if "prompt" in row else {}
    query = asked(row)
    row |= beside
    output = next((row.pop(name) for name in _OUTPUTS if name in row), None)
    both = as_list(output)
    if both is not None and not are_messages(both):
        if len(both) != 2 or not all(isinstance(text, str) for text in both):
            raise DataError(f"output must be text, or [chosen, rejected], but is {show(output)}")
        return {"prompt": query, "chosen": both[0], "rejected": both[1]}
    response = output if isinstance(output, str) else response_of(turns(output, "output"))
    return {"prompt": query, "response": response} | _rating(row)


def read_sharegpt(row: Columns) -> Columns:
    """LLaMA-Factory's sharegpt: conversations, then chosen/rejected messages or a kto_tag."""
    conversation = turns(row.pop("conversations"), "conversations")
    if "chosen" not in row and "rejected" not in row:
        prompt, response = split(conversation)
        return {"prompt": prompt, "response": response} | _rating(row)
    chosen, rejected = row.pop("chosen", None), row.pop("rejected", None)
    if chosen is None or rejected is None:
        return {"prompt": conversation, "chosen": chosen, "rejected": rejected}
    sides = _said(chosen, "chosen"), _said(rejected, "rejected")
    if conversation[-1]["role"] == "assistant" and sides[0][0]["role"] == "assistant":
        if conversation[-len(sides[0]) :] != sides[0]:
            raise DataError("conversations must end with the turn that chosen and rejected answer")
        conversation = conversation[: -len(sides[0])]
    return contrast(conversation, *sides)


def read_messages(row: Columns) -> Columns:
    """ms-swift: messages or query and response; rejected_response, rejected_messages or label.

    A rejected response stands in the place of all that follows the last turn of the user. Rejected
    media alone are the same answer about something else.
    """
    other = any(f"{kind}s_rejected" in row for kind in KINDS)
    if "messages" in row:
        conversation = turns(row.pop("messages"), "messages")
        if "rejected_messages" in row:
            rejected = turns(row.pop("rejected_messages"), "rejected_messages")
            return contrast(None, conversation, rejected)
        if "rejected_response" in row or other:
            start = answer_of(conversation)
            prompt, response = conversation[:start], response_of(conversation[start:])
        else:
            prompt, response = split(conversation)
    else:
        prompt, response = asked(row), row.pop("response", None)
    if "rejected_response" in row or other:
        rejected = row.pop("rejected_response", response)
        if not isinstance(rejected, str):
            rejected = response_of(turns(rejected, "rejected_response"))
        return {"prompt": prompt, "chosen": response, "rejected": rejected}
    return {"prompt": prompt, "response": response} | _rating(row)


LISTS = ("responses", "completions", "answers", "generations")
LISTED = ("response", "text", "completion", "answer", "content")
"""Names of the words of one response of a list."""

_RESPONSES = ("response", "completion", "output")
_OUTPUTS = ("output", "response", "completion")
SCORED = ("score", "overall_score", "rating", "pm_score")
CHOICES = (
    ("response_a", "response_b"),
    ("response_0", "response_1"),
    ("response_1", "response_2"),
    ("conversation_a", "conversation_b"),
)
_STRUCTURED = ("conversations", "messages", "query", "instruction")
_CHOICE_COLUMNS = tuple(name for pair in CHOICES for name in pair)

LAYOUTS: dict[str, Layout] = {
    "pair": Layout(
        "prompt (or shared by both), chosen, rejected",
        (("chosen", "rejected"),),
        ("conversations", "conversations1", "instruction", "media", *_CHOICE_COLUMNS),
        read_pair,
    ),
    "choice": Layout(
        "prompt, response_a, response_b, winner or votes_a and votes_b or tie",
        (
            ("response_a", "response_0", "response_1", "conversation_a"),
            ("response_b", "response_1", "response_2", "conversation_b"),
        ),
        ("chosen", "rejected", "responses"),
        read_choice,
    ),
    "ranked": Layout(
        "prompt, responses (or completions, answers, generations), scores or ranks",
        (LISTS,),
        ("chosen", "rejected", "conversations", "messages", "query", *_CHOICE_COLUMNS),
        read_ranked,
    ),
    "single": Layout(
        "prompt, response or completion, and desirable or label where it is rated",
        (("prompt", "question", "problem", "input", "context"), _RESPONSES),
        ("chosen", "rejected", "responses", *_STRUCTURED, *_CHOICE_COLUMNS),
        read_single,
    ),
    "alpaca": Layout(
        "instruction, input, and chosen and rejected, or output (and kto_tag)",
        (("instruction",), ("chosen", *_OUTPUTS)),
        ("conversations",),
        read_alpaca,
    ),
    "sharegpt": Layout(
        "conversations, and chosen and rejected, or kto_tag",
        (("conversations",),),
        ("messages", "instruction", "responses", "correct_answer"),
        read_sharegpt,
    ),
    "messages": Layout(
        "messages (or query, response), and rejected_response, rejected_messages or label",
        (("messages", "query"),),
        ("chosen", "rejected", "conversations", "instruction", "responses"),
        read_messages,
    ),
    **MEDIA_LAYOUTS,
    **PICTURE_LAYOUTS,
}
