"""Held-out clips on the page: the frames the model saw, and what it said before and after."""

from __future__ import annotations

import re
from typing import TYPE_CHECKING

from markupsafe import Markup

from mmalign.quickstart import clip_questions as questions
from mmalign.quickstart.clips import EVENTS, NUM_FRAMES
from mmalign.report import blocks
from mmalign.report.pictures import picture

if TYPE_CHECKING:
    from collections.abc import Mapping
    from pathlib import Path

    from mmalign.quickstart.video_exam import Marks

_ARMS = ("before", "after", "control")
_SHOWN = ("event", "basic", "no_reversed", "no_other")  # kinds of questions
_TABLE = Markup(
    '<div class="scroll"><table><thead><tr><th>question</th>{}</tr></thead>'
    "<tbody>{{}}</tbody></table></div>"
).format(Markup().join(Markup('<th class="text">{}</th>').format(arm) for arm in _ARMS))


def shown_clips(output: Path, marks: Mapping[str, Marks], count: int) -> Markup:
    """For the first clips, the frames, and below them questions and answers."""
    paper = marks["before"].paper
    parts = [
        blocks.paragraph(
            f"The first {min(count, len(paper.clips))} held-out clips, one of each of the "
            f"{len(EVENTS)} events; none was chosen. These are the {NUM_FRAMES} frames of 32 x 32 "
            "pixels that the model gets. Below them one open question and three that ask for yes "
            "or no."
            if count >= len(EVENTS)
            else f"The first {count} held-out clips and the {NUM_FRAMES} frames of each that the "
            "model gets."
        )
    ]
    for index in range(min(count, len(paper.clips))):
        rows: list[Markup] = []
        for kind in _SHOWN:
            asked = paper.asked[kind][index]
            said = [
                _answer(marks[arm].answers[kind][index], right=bool(marks[arm].right[kind][index]))
                for arm in _ARMS
            ]
            rows.append(
                Markup().join([Markup("<tr><th>{}</th>").format(_plain(asked.question)), *said])
            )
        file = output / "shown" / f"{index}.webp"
        _write_frames(paper.clips.files[index], file)
        truth = _plain(questions.sentence(paper.clips.scenes[index]))
        parts.append(
            Markup('<article class="answers">{}{}</article>').format(
                picture(file, f"{paper.clips.files[index].name}: {truth}"),
                _TABLE.format(Markup().join(rows)),
            )
        )
    return Markup().join(parts)


def _write_frames(clip: Path, file: Path) -> None:
    from mmalign.config import VideoConfig
    from mmalign.data.example import Clip
    from mmalign.video import strips
    from mmalign.video.media import read_frames
    from mmalign.video.processing import Shown

    frames = read_frames(Clip(clip), VideoConfig(num_frames=NUM_FRAMES))
    image = strips.sheet(Shown(clips=[(frames, None)], starts=[0.0]))
    assert image is not None
    strips.write(image, file)


def _answer(text: str, *, right: bool) -> Markup:
    """A cell: an answer with a sign in front, so that not colour alone tells right from wrong.

    Where yes or no was said that word alone is coloured: it is what was asked for.
    """
    word = text.partition(" ")[0]
    told, rest = _plain(text), ""
    if word in (questions.YES, questions.NO):
        told, rest = word, told.removeprefix(word)
    sign, name = ("✓", "good") if right else ("✗", "bad")
    shown = Markup('<td class="text"><span class="{}">{} {}</span>{}</td>')
    return shown.format(name, sign, told, rest)


def _plain(text: str) -> str:
    """As people write it; to the model every mark is a word of its own."""
    return re.sub(r" ([.,?])", r"\1", text)
