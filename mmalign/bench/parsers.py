"""What a model meant by its words, strictly: nothing is guessed, and None says so.

Thoughts, tokens of templates and layout are no answer; what stands in `<answer>` or a box is the
answer, whatever else is said.
"""

from __future__ import annotations

import math
import re
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from enum import IntEnum
from importlib import import_module
from itertools import pairwise
from typing import Any, cast

from mmalign.bench.options import (
    CHINESE,
    EXPLAINED,
    Given,
    Rank,
    bare,
    given,
    listed,
    mentioned,
    plain,
)
from mmalign.bench.spoken import Token, agreed, glossary, tokens, word_set
from mmalign.errors import ConfigError


class Cue(IntEnum):
    """How surely a clause is an answer, the surest last."""

    LED = 0  # yes he does
    ALONE = 1  # yes
    CONCLUDED = 2  # so yes
    CUED = 3  # the answer is yes
    FINAL = 4  # the final answer is yes


@dataclass(slots=True)
class _Clause:
    words: list[str] = field(default_factory=list)
    end: str = "."  # the mark behind it


YES_NO_CHINESE = glossary("""
yes: 是的 对的 没错 有的 是的呢
correct: 是 对 有 正确 确实 当然 肯定 会 能
nope: 不是 不对 没有 没 否 不 无 并非 不会 不能
false: 不正确 错误 错
unsure: 不确定 不知道 不清楚 无法 难以 看不出 不明
whether: 是否 是不是 有没有 如果
answer is: 答案是 答案为 答案
final answer is: 最终答案是 最终答案为 最终答案
so: 所以 因此 故
or: 或者 还是 或 和
""")
"""What steers the reading of a yes or no in Chinese."""

_PHRASES = glossary(
    """
yes: claro que sí
no: claro que no, bien sûr que non
of course: por supuesto, bien sûr, without a doubt
not at all: pas du tout, para nada, auf keinen fall
""",
    ", ",
)
_PHRASE = re.compile(rf"\b(?:{'|'.join(_PHRASES)})\b", re.IGNORECASE)

YES = word_set("yes yeah yep yup yea aye")
NO = word_set("no nope nah nay")
_TRUE = word_set(
    "correct true right affirmative correcto cierto verdadero claro vrai vraie exact richtig "
    "wahr stimmt accurate"
)
_FALSE = word_set(
    "false incorrect wrong negative untrue inaccurate falso incorrecto faux falsch unwahr never"
)
_SURE = word_set(
    "absolutely certainly definitely indeed exactly sure totally precisely obviously genau "
    "natürlich absolut exactement certainement absolument claramente"
)
_SOFTENED = word_set("not really quite exactly entirely at all a the is")
_REASONS = word_set("because since as")
_JOINED = word_set("or and / |")
_FILLERS = word_set(
    "so and but then thus therefore hence consequently well oh ok okay hmm um ah actually "
    "honestly clearly simply just the answer final response is it's its it that that's this "
    "would must should be i i'd i'm we think believe guess say to my a an in conclusion short "
    "summary overall based on video clip question however still again probably likely most "
    "mostly maybe perhaps statement claim sorry here as for your given shown de of course "
    "evidently yes-or-no was"
)
_AFTER = word_set("from me sir please indeed definitely though thanks thank you at all it is here")
_CONCLUDES = word_set("so therefore thus hence consequently conclusion summary overall")
_ADJECTIVES = word_set("correct right best short final")
_IDIOMS = word_set(
    "doubt problem question questions worries wonder matter need idea clue answer response "
    "comment data input video image context information option choice"
)
_SUBJECTS = word_set("he she it they there this that i the these those we you does do is are")
_UNKNOWN = word_set(
    "above unsure uncertain unclear unknown undetermined undeterminable ambiguous indeterminate "
    "determine determined tell know knows whether if possible impossible able unable cannot "
    "can't couldn't enough sufficient insufficient information answerable matter sense "
    "applicable available provided accessible loaded access discernible inconclusive depends "
    "idea clue answer comment input"
)
_DOUBTED = word_set("sure clear certain confident evident obvious")
_DENIALS = word_set("not no never nothing nobody none neither nope")
_PLACES = word_set("in on at from by based during throughout according as to for within here")
_TURNED = word_set(
    "only just merely but stop stops stopped stopping fail fails failed until unless except "
    "however although though instead rather who which because when while since where why doubt "
    "else says said shouts reads answers replies"
)
_SENSES = word_set("see hear think believe find notice observe detect")
_MAX_STATEMENT = 30


def yes_no(text: str) -> str | None:
    """The yes or no of an answer; None: it is neither, both, or not known.

    An answer is read clause by clause. A clause that is a yes or a no counts before one that begins
    with it, "the answer is no" before both, and a contradiction at the surest place is no answer. A
    plain statement that denies ("The man does not jump") is a no; one that affirms is not read,
    since only the question tells what it affirms. What is asked, supposed or not known is no
    answer.
    """
    return agreed(text, _read)


def _read(text: str) -> str | None:
    letter = {"y": "yes", "n": "no", "si": "yes"}.get(text.lower().strip(" .!'\"()"))
    if letter:
        return letter
    text = _PHRASE.sub(lambda found: _PHRASES[found[0].lower()], text)
    clauses = _without_pairs(list(_clauses(tokens(text, YES_NO_CHINESE))))
    said = list(_said(clauses))
    if said:
        rank = max(rank for rank, _ in said)
        words = {word for its, word in said if its == rank}
        return words.pop() if len(words) == 1 else None
    return "no" if _is_denial(clauses) else None


def _clauses(found: Sequence[Token]) -> Iterator[_Clause]:
    clause = _Clause()
    for token in found:
        if token.word:
            clause.words.append(token.word)
        elif token.text in "/|":
            clause.words.append(token.text)
        elif token.text not in "\"'":
            clause.end = token.text
            yield clause
            clause = _Clause()
    yield clause


def _without_pairs(clauses: list[_Clause]) -> list[_Clause]:
    """Without "yes or no" and the like, which say neither."""
    for clause in clauses:
        kept: list[str] = []
        for word in clause.words:
            kept.append(word)
            rest = [w for w in kept[-5:] if w not in ("a", "the")]
            if len(rest) > 2 and rest[-2] in _JOINED:
                sides = {_polar(rest[-1]), _polar(rest[-3])}
                while sides == {"yes", "no"} and kept.pop() != rest[-3]:
                    pass
        clause.words = kept
    return clauses


def _polar(word: str) -> str:
    """What a word says by itself: yes, no or nothing."""
    if word in YES or word in _TRUE:
        return "yes"
    return "no" if word in NO or word in _FALSE or word == "nope" else ""


def _said(clauses: Sequence[_Clause]) -> Iterator[tuple[Cue, str]]:
    """How surely each clause that says yes or no does so."""
    cue, supposed = Cue.LED, False
    for clause in clauses:
        if supposed or (clause.end == "?" and len(clauses) > 2):
            cue, supposed = Cue.LED, supposed and clause.end == ","
            continue
        cue, rest = _after_fillers(clause.words, cue)
        if not rest:
            cue = cue if clause.end in ":,\n-(" else Cue.LED
            continue
        supposed = rest[0] in ("if", "unless") and clause.end == ","
        word, alone = _polarity(rest)
        if word:
            yield max(cue, Cue.ALONE) if alone else cue, word
        cue = Cue.LED


def _after_fillers(words: list[str], cue: Cue) -> tuple[Cue, list[str]]:
    """What a clause says without the words that lead to it, and how sure they make it."""
    for i, word in enumerate(words):
        if word == "answer":
            cue = max(cue, Cue.CUED)
        elif word == "final":
            cue = Cue.FINAL
        elif word in _CONCLUDES:
            cue = max(cue, Cue.CONCLUDED)
        elif word in _ADJECTIVES and words[i + 1 : i + 2] in (["answer"], ["response"]):
            continue
        elif words[i : i + 2] == ["of", "course"] or word not in _FILLERS:
            return cue, words[i:]
    return cue, []


def _polarity(words: list[str]) -> tuple[str, bool]:
    """The yes or no that words begin with, "" for none, and whether they say nothing else."""
    if words[:2] == ["of", "course"]:
        words = ["sure", *words[2:]]
    first, rest = words[0], words[1:]
    behind = rest[0] if rest else ""
    alone = all(word in _AFTER for word in rest)
    if set(words) & _UNKNOWN or (set(words) & _DOUBTED and first in ("no", "not")):
        return "", False
    if first in YES or first in NO:
        other = NO if first in YES else YES
        known = first in YES or behind not in _IDIOMS
        known = known and behind not in other and (not rest or rest[-1] not in other)
        return (("yes" if first in YES else "no") if known else ""), alone
    if first in ("not", *_SURE, "stimmt") and (first == "not" or behind == "not"):
        told = [word for word in words[1:] if word not in _SOFTENED]
        opposite = {"yes": "no", "no": "yes"}.get(_polar(told[0]), "") if told else "no"
        return opposite, len(told) < 2
    if _polar(first):
        return (_polar(first), alone) if alone or behind in _REASONS else ("", False)
    if first in _SURE and (alone or (behind in _SUBJECTS and not _denials(rest))):
        return "yes", alone
    return "", False


def _denials(words: Sequence[str]) -> list[int]:
    """Which words of a clause deny."""
    return [i for i, word in enumerate(words) if word in _DENIALS or word.endswith("n't")]


def _is_denial(clauses: Sequence[_Clause]) -> bool:
    """Whether the first sentence, plainly, denies what was asked."""
    sentence = _first_sentence(clauses)
    words = [word for clause in sentence for word in clause.words]
    places = _denials(words)
    if len(places) != 1 or len(words) > _MAX_STATEMENT or sentence[-1].end == "?":
        return False
    place = places[0]
    kinds, behind = set(words), words[place + 1 : place + 2]
    if place >= len(sentence[0].words) or words == ["neither"]:
        return False
    if kinds & (_UNKNOWN | _TURNED | YES) or (words[place] == "no" and _IDIOMS & set(behind)):
        return False
    if (kinds & _DOUBTED and words[place] == "not") or "and" in words[place:]:
        return False
    if "that" in words[2:place]:
        return False
    return words[0] not in ("i", "we") or bool(kinds & _SENSES)


def _first_sentence(clauses: Sequence[_Clause]) -> list[_Clause]:
    """Its clauses, without those before it that only say where: "in the video, ..."."""
    sentence: list[_Clause] = []
    for clause in clauses:
        sentence += [clause] if clause.words else []
        if sentence and clause.end in ".!?;\n":
            break
    while len(sentence) > 1 and sentence[0].words[0] in _PLACES:
        del sentence[0]
    return sentence


LETTERS = "ABCDEFGHIJKLMNOPQRSTUVWXYZ"

_COMPACT = re.compile(  # AC, but not in "the AC adapter"
    r"(?:(?<![a-z] )|(?<= is )|(?<= are )|(?<=answer )|(?<=answers ))\b[A-Z]{2,26}\b(?! [a-z])"
)

_CUE = re.compile(
    r"\b(?:answer|response|option|choice)(?: is(?! not\b)| would be| ?:)", re.IGNORECASE
)


def letter(text: str, options: Sequence[str] = (), count: int | None = None) -> str | None:
    """The one letter an answer gives.

    A letter counts where it stands as an answer: after "answer is" and the like, in front, alone,
    or in brackets; never as a word of a sentence, and never where it is denied. The surest place
    counts; two letters there are no answer. Where no letter is given, the one option whose text is
    said counts.

    Args:
        text: What the model said.
        options: Texts of the options; () where they are not known.
        count: How many options there are; by default as many as `options`, or 26.
    """
    return agreed(text, lambda part: _letter(part, options, count))


def _letter(text: str, options: Sequence[str], count: int | None) -> str | None:
    found = tokens(text, CHINESE)
    said = given(found)
    if said:
        one = _surest(said, found)
        if one is not None:
            letter = one.letter
            allowed = LETTERS[: count or len(options) or 26]
            return letter if letter in allowed and _fits(one, found, options) else None
        if max(item.rank for item in said) > Rank.LOOSE:
            return None
    return _by_text(text, options)


def _surest(said: Sequence[Given], found: Sequence[Token]) -> Given | None:
    """The letter that stands surest, if it stands there alone."""
    rank = max(item.rank for item in said)
    top = [item for item in said if item.rank == rank]
    if rank == Rank.LOOSE or len({item.letter for item in top}) > 1:
        return None
    one = top[0]
    pairs = pairwise(said)
    if any(
        first.letter != second.letter and one.letter in (first.letter, second.letter)
        for first, second in pairs
        if (first.rank == rank or second.rank == rank) and listed(found, first, second)
    ):
        return None
    return None if rank == Rank.FRONT and _is_echo(one, said, found) else one


def _is_echo(one: Given, said: Sequence[Given], found: Sequence[Token]) -> bool:
    """Whether other options are listed with marks too, before any explanation."""
    stop = _explained_at(found)
    line = next((i for i, token in enumerate(found) if token.text == "\n"), len(found))
    return any(
        item.letter != one.letter and item.label and item.at < stop
        for item in said
        if item.starts or item.at < line
    )


def _explained_at(found: Sequence[Token]) -> int:
    """Where an explanation begins, or the end."""
    return next((i for i, token in enumerate(found) if token.word in EXPLAINED), len(found))


def _fits(one: Given, found: Sequence[Token], options: Sequence[str]) -> bool:
    """Whether the letter's own option is named behind it, or no option at all.

    "C. dog" is no answer where the dog is B.
    """
    longest = max((plain(option).count(" ") + 2 for option in options), default=0)
    words: list[str] = []
    named: list[str] = []  # what stands behind the letter, up to each mark
    for token in found[one.at + 1 : one.at + 3 * longest + 4]:
        if token.text == "\n":
            break
        if token.word:
            words.append(token.text)
        elif words:
            named.append(bare(" ".join(words)))
    named.append(bare(" ".join(words)))
    texts = [bare(option) for option in options]
    own = LETTERS.find(one.letter)
    if not words or own >= len(texts) or texts[own] in named:
        return True
    return not any(text and text in named for text in texts)


def _by_text(text: str, options: Sequence[str]) -> str | None:
    """The letter of the one option that an answer says."""
    kinds = [plain(option) for option in options]
    if "yes" in kinds and "no" in kinds and plain(text) not in kinds:
        read = yes_no(text)
        return None if read is None else LETTERS[kinds.index(read)]
    for part in (*concluded(text), text.partition("\n")[0], text):
        said = mentioned(part, options)
        if len(said) == 1 and said[0] < len(LETTERS):
            return LETTERS[said[0]]
        if len(said) > 1:
            return None
    return None


def concluded(text: str) -> list[str]:
    """What stands behind the last "answer:" or "answer is", up to the line's end."""
    cues = [match.end() for match in _CUE.finditer(text)]
    return [text[cues[-1] :].lstrip().partition("\n")[0]] if cues else []


def letters(text: str, options: Sequence[str]) -> frozenset[str]:
    """All letters that an answer to a question with several right options gives; empty: none."""
    return agreed(text, lambda part: _letters(part, options)) or frozenset()


def _letters(text: str, options: Sequence[str]) -> frozenset[str]:
    allowed = LETTERS[: len(options)]

    def spaced(found: re.Match[str]) -> str:
        return ", ".join(found[0]) if set(found[0]) <= set(allowed) else found[0]

    text = _COMPACT.sub(spaced, text)
    found = tokens(text, CHINESE)
    said = given(found)
    chosen = _all_meant(said, found)
    if not chosen:
        return frozenset(LETTERS[i] for i in mentioned(text, options) if i < len(LETTERS))
    between = found[chosen[0].at : chosen[-1].at]
    unsure = any(token.word == "or" for token in between)
    fits = all(item.letter in allowed and _fits(item, found, options) for item in chosen)
    return frozenset(item.letter for item in chosen) if fits and not unsure else frozenset()


def _all_meant(said: Sequence[Given], found: Sequence[Token]) -> list[Given]:
    """The surest letters, those of one list with them, and other marks of options."""
    rank = max((item.rank for item in said), default=Rank.LOOSE)
    if rank == Rank.LOOSE:
        return []
    stop = _explained_at(found)
    chosen: list[Given] = []
    for place, item in enumerate(said):
        before = said[place - 1]
        in_list = bool(chosen) and before is chosen[-1] and listed(found, before, item)
        marked = item.at < stop and item.label and (item.starts or rank <= Rank.FRONT)
        if item.rank == rank or in_list or (marked and (chosen or rank < Rank.CONCLUDED)):
            chosen.append(item)
    return chosen


Similarity = Callable[[str, str], float]
"""Two texts to a number up to 1, as a cosine of embeddings is."""

FILLERS = frozenset(("a", "an", "the", "of", "in", "on", "at", "with", "and", "to"))


def word_cosine(a: str, b: str) -> float:
    """Cosine of two counts of words, fillers left out: no embedding, so no synonyms.

    "a dark kitchen" and "the kitchen" give 1 / sqrt(2); "sofa" and "couch" give 0.
    """
    counts = [Counter(word for word in plain(t).split() if word not in FILLERS) for t in (a, b)]
    product = sum(count * counts[1][word] for word, count in counts[0].items())
    norms = [math.sqrt(sum(count**2 for count in part.values())) for part in counts]
    return product / (norms[0] * norms[1]) if all(norms) else 0.0


def named_similarity(path: str) -> Similarity:
    """The function that `my_package.module:function` names.

    Raises:
        ConfigError: There is none.
    """
    module, _, name = path.partition(":")
    try:
        found: Any = getattr(import_module(module), name)
    except (ImportError, AttributeError, ValueError) as error:
        raise ConfigError(
            f"--similarity {path}: write it as my_package.module:function, of two texts ({error})"
        ) from error
    if not callable(found):
        raise ConfigError(f"--similarity {path}: is no function")
    return cast("Similarity", found)
