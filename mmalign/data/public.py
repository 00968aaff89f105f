"""Public files whose columns have names of their own, brought to names that layouts know.

ultrafeedback-binarized-preferences   instruction, chosen_response, rejected_response
HelpSteer3, HelpSteer2-preference     context or prompt, response1, response2, overall_preference
stack-exchange-paired                 question, response_j, response_k
Code-Preference-Pairs                 instruction, accepted, rejected
SHP                                   history, human_ref_A, human_ref_B, labels
Preference-Collection                 orig_instruction, orig_response_A and _B, orig_preference
OpenAI's preference format            input, preferred_output, non_preferred_output
arena-human-preference-55k            prompt, response_a, response_b as JSON lists; winner_model_a
"""

from __future__ import annotations

import json
from contextlib import suppress
from typing import Any

from mmalign.data.fields import as_list, as_object, number, show
from mmalign.data.turns import Columns, Turns
from mmalign.errors import DataError

_RENAMED: tuple[tuple[tuple[str, ...], dict[str, str]], ...] = (
    (("chosen", "rejected", "messages", "query"), {
        "chosen_response": "chosen", "rejected_response": "rejected",
    }),
    (("chosen", "rejected"), {"preferred_output": "chosen", "non_preferred_output": "rejected"}),
    (("chosen", "rejected"), {"response_j": "chosen", "response_k": "rejected"}),
    (("chosen",), {"accepted": "chosen", "rejected": "rejected"}),
    (("response_1",), {"response1": "response_1", "response2": "response_2"}),
    (("response_a",), {"human_ref_A": "response_a", "human_ref_B": "response_b"}),
    (("response_a", "instruction", "prompt"), {
        "orig_response_A": "response_a", "orig_response_B": "response_b",
        "orig_instruction": "prompt",
    }),
    (("conversations", "messages", "chosen", "prompt"), {"conversation": "conversations"}),
)  # fmt: skip
"""For each: columns that must not be there, and the old names, all of which must be, to the new."""

_OWN = frozenset(name for _, names in _RENAMED for name in names) | {
    *("input", "rationale", "rationales", "overall_preference", "preference_strength"),
    *("winner_tie", "response_a"),
}
"""Columns without one of which there is nothing to do."""

_SIGNED = ("overall_preference", "preference_strength")
_JUDGED = frozenset(("generations", "rating", "ratings"))
_FLAGS = {"winner_model_a": "a", "winner_model_b": "b", "winner_tie": "tie"}


def renamed(row: Columns) -> Columns:
    """The row with columns of the files above under the names that layouts read.

    Raises:
        DataError: A column that says which response won holds what it cannot.
    """
    if _OWN.isdisjoint(row):
        return row
    row = dict(row)
    scores = {"score_A": "score_a", "score_B": "score_b"} if "human_ref_A" in row else {}
    _of_openai(row)
    _of_arena(row)
    _winner(row)
    for unless, names in _RENAMED:
        if set(names) <= set(row) and not set(unless) & set(row):
            row = {names.get(name, name): value for name, value in row.items()}
    if "rationale_prompt" not in row and _JUDGED & set(row):
        # A judge's reasons for its ratings answer no question of the row.
        reasons = {name: row.pop(name) for name in ("rationale", "rationales") if name in row}
        row |= {"meta": {**reasons, **(as_object(row.get("meta")) or {})}} if reasons else {}
    return row | {new: row.pop(old) for old, new in scores.items() if old in row}


def _of_openai(row: Columns) -> None:
    """`input` of {messages, tools, parallel_tool_calls} as columns of the row."""
    asked = as_object(row.get("input"))
    if asked is None or "messages" not in asked or "prompt" in row:
        return
    del row["input"]
    row["prompt"] = asked["messages"]
    for key, value in asked.items():
        if key != "messages" and value is not None:
            row.setdefault(key, value)


def _of_arena(row: Columns) -> None:
    """A prompt and two responses that are each a list of turns, or its JSON text, as two talks."""
    names = ("prompt", "response_a", "response_b")
    said = {name: _turns_of_one(row.get(name)) for name in names}
    if not all(said.values()):
        return
    asked = said["prompt"]
    for name in names[1:]:
        if len(said[name]) != len(asked):
            found = f"it holds {len(said[name])} for {len(asked)}"
            raise DataError(f"{name} must hold an answer to every turn of prompt, but {found}")
        talk: Turns = []
        for question, answer in zip(asked, said[name], strict=True):
            if question is None or answer is None:
                raise DataError(f"a turn of {'prompt' if question is None else name} is null")
            talk.append({"role": "user", "content": question})
            talk.append({"role": "assistant", "content": answer})
        row[f"conversation_{name[-1]}"] = talk
    for name in names:
        del row[name]


def _turns_of_one(value: Any) -> list[str | None]:
    """The texts of a list of texts or nulls, or of its JSON text; [] for anything else."""
    if isinstance(value, str) and value.lstrip().startswith("["):
        with suppress(ValueError, RecursionError):
            value = json.loads(value)
    items = as_list(value) or []
    return items if all(isinstance(item, str | None) for item in items) else []


def _winner(row: Columns) -> None:
    """Which response won, as `winner`."""
    if "winner" in row:
        return
    found: dict[str, Any] = {}
    if ("response1" in row or "response_1" in row) and not {"chosen", "rejected"} & set(row):
        found |= {key: _sign(key, row[key]) for key in _SIGNED if key in row}
    if "human_ref_A" in row and "labels" in row:
        won = {1.0: "a", 0.0: "b"}.get(number(row["labels"]) or 0.0)
        found["labels"] = None if isinstance(row["labels"], str | bool) else won
    if "orig_response_A" in row and "orig_preference" in row and "instruction" not in row:
        found["orig_preference"] = {"A": "a", "B": "b"}.get(str(row["orig_preference"]))
    if {"response_a", "conversation_a"} & set(row) and set(_FLAGS) <= set(row):
        given = [key for key in _FLAGS if number(row[key]) == 1 or row[key] is True]
        found[", ".join(_FLAGS)] = _FLAGS[given[0]] if len(given) == 1 else None
    for key, winner in found.items():
        if winner is None:
            names = key.split(", ")
            raise DataError(
                f"{key} must say which response won, but is {show([row[n] for n in names])}"
            )
        for name in key.split(", "):
            row.pop(name)
        row["winner"] = winner


def _sign(key: str, value: Any) -> str | None:
    """HelpSteer's preference: below 0 the first response is the better one, above 0 the second."""
    strength = number(value)
    if strength is None:
        return None
    return "tie" if strength == 0 else "a" if strength < 0 else "b"
