"""The video demonstration's base, pairs and exam.

Trained to say yes, asked to say no where no is true.
"""

from __future__ import annotations

import math
import time
from dataclasses import dataclass
from functools import cached_property
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from torch.nn.functional import cross_entropy
from torch.nn.utils import clip_grad_norm_

from mmalign.data.jobs import write_lines
from mmalign.quickstart import clips as questions
from mmalign.quickstart.clips import (
    COLOURS,
    EVENTS,
    REVERSED,
    SHAPES,
    Reader,
    Scene,
    features,
    logits,
    others,
)

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence
    from pathlib import Path

    from numpy.typing import NDArray

    from mmalign.quickstart.clips import Asked, Clips, Pixels


# Preference pairs about clips, by rule: the true sentence against a false one, and what differs.
#
# Only the word yes or no is marked in answers to yes-or-no questions. With the event marked too,
# the pairs are won on events, which the model knows already, and it goes on saying yes.

PAIRS = "pairs.jsonl"
PAIRS_A_CLIP = 4


def write(clips: Clips, seed: int) -> Path:
    """Write four records a clip to `pairs.jsonl` beside the clips, as `mmalign train` reads them.

    Args:
        clips: What is asked about; all in one folder.
        seed: Of what is asked, and of what a rejected answer says.
    """
    random = np.random.default_rng(seed)
    file = clips.files[0].with_name(PAIRS)
    write_lines(
        file,
        (
            {"id": f"{path.stem}-{number}", "video": path.name, **pair}
            for path, scene in zip(clips.files, clips.scenes, strict=True)
            for number, pair in enumerate(four_pairs(scene, random))
        ),
    )
    return file


def four_pairs(scene: Scene, random: np.random.Generator) -> list[dict[str, Any]]:
    """Yes where yes is true, no where no is true, a static yes or no, and something general."""
    other = REVERSED[scene.event]
    if random.random() < 0.5:
        other = _another(EVENTS, scene.event, random)
    true, false = questions.does(scene, scene.event), questions.does(scene, other)
    reverse = questions.sentence(scene, REVERSED[scene.event])
    colour = scene.colour if random.random() < 0.5 else _another(COLOURS, scene.colour, random)
    return [
        _by_first_word(true, f"{questions.NO} , {reverse}"),
        # What the base tends to say.
        _by_first_word(false, f"{questions.YES} , {questions.sentence(scene, other)}"),
        _by_first_word(static := questions.is_it(scene, colour), _swapped(static)),
        _general(scene, random),
    ]


def _by_first_word(asked: Asked, rejected: str) -> dict[str, Any]:
    """A pair whose spans are yes and no alone."""
    return _pair(asked, rejected, *((0, len(a.split()[0])) for a in (asked.answer, rejected)))


def _swapped(asked: Asked) -> str:
    word = questions.NO if asked.first_word == questions.YES else questions.YES
    return word + asked.answer.removeprefix(asked.first_word)


def _general(scene: Scene, random: np.random.Generator) -> dict[str, Any]:
    """Colour, shape or event, against the same sentence with a word that is not true."""
    kind = int(random.integers(3))
    if kind == 0:
        wrong = Scene(scene.shape, _another(COLOURS, scene.colour, random), scene.event)
        ask = questions.which_colour
    elif kind == 1:
        wrong = Scene(_another(SHAPES, scene.shape, random), scene.colour, scene.event)
        ask = questions.which_shape
    else:
        wrong = Scene(scene.shape, scene.colour, _another(EVENTS, scene.event, random))
        ask = questions.what_happens
    asked, rejected = ask(scene), ask(wrong).answer
    return _pair(asked, rejected, *_differing(asked.answer, rejected))


def _pair(
    asked: Asked, rejected: str, chosen_span: tuple[int, int], rejected_span: tuple[int, int]
) -> dict[str, Any]:
    return {
        "prompt": asked.question,
        "chosen": asked.answer,
        "rejected": rejected,
        "spans_chosen": [list(chosen_span)],
        "spans_rejected": [list(rejected_span)],
    }


def _differing(one: str, two: str) -> tuple[tuple[int, int], tuple[int, int]]:
    """Where the words of two sentences differ, without what both begin and end with."""
    words = one.split(), two.split()
    shorter = min(map(len, words))
    front = next(i for i in range(shorter) if words[0][i] != words[1][i])
    back = next(i for i in range(shorter) if words[0][-1 - i] != words[1][-1 - i])
    starts = [sum(len(word) + 1 for word in many[:front]) for many in words]
    ends = [len(text) - sum(len(w) + 1 for w in many[len(many) - back :])
            for text, many in zip((one, two), words, strict=True)]  # fmt: skip
    return (starts[0], ends[0]), (starts[1], ends[1])


def _another(values: Any, value: str, random: np.random.Generator) -> str:
    return str(random.choice([other for other in values if other != value]))


# The base of the video demonstration: fine-tuned from scratch on answers that are mostly "yes".
#
# Of the questions whether something happens, nine in ten are true, as in data derived from
# captions. The model learns to see events, and to say yes whatever it sees.

SHARE_OF_YES = 0.9  # among questions whether an event happens
_CLIPS, _LR, _WARMUP, _LOWEST = 16, 1.5e-3, 50, 0.05  # clips a step, with three questions each
_REPLAN_EVERY = 50  # steps


@dataclass(frozen=True, slots=True)
class Course:
    """How the training went.

    Attributes:
        losses: Mean cross-entropy of the answers' tokens, a step.
        num_skipped: Steps that were left out because the machine was too slow for them.
    """

    losses: tuple[float, ...]
    num_skipped: int


def train(
    model: Any, processor: Any, clips: Clips, seed: int, num_steps: int, max_seconds: float
) -> Course:
    """Teach the model, in place, to answer questions about clips.

    Args:
        model: Fresh.
        processor: Of the model.
        clips: To learn from.
        seed: Of the order of the clips and of what is asked.
        num_steps: As many as there is time for, at most.
        max_seconds: Where the pace does not suffice for all steps, fewer are planned and the
            learning rate falls sooner.
    """
    random = np.random.default_rng(seed)
    reader = Reader(processor)
    pixels = reader.pixels(clips.pixels)
    optimizer = torch.optim.AdamW(
        model.parameters(), lr=_LR, betas=(0.9, 0.98), weight_decay=0.01, fused=True
    )
    order = np.empty(0, np.int64)
    losses: list[float] = []
    planned, began = num_steps, time.perf_counter()
    model.train()
    for step in range(num_steps):
        if step and step % _REPLAN_EVERY == 0:
            planned = _plan(planned, step, time.perf_counter() - began, max_seconds)
        if step >= planned:
            break
        if len(order) < _CLIPS:
            order = np.concatenate([order, random.permutation(len(clips))])
        drawn, order = order[:_CLIPS], order[_CLIPS:]
        asked = [one for i in drawn for one in three_questions(clips.scenes[i], random)]
        rows = reader.rows(asked)
        shown = torch.arange(len(drawn)).repeat_interleave(len(asked) // len(drawn))
        seen = features(model, pixels[torch.from_numpy(drawn)])
        found = logits(model, seen, shown, rows)
        loss = cross_entropy(found[rows.is_answer], rows.targets[rows.is_answer])
        loss.backward()
        for group in optimizer.param_groups:
            group["lr"] = _LR * _pace(step, planned)
        clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
        losses.append(loss.item())
    model.eval()
    return Course(tuple(losses), num_steps - len(losses))


def three_questions(scene: Scene, random: np.random.Generator) -> list[Asked]:
    """What is asked about a clip in one step: always a static yes or no, and two more."""
    wrong = [colour for colour in COLOURS if colour != scene.colour]
    colour = scene.colour if random.random() < 0.5 else str(random.choice(wrong))
    second = questions.which_colour(scene)
    if random.random() < 0.5:
        second = questions.does(scene, _asked_event(scene, random))
    third = questions.what_happens(scene)
    if random.random() >= 0.65:
        third = questions.which_shape(scene)
    return [questions.is_it(scene, colour), second, third]


def _asked_event(scene: Scene, random: np.random.Generator) -> str:
    if random.random() < SHARE_OF_YES:
        return scene.event
    if random.random() < 0.5:
        return REVERSED[scene.event]
    return str(random.choice([event for event in EVENTS if event != scene.event]))


def _plan(planned: int, step: int, seconds: float, max_seconds: float) -> int:
    """Steps that fit into the time at the pace so far, never more than were planned before."""
    return min(planned, max(step + 1, int(step * max_seconds / seconds)))


def _pace(step: int, planned: int) -> float:
    """Share of the learning rate: up linearly, down with the cosine."""
    if step < _WARMUP:
        return (step + 1) / _WARMUP
    done = min(1.0, (step - _WARMUP) / max(1, planned - _WARMUP))
    return _LOWEST + (1.0 - _LOWEST) * 0.5 * (1.0 + math.cos(math.pi * done))


# The held-out exam: does the model say no where no is true, and does it still know the rest?

if TYPE_CHECKING:
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
