"""The held-out exam: does the model say no where no is true, and does it still know the rest?"""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property
from typing import TYPE_CHECKING, Any

import numpy as np
import torch

from mmalign.quickstart import clip_questions as questions
from mmalign.quickstart.clip_rows import Reader
from mmalign.quickstart.clips import COLOURS, REVERSED, others

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence

    from numpy.typing import NDArray

    from mmalign.quickstart.clip_questions import Asked
    from mmalign.quickstart.clips import Clips, Pixels, Scene

    Right = NDArray[np.bool_]

NO_QUESTIONS = ("no_reversed", "no_other")
GENERAL = ("colour", "shape", "event", "static")
"""What no yes or no about events is part of: three open questions, and a static one."""

_FIRST_WORD = ("basic", *NO_QUESTIONS, "static")  # kinds whose answer is yes or no
_AT_ONCE = 200  # questions of a batch
_LONGEST = 12  # tokens of an answer; a true one has 10 at most


@dataclass(frozen=True, slots=True)
class Paper:
    """The questions of an exam: one of each kind a clip.

    Attributes:
        clips: Held out.
        asked: Kind to a question for each clip.
    """

    clips: Clips
    asked: Mapping[str, tuple[Asked, ...]]


@dataclass(frozen=True)
class Marks:
    """What a model answered.

    Attributes:
        paper: What it was asked.
        answers: Kind to its answer for each clip.
    """

    paper: Paper
    answers: Mapping[str, tuple[str, ...]]

    @cached_property
    def right(self) -> Mapping[str, Right]:  # [N] each
        """Which answers are right: their first word where yes or no was asked, else all of it."""
        return {
            kind: np.array(
                [
                    _first(told) == _first(one.answer)
                    if kind in _FIRST_WORD
                    else told == one.answer
                    for told, one in zip(answers, self.paper.asked[kind], strict=True)
                ]
            )
            for kind, answers in self.answers.items()
        }

    @property
    def pair(self) -> NDArray[np.float64]:  # [N]
        """Yes and no both right, mean over the two no-questions of a clip."""
        basic = self.right["basic"]
        return np.mean([basic & self.right[kind] for kind in NO_QUESTIONS], axis=0)

    @property
    def general(self) -> NDArray[np.float64]:  # [N]
        """Mean of what must not be lost."""
        return np.mean([self.right[kind] for kind in GENERAL], axis=0)

    def names_event(self, kind: str) -> Right:  # [N]
        """Whether an answer says what really happens, whatever else it says."""
        true = [questions.happens(scene.event) for scene in self.paper.clips.scenes]
        return np.array(
            [
                told.endswith(f" {what} .")
                for told, what in zip(self.answers[kind], true, strict=True)
            ]
        )

    def explanations(self) -> tuple[float, float]:
        """Of what follows yes and no about events: the shares that are true, and sentences."""
        true = [questions.sentence(scene) for scene in self.paper.clips.scenes]
        known = questions.sentences()
        told = [
            (answer.partition(" , ")[2], what)
            for kind in ("basic", *NO_QUESTIONS)
            for answer, what in zip(self.answers[kind], true, strict=True)
        ]
        return (
            sum(said == what for said, what in told) / len(told),
            sum(said in known for said, _ in told) / len(told),
        )

    def numbers(self) -> dict[str, float]:
        """All shares, between 0 and 1."""
        is_true, is_sentence = self.explanations()
        shares = {
            "pair": self.pair,
            **{kind: self.right[kind] for kind in ("basic", *NO_QUESTIONS)},
            "explanation_true": is_true,
            "explanation_whole": is_sentence,
            "event_word": self.names_event("event"),
            **{kind: self.right[kind] for kind in GENERAL},
            "general": self.general,
        }
        return {kind: round(float(np.mean(marks)), 4) for kind, marks in shares.items()}


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
    """Answer every question of a paper, greedily."""
    answers: dict[str, tuple[str, ...]] = {}
    for kind, asked in paper.asked.items():
        told: list[str] = []
        for first in range(0, len(asked), _AT_ONCE):
            part = slice(first, first + _AT_ONCE)
            told += answer(model, processor, paper.clips.pixels[part], asked[part])
        answers[kind] = tuple(told)
    return Marks(paper, answers)


def answer(model: Any, processor: Any, pixels: Pixels, asked: Sequence[Asked]) -> list[str]:
    """What a model says, through the library's own `generate`.

    Args:
        model: Of the library's class.
        processor: Of the model.
        pixels: The clip of each question, [N, 8, 32, 32, 3] uint8.
        asked: The questions, N.
    """
    reader = Reader(processor)
    inputs = processor(
        text=[reader.text(one.question) for one in asked],
        videos=list(pixels),
        padding=True,
        padding_side="left",
        return_tensors="pt",
    )
    with torch.inference_mode():
        output = model.eval().generate(**inputs, max_new_tokens=_LONGEST, do_sample=False)
    told = output[:, inputs["input_ids"].shape[1] :]
    return processor.tokenizer.batch_decode(told, skip_special_tokens=True)


def _questions(scene: Scene, index: int, random: np.random.Generator) -> dict[str, Asked]:
    wrong = [colour for colour in COLOURS if colour != scene.colour]
    colour = scene.colour if index // 8 % 2 else str(random.choice(wrong))  # events come in eights
    return {
        "basic": questions.does(scene, scene.event),
        "no_reversed": questions.does(scene, REVERSED[scene.event]),
        "no_other": questions.does(scene, str(random.choice(others(scene.event)))),
        "event": questions.what_happens(scene),
        "colour": questions.which_colour(scene),
        "shape": questions.which_shape(scene),
        "static": questions.is_it(scene, colour),
    }


def _first(answer: str) -> str:
    return answer.partition(" ")[0]
