"""Words and marks of an answer; words of other languages that steer a reading stand in English.

Only such words are translated: what the options say is compared as it is written.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from typing import NamedTuple

_TOKEN = re.compile(r"\n|[^\W_]+(?:['-][^\W_]+)*|[^\s\w]|_")
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
ENGLISH = {
    word: english
    for line in _FOREIGN.strip().splitlines()
    for english, _, words in [line.partition(": ")]
    for word in words.split()
}


def word_set(text: str) -> frozenset[str]:
    """The words of a line."""
    return frozenset(text.split())


class Token(NamedTuple):
    """A word, a mark or a line's end.

    Attributes:
        text: As it is written.
        word: In lower case and English; empty for a mark.
        start: Its place in the text, and `end`: that of what follows.
    """

    text: str
    word: str
    start: int
    end: int


def tokens(text: str, phrases: Mapping[str, str] | None = None) -> list[Token]:
    """The tokens of a text.

    Args:
        text: Without layout.
        phrases: Chinese phrases and what they stand for in English.
    """
    if phrases and _HAN.search(text):
        text = in_english(text, phrases)
    found: list[Token] = []
    for match in _TOKEN.finditer(text):
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
