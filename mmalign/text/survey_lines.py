"""What a survey found, in words: a line for each thing, and the rows with problems."""

from __future__ import annotations

from typing import TYPE_CHECKING

from mmalign.data.fields import Problem
from mmalign.data.records import ProblemList, Record
from mmalign.errors import ConfigError, DataError
from mmalign.text.survey import NAMED, kind_of

if TYPE_CHECKING:
    from collections.abc import Sequence

    from mmalign.config import DataConfig
    from mmalign.data.example import Example
    from mmalign.text.limits import Limits
    from mmalign.text.survey import Found

_OWN_WORDS = frozenset({"prompts_cut", "responses_cut", "ends_lost", "special_tokens"})


def lines(found: Found, rows: Sequence[Example], data: DataConfig) -> list[str]:
    """One sentence for each thing that was done to rows; none where nothing was.

    Args:
        found: By the survey.
        rows: What was surveyed.
        data: The limits, which are named.
    """
    told: list[str] = []

    def tell(name: str, sentence: str) -> None:
        told.append(f"{sentence}; {_first(found.first[name], found.counts[name], rows)}")

    if count := found.counts["prompts_cut"]:
        kept = "start" if data.truncate_prompt == "keep_start" else "end"
        tell(
            "prompts_cut",
            f"{_of(count, found.rows)} prompts cut at {data.max_prompt_length:,} tokens "
            f"(data.max_prompt_length), of which the {kept} is kept",
        )
    if count := found.counts["responses_cut"]:
        lost = found.counts["ends_lost"]
        tell(
            "responses_cut",
            f"{_of(count, found.responses)} responses cut at {data.max_response_length:,} tokens "
            "(data.max_response_length)" + (f"; {lost:,} lost their end" if lost else ""),
        )
    if count := found.counts["special_tokens"]:
        tell(
            "special_tokens",
            f"{_of(count, found.responses)} responses have a special token of this tokenizer "
            "written in their text, and learn it as such",
        )
    if found.equal:
        told.append(
            f"{_of(len(found.equal), found.pairs)} pairs have the same tokens on both sides, of "
            f"which nothing is learned; {_first(found.equal, len(found.equal), rows)}"
        )
    for name in found.counts:
        if name not in _OWN_WORDS:
            sentence = found.sentences.get(name) or _SENTENCES.get(name, name.replace("_", " "))
            tell(name, f"{_of(found.counts[name], found.rows)} rows: {sentence}")
    return [*told, *found.said]


_SENTENCES = {
    "prompts_empty": "the prompt is empty, so the answer follows the tokenizer's first token",
    "prompts_rendered": "the prompt has special tokens written in its text, and the chat template "
    "writes its own around it; give the words alone, or set text.chat_template: false",
    "without_template": "the prompt is a conversation, but no chat template is in use; it is "
    "written as a transcript of Human and Assistant",
}


def problems(found: Found, rows: Sequence[Example]) -> ProblemList:
    """The rows that cannot be trained on, grouped by what is wrong with them."""
    result = ProblemList()
    for number, what, value in found.problems:
        row = rows[number]
        record = Record(row.place or row.id, row.id, "", None)
        group = result.groups.setdefault(kind_of(what), [])
        group.append((record, Problem(what, value)))
    return result


def require_lesson(found: Found, train: Sequence[int], rows: Sequence[Example]) -> None:
    """Refuse pairs that are all the same on both sides.

    Raises:
        DataError: naming what can be done.
    """
    equal = set(found.equal)
    if not equal or any(number not in equal for number in train):
        return
    longer = " or raise data.max_response_length" if found.counts["responses_cut"] else ""
    raise DataError(
        f"all {len(train):,} pairs to train on have the same tokens on both sides (the first is "
        f"{rows[train[0]].id!r}), so there is nothing to learn; give other pairs{longer}"
    )


def require_room(found: Found, limits: Limits) -> None:
    """Refuse rows whose prompts, under the answers of other rows, are beyond the positions.

    Raises:
        ConfigError: naming the limits to lower.
    """
    prompt, response = found.longest
    limit = limits.positions
    if limit is not None and prompt + response - 1 > limit:
        raise ConfigError(
            f"the objective scores answers under the prompts of other rows: the longest prompt "
            f"({prompt:,} tokens) and the longest answer ({response:,}) are beyond the model's "
            f"{limit:,} positions. Lower data.max_prompt_length and data.max_response_length to "
            f"{limit:,} together"
        )


def _of(count: int, total: int) -> str:
    return f"all {total:,}" if count == total else f"{count:,} of {total:,}"


def _first(numbers: Sequence[int], count: int, rows: Sequence[Example]) -> str:
    named = [_name(rows[number]) for number in dict.fromkeys(numbers[:NAMED])]
    if len(named) == 1:
        return f"the row is {named[0]}" if count == 1 else f"the first row is {named[0]}"
    return f"the first rows are {', '.join(named[:-1])} and {named[-1]}"


def _name(row: Example) -> str:
    """Its id, or where it stands where it has none."""
    return row.id if row.id == row.place else repr(row.id)
