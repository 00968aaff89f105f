"""`mmalign bench`: tables of 80 columns, files, and one line for what is wrong."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from runs import VIDEOHALLUCER, videohallucer_pair, write
from typer.testing import CliRunner

from mmalign.bench import BENCHMARKS
from mmalign.cli import app


def run(*arguments: object) -> tuple[int, str, str]:
    result = CliRunner().invoke(app, ["bench", *map(str, arguments)])
    assert isinstance(result.exception, SystemExit | None), repr(result.exception)
    return result.exit_code, result.stdout, result.stderr


def test_list_names_every_benchmark_in_80_columns() -> None:
    code, out, _ = run("list")
    assert code == 0
    assert [block.split()[0] for block in out.strip().split("\n\n")] == list(BENCHMARKS)
    assert max(map(len, out.split("\n"))) <= 80


def test_score_prints_a_table_and_writes_what_was_read(tmp_path: Path) -> None:
    pairs = [*VIDEOHALLUCER, videohallucer_pair("temporal", "I could not tell, I am afraid.", None)]
    file = write(tmp_path / "raw.json", pairs)
    code, out, _ = run("score", file, "--benchmark", "videohallucer", "--out", tmp_path / "o")
    assert code == 0
    assert max(len(line) for line in out.split("\n") if str(tmp_path) not in line) <= 80
    assert "VideoHallucer (strict)" in out
    assert "10 questions; 95 % by resampling 5 pairs" in out
    assert "1 questions have no answer: counted as wrong" in out
    assert "2 answers were not understood: 'Yes and no.', 'I could not tell, I am afraid.'" in out
    assert "what is not understood counts as wrong" in out
    (line,) = [line for line in out.split("\n") if line.startswith("accuracy ")][:1]
    assert line.split()[:2] == ["accuracy", "16.7%"]  # (1/3 + 0/2) / 2
    summary = json.loads((tmp_path / "o" / "score.json").read_text())
    assert summary["metrics"]["accuracy"]["value"] == pytest.approx(1 / 6)
    assert summary["counts"]["missing"] == 1
    rows = [json.loads(line) for line in (tmp_path / "o" / "rows.jsonl").open()]
    assert rows[1]["read"] == "no"
    assert rows[1]["right"] is True


def test_score_as_json_says_how_it_was_read(tmp_path: Path) -> None:
    file = write(tmp_path / "raw.json", VIDEOHALLUCER)
    code, out, _ = run("score", file, "--benchmark", "videohallucer", "--json", "--legacy")
    assert code == 0
    assert json.loads(out)["reading"] == "legacy"
    assert json.loads(out)["metrics"]["accuracy"]["value"] == pytest.approx(2 / 3)


def test_compare_prints_both_runs(tmp_path: Path) -> None:
    a = write(tmp_path / "a.json", VIDEOHALLUCER)
    better = [*VIDEOHALLUCER[:3], videohallucer_pair("temporal", "yes", "no")]
    b = write(tmp_path / "b.json", better)
    code, out, _ = run("compare", a, b, "--benchmark", "videohallucer")
    assert code == 0
    (line,) = [line for line in out.split("\n") if line.startswith("accuracy ")][:1]
    assert line.split()[:4] == ["accuracy", "16.7%", "66.7%", "+50.0%"]
    assert max(len(line) for line in out.split("\n") if str(tmp_path) not in line) <= 80
    code, out, _ = run("compare", a, b, "--benchmark", "videohallucer", "--json")
    assert json.loads(out)["metrics"]["accuracy"]["difference"] == pytest.approx(0.5)
    assert json.loads(out)["only_b_right"] == 1


def test_convert_writes_the_common_format(tmp_path: Path) -> None:
    file, out = write(tmp_path / "raw.json", VIDEOHALLUCER), tmp_path / "common.jsonl"
    code, said, _ = run("convert", file, "--benchmark", "videohallucer", "--out", out)
    assert (code, said) == (0, f"{out}: 8 questions written, 0 without an answer\n")
    first = json.loads(out.read_text().split("\n")[0])
    assert first == {
        "id": "obj_rel/0/basic",
        "benchmark": "videohallucer",
        "task": "obj_rel",
        "prediction": "Yes.",
        "answer": "yes",
        "pair_id": "obj_rel/0",
        "meta": {"video": "object_relation/videos/v.mp4", "side": "basic"},
    }


@pytest.mark.parametrize(
    ("name", "content", "arguments", "message"),
    [
        ("a.json", "{", ("videohallucer",), "a.json: not JSON: "),
        ("a.json", "[]", ("videohallucer",), "a.json: holds no questions"),
        ("a.json", '[{"category": "a\\ud800"}]', ("videohallucer",), "half of a surrogate pair"),
        ("a.json", "[" * 100_000, ("videohallucer",), "a.json: not JSON: nested too deeply"),
        ("a.jsonl", '{"id": 1', ("videohallucer",), "a.jsonl:1: the last line is cut off"),
        ("a.txt.zip", "", ("videohallucer",), "the name ends in .zip"),
        ("a.json", '{"k": 1}', ("videohallucer",), "must hold a list; found an object with ['k']"),
        ("a.json", '[{"x": 1}]', ("vidhalluc-bqa",), "must hold an object; found a list of 1"),
        ("a.json", '[{"category": "x"}]', ("videohallucer",), "a.json:1 basic: must be an object"),
        ("a.json", '[{"video": "v"}]', ("tvbench",), "a.json:1: 'candidates' must be a list"),
        ("a.json", "[{}]", ("tvbnch",), "no such benchmark. Did you mean 'tvbench'?"),
        ("a.json", "[{}]", ("tvbench", "--similarity", "m:f"), "only vidhalluc-sth compares"),
        ("a.json", "[{}]", ("vidhalluc-sth", "--similarity", "no_such:f"), "write it as my_pack"),
        (
            "a.json",
            '[{"id": 1, "benchmark": "mlvu", "prediction": "A", "answer": "A"}]',
            ("tvbench",),
            "the benchmark is 'mlvu', but --benchmark is 'tvbench'",
        ),
        (
            "a.json",
            '[{"video": "v", "question": "?", "candidates": ["x", "y"], "answer": "z"}]',
            ("tvbench",),
            "a.json:1: the answer 'z' is none of the 2 options",
        ),
        (
            "a.json",
            '[{"video": "v", "question": "?", "candidates": ["x", "y"], "answer": "y"}]',
            ("tvbench",),
            "holds no answers of a model",
        ),
    ],
)
def test_what_is_wrong_is_one_line(
    tmp_path: Path, name: str, content: str, arguments: tuple[str, ...], message: str
) -> None:
    file = tmp_path / name
    file.write_text(content)
    benchmark, *more = arguments
    code, out, err = run("score", file, "--benchmark", benchmark, *more)
    assert (code, out) == (1, "")
    assert message in err
    assert err.count("\n") == 1


def test_a_file_that_is_not_there(tmp_path: Path) -> None:
    for name in ("a.json", "a", "folder"):
        (tmp_path / "folder").mkdir(exist_ok=True)
        code, _, err = run("score", tmp_path / name, "--benchmark", "tvbench")
        assert code == 1
        assert err.count("\n") == 1


def test_the_layout_is_named_where_a_file_does_not_fit(tmp_path: Path) -> None:
    file = write(tmp_path / "a.json", [{"video": "v"}])
    _, _, err = run("score", file, "--benchmark", "avqa")
    assert f"avqa reads {BENCHMARKS['avqa'].layout}" in err


def test_ids_that_come_twice_or_from_nowhere_are_refused(tmp_path: Path) -> None:
    row = {"id": "x", "benchmark": "tvbench", "prediction": "A", "answer": "A"}
    twice = write(tmp_path / "twice.jsonl", [row, row])
    _, _, err = run("score", twice, "--benchmark", "tvbench")
    assert "1 ids come twice, the first is 'x'" in err
    asked = [{"video": "v", "question": "?", "candidates": ["x", "y"], "answer": "y"}]
    questions = write(tmp_path / "task.json", asked)
    once = write(tmp_path / "once.jsonl", [row])
    _, _, err = run("score", once, "--benchmark", "tvbench", "--questions", questions)
    assert "1 answers are to none of the questions: 'x'" in err
