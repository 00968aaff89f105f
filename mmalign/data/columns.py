"""What columns beside the answers mean: which one asks, and the system text before it."""

from __future__ import annotations

from difflib import get_close_matches
from typing import Any

from mmalign.data.fields import as_list, as_object, show
from mmalign.data.parse_media import MEDIA_KEYS, WHOLE_KEYS
from mmalign.data.turns import Columns, Turns, are_messages, prompt_of, turns
from mmalign.data.unread import is_bookkeeping, is_opinion
from mmalign.errors import DataError
from mmalign.safe import printable

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
    items = as_list(history) or []
    head: Turns = turns(history, "history") if are_messages(history) else []
    for item in [] if head else items:
        pair = as_list(item) or []
        if len(pair) != 2 or not all(isinstance(text, str) for text in pair):
            raise DataError(
                f"history must hold [question, answer] of texts, but holds {show(item)}"
            )
        head += [{"role": "user", "content": pair[0]}, {"role": "assistant", "content": pair[1]}]
    asked = [{"role": "user", "content": query}] if isinstance(query, str) else query
    return [*head, *asked] if head else query


def could_ask(row: Columns) -> list[str]:
    """The columns whose text might be the prompt that a row lacks."""
    return [
        name
        for name, value in row.items()
        if name not in _NO_PROMPTS and _says_something(name, value)
    ]


def _says_something(name: str, value: Any) -> bool:
    """Whether a column holds words; those of a column named like bookkeeping only if it is long."""
    if is_bookkeeping(name):
        return isinstance(value, str) and _is_sentence(value) and not is_opinion(name)
    return (
        bool(value.strip()) if isinstance(value, str) else bool(as_list(value) or as_object(value))
    )


def _is_sentence(text: str) -> bool:
    """Whether a text is more than a name."""
    count = len(text.split())
    return count > _LABEL or (count > 1 and text.rstrip().endswith((".", "?", "!", ":")))


def check_is_said(row: Columns) -> None:
    """Refuse a row whose column for the prompt is there and empty."""
    empty = [name for name in ASKING if isinstance(row.get(name), str)]
    if empty:
        raise DataError(
            f"there is no prompt: {_listed(empty)} {'are' if empty[1:] else 'is'} empty"
        )


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
        DataError: The column is no text, or a prompt has another system text.
    """
    named = {name: row.pop(name) for name in SYSTEM if name in row}
    texts: dict[str, str] = {}
    for name, text in named.items():
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
