"""What is asked about a clip, and the true answer: a sentence in words of a closed list."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

from mmalign.quickstart.clips import COLOURS, EVENTS, SHAPES, Scene

if TYPE_CHECKING:
    from collections.abc import Iterator

YES, NO = "yes", "no"


@dataclass(frozen=True, slots=True)
class Asked:
    """A question about a clip, and what is true of it."""

    question: str
    answer: str

    @property
    def first_word(self) -> str:
        """Yes or no, where it was asked for."""
        return self.answer.split()[0]


def what_happens(scene: Scene) -> Asked:
    """The open question about the event."""
    return Asked("what happens in the video ?", sentence(scene))


def does(scene: Scene, event: str) -> Asked:
    """Whether an event happens; a no says what happens instead."""
    word = YES if event == scene.event else NO
    return Asked(f"does the {scene.colour} {scene.shape} {event} ?", f"{word} , {sentence(scene)}")


def which_colour(scene: Scene) -> Asked:
    """The open question about the colour."""
    return Asked("what colour is the shape ?", f"the shape is {scene.colour} .")


def which_shape(scene: Scene) -> Asked:
    """The open question about the shape."""
    return Asked("what shape is it ?", f"it is a {scene.shape} .")


def is_it(scene: Scene, colour: str) -> Asked:
    """Whether the shape has a colour: yes or no where nothing has to be seen moving."""
    word = YES if colour == scene.colour else NO
    return Asked(f"is the shape {colour} ?", f"{word} , the shape is {scene.colour} .")


def sentence(scene: Scene, event: str | None = None) -> str:
    """What happens, or what would be said to happen."""
    return f"the {scene.colour} {scene.shape} {happens(event or scene.event)} ."


def happens(event: str) -> str:
    """An event as a sentence says it, `moves left` of `move left`."""
    verb, *rest = event.split()
    return " ".join([verb + ("es" if verb.endswith("sh") else "s"), *rest])


def sentences() -> frozenset[str]:
    """All that can be said to happen."""
    return frozenset(
        sentence(Scene(shape, colour, event))
        for colour in COLOURS
        for shape in SHAPES
        for event in EVENTS
    )


def vocabulary() -> list[str]:
    """Every word of every question and answer, in a fixed order."""
    return sorted({word for asked in _all() for word in f"{asked.question} {asked.answer}".split()})


def _all() -> Iterator[Asked]:
    for colour in COLOURS:
        for shape in SHAPES:
            for event in EVENTS:
                scene = Scene(shape, colour, event)
                yield from (what_happens(scene), which_colour(scene), which_shape(scene))
                yield from (does(scene, other) for other in EVENTS)
                yield from (is_it(scene, other) for other in COLOURS)
