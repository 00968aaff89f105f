"""VideoHallucer and VidHalluc on files that can be scored on paper."""

from __future__ import annotations

import math
from pathlib import Path

import pytest
from runs import VIDEOHALLUCER, both, scored, videohallucer_pair, write

from mmalign.bench import find, questions, read_files, score
from mmalign.bench.hallucination import VidHallucSTH, scaled
from mmalign.bench.parsers import word_cosine


def test_videohallucer_by_hand(tmp_path: Path) -> None:
    """obj_rel: pairs 1 of 3, basic 2 of 3, made up 2 of 3. temporal: "Yes or no: yes." is a yes,

    "Yes and no." is nothing: basic right, made up wrong. Answers: yes 4 (1 + 2 + 0 + 1), no 3; 4 of
    each are right. Wrong: pair 2 made up (yes), pair 3 basic (no), pair 4 made up: 1 of 3 says yes.
    """
    found = scored("videohallucer", write(tmp_path / "raw.json", VIDEOHALLUCER))
    expected = {
        "accuracy": (1 / 3 + 0) / 2,
        "basic": (2 / 3 + 1) / 2,
        "hallucination": (2 / 3 + 0) / 2,
        "yes_diff": (4 - 4) / 8,
        "no_diff": (3 - 4) / 8,
        "fp_ratio": 1 / 3,
        "accuracy/obj_rel": 1 / 3,
        "accuracy/temporal": 0,
    }
    assert {name: found.metrics[name] for name in expected} == pytest.approx(expected)
    assert found.sizes["accuracy"] == 4
    assert found.sizes["accuracy/obj_rel"] == 3
    assert found.counts["units"] == 4
    assert found.counts["questions"] == 8


def test_videohallucer_legacy_counts_both_words_on_both_sides(tmp_path: Path) -> None:
    """The pair of both words is right: temporal 1, accuracy (1/3 + 1)/2.

    Published bias. Pairs (yes in basic, no in made up): (1, 1), (1, 0), (0, 1), (1, 1).
    said_yes: 1, 1 + 1, 0, 1 = 4; said_no: 1, 0, 1 + 1, 1 = 4; wrong 2, false positives 1.
    """
    file = write(tmp_path / "raw.json", VIDEOHALLUCER)
    assert both("videohallucer", file, "accuracy") == pytest.approx((1 / 6, 2 / 3))
    assert both("videohallucer", file, "accuracy/temporal") == (0, 1)
    found = scored("videohallucer", file, legacy=True).metrics
    assert (found["yes_diff"], found["no_diff"], found["fp_ratio"]) == (0, 0, 0.5)


def test_videohallucer_without_an_answer_is_wrong_and_reported(tmp_path: Path) -> None:
    pairs = [videohallucer_pair("fact", "yes", None), videohallucer_pair("fact", "yes", "no")]
    found = scored("videohallucer", write(tmp_path / "raw.json", pairs))
    assert found.metrics["accuracy"] == 0.5
    assert found.metrics["basic"] == 1
    assert found.counts["missing"] == 1


def test_videohallucer_files_name_their_category(tmp_path: Path) -> None:
    pair = videohallucer_pair("", None, None)
    del pair["category"]
    asked = questions("videohallucer", write(tmp_path / "object_relation.json", [pair]))
    assert [q.id for q in asked] == ["obj_rel/0/basic", "obj_rel/0/hallucination"]
    assert asked[0].prompt == "Is it so?\nAnswer the question using 'yes' or 'no'."
    assert asked[0].video == "object_relation/videos/v.mp4"
    assert asked[0].pair_id == asked[1].pair_id == "obj_rel/0"


BQA = {
    "k1": [
        {"q": "Does she run?", "a": {"c1": "Yes", "c2": "No"}},
        {"q": "Does she sit?", "a": {"c1": "No", "c2": "Yes"}},
    ],
    "k2": [{"q": "Does he jump?", "a": {"c3": "Yes", "c4": "No"}}],
    "k3": [{"q": "Does it fly?", "a": {"c5": "Yes", "c6": "No"}}],
}
BQA_SAID = {
    "k1": [
        {"q": "", "a": {"c1": "Yes, she does. No doubt.", "c2": "No"}},  # right either way
        {"q": "", "a": {"c1": "No", "c2": "Yes"}},  # right
    ],
    "k2": [{"q": "", "a": {"c3": "Yes he does", "c4": "no."}}],  # right strictly, not legacy
}  # k3 is missing


def test_vidhalluc_bqa_leaves_missing_keys_out_only_in_legacy(tmp_path: Path) -> None:
    """Strict: 3 of 4 questions. Legacy: `Yes he does` is not `Yes`, k3 is left out: 2 of 3."""
    asked, said = write(tmp_path / "gt.json", BQA), write(tmp_path / "preds.json", BQA_SAID)
    assert both("vidhalluc-bqa", said, "accuracy", asked) == pytest.approx((3 / 4, 2 / 3))
    strict = scored("vidhalluc-bqa", said, questions=asked)
    assert strict.counts["missing"] == 2
    assert strict.counts["units"] == 3
    legacy = scored("vidhalluc-bqa", said, questions=asked, legacy=True)
    assert legacy.counts["left_out"] == 2
    assert legacy.sizes["accuracy"] == 3


def test_vidhalluc_bqa_one_missing_clip_makes_the_question_wrong_either_way(
    tmp_path: Path,
) -> None:
    asked = write(tmp_path / "gt.json", {"k": BQA["k2"]})
    said = write(tmp_path / "preds.json", {"k": [{"q": "", "a": {"c3": "Yes"}}]})
    assert both("vidhalluc-bqa", said, "accuracy", asked) == (0, 0)


def mcq(right: str, said: str) -> dict[str, object]:
    choices = dict(zip("ABCD", ("a cat", "a dog", "two cats", "none"), strict=True))
    return {
        "Question": "What is there?",
        "Choices": choices,
        "Correct Answer": right,
        "Model Answer": said,
    }


def test_vidhalluc_mcq_by_hand(tmp_path: Path) -> None:
    """Strict right: 1, 2, 4 of 4 (3 reads none). Legacy: 1 and 4; `AC` is no letter, no option."""
    data = {
        "k1": {"c1": mcq("B", "B"), "c2": mcq("A, C", "AC")},
        "k2": {"c3": mcq("B", "A wolf, I think"), "c4": mcq("D", "There are none.")},
    }
    file = write(tmp_path / "mcq.json", data)
    assert both("vidhalluc-mcq", file, "accuracy") == (3 / 4, 2 / 4)
    found = scored("vidhalluc-mcq", file)
    assert found.metrics["right options/several"] == 1
    assert found.counts["unmatched"] == 1


STH = {
    "v1": {"Scene change": "Yes", "Locations": "from a kitchen to a garden."},
    "v2": {"Scene change": "Yes", "Locations": "from a street to a shop."},
    "v3": {"Scene change": "No", "Locations": "None"},
    "v4": {"Scene change": "No", "Locations": "None"},
    "v5": {"Scene change": "Yes", "Locations": "from a beach to a boat."},
}
STH_SAID = {
    "v1": "Scene change: Yes, Locations: from the kitchen to a dark garden.",
    "v2": "Scene change: No, Locations: None",
    "v3": "Scene change: No, Locations: None",
    "v4": "Scene change: Yes, Locations: from a road to a field.",
}  # v5 is missing


def test_vidhalluc_sth_by_hand(tmp_path: Path) -> None:
    """Strict, v5 wrong: tp 1, fn 2, fp 1, tn 1. MCC = (1 - 2) / sqrt(2 * 3 * 2 * 3) = -1/6.

    Places of v1: kitchen and kitchen, 1; garden and dark garden, 1/sqrt(2). desc = their mean.
    Legacy: v5 left out: tp 1, fn 1, fp 1, tn 1, MCC 0; low is 0.5 instead of 0.3.
    """
    asked, said = write(tmp_path / "gt.json", STH), write(tmp_path / "preds.json", STH_SAID)

    def by_hand(mcc: float, low: float) -> float:
        sigmoid = [1 / (1 + math.exp(-x)) for x in (math.sqrt(0.5), low, 1.0)]
        second = (sigmoid[0] - sigmoid[1]) / (sigmoid[2] - sigmoid[1])
        return 0.6 * ((mcc + 1) / 2) ** 2 + 0.4 * (1 + second) / 2

    expected = (by_hand(-1 / 6, 0.3), by_hand(0, 0.5))  # 0.4217, 0.4316
    assert both("vidhalluc-sth", said, "score", asked) == pytest.approx(expected)
    strict = scored("vidhalluc-sth", said, questions=asked)
    assert strict.metrics["mcc"] == pytest.approx(-1 / 6)
    assert strict.sizes["description"] == 1
    assert "not the SimCSE" in strict.notes[0]


def test_vidhalluc_sth_without_a_full_stop_has_no_places_in_legacy(tmp_path: Path) -> None:
    asked = write(tmp_path / "gt.json", {"v1": STH["v1"], "v3": STH["v3"]})
    said = {"v1": "Scene change: Yes, Locations: from a kitchen to a garden", "v3": "No."}
    file = write(tmp_path / "preds.json", said)
    assert both("vidhalluc-sth", file, "description", asked) == (1, 0)


def test_vidhalluc_sth_takes_any_similarity(tmp_path: Path) -> None:
    asked, said = write(tmp_path / "gt.json", STH), write(tmp_path / "preds.json", STH_SAID)
    kind = VidHallucSTH(lambda a, b: 1.0, "ones")
    found = score(kind, read_files(kind, [said], [asked]), num_resamples=10)
    assert found.metrics["description"] == 1
    assert found.notes == ["description: similarity by ones"]


def test_word_cosine_and_its_scale() -> None:
    assert word_cosine("a dark kitchen", "the kitchen") == pytest.approx(1 / math.sqrt(2))
    assert word_cosine("sofa", "couch") == 0
    assert word_cosine("", "couch") == 0
    assert (scaled(0.3, 0.3), scaled(1.0, 0.3), scaled(0.4, 0.5)) == (0, 1, 0)


def test_vidhalluc_tsh_by_hand(tmp_path: Path) -> None:
    """Strict: 3 of 4. Legacy: `BA.` is not read, and `B ... after A` is read as BA: 1 of 4."""
    said = {
        "1": ("AB", "Action A happens before Action B."),
        "2": ("BA", "BA."),
        "3": ("AB", "Action B happens after Action A"),
        "4": ("BA", "AB"),
    }
    data = {
        key: {"video": f"v{key}", "Question": "?", "Correct Answer": right, "Model Answer": text}
        for key, (right, text) in said.items()
    }
    assert both("vidhalluc-tsh", write(tmp_path / "t.json", data), "accuracy") == (3 / 4, 1 / 4)


def test_prompts_of_vidhalluc_end_as_published(tmp_path: Path) -> None:
    bqa = questions("vidhalluc-bqa", write(tmp_path / "bqa.json", BQA))
    assert bqa[0].prompt == "Does she run? Only answer with a single word 'Yes' or 'No'."
    assert (bqa[0].id, bqa[0].pair_id, bqa[0].video) == ("k1/0/c1", "k1/0", "c1.mp4")
    one = questions("vidhalluc-mcq", write(tmp_path / "mcq.json", {"k": {"c": mcq("B", "")}}))[0]
    assert one.prompt.endswith("(e.g., ABCD)\nChoices:\nA. a cat\nB. a dog\nC. two cats\nD. none\n")
    assert (
        "Scene change: Yes, Locations"
        in questions("vidhalluc-sth", write(tmp_path / "sth.json", STH))[0].prompt
    )
    assert find("vidhalluc-bqa").unit_of(bqa[0].answered("vidhalluc-bqa", "")) == "k1"
