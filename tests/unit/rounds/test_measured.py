"""Numbers of a round: rewards, KL, wins, from rows that one can count by hand."""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

import pytest

from mmalign.errors import DataError
from mmalign.judging.rule import Rule
from mmalign.judging.score import score_file
from mmalign.rounds import measure


def write(path: Path, *lines: dict[str, Any]) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("".join(json.dumps(line) + "\n" for line in lines))
    return path


def said(name: str, *texts: str, **about: Any) -> dict[str, Any]:
    made = {"seed": 1, "cut": False, "logp": None, "tokens": 3, "from": "policy", **about}
    return {"id": name, "prompt": "Hi", "responses": list(texts), "about": [made for _ in texts]}


def test_responses_to_the_same_prompts_stand_in_one_row(tmp_path: Path) -> None:
    own = write(tmp_path / "own.jsonl", said("a", "x"), said("b", "y"))
    base = write(tmp_path / "base" / "own.jsonl", said("b", "w"), said("a", "v"))
    measure.join(own, [("base", base)], tmp_path / "both.jsonl")
    lines = [json.loads(line) for line in (tmp_path / "both.jsonl").read_text().splitlines()]
    assert [line["responses"] for line in lines] == [["x", "v"], ["y", "w"]]
    assert [[one["from"] for one in line["about"]] for line in lines] == [["policy", "base"]] * 2
    lost = write(tmp_path / "lost.jsonl", said("a", "v"))
    with pytest.raises(DataError, match=r"lost.jsonl: has no responses to b"):
        measure.join(own, [("base", lost)], tmp_path / "both.jsonl")


def test_images_come_along(tmp_path: Path) -> None:
    for name in ("own", "base"):
        (tmp_path / name).mkdir()
        (tmp_path / name / "a.png").write_bytes(name.encode())
        line = {"id": "a", "prompt": "Hi", "images": ["a.png"], "about": [{"seed": 1}]}
        write(tmp_path / name / "r.jsonl", line)
    out = tmp_path / "own" / "both.jsonl"
    measure.join(tmp_path / "own" / "r.jsonl", [("base", tmp_path / "base" / "r.jsonl")], out)
    first, second = json.loads(out.read_text())["images"]
    assert (out.parent / first).read_bytes() == b"own"
    assert (out.parent / second).read_bytes() == b"base"


def judged(name: str, scores: list[float | None], **more: Any) -> dict[str, Any]:
    froms = ["policy", "previous", "base"][: len(scores)]
    about = [{"from": one, "tokens": 4, "cut": name == "c"} for one in froms]
    texts = [f"{one} of {name}" for one in froms]
    rewards = {"rule": scores}
    line = {"id": name, "prompt": "Hi", "responses": texts, "about": about, "rewards": rewards}
    return {**line, "scores": scores, **more}


def test_rows_and_means(tmp_path: Path) -> None:
    file = write(
        tmp_path / "judged.jsonl",
        judged("a", [1.0, 0.5, 0.0]),
        judged("b", [0.5, 0.5, 0.0]),
        judged("c", [0.0, 0.5, 1.0]),
        judged("d", [None, 0.5, 0.0]),
    )
    rows = measure.rows_of(file, {"a": (2.0, 4), "b": (1.0, 4), "c": (3.0, 8)})
    assert rows[0]["policy"] == "policy of a"
    found = measure.summary(rows, "nats")
    assert found["reward"]["mean"] == pytest.approx(0.5)
    assert found["lost"] == found["cut"] == 0.25
    assert found["kl"]["mean"] == pytest.approx(2.0)
    assert found["kl_per_token"]["mean"] == pytest.approx(6 / 16)
    assert found["length"]["mean"] == 4
    over = found["over_previous"]
    assert [over[k] for k in ("wins", "losses", "ties")] == pytest.approx([1 / 3] * 3)
    assert found["over_base"]["difference"] == pytest.approx((1.0 + 0.5 - 1.0) / 3)
    assert all(map(math.isfinite, over["interval"]))


def test_images_have_no_kl(tmp_path: Path) -> None:
    rows = measure.rows_of(write(tmp_path / "j.jsonl", judged("a", [1.0, 0.0])), {"a": (0.1, 1)})
    found = measure.summary(rows, "errors")
    assert "kl" not in found
    assert found["log_ratio"]["mean"] == pytest.approx(0.1)


def test_a_judge_of_pairs_gives_win_rates_in_place_of_rewards(tmp_path: Path) -> None:
    wins = [[0.5, 0.7, 0.9], [0.3, 0.5, 0.6], [0.1, 0.4, 0.5]]
    line = judged("a", [0.8, 0.4, 0.2], wins=wins) | {"rewards": {}}
    rows = measure.rows_of(write(tmp_path / "j.jsonl", line), {"a": (1.0, 2)})
    found = measure.summary(rows, "nats")
    assert found["reward"]["mean"] == pytest.approx(0.9)  # over the base
    assert found["over_previous"]["wins"] == 1.0
    assert found["over_base"]["difference"] == pytest.approx(0.8)


def test_real_verdicts_of_a_judge_that_compares(tmp_path: Path) -> None:
    """Its win rates are shared out among whoever stands in a row, and so are no reward."""
    (tmp_path / "pair_rules.py").write_text(
        "def longer(response, other):\n    a, b = len(response), len(other)\n"
        "    return 0.5 if a == b else float(a > b)\n"
    )
    judge = Rule("pair_rules:longer", tmp_path)
    rows: list[list[dict[str, Any]]] = []
    for number, lines in enumerate((
        [said("a", "xx"), said("b", "yy"), said("c", " ")],
        [said("a", "xxx", "x", "xx"), said("b", "yy", "yyy", "yy"), said("c", " ", "z", " ")],
    )):  # fmt: skip
        for line in lines:
            names = ["policy", "previous", "base"]
            line["about"] = [a | {"from": n} for a, n in zip(line["about"], names, strict=False)]
        file, out = tmp_path / f"c{number}.jsonl", tmp_path / f"j{number}.jsonl"
        score_file(write(file, *lines), out, judge)
        rows.append(measure.rows_of(out, {}))
    base, found = (measure.summary(own, "nats") for own in rows)
    assert base["reward"]["mean"] == 0.5
    assert [row["policy_reward"] for row in rows[1]] == [1.0, 0.5, None]
    assert found["lost"] == base["lost"] == pytest.approx(1 / 3)
    assert (found["over_previous"]["wins"], found["over_previous"]["losses"]) == (0.5, 0.5)
    assert (found["over_base"]["wins"], found["over_base"]["ties"]) == (0.5, 0.5)


def test_files_made_elsewhere_need_ids_and_no_more(tmp_path: Path) -> None:
    plain = {"id": "a", "prompt": "Hi", "responses": ["x"]}
    own = write(tmp_path / "own.jsonl", plain)
    measure.join(own, [("base", own)], tmp_path / "both.jsonl")
    line = json.loads((tmp_path / "both.jsonl").read_text())
    assert [one["from"] for one in line["about"]] == ["policy", "base"]
    for lines, what in (([plain, plain], "'a' comes twice"), ([{**plain, "id": None}], "no `id`")):
        bad = write(tmp_path / "bad.jsonl", *lines)
        with pytest.raises(DataError, match=what):
            measure.join(own, [("base", bad)], tmp_path / "both.jsonl")


def test_images_of_one_name_stay_apart_and_others_stay_where_they_are(tmp_path: Path) -> None:
    (tmp_path / "key").write_bytes(b"secret")
    for name in ("own", "base/x", "base/y"):
        (tmp_path / name).mkdir(parents=True)
        (tmp_path / name / "0.png").write_bytes(name.encode())

    def line(*paths: str) -> dict[str, Any]:
        return {"id": "a", "prompt": "Hi", "images": list(paths)}

    own = write(tmp_path / "own" / "r.jsonl", line("0.png"))
    base = write(tmp_path / "base" / "r.jsonl", line("x/0.png", "y/0.png"))
    out = own.with_name("both.jsonl")
    measure.join(own, [("base", base)], out)
    found = [(out.parent / path).read_bytes() for path in json.loads(out.read_text())["images"]]
    assert found == [b"own", b"base/x", b"base/y"]
    write(base, line("../key"))
    with pytest.raises(DataError, match="images must stay inside"):
        measure.join(own, [("base", base)], out)
    assert not list(out.parent.rglob("key"))


def test_nothing_judged_is_an_error(tmp_path: Path) -> None:
    rows = measure.rows_of(write(tmp_path / "j.jsonl", judged("a", [None])), {})
    with pytest.raises(DataError, match="no held-out response could be judged"):
        measure.summary(rows, "nats")


def test_what_became_of_the_prompts(tmp_path: Path) -> None:
    file = write(
        tmp_path / "judged.jsonl",
        judged("a", [1.0, 0.0]), judged("b", [1.0, 1.0]), judged("c", [1.0, None]),
        judged("d", [0.0, 1.0]),
    )  # fmt: skip
    pairs = write(tmp_path / "pairs.jsonl", {"prompt": "Hi"}, {"prompt": "Hi"})
    found = measure.made(file, pairs)
    assert found == {"prompts": 4, "pairs": 2, "ties": 0.25, "lost": 0.25, "reward": 5 / 7}
