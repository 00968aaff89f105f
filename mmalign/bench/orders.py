"""The order of two actions, as an answer tells it, and as the published script reads it."""

from __future__ import annotations

import re
from bisect import bisect_left
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

from mmalign.bench.options import denied_after, denied_before
from mmalign.bench.spoken import Token, agreed, glossary, tokens, word_set

_RIGHT, _LEFT = re.compile(r"(?<![-=<])[-=]++>"), re.compile(r"<[-=]++(?!>)")
_HYPHEN = re.compile(r"\b([AB])-(?=[AB]\b)")
_PHRASES = glossary(
    """
precedes: followed by
follows: preceded by
before: prior to, ahead of, earlier than, sooner than, antes de, antes que, avant, bevor
after: later than, subsequent to, subsequently to, as soon as, después de, après, nachdem
then: después, after that, after this, after which, after it
sooner: before that, before this
simultaneously: at the same time
first: starts with, begins with
last: ends with
""",
    ", ",
)
_PHRASE = re.compile(rf"\b(?:{'|'.join(_PHRASES)})\b", re.IGNORECASE)
CHINESE = glossary("""
before: 先于 早于
after: 晚于
wasbefore: 之前 以前
wasafter: 之后 以后
action: 动作
first: 首先 先
then: 然后 接着 随后 再 后
simultaneously: 同时
not: 不是 没有 不
only: 只有
""")
"""What tells an order in Chinese; what stands behind both actions has a word of its own."""

_RELATIONS = {
    **dict.fromkeys(("before", "precedes", "preceding", "preceded", "\u2192", ">"), "before"),
    **dict.fromkeys(("after", "follows", "following", "followed", "once", "\u2190"), "after"),
    **dict.fromkeys(("first", "firstly", "earlier", "initially"), "first"),
    **dict.fromkeys(
        word_set("second secondly later afterwards afterward next last lastly finally thereafter"),
        "later",
    ),
    "then": "then",
    "sooner": "sooner",
    "wasbefore": "wasbefore",
    "wasafter": "wasafter",
}
_BACKWARDS = word_set("after wasafter later then")
_FIRST = {"A": "AB", "B": "BA"}
_FRONTED = word_set("before after following once")
_UNTOLD = word_set(
    "simultaneously unclear together both neither cannot whether if unable undetermined unknown "
    "can't sure unsure clear determine either or while during"
)
_PLAIN = word_set(
    "a b action actions event events the order sequence is are was answer correct final in they "
    "occur of it goes video this it's i detect detected see first second then"
)
"""Words of an answer that only lists the actions."""


@dataclass(frozen=True, slots=True)
class _Item:
    """An action, by its letter, or a relation, by its name."""

    kind: str  # A, B, or a value of _RELATIONS
    clause: int
    fronts: bool  # whether its clause begins with it
    fronted: bool  # whether it can stand before both actions: "after A, B"


def order(text: str) -> str | None:
    """AB, BA, or the one action that was seen.

    Read are the letters alone or in front; sentences that tell an order, by "before", "after",
    "then", "later than", "first", "followed by" or an arrow; both actions listed once each; one
    action where the other is denied or not named. Sentences that contradict each other, or deny
    an order, tell none.
    """
    return agreed(text, _order)


def _order(text: str) -> str | None:
    text = _LEFT.sub(" \u2190 ", _RIGHT.sub(" \u2192 ", _HYPHEN.sub(r"\1, ", text)))
    text = _PHRASE.sub(lambda found: _PHRASES[found[0].lower()], text)
    found = tokens(text.replace("\u21d2", "\u2192"), CHINESE)
    words = [token.text.upper() for token in found if token.word]
    if len(words) == 1 and words[0] in ("AB", "BA", "A", "B"):
        return words[0]
    ahead, behind = denied_before(found), denied_after(found)
    whole = {
        token.text
        for i, token in enumerate(found)
        if token.text in ("AB", "BA") and not (ahead[i] or behind[i])
    }
    if whole:
        return whole.pop() if len(whole) == 1 else None
    told: set[str] = set()
    denied = False
    for items, doubt, denies in _sentences(found, ahead, behind):
        votes = set(_votes(items))
        denied = denied or (denies and bool(votes))
        told |= votes if not (doubt or denies) else set()
    named = {letter for _, letter in _actions(found)}
    if told and (len(named) == 2 or "first" in {_RELATIONS.get(token.word) for token in found}):
        return told.pop() if len(told) == 1 else None
    return None if denied else _listed(found, ahead, behind)


def _actions(found: Sequence[Token]) -> Iterator[tuple[int, str]]:
    """Where an action is named: "Action A", "A" that is no article, "b" behind "action"."""
    for i, token in enumerate(found):
        letter = token.text.upper()
        if letter not in ("A", "B") or not token.word:
            continue
        named = i > 0 and found[i - 1].word in ("action", "actions", "event", "and")
        after = found[i + 1] if i + 1 < len(found) else None
        word = after.word if after else ""
        article = letter == "A" and word.isalpha() and word.isascii()
        article = article and word not in _RELATIONS and word not in _VERBS
        if (named and found[i - 1].word != "and") or (token.text.isupper() and not article):
            yield i, letter


_VERBS = word_set(
    "and or is was happens occurs comes takes took happened occurred came appears precedes "
    "follows followed preceded to does did has then in at i not doesn't isn't didn't only as"
)


def _sentences(
    found: Sequence[Token], ahead: Sequence[bool], behind: Sequence[bool]
) -> Iterator[tuple[list[_Item], bool, bool]]:
    """Actions and relations of each sentence, whether it doubts and whether it denies."""
    actions = dict(_actions(found))
    items: list[_Item] = []
    clause, fronts, doubt, denies = 0, True, False, False
    for i, token in enumerate(found):
        if token.text in "\n.!?;" and not _is_label(found, i, actions):
            yield items, doubt or token.text == "?", denies
            items, clause, fronts, doubt, denies = [], 0, True, False, False
            continue
        if token.text in ",:" or token.word in ("and", "but"):
            clause, fronts = clause + 1, True
            continue
        kind = actions.get(i) or _RELATIONS.get(token.word or token.text)
        if kind:
            denies = denies or ahead[i] or behind[i]
            fronted = fronts and token.word in _FRONTED
            items.append(_Item(kind, clause, fronts, fronted))
        doubt = doubt or token.word in _UNTOLD
        fronts = fronts and token.word in ("action", "event", "the", "it", "")
    yield items, doubt, denies


def _is_label(found: Sequence[Token], i: int, actions: dict[int, str]) -> bool:
    """Whether a full stop belongs to a mark such as `A.` or `1.`, not to a sentence."""
    if found[i].text != "." or i == 0 or i + 1 == len(found):
        return False
    return found[i - 1].word.isdigit() and i - 1 not in actions


def _votes(items: Sequence[_Item]) -> Iterator[str]:
    """Orders that the relations of a sentence tell."""
    for i, item in enumerate(items):
        if item.kind in ("A", "B"):
            continue
        before = [other for other in items[max(0, i - 2) : i] if other.kind in ("A", "B")]
        after = [other for other in items[i + 1 : i + 3] if other.kind in ("A", "B")]
        near = items[i + 1] if i + 1 < len(items) and items[i + 1].kind in ("A", "B") else None
        told = _vote(item, before, after, near)
        if told in ("AB", "BA"):
            yield told[::-1] if item.kind in _BACKWARDS else told


def _vote(item: _Item, before: list[_Item], after: list[_Item], near: _Item | None) -> str:
    """The order of the actions around a relation, as if it were "before" or "first"."""
    if item.kind in ("before", "after"):
        if item.fronted and len(after) == 2:
            return after[1].kind + after[0].kind
        if before and near:
            return before[-1].kind + near.kind
        return "" if not before or after else _FIRST[before[-1].kind]  # "B happens after"
    if item.kind in ("wasbefore", "wasafter"):
        if len(before) == 1 and near:  # after B, A
            return near.kind + before[0].kind
        return "".join(one.kind for one in before)
    own = before[-1] if before and before[-1].clause == item.clause else None
    one = near if near and (item.fronts or own is None or item.kind in ("then", "sooner")) else own
    return _FIRST[one.kind] if one else ""


def _listed(found: Sequence[Token], ahead: Sequence[bool], behind: Sequence[bool]) -> str | None:
    """Both actions as a list, or the one that is not denied."""
    named = list(_actions(found))
    kept = [(i, letter) for i, letter in named if not (ahead[i] or behind[i])]
    letters = "".join(letter for _, letter in kept)
    words = {token.word for token in found}
    if len(set(letters)) == 1 and not words & (_UNTOLD - {"neither", "clear", "sure"}):
        relations = {_RELATIONS.get(token.word) for token in found} - {None}
        return letters[0] if not relations else None
    plain = all(token.word in _PLAIN or not token.word.isalpha() for token in found)
    return letters if letters in ("AB", "BA") and len(named) == 2 and plain else None


_PUBLISHED_MENTION = r"(action [ab]|[ab][\.\)])"


def published_order(text: str) -> str | None:
    """As the published script reads it.

    Its patterns hold sets of characters where words are meant (`[^before]+`), so that most
    sentences fall through to the order of all mentions: actions named twice give ABAB.

    Source: Vid-Halluc/VidHalluc, eval/evaluation/eval_tsh.py.
    """
    low = text.lower()
    if low in ("ab", "ba", "a", "b"):
        return low.upper()
    if "not clear" in low or "no clear" in low:
        return None
    named = [action for action in ("a", "b") if f"action {action}" in low]
    if len(named) < 2:
        return named[0].upper() if named else None
    word = next((word for word in ("before", "then", "after") if word in low), None)
    if word:
        told = _published_search(low, word)
        if told:
            first, second = told
            return (second + first if word == "after" else first + second).upper()
    return "".join(mention[-1] for mention in re.findall(_PUBLISHED_MENTION, low)).upper()


def _published_search(low: str, word: str) -> tuple[str, str] | None:
    """Last characters of the two mentions that the published pattern finds, in linear time.

    The pattern is MENTION[^word]+word[^action]*?MENTION, searched from the left.
    """
    mentions = list(re.finditer(rf"(?={_PUBLISHED_MENTION})", low))
    starts = [mention.start() for mention in mentions]
    stops = [match.start() for match in re.finditer(f"[{word}]", low)]
    barred = [match.start() for match in re.finditer("[action]", low)]
    for mention in mentions:
        end = mention.end(1)
        stop = _next(stops, end)
        if stop is None or stop == end or not low.startswith(word, stop):
            continue
        after = stop + len(word)
        place = bisect_left(starts, after)
        last = _next(barred, after)
        if place < len(starts) and (last is None or starts[place] <= last):
            return mention[1][-1], mentions[place][1][-1]
    return None


def _next(places: Sequence[int], start: int) -> int | None:
    at = bisect_left(places, start)
    return places[at] if at < len(places) else None
