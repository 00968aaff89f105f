"""Options of a question by their letters and by their texts: which of them an answer means."""

from __future__ import annotations

import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from enum import IntEnum

from mmalign.bench.spoken import Token, glossary, tokens, word_set
from mmalign.data.words import stem

ARTICLES = word_set("a an the")
NEGATORS = word_set(
    "not no never without neither nor rather instead except unlike cannot none nothing"
)
COPULAS = word_set(
    "is are was were be been being seems appears looks would could should must can will do does "
    "did has have had"
)
ADVERBS = word_set("clearly definitely also both all actually simply obviously")
WRONG = word_set(
    "wrong incorrect false impossible unlikely excluded eliminated ruled out absent irrelevant "
    "inaccurate rejected missing"
)
_TURNS = word_set("but only however so therefore thus hence then because")
_LINKS = word_set("and or nor one option choice")


def plain(text: str) -> str:
    """Lower case, words and numbers only, single spaces: for comparing texts."""
    return " ".join(re.findall(r"[^\W_]+", text.lower()))


def bare(text: str) -> str:
    """`plain` without an article in front."""
    first, _, rest = plain(text).partition(" ")
    return rest if first in ARTICLES and rest else f"{first} {rest}".strip()


def is_negation(word: str) -> bool:
    """Whether a word denies: not, never, isn't."""
    return word in NEGATORS or word.endswith("n't")


def denied_before(found: Sequence[Token]) -> list[bool]:
    """For each token, whether a negation earlier in its clause reaches it."""
    denied = False
    reached: list[bool] = []
    for i, token in enumerate(found):
        reached.append(denied)
        if not token.word:
            denied = denied and token.text not in "\n.,;:!?"
        elif is_negation(token.word):
            after = found[i + 1].word if i + 1 < len(found) else ""
            denied = after not in ("only", "just", "merely", "doubt")
        elif token.word in _TURNS:
            denied = False
    return reached


def denied_after(found: Sequence[Token]) -> list[bool]:
    """For each token, whether what follows denies it: "A is wrong", "the dog is not there"."""
    denied = pending = False
    reached = [False] * len(found)
    for i in range(len(found) - 1, -1, -1):
        token = found[i]
        reached[i] = denied
        if token.word == "not":
            pending, denied = not denied, False
        elif token.word in WRONG or token.word == "cannot" or token.word.endswith("n't"):
            denied, pending = True, False
        elif pending:
            denied, pending = token.word in COPULAS, False
        elif len(token.text) == 1 and token.word.isalpha():
            pass  # the letters of "A and C are wrong"
        elif token.word:
            denied = denied and (
                token.word in COPULAS or token.word in ADVERBS or token.word in _LINKS
            )
        else:
            denied = denied and token.text in ")]\":-'"
    return reached


def mentioned(text: str, options: Sequence[str]) -> list[int]:
    """Numbers of the options that an answer says in whole words and does not deny.

    An option whose text is part of a longer option that is said counts only where it is the whole
    answer. Articles in front do not matter where options do not differ by them, and neither do
    endings ("dogs", "running") where no option is said as it is written.
    """
    whole, texts = plain(text), [plain(option) for option in options]
    equal = [i for i, option in enumerate(texts) if option and option == whole]
    if equal:
        return equal
    heads = [bare(option) for option in options]
    if len(set(heads)) == len(heads):
        texts = heads
        equal = [i for i, option in enumerate(texts) if option and option == bare(text)]
    return equal or _said(text, texts, str) or _said(text, texts, _stems)


def _stems(text: str) -> str:
    return " ".join(map(stem, text.split()))


def _said(text: str, texts: Sequence[str], form: Callable[[str], str]) -> list[int]:
    texts = [form(option) for option in texts]
    if len(set(texts)) < len(texts) and form is not str:
        return []  # endings tell them apart
    found = tokens(text)
    ahead, behind = denied_before(found), denied_after(found)
    words: list[str] = []
    places: list[int] = []  # token of each word; one token holds several: "two-piece"
    for i, token in enumerate(found):
        parts = [form(part) for part in re.findall(r"[^\W_]+", token.text.lower())]
        words += parts
        places += [i] * len(parts)

    def is_said(option: str) -> bool:
        parts = option.split(" ")
        return any(
            word == parts[0]
            and words[at : at + len(parts)] == parts
            and not ahead[places[at]]
            and not behind[places[at + len(parts) - 1]]
            for at, word in enumerate(words)
        )

    said = [i for i, option in enumerate(texts) if option and is_said(option)]
    return [
        i
        for i in said
        if not any(texts[i] != texts[j] and f" {texts[i]} " in f" {texts[j]} " for j in said)
    ]


class Rank(IntEnum):
    """How a letter stands, the surest last."""

    LOOSE = 0  # a word among others
    BRACKET = 1  # (B)
    ALONE = 2  # a clause of its own
    HINT = 3  # it is B; option B; but B
    FRONT = 4  # the answer begins with it
    CONCLUDED = 5  # so B
    CUED = 6  # the answer is B; I choose B; B is correct
    FINAL = 7  # the final answer is B


@dataclass(frozen=True, slots=True)
class Given:
    """A letter of an answer that is not denied."""

    letter: str  # in upper case
    at: int  # number of its token
    rank: Rank  # how it stands
    label: bool  # whether it stands as the mark of an option: `B.`, `B:`, `(B)`
    starts: bool  # whether it begins a line or a sentence


CHINESE = glossary("""
final answer: 最终答案 最终选择
answer: 答案
option: 选项
choose: 选择 选
should: 应该 应
correct: 正确 对的
best: 最佳
the: 的
wrong: 不正确 不对 错误 错
not: 不选 不是 并非 而非 不可能 不会 排除 不
but: 而是 但是
whether: 是否
is: 是 为
i: 我
think: 认为 觉得
because: 因为 由于 解释 理由 原因
so: 所以 因此 故
and: 以及 和 与
or: 或者 还是 或
""")
"""What steers the reading of letters in Chinese."""

ANSWER = word_set("answer answers response choose select pick chose selected picked opt vote")
CONCLUSION = word_set("so therefore thus hence consequently conclusion conclude")
EXPLAINED = word_set("because since explanation explain reason reasoning rationale justification")
_OPTION = word_set("option options choice choices letter")
_GOOD = word_set("correct right best final accurate appropriate true answer")
_HINT = word_set(
    "is it's that's i'd i'll say think guess believe but be go maybe perhaps probably certainly "
    "definitely surely clearly"
)
_FILLERS = word_set(
    "the a my our your this that it to i we is are be was would should must could will can may "
    "might likely probably most definitely clearly actually indeed simply only single one "
    "obviously certainly here given question questions for of in on from by based video clip "
    "above following provided shown multiple and then final correct right best i'm i'd i'll "
    "think believe guess say go with letter it's its that's seems appears looks suitable "
    "appropriate accurate option options choice choices answer answers response choose select "
    "pick as"
)
_CLOSED = word_set(
    "is are was were because since as and or but for which that with in on at from if when where "
    "while due given based only instead rather not the it they he she this there would could "
    "should can seems appears looks isn't doesn't can't cannot does must may has"
)
"""Words that never follow an article, so that an A before them is a letter."""

_JOINING = word_set("and or then maybe perhaps possibly also option")
_HYPOTHETICAL = word_set("whether if unless between")
_BEFORE = "([{<\"'"
_BEHIND = ")]}>\"'"
_OPENS, _CLOSES = frozenset("(["), frozenset(")]")
_LABELS = frozenset(".):]")
_NOTHING = Token("", "", -1, -1)


def given(found: Sequence[Token]) -> list[Given]:
    """The single letters that an answer gives, in order; what it denies or asks is left out."""
    ahead, behind = denied_before(found), denied_after(found)
    letters: list[Given] = []
    cue, adjective, supposed, line, clause = Rank.LOOSE, False, False, True, True
    for i, token in enumerate(found):
        if _is_letter(found, i):
            if not (ahead[i] or behind[i] or supposed or _asked(found, i)):
                letters.append(_given(found, i, cue, line, clause))
            cue, line, clause = Rank.LOOSE, False, False
        elif not token.word:
            cue = _after_mark(cue, token.text)
            supposed = supposed and token.text not in "\n.,;:!?"
            line = token.text in "\n.;!?" or (line and token.text in "-*([\"'")
            clause = clause if token.text in _BEFORE or token.text in _BEHIND else True
        else:
            supposed = supposed or token.word in _HYPOTHETICAL
            cue = _after_word(cue, token.word, adjective)
            adjective = token.word in _GOOD and token.word != "answer"
            line = False
            clause = clause and token.word in _HINT
    return letters


def listed(found: Sequence[Token], one: Given, other: Given) -> bool:
    """Whether two letters that follow each other are of one list: `A, B`, `A and B`, `A/B`."""
    between = found[one.at + 1 : other.at]
    if len(between) > 8:
        return False
    if any(token.text == "." for token in between):
        after = found[other.at + 1].text if other.at + 1 < len(found) else "."
        return one.starts and not any(token.word for token in between) and after in ".),:]"
    return all(token.word in _JOINING or token.text in ",;/&+|()[]\"'\n" for token in between)


def _is_letter(found: Sequence[Token], i: int) -> bool:
    """Whether a token is a letter: no article, pronoun, unit or part of an abbreviation."""
    token, (before, after, third) = found[i], _around(found, i)
    if len(token.text) != 1 or not ("a" <= token.text.lower() <= "z") or before.word.isdigit():
        return False
    joined = (after.start, third.start) == (token.end, after.end)
    if after.text == "." and joined and len(third.text) == 1 and third.word.isalpha():
        return False  # "a.m.", "U.S."
    if not after.word:
        return True
    return (
        token.text.isupper() and token.text != "I" and (token.text != "A" or after.word in _CLOSED)
    )


def _around(found: Sequence[Token], i: int) -> list[Token]:
    """The token before one, and the two behind it; an empty one where there is none."""
    return [found[k] if 0 <= k < len(found) else _NOTHING for k in (i - 1, i + 1, i + 2)]


def _asked(found: Sequence[Token], i: int) -> bool:
    behind = next((t.text for t in found[i + 1 : i + 4] if t.text not in _BEHIND), "")
    return behind == "?" and i > 1


def _given(found: Sequence[Token], i: int, cue: Rank, line: bool, clause: bool) -> Given:
    token, (before, after, _) = found[i], _around(found, i)
    upper = token.text.isupper()
    closed = not after.word or after.word in _CLOSED
    bracketed = before.text in _OPENS and after.text in _CLOSES
    label = bracketed or after.text in _LABELS
    front = not any(t.word for t in found[max(0, i - 6) : i]) and i <= 6
    if cue >= Rank.CUED and (upper or not after.word):
        rank = cue
    elif upper and _is_praised(found, i):
        rank = Rank.CUED
    elif cue == Rank.CONCLUDED and closed and upper:
        rank = cue
    elif front and (upper or label or len(found) <= i + 2):
        rank = Rank.FRONT
    elif cue == Rank.HINT and closed and (upper or bracketed):
        rank = cue
    elif clause and upper and after.word in ("", "and", "or"):
        rank = Rank.ALONE
    else:
        rank = Rank.BRACKET if bracketed and upper else Rank.LOOSE
    return Given(token.text.upper(), i, rank, label and upper, line)


def _is_praised(found: Sequence[Token], i: int) -> bool:
    """ "B is the correct answer", "(B) is right"."""
    following = [t for t in found[i + 1 : i + 9] if t.text not in _BEHIND]
    if not following or following[0].word not in (
        "is", "would", "must", "seems", "appears", "looks", "should",
    ):  # fmt: skip
        return False
    for token in following[1:]:
        if token.word in _GOOD:
            return True
        if token.word not in _FILLERS:
            return False
    return False


def _after_mark(cue: Rank, mark: str) -> Rank:
    """What is left of a cue behind a mark: the next line may still hold the answer."""
    if mark in ".?!;" or (mark in ",\n" and cue < Rank.CONCLUDED):
        return Rank.LOOSE
    return cue


def _after_word(cue: Rank, word: str, adjective: bool) -> Rank:
    if word in ANSWER:
        return Rank.FINAL if cue == Rank.FINAL else Rank.CUED
    if word == "final":
        return Rank.FINAL
    if word in CONCLUSION:
        return max(cue, Rank.CONCLUDED)
    if word in _OPTION:
        return max(cue, Rank.CUED if adjective else Rank.HINT)
    if word == "is" and cue == Rank.HINT:
        return Rank.HINT
    if word in _HINT:
        return max(cue, Rank.HINT)
    return cue if word in _FILLERS else Rank.LOOSE
