"""What a model's output says as its answer: without thoughts, template tokens and layout.

Every step passes over the text once. Words of other languages that steer a reading stand in
English; only those are translated, what the options say is compared as it is written.
"""

from __future__ import annotations

import re
import unicodedata
from collections.abc import Callable, Mapping
from typing import NamedTuple, TypeVar

Read = TypeVar("Read")

_THOUGHT = re.compile(
    r"(?P<closes></(?:think|thinking|thoughts?|reasoning|reflection|analysis|scratchpad|seed:think)>"
    r"|\u25c1/think\u25b7|\[/THINK\]|<\|end_of_thought\|>|<\|channel\|>final<\|message\|>)"
    r"|<(?:think|thinking|thoughts?|reasoning|reflection|analysis|scratchpad|seed:think)>"
    r"|\u25c1think\u25b7|\[THINK\]|<\|begin_of_thought\|>"
    r"|<\|channel\|>(?:analysis|commentary)<\|message\|>",
    re.IGNORECASE,
)
_TOKEN = re.compile(
    r"(?:<\|im_start\|>|<\|start_header_id\|>|<start_of_turn>|<\|start\|>)(?:assistant|model)?"
    r"|<\|(?!begin_of_box|end_of_box)[^|<>\s]{1,40}\|>"
    r"|</?s>|<(?:eos|bos|pad|unk|end_of_turn)>|\[(?:EOS|BOS|PAD|UNK|CLS|SEP|/?INST)\]"
    r"|#{2,3} ?(?:Human|User|Assistant):|\n(?:Human|User|HUMAN|USER):"
)
_MARK = re.compile(
    r"(?P<closes></(?:final_answer|answer|ans|final|conclusion)>|<\|end_of_box\|>"
    r"|\[/ANSWER\])"
    r"|<(?:final_answer|answer|ans|final|conclusion)>|<\|begin_of_box\|>|\[ANSWER\]",
    re.IGNORECASE,
)
_BOX = re.compile(r"(?:\\(?:boxed|fbox)|\x08oxed)\s?\{")  # JSON reads a lone "\b" as a backspace
_HTML = re.compile(r"</?(?:b|i|u|p|em|li|ul|ol|br|div|span|code|mark|strong|center|h[1-6]) ?/?>")
_LATEX = re.compile(
    r"\\(?:text|mathrm|mathbf|mathbb|mathit|textbf|textit|rm|bf)\b|\\[()\[\]]|[${}]"
)
_MARKDOWN = re.compile(r"[*`]|__|~~|^#{1,6} |^> ", re.MULTILINE)
_UNSEEN = re.compile(
    r"[\x00-\x08\x0b-\x1f\x7f-\x9f\u00ad\u0600-\u0605\u061c\u180e\u200b-\u200f\u202a-\u202e"
    r"\u2060-\u206f\ufeff\ufff9-\ufffb\U000e0000-\U000e007f]"
)
_BLANKS = re.compile(r"[^\S\n]+")
_LINES = re.compile(r" ?\n[\n ]*")
_QUOTES = str.maketrans(
    {
        **dict.fromkeys("\u2018\u2019\u02bc\u2032", "'"),
        **dict.fromkeys("\u201c\u201d\u201e\u00ab\u00bb\u300c\u300d\u300e\u300f\u300a\u300b", '"'),
        **dict.fromkeys("\u3010\u3014", "["),
        **dict.fromkeys("\u3011\u3015", "]"),
        **dict.fromkeys("\u2013\u2014\u2015\u2212", "-"),
        "\u3002": ".",
        "\u3001": ",",
        "\u00bf": " ",
        "\u00a1": " ",
    }
)


def spoken(text: str) -> tuple[list[str], str]:
    """What an output marks as its answer, and all that it says.

    Closed blocks of thought are taken away, then what stands before a closing tag without an
    opening one, and a block that never closes to the end. What follows an end token is no answer.
    Forms of a character that NFKC holds equal are one, so that full-width marks are plain ones.

    Returns:
        Contents of `<answer>`, or else of boxes, in order and without layout; and the whole text
        without layout.
    """
    text = unicodedata.normalize("NFKC", text)
    text = _first_turn(_without_thoughts(text))
    marked = _between_tags(text)
    boxed = [box for part in marked or [text] for box in _boxes(part)]
    whole = without_layout(_MARK.sub("\n", text))
    return [without_layout(part) for part in boxed or marked], whole


def agreed(text: str, read: Callable[[str], Read]) -> Read | None:
    """What each answer that an output marks is read as, or all that it says; None if they differ.

    Args:
        text: What the model said.
        read: Reads one answer without layout.
    """
    marked, whole = spoken(text)
    found = {read(part) for part in marked or [whole]}
    return found.pop() if len(found) == 1 else None


def final(text: str) -> str:
    """The answer that an output marks, or all that it says; empty where marks contradict."""
    return agreed(text, str) or ""


def without_layout(text: str) -> str:
    """Without Markdown, HTML and LaTeX, blanks in a row and characters that take no place."""
    text = _BOX.sub(" ", text).replace("<br>", "\n")
    text = _LATEX.sub(" ", _HTML.sub("", text))
    text = _MARKDOWN.sub("", text).translate(_QUOTES)
    return _LINES.sub("\n", _UNSEEN.sub("", _BLANKS.sub(" ", text))).strip()


def _without_thoughts(text: str) -> str:
    kept: list[str] = []
    start, inside = 0, False
    for tag in _THOUGHT.finditer(text):
        if tag["closes"]:
            if not inside:  # the prompt held the opening tag
                kept.clear()
            inside, start = False, tag.end()
        elif not inside:
            kept.append(text[start : tag.start()])
            inside = True
    return "\n".join(kept if inside else [*kept, text[start:]])


def _first_turn(text: str) -> str:
    """The first piece between tokens of a template that says anything."""
    pieces = _TOKEN.split(text)
    return next(filter(str.strip, pieces), pieces[-1])


def _between_tags(text: str) -> list[str]:
    """Contents of tags around answers; the first opening one, or the last closing one, may lack."""
    found: list[str] = []
    start, inside = 0, False
    for tag in _MARK.finditer(text):
        if tag["closes"]:
            if inside or not found:
                found.append(text[start : tag.start()])
            inside = False
        else:
            start, inside = tag.end(), True
    if inside:
        found.append(text[start:])
    return [part for part in found if part.strip()]


def _boxes(text: str) -> list[str]:
    r"""Contents of \boxed{}, braces inside it matched; one that never closes goes to the end."""
    found: list[str] = []
    end = 0
    while box := _BOX.search(text, end):
        depth, end = 1, box.end()
        while end < len(text) and depth:
            depth += {"{": 1, "}": -1}.get(text[end], 0)
            end += 1
        found.append(text[box.end() : end - (not depth)])
    return [part for part in found if part.strip()]


def word_set(text: str) -> frozenset[str]:
    """The words of a line."""
    return frozenset(text.split())


def glossary(text: str, separator: str | None = None) -> dict[str, str]:
    """Words to what they mean.

    Args:
        text: A line for each meaning, `meaning: word word`.
        separator: What stands between the words, which may have blanks then.
    """
    return {
        word: meaning
        for line in text.strip().splitlines()
        for meaning, _, words in [line.partition(": ")]
        for word in words.split(separator)
    }


_WORD_OR_MARK = re.compile(r"\n|[^\W_]+(?:['-][^\W_]+)*|[^\s\w]|_")
_HAN = re.compile(r"([\u3040-\u30ff\u3400-\u9fff\uac00-\ud7af]+)")
_ELISION = ("l'", "d'", "qu'", "j'", "s'")

_FOREIGN = """
answer: respuesta réponse reponse antwort lösung
option: opción opcion alternativa
choice: choix elección auswahl
choose: elijo escojo selecciono elegiría elegiria choisis choisirais sélectionne wähle nehme
is: es est ist c'est n'est sería seria serait wäre lautet
correct: correcta correcto correcte bonne exacte richtig richtige korrekt korrekte
best: mejor meilleure meilleur beste
final: finale endgültige
not: nicht pas
but: sondern sino mais pero aber
so: donc entonces folglich daher deshalb
because: porque parce puisque weil denn explicación begründung erklärung
and: et und y
or: ou oder o
neither: ni weder
nor: noch
wrong: incorrecta incorrecto falsa falso fausse faux falsch
the: la le el les los las die der das den une un una ein eine
yes: oui sí ja jawohl
no: non nein
none: aucun aucune kein keine keinen ningún ninguna niemand personne nadie
never: jamais nunca nie niemals
nothing: rien nada nichts
idea: ahnung idée
know: sé sais weiß saber savoir wissen
unsure: unsicher unklar seguro sûr sicher incertain
determine: determinar déterminer bestimmen
impossible: unmöglich imposible
whether: ob
then: puis ensuite dann danach luego después despues
first: primero d'abord zuerst
before: antes avant vor vorher
after: après nach
"""
ENGLISH = glossary(_FOREIGN)


class Token(NamedTuple):
    """A word, a mark or a line's end."""

    text: str  # as it is written
    word: str  # in lower case and English; empty for a mark
    start: int  # its place in the text
    end: int  # that of what follows


def tokens(text: str, phrases: Mapping[str, str] | None = None) -> list[Token]:
    """The tokens of a text.

    Args:
        text: Without layout.
        phrases: Chinese phrases and what they stand for in English.
    """
    if phrases and _HAN.search(text):
        text = in_english(text, phrases)
    found: list[Token] = []
    for match in _WORD_OR_MARK.finditer(text):
        written = match[0]
        word = written.lower() if written[0].isalnum() else ""
        if "'" in word[:3] and word not in ENGLISH:
            word = word.removeprefix(next(filter(word.startswith, _ELISION), ""))
        found.append(Token(written, ENGLISH.get(word, word), match.start(), match.end()))
    return found


def in_english(text: str, phrases: Mapping[str, str]) -> str:
    """A text with Chinese phrases in English, the longest first, and blanks around the rest."""
    found = re.sub(
        "|".join(sorted(map(re.escape, phrases), key=len, reverse=True)),
        lambda match: f" {phrases[match[0]]} ",
        text,
    )
    return _HAN.sub(r" \1 ", found)
