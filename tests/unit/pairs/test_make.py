"""Files of pairs: from files of answers and scores, and from a tiny model about real clips."""

from __future__ import annotations

import json
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pytest
import torch
from tiny_video import write_clip
from tiny_video_text import OMNI
from typer.testing import CliRunner

from mmalign import config as configs
from mmalign.cli import app
from mmalign.data.jobs import Source
from mmalign.data.records import read_records
from mmalign.errors import DataError
from mmalign.pairs.answers import Sampled, rows_of

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence

    from mmalign.pairs.answers import Answer, Row

    Models = Callable[[str], Path]

QUESTIONS: list[dict[str, Any]] = [
    {"id": "who", "prompt": "Who throws what?", "response": "The man throws a red ball."},
    {"id": "many", "prompt": "How many dogs are there?", "response": "Two"},
    {
        "id": "ask",
        "prompt": "Does the man sit?",
        "chosen": "Yes, he sits on a chair.",
        "rejected": "Maybe.",
    },
]
ANSWERS: list[dict[str, Any]] = [
    {"id": "who", "answers": ["The man throws a red ball", "the man kicks a red ball.",
                              "The woman throws a RED ball.", "The woman throws a red ball!"]},
    {"id": "many", "answers": ["There are 3 dogs.", "2", "some", "three"]},
    {"id": "ask", "answers": ["No, he stands.", "He does something with some kind of thing."]},
]  # fmt: skip


def write(path: Path, records: Sequence[Any]) -> Path:
    path.write_text("".join(json.dumps(record) + "\n" for record in records), encoding="utf-8")
    return path


def read(path: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]


def run(*arguments: object, code: int = 0) -> str:
    result = CliRunner().invoke(app, ["data", "make", *map(str, arguments)])
    assert result.exit_code == code, result.output
    return result.output


def files(folder: Path) -> list[str | Path]:
    data, answers = write(folder / "qa.jsonl", QUESTIONS), write(folder / "said.jsonl", ANSWERS)
    return ["--data", data, "--answers", answers, "--out", folder / "pairs.jsonl"]


def phrases(pair: dict[str, Any]) -> tuple[list[str], list[str]]:
    sides = ("chosen", "rejected")
    texts = [[pair[side][a:b] for a, b in pair[f"spans_{side}"]] for side in sides]
    return texts[0], texts[1]


def test_wrong_answers_are_kept_with_what_differs(tmp_path: Path) -> None:
    said = run("hallucinate", *files(tmp_path), "--keep", 2)
    who, many, many_2, ask = read(tmp_path / "pairs.jsonl")
    assert [pair["id"] for pair in (who, many, many_2, ask)] == ["who", "many-1", "many-2", "ask"]
    assert who["rejected"] == "The woman throws a RED ball."
    assert phrases(who) == (["man"], ["woman"])
    assert who["meta"] == {
        "recipe": "hallucinate", "source_id": "who", "rule": "contradiction", "likeness": 0.75,
    }  # fmt: skip
    assert {many["rejected"], many_2["rejected"]} == {"There are 3 dogs.", "three"}
    assert ask["chosen"] == "Yes, he sits on a chair."
    assert phrases(ask) == (["Yes"], ["No"])
    assert "4 pairs of 3 records" in said
    # The man kicks: two thirds are the same, so no rule tells. "some" and "something" say nothing.
    assert "2 right, 3 undecided, 5 wrong, 1 said before" in said


def test_what_is_made_is_read_as_pairs_with_spans(tmp_path: Path) -> None:
    run("hallucinate", *files(tmp_path))
    rows = [record.example for record in read_records(tmp_path / "pairs.jsonl")]
    assert all(row is not None and row.kind == "pair" for row in rows)
    assert [row.candidates[1].spans for row in rows if row] == [((4, 9),), ((10, 16),), ((0, 2),)]


def test_an_outside_answer_known_to_be_wrong_is_asked_no_rule(tmp_path: Path) -> None:
    arguments = files(tmp_path)
    rewritten = "The boy throws a red ball."  # no opposite of a man: undecided by rule
    write(tmp_path / "said.jsonl", [
        {"id": "who", "pred": rewritten, "wrong": True}, *ANSWERS[1:]
    ])  # fmt: skip
    run("hallucinate", *arguments)
    pair = read(tmp_path / "pairs.jsonl")[0]
    assert (pair["rejected"], pair["meta"]["rule"]) == (rewritten, "given")


def test_vague_answers_are_paired_with_the_record_s_own(tmp_path: Path) -> None:
    run("ambiguous", *files(tmp_path), "--consistency", 0, "--weigh")
    (pair,) = read(tmp_path / "pairs.jsonl")
    assert pair["chosen"] == QUESTIONS[2]["chosen"]
    assert pair["rejected"] == ANSWERS[2]["answers"][1]
    assert pair["weight"] == pair["ambiguity"]["score"] == 0.9
    assert pair["ambiguity"]["judge"] == "rules"
    assert pair["ambiguity"]["reason"].startswith("words for anything: something, some kind of")


def test_answers_that_disagree_are_vague(tmp_path: Path) -> None:
    arguments = files(tmp_path)
    write(tmp_path / "said.jsonl", [
        *ANSWERS[:2], {"id": "ask", "answers": ["He sings.", "A dog barks.", "It rains."]}
    ])  # fmt: skip
    said = run("ambiguous", *arguments, "--keep", 3)
    pairs = [pair for pair in read(tmp_path / "pairs.jsonl") if pair["meta"]["source_id"] == "ask"]
    assert len(pairs) == 3
    assert all("the answers disagree" in pair["ambiguity"]["reason"] for pair in pairs)
    assert "vague" in said


def test_the_specific_answer_may_be_the_model_s(tmp_path: Path) -> None:
    arguments = files(tmp_path)
    write(tmp_path / "said.jsonl", [
        {"id": "who", "answers": ["The man throws a ball.", "A man throws a ball", "Something."]},
        {"id": "many", "answers": ["It is hard to tell.", "Not sure"]},
        {"id": "ask", "answers": ["Yes."]},
    ])  # fmt: skip
    said = run("ambiguous", *arguments, "--own")
    (pair,) = read(tmp_path / "pairs.jsonl")
    assert (pair["chosen"], pair["rejected"]) == ("The man throws a ball.", "Something.")
    assert "2 records without a specific answer" in said


def test_a_judge_takes_the_place_of_the_rules(tmp_path: Path) -> None:
    judge = write(tmp_path / "judge.jsonl", [
        {"id": "who", "scores": [0.1, 0.2, 0.9, 0.3], "reason": "names nobody"},
        {"id": "many", "answer": "SOME ", "score": 0.8},
        {"id": "ask", "score": 0.2},
    ])  # fmt: skip
    said = run("ambiguous", *files(tmp_path), "--judge", judge, code=1)
    assert "scores 1 of the 4 answers of 'many'" in said
    scores = [{"id": "many", "answer": text, "score": 0.5 + i / 10}
              for i, text in enumerate(ANSWERS[1]["answers"])]  # fmt: skip
    write(judge, [{"id": "who", "scores": [0.1, 0.2, 0.9, 0.3], "reason": "no name"}, *scores])
    said = run("ambiguous", *files(tmp_path), "--judge", judge)
    who, many = read(tmp_path / "pairs.jsonl")
    assert who["rejected"] == "The woman throws a RED ball."
    assert who["ambiguity"] == {"judge": "judge.jsonl", "score": 0.9, "reason": "no name"}
    assert many["rejected"] == "three"
    assert "2 without a score" in said


@pytest.mark.parametrize(
    ("more", "told"),
    [
        (["--num", 2], "leave out CONFIG"),
        (["--change", "reverse"], "--change corrupts videos"),
        (["--out", "x.json"], "must end in .jsonl"),
    ],
)
def test_options_that_would_be_ignored_are_refused(
    more: list[Any], told: str, tmp_path: Path
) -> None:
    assert told in run("hallucinate", *files(tmp_path), *more, code=1)


def test_a_file_is_not_written_over(tmp_path: Path) -> None:
    run("hallucinate", *files(tmp_path))
    assert "already exists" in run("hallucinate", *files(tmp_path), code=1)


@pytest.mark.parametrize(
    ("line", "told"),
    [
        ({"answers": ["a"]}, "has no `id`"),
        ({"id": "who", "answers": [3]}, "must hold text"),
        ({"id": "who"}, "must hold text"),
    ],
)
def test_bad_answers_are_named(line: dict[str, Any], told: str, tmp_path: Path) -> None:
    arguments = files(tmp_path)
    write(tmp_path / "said.jsonl", [line])
    said = run("hallucinate", *arguments, code=1)
    assert f"{tmp_path / 'said.jsonl'}:1" in said
    assert told in said


@pytest.fixture
def work(tmp_path: Path, video_models: Models) -> Path:
    """A folder with two clips, a broken one, questions and the config of a tiny model."""
    torch.set_num_threads(1)
    for seed in range(2):
        write_clip(tmp_path / "clips" / f"{seed}.mp4", seed=seed, frames=8)
    (tmp_path / "clips" / "broken.mp4").write_bytes(b"no clip")
    names = ("0.mp4", "1.mp4", "broken.mp4")
    rows = [{**row, "video": f"clips/{name}"} for row, name in zip(QUESTIONS, names, strict=True)]
    write(tmp_path / "qa.jsonl", rows)
    config = {
        "modality": "video",
        "model": {"path": str(video_models("llava_onevision")), "lora": {"rank": 2}},
        "video": {"num_frames": 4},
        "text": {"masks": {"kind": "spans"}},
        "data": {"train": str(tmp_path / "out" / "pairs.jsonl")},
        "objective": {"name": "rrpo"},
        "sample": {"max_new_tokens": 6, "temperature": 1.0},
        "train": {"num_steps": 1, "batch_size": 2, "num_threads": 1},
        "output": str(tmp_path / "run"),
    }
    (tmp_path / "config.yaml").write_text(json.dumps(config))
    return tmp_path


@pytest.fixture(autouse=True)
def _folder(tmp_path: Path) -> None:
    (tmp_path / "clips").mkdir()
    (tmp_path / "out").mkdir()


@pytest.mark.slow
def test_a_model_s_wrong_answers_become_pairs_that_train(
    work: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Interrupted after a record, run again, compared with an unbroken run; then one step."""
    options = ["--data", work / "qa.jsonl", "--num", 4, "--keep", 2, "--seed", 3]
    whole = run("hallucinate", work / "config.yaml", *options, "--out", work / "whole.jsonl")
    assert "1 records left out, which cannot be asked:" in whole
    assert whole.count("broken.mp4") == 1

    asked: list[str] = []
    plain = Sampled.__call__

    def counted(self: Sampled, row: Row) -> list[Answer] | DataError:
        if len(asked) == 1:
            asked.append("stop")
            raise KeyboardInterrupt
        asked.append(row.id)
        return plain(self, row)

    monkeypatch.setattr(Sampled, "__call__", counted)
    out = work / "parts.jsonl"
    said = run("hallucinate", work / "config.yaml", *options, "--out", out, code=130)
    assert "run it again to go on" in said
    assert not out.exists()
    assert run("hallucinate", work / "config.yaml", *options[:-1], 4, "--out", out, code=1).count(
        "(seed differs)"
    )
    run("hallucinate", work / "config.yaml", *options, "--out", out)
    assert asked == ["who", "stop", "many", "ask"]
    assert out.read_bytes() == (work / "whole.jsonl").read_bytes()
    answers = read(work / "parts.answers.jsonl")
    assert [line["id"] for line in answers] == ["who", "many"]
    assert all(answer["change"]["operation"] == "mask_frames" for answer in answers[0]["answers"])
    assert not out.with_name("parts.jsonl.partial").exists()

    pairs = read(out)
    assert {pair["video"] for pair in pairs} <= {"clips/0.mp4", "clips/1.mp4"}
    assert all(pair["chosen"] in [q.get("response") for q in QUESTIONS] for pair in pairs)
    trained = CliRunner().invoke(app, ["train", str(work / "config.yaml"), f"data.train={out}"])
    assert trained.exit_code == 0, trained.output
    assert (work / "run" / "final").is_dir()


@pytest.mark.runs
def test_a_model_s_answers_are_the_same_in_every_batch(work: Path) -> None:
    row = rows_of(Source(str(work / "qa.jsonl")), work / "out.jsonl")[0][0]
    found: list[list[str]] = []
    for size in (1, 2, 5):
        config = configs.load(work / "config.yaml", [f"train.batch_size={size}"])
        answers = Sampled(config, None, num=5, seed=3)(row)
        assert not isinstance(answers, DataError)
        found.append([answer.text for answer in answers])
    assert found[0] == found[1] == found[2]
    assert len(set(found[0])) > 1


@pytest.mark.parametrize(
    ("recipe", "more", "told"),
    [
        ("ambiguous", ["sample.temperature=0.0"], "would give the same answer 4 times"),
        ("hallucinate", ["--change", "swap_video"], "--change swap_video: must be one of blur"),
        ("hallucinate", ["--out", "out/pairs.jsonl"], "clips/0.mp4 does not lie below"),
        ("hallucinate", ["--checkpoint", "none"], "there is no such folder"),
        ("ambiguous", ["--judge", "none.jsonl"], "give them by --answers"),
    ],
)
def test_what_cannot_be_done_is_told_before_a_model_loads(
    recipe: str, more: list[str], told: str, work: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(work)
    monkeypatch.setattr("mmalign.inference.build_adapter", None)
    start = [recipe, "config.yaml", "--data", "qa.jsonl", "--out", "x.jsonl"]
    assert told in run(*start, *more, code=1)


def test_vague_answers_of_a_model_keep_parts_of_clips_and_clues(
    work: Path, video_models: Models
) -> None:
    """The whole prompt's media are carried over as canonical keys, its clues are read."""
    video = {"path": "clips/0.mp4", "start": 0.25, "frames": [0, 2, 4]}
    rows = [
        {**QUESTIONS[0], "response": "A man with a whistle throws a red ball.",
         "video": video, "audio": "clips/1.mp4", "split": "train",
         "clues": {"video": "a red ball", "audio": "a whistle"}},
    ]  # fmt: skip
    write(work / "qa.jsonl", rows)
    hears = f"model.path={video_models(OMNI)}"
    run("ambiguous", work / "config.yaml", hears, "--data", work / "qa.jsonl",
        "--out", work / "x.jsonl", "--num", 2, "--threshold", 0.3)  # fmt: skip
    (pair,) = read(work / "x.jsonl")
    assert {key: pair[key] for key in ("video", "audio", "split")} == {
        "video": video, "audio": "clips/1.mp4", "split": "train",
    }  # fmt: skip
    assert "names nothing that the audio clue does" in pair["ambiguity"]["reason"]


def test_prompts_alone_are_answered_by_the_model_on_both_sides(tmp_path: Path) -> None:
    asked = write(tmp_path / "asked.jsonl", [{"id": "who", "prompt": "Who throws what?"}])
    said = write(tmp_path / "said.jsonl", [{"id": "who", "answers": ["A man.", "Something"]}])
    start = ["--data", asked, "--answers", said, "--out", tmp_path / "x.jsonl"]
    start += ["--layout", "prompts"]
    assert "1 of 1 records have none" in run("hallucinate", *start, code=1)
    run("ambiguous", *start, "--consistency", 0, "--threshold", 0.4)
    (pair,) = read(tmp_path / "x.jsonl")
    assert (pair["chosen"], pair["rejected"]) == ("A man.", "Something")
