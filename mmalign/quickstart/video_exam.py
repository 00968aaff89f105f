"""The held-out exam: does the model say no where no is true, and does it still know the rest?

Answers are greedy. They are read from one pass over the true answers: a greedy answer is the true
one exactly if every token of it is the most likely after the true ones before it, and its first
word needs the question alone.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np
import torch

from mmalign.quickstart import clip_questions as questions
from mmalign.quickstart.clip_rows import Reader, features, logits
from mmalign.quickstart.clips import COLOURS, REVERSED, others

if TYPE_CHECKING:
    from collections.abc import Mapping

    from numpy.typing import NDArray

    from mmalign.quickstart.clip_questions import Asked
    from mmalign.quickstart.clips import Clips, Scene

NO_QUESTIONS = ("no_reversed", "no_other")
GENERAL = ("colour", "shape", "event", "static")
"""What no yes or no about events is part of: two open questions, the whole sentence, a static one."""

_FIRST_WORD = ("basic", *NO_QUESTIONS, "static")
_AT_ONCE = 200  # rows of a forward pass


@dataclass(frozen=True, slots=True)
class Paper:
    """The questions of an exam: one of each kind a clip.

    Attributes:
        clips: Held out.
        asked: Kind to a question for each clip.
    """

    clips: Clips
    asked: Mapping[str, tuple[Asked, ...]]


@dataclass(frozen=True, slots=True)
class Marks:
    """Which answers were right, [N] for each kind; `event_word` is read from the open question."""

    right: Mapping[str, NDArray[np.bool_]]

    @property
    def pair(self) -> NDArray[np.float64]:
        """Yes and no both right, mean over the two no-questions of a clip, [N]."""
        basic = self.right["basic"]
        return np.mean([basic & self.right[kind] for kind in NO_QUESTIONS], axis=0)

    @property
    def general(self) -> NDArray[np.float64]:
        """Mean of what must not be lost, [N]."""
        return np.mean([self.right[kind] for kind in GENERAL], axis=0)

    def numbers(self) -> dict[str, float]:
        """All shares, between 0 and 1."""
        right = {
            kind: self.right[kind] for kind in ("basic", *NO_QUESTIONS, "event_word", *GENERAL)
        }
        shares = {"pair": self.pair, **right, "general": self.general}
        return {kind: round(float(np.mean(marks)), 4) for kind, marks in shares.items()}

    def errors(self) -> dict[str, float]:
        """Standard error of each number that is a headline, over the clips drawn."""
        several = {"pair": self.pair, "general": self.general}
        return {
            kind: round(float(np.std(marks) / np.sqrt(len(marks))), 4)
            for kind, marks in several.items()
        }


def write_paper(clips: Clips, seed: int) -> Paper:
    """Questions for held-out clips.

    Args:
        clips: Never trained on.
        seed: Of the other event that is asked about, and of static questions, half of them true.
    """
    random = np.random.default_rng(seed)
    asked = [_questions(scene, index, random) for index, scene in enumerate(clips.scenes)]
    return Paper(clips, {kind: tuple(one[kind] for one in asked) for kind in asked[0]})


def sit(model: Any, processor: Any, paper: Paper) -> Marks:
    """Answer every question of a paper, and mark the answers."""
    reader = Reader(processor)
    marks: dict[str, NDArray[np.bool_]] = {}
    model.eval()
    with torch.inference_mode():
        pixels = reader.pixels(paper.clips.pixels).split(_AT_ONCE)
        seen = torch.cat([features(model, part) for part in pixels])
        for kind, asked in paper.asked.items():
            parts = [
                _mark(model, reader, seen[first : first + _AT_ONCE], asked[first : first + _AT_ONCE])
                for first in range(0, len(asked), _AT_ONCE)
            ]
            first_word, event_word, whole = (np.concatenate(p) for p in zip(*parts, strict=True))
            marks[kind] = first_word if kind in _FIRST_WORD else whole
            if kind == "event":
                marks["event_word"] = event_word
    return Marks(marks)


def _questions(scene: Scene, index: int, random: np.random.Generator) -> dict[str, Asked]:
    wrong = [colour for colour in COLOURS if colour != scene.colour]
    colour = scene.colour if index % 2 else str(random.choice(wrong))
    return {
        "basic": questions.does(scene, scene.event),
        "no_reversed": questions.does(scene, REVERSED[scene.event]),
        "no_other": questions.does(scene, str(random.choice(others(scene.event)))),
        "colour": questions.which_colour(scene),
        "shape": questions.which_shape(scene),
        "event": questions.what_happens(scene),
        "static": questions.is_it(scene, colour),
    }


_SUBJECT = 3  # words before the event: the, red, disc


def _mark(
    model: Any, reader: Reader, seen: torch.Tensor, asked: tuple[Asked, ...]
) -> tuple[NDArray[np.bool_], NDArray[np.bool_], NDArray[np.bool_]]:
    """Whether the first word, the word or words of the event, and all of each answer are right."""
    rows = reader.rows(asked)
    found = logits(model, seen, torch.arange(len(asked)), rows).argmax(-1)
    hits = found == rows.targets  # [R, S - 1]
    place = torch.arange(hits.shape[1]) - rows.starts[:, None]  # in the answer, from 0
    event = rows.is_answer & (place >= _SUBJECT)
    return tuple(  # type: ignore[return-value]
        (hits | ~where).all(1).numpy() for where in (place == 0, event, rows.is_answer)
    )
