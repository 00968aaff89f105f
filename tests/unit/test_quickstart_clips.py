"""Clips that show what they say, questions with true answers, pairs, and how they are marked."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import numpy as np
import pytest
import torch

from mmalign.data.example import Clip
from mmalign.quickstart import clips, video_pairs
from mmalign.quickstart.clips import EVENTS, REVERSED, Scene
from mmalign.quickstart.video_pairs import Marks, Paper, _plan, answer, three_questions, write_paper

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
    """The model and its processor."""
    from mmalign.quickstart.clips import make_model, make_processor

    processor = make_processor()
    return make_model(processor, 0), processor


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


def test_answers_are_true_and_in_known_words() -> None:
    assert clips.does(SCENE, "shrink").answer == "yes , the blue bar shrinks ."
    assert clips.does(SCENE, "grow").answer == "no , the blue bar shrinks ."
    assert clips.is_it(SCENE, "red").answer == "no , the shape is blue ."
    assert [clips.happens(e) for e in ("move left", "vanish")] == ["moves left", "vanishes"]
    known = set(clips.vocabulary())
    assert {"vanish", "vanishes", "yes", "no", "?"} <= known


def test_nine_in_ten_answers_about_events_are_yes_and_half_of_those_about_colours() -> None:
    random = np.random.default_rng(0)
    asked = [one for _ in range(2000) for one in three_questions(SCENE, random)]
    for start, share in (("does", 0.9), ("is the", 0.5)):
        words = [one.first_word for one in asked if one.question.startswith(start)]
        assert np.mean([word == "yes" for word in words]) == pytest.approx(share, abs=0.03)


def test_pairs_mark_yes_and_no_alone_or_what_differs() -> None:
    random = np.random.default_rng(0)
    kinds: set[str] = set()
    for _ in range(50):
        for number, pair in enumerate(video_pairs.four_pairs(SCENE, random)):
            (a, b), (c, d) = pair["spans_chosen"][0], pair["spans_rejected"][0]
            chosen, rejected = pair["chosen"], pair["rejected"]
            said = chosen[a:b], rejected[c:d]
            if number < 3:
                assert set(said) == {"yes", "no"}
                assert chosen.startswith(said[0])
            else:
                assert chosen[:a] == rejected[:c]
                assert chosen[b:] == rejected[d:]
                assert not set(said[0].split()) & set(said[1].split())
                kinds.add(pair["prompt"])
            if number < 2:
                assert clips.sentence(SCENE) in chosen
                assert clips.sentence(SCENE) not in rejected
    assert len(kinds) == 3


def test_pairs_are_records_that_training_reads(eight: clips.Clips) -> None:
    from mmalign.data import read_records

    read = list(read_records(video_pairs.write(eight, seed=0)))
    rows = [record.example for record in read if record.example is not None]
    assert len(rows) == len(read) == 32
    assert rows[5].media.videos == (Clip(eight.files[1]),)
    chosen = rows[5].candidates[0]
    assert chosen.spans == ((0, len(str(chosen.response).split()[0])),)


def test_base_learns_from_what_the_processor_gives(
    eight: clips.Clips, small: tuple[Any, Any]
) -> None:
    """Rows made here, and features encoded once, against the library's own way."""
    from mmalign.quickstart.clips import Reader, features, logits

    model, processor = small
    reader = Reader(processor)
    asked = [clips.what_happens(eight.scenes[0]), clips.does(eight.scenes[1], "move up")]
    rows = reader.rows(asked)
    with torch.inference_mode():
        found = logits(model, features(model, reader.pixels(eight.pixels)), torch.arange(2), rows)
    for index, one in enumerate(asked):
        text = f"{reader.text(one.question)}{one.answer} <eos>"
        inputs = processor(text=[text], videos=[eight.pixels[index]], return_tensors="pt")
        length = inputs["input_ids"].shape[1]
        assert rows.ids[index, :length].tolist() == inputs["input_ids"][0].tolist()
        assert not rows.attention[index, length:].any()
        answered = processor.tokenizer.decode(rows.targets[index][rows.is_answer[index]])
        assert answered == f"{one.answer} <eos>"
        with torch.inference_mode():
            expected = model(**inputs).logits[0, :-1]
        torch.testing.assert_close(found[index, : length - 1], expected, atol=1e-5, rtol=1e-4)


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


def test_marks_count_first_words_and_whole_sentences(eight: clips.Clips) -> None:
    paper = write_paper(eight, seed=0)
    true = {kind: tuple(one.answer for one in asked) for kind, asked in paper.asked.items()}
    assert set(Marks(paper, true).numbers().values()) == {1.0}
    static = [one.first_word for one in Paper(eight, paper.asked).asked["static"]]
    assert static == ["no"] * 8  # the next eight are yes

    says_yes = {
        kind: tuple(f"yes , {a.partition(' , ')[2]}" for a in answers) if kind != "event" else
        tuple(a.replace("the", "no") for a in answers)
        for kind, answers in true.items()
    }  # fmt: skip
    numbers = Marks(paper, says_yes).numbers()
    expected = {"pair": 0, "basic": 1, "no_reversed": 0, "no_other": 0, "event_word": 1, "event": 0}
    assert {kind: numbers[kind] for kind in expected} == expected
    assert Marks(paper, says_yes).names_event("no_reversed").all()
    assert Marks(paper, says_yes).explanations() == (1.0, 1.0)

    last = true["basic"][:-2]
    wrong = "yes , the red disc grows ."  # the last clips show what appears and what vanishes
    broken = true | {"basic": (*last, wrong, "yes , the the bar .")}
    assert Marks(paper, broken).explanations() == pytest.approx((22 / 24, 23 / 24))

    half = true | {"no_other": says_yes["no_other"]}
    assert Marks(paper, half).numbers()["pair"] == 0.5


def test_held_out_questions_are_about_what_happens_its_reverse_and_neither(
    eight: clips.Clips,
) -> None:
    for scene, basic, reverse, other in zip(
        eight.scenes,
        *(write_paper(eight, seed=1).asked[kind] for kind in ("basic", "no_reversed", "no_other")),
        strict=True,
    ):
        assert scene.event in basic.question
        assert REVERSED[scene.event] in reverse.question
        assert not {scene.event, REVERSED[scene.event]} & {
            event for event in EVENTS if event in other.question
        }


def test_fewer_steps_are_planned_on_a_slow_machine() -> None:
    assert _plan(800, step=50, seconds=5.0, max_seconds=125.0) == 800
    assert _plan(800, step=50, seconds=12.5, max_seconds=125.0) == 500
    assert _plan(500, step=100, seconds=11.0, max_seconds=125.0) == 500, "never more again"
    assert _plan(800, step=300, seconds=150.0, max_seconds=125.0) == 301, "and then it ends"
