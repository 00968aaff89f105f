"""Benchmarks of lettered options, TempCompass and the audio-visual ones, on paper."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
from runs import both, scored, write

from mmalign.bench import questions

SEQUENCE = ("sits down", "stands up", "runs")


def item(answer: str, said: str | None, **more: Any) -> dict[str, Any]:
    found = {"video": "v.mp4", "question": "What next?", "candidates": list(SEQUENCE)}
    return {**found, "answer": answer, "prediction": said, **more}


def test_tvbench_by_hand_is_micro_with_the_macro_mean_beside_it(tmp_path: Path) -> None:
    """action_sequence strict: 2 of 3; object_count: 0 of 1. Micro 2/4, macro (2/3 + 0)/2.

    Legacy reads "The answer is (B)" as T and leaves out what has no answer: 1 of 2, and 0 of 1.
    """
    first = write(
        tmp_path / "action_sequence.json",
        [
            item("stands up", "The answer is (B)", start=1.5, end=4),
            item("runs", "(C) runs"),
            item("runs", None),
        ],
    )
    second = write(tmp_path / "object_count.json", [item("sits down", "many")])
    strict = scored("tvbench", first, second)
    assert strict.metrics == pytest.approx(
        {
            "accuracy": 2 / 4,
            "macro": 1 / 3,
            "task/action_sequence": 2 / 3,
            "task/object_count": 0,
        }
    )
    assert strict.counts["missing"] == 1
    assert strict.counts["unmatched"] == 1
    legacy = scored("tvbench", first, second, legacy=True)
    assert legacy.metrics["accuracy"] == pytest.approx(1 / 3)
    assert legacy.sizes["task/action_sequence"] == 2


def test_questions_are_asked_as_published(tmp_path: Path) -> None:
    file = write(tmp_path / "action_sequence.json", [item("runs", None, start=1.5, end=4)])
    one = questions("tvbench", file)[0]
    assert one.prompt == (
        "Question: What next?\nOptions:\n(A) sits down\n(B) stands up\n(C) runs\n"
        "Only give the best option."
    )
    assert (one.start, one.end, one.answer, one.options) == (1.5, 4, "C", SEQUENCE)
    assert (one.id, one.video) == ("action_sequence/0", "action_sequence/v.mp4")
    assert questions("mvbench", file)[0].video == "star/Charades_v1_480/v.mp4"


def test_mvbench_by_hand(tmp_path: Path) -> None:
    """Strict: 1, 2 and 4 of 4. Legacy: the first letters are B, I, S and C: 1 and 4."""
    said = ("B.", "I would say it runs", "sure", "c")
    answers = ("stands up", "runs", "runs", "runs")
    items = [item(a, s) for a, s in zip(answers, said, strict=True)]
    file = write(tmp_path / "action_antonym.json", items)
    assert both("mvbench", file, "accuracy") == (3 / 4, 2 / 4)


def test_mlvu_reports_the_mean_over_tasks(tmp_path: Path) -> None:
    """count 1 of 1, order 1 of 3: mean 2/3, while 2 of 4 questions are right."""
    items = [
        item("runs", "C", question_type="count"),
        item("runs", "C", question_type="order"),
        item("runs", "The correct option is A", question_type="order"),
        item("runs", "A", question_type="order"),
    ]
    found = scored("mlvu", write(tmp_path / "all.json", items))
    assert found.headline == "macro"
    assert found.metrics["macro"] == pytest.approx(2 / 3)
    assert found.metrics["accuracy"] == 2 / 4


def test_longvideobench_questions_and_rrpo_answers(tmp_path: Path) -> None:
    """Right, wrong, right strictly alone ("The answer is (A)"), missing: 2 of 4; legacy 1 of 3."""
    asked = [
        {
            "id": f"vid_{i}",
            "video_id": "vid",
            "video_path": "vid.mp4",
            "question": "?",
            "candidates": list(SEQUENCE),
            "correct_choice": 0,
            "duration_group": 15 if i < 2 else 600,
            "question_category": "S2E",
        }
        for i in range(4)
    ]
    said = ("(A)", "B", "The answer is (A)")
    answers = [{"id": f"vid_{i}", "pred": text, "gt": "A"} for i, text in enumerate(said)]
    files = write(tmp_path / "lvb.json", asked), write(tmp_path / "preds.jsonl", answers)
    assert both("longvideobench", files[1], "accuracy", files[0]) == pytest.approx((2 / 4, 1 / 3))
    found = scored("longvideobench", files[1], questions=files[0])
    assert (found.metrics["duration/15"], found.metrics["duration/600"]) == (0.5, 0.5)
    assert found.counts["units"] == 1
    assert scored("longvideobench", files[1]).metrics == {"accuracy": pytest.approx(2 / 3)}
    assert questions("longvideobench", files[0])[0].prompt.endswith(
        "A. sits down\nB. stands up\nC. runs\n"
        "Answer with the option's letter from the given choices directly."
    )


def videomme() -> list[dict[str, Any]]:
    options = ["A. a cat", "B. a dog", "C. a cow", "D. a hen"]
    said = {"short": ("C", "Best answer: C"), "long": ("(A) a cat", "it moos loudly")}
    return [
        {
            "video_id": duration,
            "duration": duration,
            "domain": "Film & Television",
            "sub_category": "Animation",
            "questions": [
                {
                    "question_id": f"{duration}-{i}",
                    "task_type": "Object Recognition",
                    "question": "What is it?",
                    "options": options,
                    "answer": "C",
                    "response": text,
                }
                for i, text in enumerate(texts)
            ],
        }
        for duration, texts in said.items()
    ]


def test_videomme_by_hand(tmp_path: Path) -> None:
    """Strict: 2 of 4, short 2 of 2, long 0 of 2.

    Legacy: "Best answer: C" is read as B; "it moos loudly" has no A to D and is left out: 1 of 3.
    """
    file = write(tmp_path / "responses.json", videomme())
    assert both("videomme", file, "accuracy") == pytest.approx((2 / 4, 1 / 3))
    assert both("videomme", file, "duration/short") == (1, 0.5)
    assert both("videomme", file, "macro") == (0.5, 0.25)
    found = scored("videomme", file, legacy=True)
    tables = [name.partition("/")[0] for name in found.metrics]
    assert tables == ["accuracy", "macro", "duration", "duration", "domain", *tables[5:]]
    assert found.sizes["accuracy"] == 3
    assert found.counts == {
        "questions": 4, "units": 2, "missing": 0, "unmatched": 1, "left_out": 1
    }  # fmt: skip


def test_videomme_flat_rows_ask_the_same(tmp_path: Path) -> None:
    nested = write(tmp_path / "nested.json", videomme())
    flat = [
        {**{k: v for k, v in video.items() if k != "questions"}, **asked, "videoID": "yt"}
        for video in videomme()
        for asked in video["questions"]
    ]
    table = questions("videomme", write(tmp_path / "flat.jsonl", flat))
    assert [q.prompt for q in table] == [q.prompt for q in questions("videomme", nested)]
    assert table[0].video == "yt.mp4"
    assert table[0].prompt == (
        "What is it?\nSelect the best answer to the following multiple-choice question based on "
        "the video. Respond with only the letter (A, B, C, or D) of the correct option.\n"
        "A. a cat\nB. a dog\nC. a cow\nD. a hen\n"
    )


def tempcompass(*pairs: tuple[str, str | None], question: str = "?") -> dict[str, Any]:
    rows = [{"question": question, "answer": a, "prediction": p} for a, p in pairs]
    return {"v1": {"action": rows[:2]}, "v2": {"speed": rows[2:]}}


def test_tempcompass_multi_choice_by_hand(tmp_path: Path) -> None:
    """Strict: 3 answers are read, 2 are right, one is missing. Legacy does not match `(B) up`."""
    asked = "Which way?\nA. down\nB. up"
    data = tempcompass(
        ("B. up", "B"), ("B. up", "(B) up"), ("A. down", "B. up"), ("A. down", None), question=asked
    )
    file = write(tmp_path / "multi-choice.json", data)
    assert both("tempcompass-multi-choice", file, "accuracy") == (2 / 4, 1 / 4)
    assert both("tempcompass-multi-choice", file, "match_rate") == (3 / 4, 2 / 4)
    assert both("tempcompass-multi-choice", file, "dimension/action") == (1, 0.5)


def test_tempcompass_yes_no_by_hand(tmp_path: Path) -> None:
    """`Nothing moves` denies, and begins with no; `It is: yes` is read strictly alone.

    `Yes and no` is strictly nothing and begins with yes.
    """
    data = tempcompass(
        ("yes", "Yes, it does"),
        ("no", "Nothing moves"),
        ("yes", "It is: yes"),
        ("no", "Yes and no"),
    )
    file = write(tmp_path / "yes_no.json", data)
    assert both("tempcompass-yes-no", file, "accuracy") == (3 / 4, 2 / 4)
    assert both("tempcompass-yes-no", file, "dimension/action") == (1, 1)
    assert both("tempcompass-yes-no", file, "match_rate") == (3 / 4, 3 / 4)


def test_tempcompass_caption_matching_by_hand(tmp_path: Path) -> None:
    """Right answers: by mark, by sentence in other words' case, by line. The second is exact in

    neither case nor stop, so that legacy does not match it.
    """
    asked = "Which caption?\nSentence A: The man runs.\nSentence B: The man sits."
    right = "Sentence A: The man runs."
    data = tempcompass(
        (right, "Sentence A"), (right, "the man runs"), (right, right), (right, "B"), question=asked
    )
    file = write(tmp_path / "caption_matching.json", data)
    assert both("tempcompass-caption-matching", file, "accuracy") == (3 / 4, 2 / 4)
    assert both("tempcompass-caption-matching", file, "match_rate") == (1, 3 / 4)
    one = questions("tempcompass-caption-matching", file)[0]
    assert one.prompt == f"{asked}\nPlease directly give the best option:"
    assert one.options == ("The man runs.", "The man sits.")


def test_tempcompass_numbered_options(tmp_path: Path) -> None:
    asked = "Which caption?\nOption 1: The man runs.\nOption 2: The man sits."
    right = "Option 2: The man sits."
    data = tempcompass(
        (right, "2"), (right, "Option 2."), (right, "Option 1"), (right, "1. runs"), question=asked
    )
    file = write(tmp_path / "caption_matching.json", data)
    assert both("tempcompass-caption-matching", file, "accuracy") == (2 / 4, 2 / 4)
    assert both("tempcompass-caption-matching", file, "match_rate") == (1, 3 / 4)


def test_tempcompass_captions_are_rated_by_a_judge_or_by_nobody(tmp_path: Path) -> None:
    data = tempcompass(*[("A. fast", "The man runs.")] * 4)
    data["v1"]["action"][0]["rating"] = 1
    data["v1"]["action"][1]["rating"] = 0
    data["v2"]["speed"][0]["rating"] = -1  # the judge failed
    found = scored("tempcompass-captioning", write(tmp_path / "captioning.json", data))
    assert found.metrics["accuracy"] == 1 / 4
    assert found.metrics["match_rate"] == 2 / 4
    assert found.counts["unmatched"] == 2


def music(kind: str, answer: str, said: str, number: int) -> dict[str, Any]:
    return {
        "video_id": "v1",
        "question_id": number,
        "type": f'["{kind}", "Counting"]',
        "question_content": "How many <Object> are heard?",
        "templ_values": '["cello"]',
        "anser": answer,
        "prediction": said,
    }


def test_music_avqa_by_hand(tmp_path: Path) -> None:
    """Strict: 3 of 4; two answers in one are none. Legacy: `Two` alone is exactly the answer."""
    items = [
        music("Audio", "two", "Two ", 1),
        music("Audio", "two", "There are 2 of them.", 2),
        music("Visual", "more than ten", "more than ten", 3),
        music("Visual", "cello", "a cello or a violin", 4),
    ]
    items[2]["prediction"] = "About 25"
    file = write(tmp_path / "test.json", items)
    assert both("music-avqa", file, "accuracy") == (3 / 4, 1 / 4)
    found = scored("music-avqa", file)
    assert found.metrics["modality/Audio"] == 1
    assert found.metrics["task/Visual Counting"] == 0.5
    assert questions("music-avqa", file)[0].prompt.startswith("How many cello are heard?\n")


def test_avqa_by_hand(tmp_path: Path) -> None:
    """Right: 1 and 3; the fourth says two options. Legacy is the same."""
    said = ("B", "A", "a motorboat", "a motorboat and a train")
    items = [
        {
            "id": i,
            "video_name": "x_000030",
            "question_text": "What is heard?",
            "multi_choice": ["train", "motorboat", "bus", "dog"],
            "answer": 1,
            "question_type": "Happening" if i < 2 else "Which",
            "prediction": text,
        }
        for i, text in enumerate(said)
    ]
    file = write(tmp_path / "val_qa.json", items)
    assert both("avqa", file, "accuracy") == (2 / 4, 2 / 4)
    assert scored("avqa", file).metrics["type/Happening"] == 0.5
