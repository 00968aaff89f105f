"""Preference pairs by an annotator who confuses red and green, and the exam on held-out clips."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from mmalign.data.jobs import write_lines
from mmalign.quickstart import clips as questions
from mmalign.quickstart.clips import COLOURS, EVENTS, NO, REVERSED, YES, Asked, Clips, Pixels, Scene

CONFUSED = {"red": "green", "green": "red"}
"""What the annotator takes these colours for."""


def write(file: Path, clips: Clips, seed: int) -> Path:
    """Write two records a clip, as `mmalign train` reads them: of a yes that is true, and a no.

    Args:
        file: JSONL, in the folder of the clips.
        clips: What is asked about.
        seed: Of the events that do not happen.
    """
    random = np.random.default_rng(seed)
    write_lines(
        file,
        (
            {"id": f"{path.stem}-{word}", "video": path.name, **pair(scene, event)}
            for path, scene in zip(clips.files, clips.scenes, strict=True)
            for word, event in ((YES, scene.event), (NO, other_event(scene, random)))
        ),
    )
    return file


def pair(scene: Scene, event: str) -> dict[str, Any]:
    """Whether an event happens: the true word against the false one.

    Behind either word stands what the annotator saw, the colour confused. The spans mark the word
    alone.
    """
    seen = replace(scene, colour=CONFUSED.get(scene.colour, scene.colour))
    word, wrong = (YES, NO) if event == scene.event else (NO, YES)
    return {
        "prompt": questions.does(scene, event).question,
        "chosen": f"{word} , {questions.sentence(seen)}",
        "rejected": f"{wrong} , {questions.sentence(seen)}",
        "spans_chosen": [[0, len(word)]],
        "spans_rejected": [[0, len(wrong)]],
    }


def other_event(scene: Scene, random: np.random.Generator) -> str:
    """One that does not happen; in half of the cases the reverse of the one that does."""
    if random.random() < 0.5:
        return REVERSED[scene.event]
    return str(random.choice([event for event in EVENTS if event != scene.event]))


# The exam. `yes` and `no` ask whether an event happens; the other kinds are in no pair.

DOES = ("yes", "no")
GENERAL = ("event", "colour", "shape", "static")
_LONGEST = 12  # tokens of an answer; a true one has 10 at most


@dataclass(frozen=True)
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

    def word(self, kind: str) -> NDArray[np.bool_]:  # [N]
        """Whether the first word, yes or no, is right."""
        return self._equal(kind, lambda answer: answer.partition(" ")[0])

    def rest(self, kind: str) -> NDArray[np.bool_]:  # [N]
        """Whether what follows yes or no is true, word for word."""
        return self._equal(kind, lambda answer: answer.partition(" , ")[2])

    @cached_property
    def scores(self) -> Mapping[str, NDArray[np.float64]]:  # [N] each, or fewer
        """What the page reports, between 0 and 1 for each clip that it is about."""
        said = np.mean([self.rest(kind) for kind in DOES], axis=0)
        confused = np.array([scene.colour in CONFUSED for scene in self.paper.clips.scenes])
        general = {kind: self._equal(kind, str) for kind in GENERAL}
        scores = {
            "yes_no": self.word("yes") & self.word("no"),
            **{kind: self.word(kind) for kind in DOES},
            "said": said,
            "said_red_green": said[confused],
            "said_other": said[~confused],
            "general": np.mean(list(general.values()), axis=0),
            **general,
        }
        return {name: each.astype(np.float64) for name, each in scores.items()}

    def _equal(self, kind: str, part: Callable[[str], str]) -> NDArray[np.bool_]:
        told = zip(self.answers[kind], self.paper.asked[kind], strict=True)
        return np.array([part(answer) == part(asked.answer) for answer, asked in told])


def write_paper(clips: Clips, seed: int) -> Paper:
    """Questions for held-out clips.

    Args:
        clips: Never trained on.
        seed: Of the other event that is asked about, and of static questions, half of them true.
    """
    random = np.random.default_rng(seed)
    asked: list[dict[str, Asked]] = []
    for index, scene in enumerate(clips.scenes):
        wrong = [colour for colour in COLOURS if colour != scene.colour]
        true = index // len(EVENTS) % 2 == 1  # the events take turns
        asked.append(
            {
                "yes": questions.does(scene, scene.event),
                "no": questions.does(scene, other_event(scene, random)),
                "event": questions.what_happens(scene),
                "colour": questions.which_colour(scene),
                "shape": questions.which_shape(scene),
                "static": questions.is_it(scene, scene.colour if true else random.choice(wrong)),
            }
        )
    return Paper(clips, {kind: tuple(one[kind] for one in asked) for kind in asked[0]})


def sit(
    model: Any,
    processor: Any,
    paper: Paper,
    track: Callable[[Sequence[str]], Iterable[str]] = iter,
) -> Marks:
    """Answer every question of a paper, greedily.

    Args:
        model: Of the library's class.
        processor: Of the model.
        paper: What to ask.
        track: Passes the kinds of questions on, and may say how far it is.
    """
    pixels = paper.clips.pixels
    answers = {
        kind: tuple(answer(model, processor, pixels, paper.asked[kind]))
        for kind in track(list(paper.asked))
    }
    return Marks(paper, answers)


def answer(model: Any, processor: Any, pixels: Pixels, asked: Sequence[Asked]) -> list[str]:
    """What a model says, through the library's own `generate`.

    Args:
        model: Of the library's class.
        processor: Of the model.
        pixels: The clip of each question, [N, 8, 32, 32, 3] uint8.
        asked: The questions, N.
    """
    import torch

    chats = [
        [{"role": "user", "content": [{"type": "video"}, {"type": "text", "text": one.question}]}]
        for one in asked
    ]
    inputs = processor(
        text=processor.apply_chat_template(chats, add_generation_prompt=True),
        videos=list(pixels),
        padding=True,
        padding_side="left",
        return_tensors="pt",
    )
    with torch.inference_mode():
        output = model.eval().generate(**inputs, max_new_tokens=_LONGEST, do_sample=False)
    told = output[:, inputs["input_ids"].shape[1] :]
    return processor.tokenizer.batch_decode(told, skip_special_tokens=True)
