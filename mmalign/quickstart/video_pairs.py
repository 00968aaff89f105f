"""Preference pairs about clips, by rule: the true sentence against a false one, and what differs.

Only the word yes or no is marked in answers to yes-or-no questions. With the event marked too, the
pairs are won on events, which the model knows already, and it goes on saying yes.
"""

from __future__ import annotations

import json
from typing import TYPE_CHECKING, Any

import numpy as np

from mmalign.quickstart import clip_questions as questions
from mmalign.quickstart.clips import COLOURS, EVENTS, REVERSED, SHAPES, Scene

if TYPE_CHECKING:
    from pathlib import Path

    from mmalign.quickstart.clip_questions import Asked
    from mmalign.quickstart.clips import Clips

PAIRS = "pairs.jsonl"
PAIRS_A_CLIP = 4


def write(clips: Clips, seed: int) -> Path:
    """Write four records a clip to `pairs.jsonl` beside the clips, as `mmalign train` reads them.

    Args:
        clips: What is asked about; all in one folder.
        seed: Of what is asked, and of what a rejected answer says.
    """
    random = np.random.default_rng(seed)
    lines: list[str] = []
    for path, scene in zip(clips.files, clips.scenes, strict=True):
        for number, pair in enumerate(four_pairs(scene, random)):
            row = {"id": f"{path.stem}-{number}", "video": path.name, **pair}
            lines.append(json.dumps(row) + "\n")
    file = clips.files[0].with_name(PAIRS)
    file.write_text("".join(lines), encoding="utf-8")
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
