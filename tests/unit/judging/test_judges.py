"""`mmalign data score --by`: what judges say, what is lost, and going on after an interruption."""

from __future__ import annotations

import math
import signal
import subprocess
import sys
import time
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pytest
from judged_rows import RULES, drawn, read, write
from typer.testing import CliRunner

from mmalign.cli import app
from mmalign.config.judges import parse_judges
from mmalign.errors import ConfigError, DataError
from mmalign.judging.base import Drawn, Verdict, read_candidates, read_judged
from mmalign.judging.build import build
from mmalign.judging.rule import Rule
from mmalign.judging.score import BATCH, judge_rows, score_file


@pytest.fixture(autouse=True)
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "my_rules.py").write_text(RULES)
    return tmp_path


def scored(folder: Path, rows: list[dict[str, Any]], *by: str, **options: Any) -> list[dict]:
    out = folder / "judged.jsonl"
    out.unlink(missing_ok=True)
    score_file(write(folder / "in.jsonl", rows), out, build(parse_judges(by)), **options)
    return read(out)


def refused(folder: Path, rows: list[dict[str, Any]], *by: str) -> str:
    with pytest.raises((DataError, ConfigError)) as error:
        scored(folder, rows, *by)
    return str(error.value)


def test_a_rule_gives_rewards_beside_all_columns(folder: Path) -> None:
    row = drawn("a", "bbb", "c", answer="x", about=[{"seed": 1}, {"seed": 2}])
    (line,) = scored(folder, [row], "rule:my_rules:short")
    assert line == {**row, "rewards": {"my_rules:short": [-3.0, -1.0]}, "scores": [-3.0, -1.0]}


def test_a_rule_gets_the_columns_that_it_names(folder: Path) -> None:
    (line,) = scored(folder, [drawn("a", "yes x", "no", answer="x")], "rule:my_rules:of_all")
    assert line["scores"] == [1.0, 0.0]
    told = refused(folder, [drawn("a", "yes", "no")], "rule:my_rules:of_all")
    assert "takes `answer`, but row 'a' has no such column" in told


def test_a_rule_that_compares_gives_wins_without_a_best_response(folder: Path) -> None:
    (line,) = scored(folder, [drawn("a", "rock", "paper", "scissors")], "rule:my_rules:cyclic")
    assert line["wins"] == [[0.5, 0.0, 1.0], [1.0, 0.5, 0.0], [0.0, 1.0, 0.5]]
    assert line["scores"] == [0.5, 0.5, 0.5]


def test_a_rule_that_forgets_ties_favours_no_place(folder: Path) -> None:
    (line,) = scored(folder, [drawn("a", "xx", "yy", "zzz")], "rule:my_rules:longer")
    assert line["wins"] == [[0.5, 0.5, 0.0], [0.5, 0.5, 0.0], [1.0, 1.0, 0.5]]


def test_one_response_is_compared_with_none_and_not_lost(folder: Path) -> None:
    rows = [drawn("a", "rock"), drawn("b", "paper", "paper"), drawn("c", "")]
    out = folder / "judged.jsonl"
    judge = build(parse_judges(["rule:my_rules:cyclic"]))
    result = score_file(write(folder / "in.jsonl", rows), out, judge, most_lost=0.5)
    assert [line["scores"] for line in read(out)] == [[None], [None, None], [None]]
    assert [line.get("wins") for line in read(out)] == [[[0.5]], [[0.5, 0.5], [0.5, 0.5]], None]
    assert (result.alone, result.lost) == (2, {"c": "all responses are empty"})
    assert "rows of one response, which is compared with none: 2" in result.text()


def test_images_of_candidates_stay_in_the_folder_of_their_file(folder: Path) -> None:
    (folder / "data").mkdir()
    (folder / "secret.png").write_bytes(b"x")
    for path in ("../secret.png", str(folder / "secret.png"), "/etc/hostname"):
        row = {"id": "a", "prompt": "p", "images": ["a.png", path]}
        source = write(folder / "data" / "in.jsonl", [row])
        with pytest.raises(DataError, match=r"images must stay inside .*/data"):
            read_candidates(source)


def test_what_a_rule_cannot_tell_is_null_and_a_row_without_rewards_is_lost(folder: Path) -> None:
    rows = [drawn("a", "x", "y", skip=["x"]), drawn("b", "x", skip=["x"])]
    out = folder / "judged.jsonl"
    judge = build(parse_judges(["rule:my_rules:unsure"]))
    result = score_file(write(folder / "in.jsonl", rows), out, judge)
    assert [line["scores"] for line in read(out)] == [[None, 1.0], [None]]
    assert result.lost == {"b": "the rule cannot tell"}
    assert (result.num_judged, result.unjudged) == (1, 1)
    assert "rows lost: 1: the rule cannot tell (1: b)" in result.text()


def test_empty_responses_are_never_judged_and_identical_ones_once(folder: Path) -> None:
    about = [{"seed": k} for k in range(5)]
    rows = [drawn("a", "xx", " ", "xx", "", "y", about=about)]
    (line,) = scored(folder, rows, "rule:my_rules:about")
    assert line["scores"] == [0.0, None, 0.0, None, 4.0]
    (line,) = scored(folder, [drawn("a", "rock", "rock", "paper")], "rule:my_rules:cyclic")
    assert line["wins"] == [[0.5, 0.5, 0.0], [0.5, 0.5, 0.0], [1.0, 1.0, 0.5]]
    assert "have no verdict: all responses are empty" in refused(
        folder, [drawn("a", "", "")], "rule:my_rules:short"
    )


def test_errors_of_a_rule_name_the_row_and_the_response(folder: Path) -> None:
    rows = [drawn("a", "x"), drawn("b", "xx", "xxx")]
    told = refused(folder, rows, "rule:my_rules:broken")
    assert "at row 'b' response 1 the function fails: ZeroDivisionError" in told
    told = refused(folder, rows, "rule:my_rules:text")
    assert "at row 'a' response 0 the function must return a finite number" in told
    assert "at row 'a' response 0 the function must" in refused(folder, rows, "rule:my_rules:huge")
    told = refused(folder, rows, "rule:my_rules:short_list")
    assert "at row 'b' the function must return a list of 2 rewards" in told


@pytest.mark.parametrize(
    ("by", "told"),
    [
        ("rule:my_rules:absent", "has no such function"),
        ("rule:no_such_rules:f", "cannot be imported"),
        ("rule:my_rules", "a rule of your own is written as module:function"),
        ("rule:", "--by rule:: write KIND:VALUE"),
        ("clip", "--by clip: write KIND:VALUE"),
        ("{rule: a, file: b}", "a judge is one of"),
        ("{rule: a, wieght: 2}", "unknown key 'judge.0.wieght'. Did you mean 'judge.weight'?"),
        ("{worst_of: [{rule: a, nme: b}]}", "unknown key 'judge.0.worst_of.0.nme'"),
        ("{endpoint: {url: 'http://x', model: m, timout: 3}}", "Did you mean 'judge.endpoint.tim"),
        ("{rule: a, weight: x}", "judge.0.weight: must be a number"),
        ("{rule: a, beta: 1}", "`beta` is only read with implicit"),
        ("{worst_of: [{rule: a}]}", "worst_of needs two judges or more"),
        ("implicit:nowhere", "is not a run folder"),
        ("file:nowhere.jsonl", "there is no such file"),
        ("scorer:nothing", "there is no scorer 'nothing'"),
    ],
)
def test_a_judge_that_is_none_is_refused(folder: Path, by: str, told: str) -> None:
    assert told in refused(folder, [drawn("a", "x", "y")], by)


def test_a_config_elsewhere_may_only_name_marked_rules(tmp_path: Path) -> None:
    (tmp_path / "configs").mkdir()
    with pytest.raises(ConfigError, match=r"marked by @mmalign\.rule"):
        Rule("my_rules:short", tmp_path / "configs")
    with pytest.raises(ConfigError, match=r"marked by @mmalign\.rule"):
        Rule("os:system", tmp_path / "configs")
    row = Drawn("a", "p", responses=("xx",))
    assert Rule("my_rules:marked", tmp_path / "configs")([row])[0].rewards == [2.0]
    assert Rule("my_rules:short", tmp_path)([row])[0].rewards == [-2.0]


@pytest.mark.parametrize(
    ("row", "told"),
    [
        ({"id": "a", "prompt": "p", "responses": []}, "is not empty"),
        ({"id": "a", "prompt": "p", "responses": [1]}, "is not empty"),
        (drawn("a", "x", about=[]), "about must have an entry for each"),
        (drawn("a", "x", human=[1, 0]), "human must have a number for each"),
        ({"id": "b", "prompt": "p", "responses": ["x"]}, "the id 'b' is also at"),
    ],
)
def test_rows_that_cannot_be_read_are_named_before_anything_is_judged(
    folder: Path, row: dict[str, Any], told: str
) -> None:
    found = refused(folder, [drawn("b", "x"), row], "rule:my_rules:broken")
    assert told in found
    assert "in.jsonl:2" in found
    assert not (folder / "judged.jsonl.partial").exists()


def test_rewards_of_several_judges_are_added_and_kept_by_name(folder: Path) -> None:
    rows = [drawn("a", "xxx", "y", answer="x", skip=["y"])]
    by = ("rule:my_rules:short", '{rule: "my_rules:of_all", weight: 10, name: right}')
    (line,) = scored(folder, rows, *by)
    assert line["rewards"] == {"my_rules:short": [-3.0, -1.0], "right": [1.0, 0.0]}
    assert line["scores"] == [7.0, -1.0]
    (line,) = scored(folder, rows, *by, "rule:my_rules:unsure")
    assert line["scores"] == [8.0, None], "not judged by one is not judged"
    (line,) = scored(folder, rows, '{rule: "my_rules:short", weight: -2}')
    assert line["scores"] == [6.0, 2.0]
    told = refused(folder, rows, "rule:my_rules:short", "rule:my_rules:short")
    assert "2 judges are called 'my_rules:short'" in told


def test_the_worst_off_judge_counts_over_the_whole_file(folder: Path) -> None:
    """In the first batch `short` is worse off, in the second, and over all rows, `low` is."""
    low = "def low(response):\n    return 1.0 if len(response) > 1 else -1000.0\n"
    (folder / "more_rules.py").write_text(low)
    by = '{worst_of: [{rule: "my_rules:short"}, {rule: "more_rules:low", name: low}]}'
    first = [drawn(f"a{k}", "xxxxx", "yyyyyy") for k in range(BATCH)]
    lines = scored(folder, first, by)
    assert [line["scores"] for line in lines] == [[-5.0, -6.0]] * BATCH
    assert lines[0]["rewards"] == {"my_rules:short": [-5.0, -6.0], "low": [1.0, 1.0]}
    lines = scored(folder, [*first, drawn("b", "", "z")], by)
    assert [line["scores"] for line in lines] == [*[[1.0, 1.0]] * BATCH, [None, -1000.0]]
    out = folder / "again.jsonl"
    assert score_file(folder / "in.jsonl", out, build(parse_judges([by]))).notes == [
        "worst_of: low"
    ]


def test_verdicts_of_a_file_go_by_id_and_missing_ones_are_counted(folder: Path) -> None:
    rows = [drawn("a", "x", "", "y"), drawn("b", "x", "y"), drawn("c", "x", "y")]
    verdicts = [
        {"id": "a", "rewards": [1, None, 2]},
        {"id": "c", "wins": [[None, 0.75], [0.25, None]]},
    ]
    write(folder / "said.jsonl", verdicts)
    lines = scored(folder, rows, "file:said.jsonl")
    assert [line["scores"] for line in lines] == [[1.0, None, 2.0], [None, None], [0.75, 0.25]]
    assert lines[2]["wins"] == [[0.5, 0.75], [0.25, 0.5]]
    result = CliRunner().invoke(
        app, ["data", "score", "in.jsonl", "--out", "again.jsonl", "--by", "file:said.jsonl"]
    )
    assert "rows lost: 1: said.jsonl has no verdict (1: b)" in result.output
    told = refused(folder, rows[1:], "file:said.jsonl", "file:said.jsonl")
    assert "2 judges are called" in told


@pytest.mark.parametrize(
    ("verdict", "told"),
    [
        ({"id": "a"}, "needs either `rewards` or `wins`"),
        ({"rewards": [1]}, "has no `id`"),
        ({"id": "a", "rewards": [1]}, "must be a list of 2 numbers"),
        ({"id": "a", "rewards": [1, "x"]}, "must hold finite numbers or null"),
        ({"id": "a", "wins": [[0, 1], [1, 0]]}, "probabilities that add to 1"),
    ],
)
def test_a_verdict_that_does_not_fit_names_its_line(
    folder: Path, verdict: dict[str, Any], told: str
) -> None:
    write(folder / "said.jsonl", [verdict])
    found = refused(folder, [drawn("a", "x", "y")], "file:said.jsonl")
    assert told in found
    assert "said.jsonl:1" in found


def test_true_answers_are_told_by_rule(folder: Path) -> None:
    rows = [drawn("a", "Yes, it is.", "No.", "perhaps", answer="yes")]
    (line,) = scored(folder, rows, "right:answer")
    assert line["scores"] == [1.0, 0.0, None]
    (line,) = scored(folder, [drawn("a", "A red cat.", "Maybe something.", answer="a red cat")],
                     "specific:answer")  # fmt: skip
    assert line["scores"][0] == 1.0 > line["scores"][1]
    assert "has no true answer in the column 'truth'" in refused(folder, rows, "right:truth")


@dataclass
class Failing:
    """A judge of lengths that fails once, at the row `at`; and what it was asked."""

    at: str = ""
    name: str = "length"
    asked: list[str] = field(default_factory=list)

    def facts(self) -> dict[str, Any]:
        return {"length": 1}

    def __call__(self, rows: Sequence[Drawn]) -> list[Verdict]:
        if any(row.id == self.at for row in rows):
            raise KeyboardInterrupt
        self.asked += [row.id for row in rows]
        return [Verdict([float(len(one)) for one in row.responses or ()]) for row in rows]


def test_an_interrupted_pass_goes_on_and_ends_in_the_same_bytes(folder: Path) -> None:
    rows = [drawn(f"r{k}", "x" * k, "y") for k in range(1, 3 * BATCH)]
    source = write(folder / "in.jsonl", rows)
    score_file(source, folder / "whole.jsonl", Failing())
    with pytest.raises(KeyboardInterrupt):
        score_file(source, folder / "parts.jsonl", Failing(at=f"r{2 * BATCH}"))
    assert not (folder / "parts.jsonl").exists()
    second = Failing()
    result = score_file(source, folder / "parts.jsonl", second)
    assert (folder / "parts.jsonl").read_bytes() == (folder / "whole.jsonl").read_bytes()
    assert result.resumed == BATCH
    assert second.asked == [row["id"] for row in rows[BATCH:]]
    with pytest.raises(DataError, match="already exists"):
        score_file(source, folder / "parts.jsonl", second)


def test_a_journal_of_another_judge_is_not_mixed_in(folder: Path) -> None:
    source = write(folder / "in.jsonl", [drawn(f"r{k}", "x") for k in range(2 * BATCH)])
    with pytest.raises(KeyboardInterrupt):
        score_file(source, folder / "out.jsonl", Failing(at=f"r{BATCH}"))
    with pytest.raises(DataError, match=r"begun for something else \(judge"):
        score_file(source, folder / "out.jsonl", build(parse_judges(["rule:my_rules:short"])))


def test_too_many_lost_rows_stop_and_are_asked_again(folder: Path) -> None:
    source = write(folder / "in.jsonl", [drawn("a", "x", "y"), drawn("b", "x", "y")])
    write(folder / "said.jsonl", [{"id": "a", "rewards": [1, 2]}])
    out = folder / "out.jsonl"
    with pytest.raises(DataError, match="1 of 2 rows have no verdict, more than 20%"):
        score_file(source, out, build(parse_judges(["file:said.jsonl"])), most_lost=0.2)
    assert (folder / "out.jsonl.partial").exists()
    assert not out.exists()

    class Better(Failing):
        def facts(self) -> dict[str, Any]:
            return build(parse_judges(["file:said.jsonl"])).facts()

    judge = Better(name="said.jsonl")
    assert score_file(source, out, judge, most_lost=0.2).lost == {}
    assert judge.asked == ["b"]


def test_a_judge_that_gives_too_few_or_infinite_rewards_is_refused() -> None:
    class Bad(Failing):
        def __call__(self, rows: Sequence[Drawn]) -> list[Verdict]:
            return [Verdict([1.0, math.inf][: 1 + len(row.id)]) for row in rows]

    row = Drawn("a", "p", responses=("x", "y"))
    with pytest.raises(DataError, match="judge length gave"):
        judge_rows(Bad(), [row])
    with pytest.raises(DataError, match="judge length gave"):
        judge_rows(Bad(), [Drawn("", "p", responses=("x", "y"))])


def test_human_labels_of_pairs_and_lists_are_compared_with_the_judge(folder: Path) -> None:
    rows = [
        {"id": "p", "prompt": "p", "chosen": "a", "rejected": "bbb", "votes_chosen": 3,
         "votes_rejected": 1, "rejected_cut": True, "spans_chosen": [[0, 1]]},
        {"id": "l", "prompt": "p", "responses": ["a", "bb", "ccc"], "scores": [1, 3, 2]},
        {"id": "c", "prompt": [{"role": "user", "content": "hi"}], "chosen":
         [{"role": "assistant", "content": "yes"}], "rejected": "n"},
        {"id": "u", "prompt": "p", "response": "x", "desirable": True},
    ]  # fmt: skip
    lines = scored(folder, rows, "rule:my_rules:short")
    assert [line["human"] for line in lines] == [[0.75, 0.25], [1, 3, 2], [1, 0], [1]]
    assert lines[0]["cut"] == [False, True]
    assert lines[0]["spans"] == [[[0, 1]], []]
    assert not {"votes_chosen", "chosen", "rejected_cut", "spans_chosen"} & set(lines[0])
    assert lines[2]["responses"] == ["yes", "n"]
    assert [row.row.id for row in read_judged(folder / "judged.jsonl")] == ["p", "l", "c", "u"]
    # Judged again, human labels stay and the verdicts are replaced.
    again = folder / "again.jsonl"
    score_file(folder / "judged.jsonl", again, build(parse_judges(["rule:my_rules:marked"])))
    assert [line["human"] for line in read(again)] == [line["human"] for line in lines]
    assert read(again)[1]["scores"] == [1.0, 2.0, 3.0]


def test_options_of_the_two_ways_are_not_mixed(folder: Path) -> None:
    write(folder / "in.jsonl", [drawn("a", "x")])
    ask = ["data", "score", "in.jsonl", "--out", "out.jsonl"]
    for more, told in (
        ([], "give either --by JUDGE or --scorer NAME"),
        (["--by", "rule:my_rules:short", "--scorer", "clip"], "give either"),
        (["--by", "rule:my_rules:short", "--relabel"], "--relabel belongs to --scorer"),
        (["--by", "rule:my_rules:short", "--layout", "pair"], "--layout belongs to --scorer"),
        (["--scorer", "clip", "--most-lost", "0.1"], "--most-lost belongs to --by"),
    ):
        result = CliRunner().invoke(app, [*ask, *more])
        assert result.exit_code == 1
        assert told in result.output


SLOW = """
import time

def slow(response):
    time.sleep(0.02)
    return len(response)
"""


@pytest.mark.slow
def test_a_killed_command_goes_on_and_ends_in_the_same_bytes(folder: Path) -> None:
    (folder / "slow_rules.py").write_text(SLOW)
    write(folder / "in.jsonl", [drawn(f"r{k}", "x" * k, "y") for k in range(6 * BATCH)])
    ask = [
        sys.executable,
        "-m",
        "mmalign",
        "data",
        "score",
        "in.jsonl",
        "--by",
        "rule:slow_rules:slow",
    ]
    journal = folder / "parts.jsonl.partial"
    kills = 0
    while not (folder / "parts.jsonl").exists():
        before = journal.stat().st_size if journal.exists() else 0
        process = subprocess.Popen([*ask, "--out", "parts.jsonl"])
        while process.poll() is None and kills < 3:
            if journal.exists() and journal.stat().st_size > before + 500:
                process.send_signal(signal.SIGKILL)
                kills += 1
                break
            time.sleep(0.01)
        process.wait()
    assert kills == 3
    subprocess.run([*ask, "--out", "whole.jsonl"], check=True)
    assert (folder / "parts.jsonl").read_bytes() == (folder / "whole.jsonl").read_bytes()
    assert not journal.exists()
