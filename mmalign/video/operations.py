"""Which operations a clip may get, given what is asked about it, and the draw among them."""

from __future__ import annotations

import re
from collections.abc import Sequence
from typing import TYPE_CHECKING

from mmalign.errors import ConfigError
from mmalign.video.augment import NEEDS_DONOR, NEEDS_SOUND, NEEDS_TIME

if TYPE_CHECKING:
    import numpy as np

_SIDES = re.compile(
    r"\b(left|right(?!\s+(?:answer|option|choice|now|away))|leftmost|rightmost|(left|right)wards?"
    r"|mirror\w*|(counter|anti)?-?clockwise)\b",
    re.IGNORECASE,
)
_COURSE = re.compile(
    r"\b(order|sequence|chronolog\w*|before|after(wards?)?|first|last|next|then|finally|while|when"
    r"|during|until|begin\w*|start\w*|end|ends|ending|earlier|later|previous\w*"
    r"|happen\w*|occur\w*|events?|actions?|activit\w+|doing|process|steps?|how many times"
    r"|mov(e|es|ed|ing|ements?)|motion|direction|forwards?|backwards?|revers\w*|turn(s|ed|ing)?"
    r"|speed\w*|fast(er)?|slow(er|ly)?|chang(e|es|ed|ing)|becom\w+|describ\w+|descriptions?"
    r"|caption\w*|summar\w+)\b",
    re.IGNORECASE,
)
_DOES = re.compile(r"\b(?:does|did|do)\b|[.?!]", re.IGNORECASE)


def allowed(
    operations: Sequence[str],
    prompt_text: str,
    *,
    hints: bool,
    hears: bool,
    num_frames: int,
    donor: bool = True,
) -> list[str]:
    """The operations that can be done to a clip and, with hints, matter to its question.

    Hints look for English words and are only a prior: a clip flipped where nobody asks about sides
    still shows the answer, so it would be a false rejection. Where they would leave nothing, they
    leave everything.

    Args:
        operations: Of the config, in its order.
        prompt_text: What is asked about the clip.
        hints: Whether to leave out operations that the question does not ask about.
        hears: Whether the model hears and the clip has sound.
        num_frames: Frames of the clip.
        donor: Whether another row's clip can be had.

    Returns:
        Those left, in the same order; none where none can be done.
    """
    possible = [
        name
        for name in operations
        if (hears or name not in NEEDS_SOUND)
        and (num_frames > 1 or name not in NEEDS_TIME)
        and (donor or name not in NEEDS_DONOR)
    ]
    if not hints:
        return possible
    hit = [name for name in possible if name not in _ASKED or _ASKED[name](prompt_text)]
    return hit or possible


def _is_of_sides(text: str) -> bool:
    return _SIDES.search(text) is not None


def _is_of_course(text: str) -> bool:
    return _COURSE.search(text) is not None or _asks_what_is_done(text)


def _asks_what_is_done(text: str) -> bool:
    """Whether there is a `do` behind another in one sentence: what does she do?"""
    is_asked = False
    for found in _DOES.finditer(text):
        word = found[0].lower()
        if is_asked and word == "do":
            return True
        is_asked = word.isalpha()
    return False


_ASKED = {"hflip": _is_of_sides, "reverse": _is_of_course, "shuffle": _is_of_course}


def draw(operations: Sequence[str], k: int, rng: np.random.Generator) -> list[str]:
    """k operations in random order; none comes again before all others came.

    Raises:
        ConfigError: There are none to draw from.
    """
    if not operations:
        raise ConfigError(
            "video.corruption.operations: none of them can be done to this clip (it has one frame, "
            "no sound that the model hears, or there is no other row to take from); add one that "
            "changes the picture, such as crop"
        )
    drawn: list[str] = []
    while len(drawn) < k:
        drawn += [operations[int(i)] for i in rng.permutation(len(operations))]
    return drawn[:k]
