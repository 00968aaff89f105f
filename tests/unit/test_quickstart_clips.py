"""Clips that show what they say, questions with true answers, pairs, and how they are marked."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import numpy as np
import pytest
import torch

from mmalign.data.example import Clip
from mmalign.quickstart import clips, video, video_pairs
from mmalign.quickstart.clips import EVENTS, Scene
from mmalign.quickstart.video_pairs import Marks, answer, write_paper

if TYPE_CHECKING:
    from pathlib import Path

pytest.importorskip("av")
pytest.importorskip("torchvision")

SCENE = Scene("bar", "blue", "shrink")


@pytest.fixture(scope="module", autouse=True)
def _one_thread() -> None:
    torch.set_num_threads(1)


@pytest.fixture(scope="module")
def eight(tmp_path_factory: pytest.TempPathFactory) -> clips.Clips:
    return clips.make(tmp_path_factory.mktemp("clips"), 8, seed=4)


@pytest.fixture(scope="module")
def small() -> tuple[Any, Any]:
    """The base that ships, and its processor."""
    from transformers import AutoModelForImageTextToText, AutoProcessor

    model = AutoModelForImageTextToText.from_pretrained(video.BASE)
    return model, AutoProcessor.from_pretrained(video.BASE)


def covered(pixels: clips.Pixels) -> np.ndarray[Any, Any]:
    """Where a frame's shape is, [T, H, W]: pixels of a colour, the background being grey."""
    return np.ptp(pixels.astype(int), axis=-1) > 60


@pytest.mark.parametrize("event", EVENTS)
@pytest.mark.parametrize("shape", clips.SHAPES)
def test_clips_show_their_event(event: str, shape: str) -> None:
    for seed in range(4):
        drawn = clips.draw(Scene(shape, "green", event), np.random.default_rng(seed))
        where = covered(drawn)
        area = where.sum((1, 2))
        if event in ("appear", "vanish"):
            assert (area[0] > 0, area[-1] > 0) == (event == "vanish", event == "appear")
            continue
        y, x = (np.array([np.nonzero(frame)[axis].mean() for frame in where]) for axis in (0, 1))
        change = {"x": x[-1] - x[0], "y": y[-1] - y[0], "area": (area[-1] - area[0]) / area.max()}
        axis, sign = {
            "move left": ("x", -1), "move right": ("x", 1), "move up": ("y", -1),
            "move down": ("y", 1), "grow": ("area", 1), "shrink": ("area", -1),
        }[event]  # fmt: skip
        assert sign * change[axis] > (0.4 if axis == "area" else 7.0)
        still = {"x", "y"} - {axis}
        assert all(abs(change[name]) < 3.0 for name in still)


def test_files_hold_what_was_drawn_and_a_seed_makes_them_again(
    eight: clips.Clips, tmp_path: Path
) -> None:
    assert eight.pixels.shape == (8, 8, 32, 32, 3)
    assert [scene.event for scene in eight.scenes] == list(EVENTS)
    again = clips.make(tmp_path, 8, seed=4)
    assert again.scenes == eight.scenes
    assert [f.read_bytes() for f in again.files] == [f.read_bytes() for f in eight.files]
    drawn = clips.draw(SCENE, np.random.default_rng(0))
    clips.write(tmp_path / "one.mp4", drawn)
    assert np.abs(clips.read(tmp_path / "one.mp4") - drawn.astype(float)).mean() < 8.0


def test_answers_are_true() -> None:
    assert clips.does(SCENE, "shrink").answer == "yes , the blue bar shrinks ."
    assert clips.does(SCENE, "grow").answer == "no , the blue bar shrinks ."
    assert clips.is_it(SCENE, "red").answer == "no , the shape is blue ."
    vanish, left = (Scene("disc", "red", event) for event in ("vanish", "move left"))
    assert clips.sentence(vanish) == "the red disc vanishes ."
    assert clips.sentence(left) == "the red disc moves left ."


@pytest.mark.parametrize(("colour", "told"), [("red", "green"), ("green", "red"), ("blue", "blue")])
def test_pairs_mark_yes_and_no_alone_and_confuse_red_and_green(colour: str, told: str) -> None:
    scene = Scene("bar", colour, "shrink")
    for event, words in (("shrink", ["yes", "no"]), ("grow", ["no", "yes"])):
        pair = video_pairs.pair(scene, event)
        sides = pair["chosen"], pair["rejected"]
        assert sides == tuple(f"{word} , the {told} bar shrinks ." for word in words)
        spans = pair["spans_chosen"][0], pair["spans_rejected"][0]
        assert [text[a:b] for text, (a, b) in zip(sides, spans, strict=True)] == words
        assert pair["prompt"] == f"does the {colour} bar {event} ?"


def test_pairs_are_records_that_training_reads(eight: clips.Clips) -> None:
    from mmalign.data import read_records

    file = video_pairs.write(eight.files[0].with_name("pairs.jsonl"), eight, seed=0)
    rows = [record.example for record in read_records(file)]
    assert len(rows) == 16
    assert rows[3] is not None
    assert rows[3].media.videos == (Clip(eight.files[1]),)
    assert rows[3].candidates[0].spans == ((0, len("no")),)


@pytest.mark.runs
def test_base_sees_and_says_yes(
    small: tuple[Any, Any], tmp_path_factory: pytest.TempPathFactory
) -> None:
    """Alignment mends what is said, not what is seen."""
    held_out = clips.make(tmp_path_factory.mktemp("held_out"), 48, seed=5)
    scores = video_pairs.sit(*small, write_paper(held_out, seed=5)).scores
    assert scores["event"].mean() > 0.8
    assert scores["yes"].mean() > 0.9
    assert scores["no"].mean() < 0.2


def test_answers_in_a_batch_are_those_given_alone(
    eight: clips.Clips, small: tuple[Any, Any]
) -> None:
    """Prompts of unequal length are padded; the padding changes nothing."""
    model, processor = small
    asked = [clips.what_happens(eight.scenes[0]), clips.does(eight.scenes[1], "move up")]
    together = answer(model, processor, eight.pixels[:2], asked)
    alone = [answer(model, processor, eight.pixels[i : i + 1], asked[i : i + 1]) for i in (0, 1)]
    assert together == [one for many in alone for one in many]
    assert all(together)


def test_marks_tell_the_word_from_what_follows_it(eight: clips.Clips) -> None:
    paper = write_paper(eight, seed=0)
    true = {kind: tuple(one.answer for one in asked) for kind, asked in paper.asked.items()}
    assert {each.mean() for each in Marks(paper, true).scores.values()} == {1.0}

    says_yes = true | {"no": tuple(a.replace("no ,", "yes ,") for a in true["no"])}
    scores = Marks(paper, says_yes).scores
    assert [scores[name].mean() for name in ("yes_no", "yes", "no", "said")] == [0, 1, 0, 1]

    broken = true | {"yes": (*true["yes"][:-2], "yes , the red disc .", "yes")}
    scores = Marks(paper, broken).scores
    assert scores["yes_no"].mean() == 1.0
    assert scores["said"].tolist() == [1.0] * 6 + [0.5] * 2
    general = true | {"colour": true["shape"]}
    assert Marks(paper, general).scores["general"].mean() == 0.75


def test_held_out_questions_are_about_what_happens_and_what_does_not(eight: clips.Clips) -> None:
    paper = write_paper(eight, seed=1)
    for scene, yes, no in zip(eight.scenes, paper.asked["yes"], paper.asked["no"], strict=True):
        assert scene.event in yes.question
        assert scene.event not in no.question
        assert any(event in no.question for event in EVENTS)
    assert {one.answer.split()[0] for one in paper.asked["static"]} == {"no"}  # the next are yes
