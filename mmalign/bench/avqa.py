"""MUSIC-AVQA: questions about musical performances, answered with one of 42 words."""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping
from contextlib import suppress

from mmalign.bench.base import Benchmark, Entry, Prediction, Question, Source, Verdict
from mmalign.bench.options import mentioned, plain
from mmalign.bench.parsers import concluded, yes_no
from mmalign.bench.spoken import final, glossary
from mmalign.data.turns import Unreadable, literal
from mmalign.errors import DataError

NUMBERS = (
    *("zero", "one", "two", "three", "four", "five", "six", "seven", "eight", "nine", "ten"),
    "more than ten",
)
PLACES = ("left", "middle", "right", "simultaneously")
SETTINGS = ("indoor", "outdoor")
INSTRUMENTS = (
    "accordion", "acoustic_guitar", "bagpipe", "banjo", "bassoon", "cello", "clarinet", "congas",
    "drum", "electric_bass", "erhu", "flute", "guzheng", "piano", "pipa", "saxophone", "suona",
    "trumpet", "tuba", "ukulele", "violin", "xylophone",
)  # fmt: skip
VOCABULARY = ("yes", "no", *NUMBERS, *PLACES, *SETTINGS, *INSTRUMENTS)
"""All answers of the data set."""

_SAME = glossary(
    """
more than ten: more than 10, over ten
one: single
middle: center, centre, central
left: leftmost
right: rightmost
simultaneously: at the same time, at once, together
indoor: indoors, inside
outdoor: outdoors, outside
saxophone: sax
congas: conga
bagpipe: bagpipes
ukulele: ukelele
""",
    ", ",
)
_SAME_WORDS = re.compile(rf"\b(?:{'|'.join(_SAME)})\b", re.IGNORECASE)
_NONE = re.compile(r"(?:none|no [a-z]+(?: [a-z]+)?)\.?", re.IGNORECASE)
_ABOVE_TEN = re.compile(
    r"\b(?:eleven|twelve|dozens?|(?:thir|four|fif|six|seven|eigh|nine)teen"
    r"|(?:twen|thir|for|fif|six|seven|eigh|nine)ty(?:[- ](?:one|two|three|four|five|six|seven"
    r"|eight|nine))?)\b",
    re.IGNORECASE,
)
_BOUND = re.compile(r"\b(?:or more|or so|at (?:least|most)|(?:more|less|fewer) than)\b|\d\+")
_SLOT = re.compile(r"<[^<>]+>")
_DIGITS = re.compile(r"\b(\d+)\b")


class MusicAVQA(Benchmark):
    """Accuracy in all, by modality, and by modality and kind of question."""

    name = "music-avqa"
    title = "MUSIC-AVQA"
    layout = (
        '[{video_id, question_id, type: \'["Audio", "Counting"]\', question_content, templ_values, '
        "anser, prediction?}, ...]"
    )
    metric = "accuracy over all questions; by modality and kind besides"
    suffix = "\nAnswer the question using a single word or phrase. (ours)"
    strict = (
        "the one of the 42 answers that is said, of those that fit the question: yes or no, "
        "numbers (digits too), places, indoor or outdoor, instruments"
    )
    legacy = "exact match after lower case and stripping, as of a classifier"
    source = "Li et al. 2022, MUSIC-AVQA (CVPR)"

    def items(self, source: Source) -> Iterator[Question]:
        """Slots such as <Object> are filled from `templ_values`."""
        for entry in source.entries():
            kinds = _listed(entry, "type")
            if len(kinds) != 2:
                raise DataError(f"{entry.where}: `type` must be a modality and a kind")
            video = entry.text("video_id")
            yield Question(
                id=entry.text("question_id"),
                task=" ".join(kinds),
                prompt=_filled(entry) + self.ending,
                video=f"{video}.mp4",
                answer=entry.text("anser", "answer"),
                meta={"modality": kinds[0], "video": video},
                said=entry.said(),
            )

    def judge(self, text: str, row: Prediction, legacy: bool) -> Verdict:
        """Compare words, or find the one answer that is said."""
        answer = row.answer.lower().strip()
        if legacy:
            read = text.lower().strip()
            return Verdict(read, read == answer)
        read = said_of_kind(text, answer)
        return Verdict(read, read is not None and plain(read) == plain(row.answer))

    def groups(self, row: Prediction) -> Mapping[str, str]:
        """By modality, and by modality and kind."""
        modality = row.meta.get("modality") or row.task.partition(" ")[0]
        return {"modality": str(modality), "task": row.task}


def said_of_kind(text: str, answer: str) -> str | None:
    """The one answer that is said, among those that a question like this one has.

    A counting question is answered by "two" in "There are two violins", not by the violin.

    Args:
        text: What the model said.
        answer: What is right, which tells the kind of the question.
    """
    if answer in ("yes", "no"):
        return yes_no(text)
    groups = (NUMBERS, PLACES, SETTINGS, INSTRUMENTS)
    words = next((group for group in groups if answer in group), (*VOCABULARY, answer))
    text = _SAME_WORDS.sub(lambda found: _SAME[found[0].lower()], final(text))
    if words is NUMBERS:
        bounded = _BOUND.search(text.lower())
        text = _ABOVE_TEN.sub("more than ten", _DIGITS.sub(_number, text))
        if bounded and "more than ten" not in text.lower():
            return None
        text = "zero" if _NONE.fullmatch(text) else text
    for part in (*concluded(text), text):
        said = mentioned(part, words)
        if said:
            return words[said[0]] if len(said) == 1 else None
    return None


def _number(found: re.Match[str]) -> str:
    value = int(found[1]) if len(found[1]) < 4 else 11
    return NUMBERS[min(value, 11)]


def _listed(entry: Entry, key: str) -> list[str]:
    """A list, which the data set writes as text."""
    value = entry.value.get(key)
    if isinstance(value, str):
        with suppress(Unreadable):
            value = literal(value)
    if not isinstance(value, list):
        raise DataError(f"{entry.where}: {key!r} must be a list; found {value!r}")
    return [str(item) for item in value]


def _filled(entry: Entry) -> str:
    text = entry.text("question_content")
    slots = _SLOT.findall(text)
    values = _listed(entry, "templ_values") if slots else []
    if len(values) < len(slots):
        raise DataError(f"{entry.where}: {len(slots)} slots, but {len(values)} `templ_values`")
    given = iter(values)
    return _SLOT.sub(lambda _: next(given), text)
