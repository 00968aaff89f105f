"""Rounds on a real small model: files of each stage, resume, momentum, stop rules, refusals."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import rounds_runs as small

from mmalign.errors import CheckpointError, ConfigError, DataError, MmalignError


def lines(path: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in path.read_text().splitlines()]


@pytest.fixture(scope="module")
def plain(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Two plain rounds; the folder that holds rounds/."""
    folder = tmp_path_factory.mktemp("plain")
    small.run(folder)
    return folder


@pytest.mark.runs
def test_each_stage_is_a_file(plain: Path) -> None:
    folder = plain / "rounds" / "round-02"
    prompts, candidates, judged, pairs = (
        lines(folder / f"{name}.jsonl") for name in ("prompts", "candidates", "judged", "pairs")
    )
    assert len(prompts) == len(candidates) == len(judged) == 12 >= len(pairs) > 0
    first = {line["id"] for line in lines(folder.parent / "round-01" / "prompts.jsonl")}
    assert not first & {line["id"] for line in prompts}
    for line in candidates:
        assert len(line["responses"]) == len(line["about"]) == 4
    scores = {line["id"]: line for line in judged}
    for pair in pairs:
        row = scores[pair["meta"]["source"]]
        of = dict(zip(row["responses"], row["scores"], strict=True))
        assert of[pair["chosen"]] == max(row["scores"]) > of[pair["rejected"]]
        assert pair["meta"]["round"] == 2
    assert (folder / "next").readlink() == Path("run/final")
    stages = json.loads((folder / "done.json").read_text())["stages"]
    assert {
        "prompts.jsonl",
        "candidates.jsonl",
        "judged.jsonl",
        "pairs.jsonl",
        "run/final",
        "next",
    } <= stages.keys()
    start = json.loads((folder / "run" / "inputs.json").read_text())["model"]
    assert str(folder.parent / "round-01" / "next") in json.dumps(
        start
    ) or "round-01" in json.dumps(start)


@pytest.mark.runs
def test_rounds_are_measured_on_the_same_prompts(plain: Path) -> None:
    found = [
        json.loads((plain / "rounds" / f"round-0{n}" / "measured.json").read_text())
        for n in range(3)
    ]
    rows = [lines(plain / "rounds" / f"round-0{n}" / "held_out" / "rows.jsonl") for n in range(3)]
    assert len({tuple(row["id"] for row in part) for part in rows}) == 1
    assert not {"kl", "over_base"} & found[0].keys()
    for number in (1, 2):
        assert found[number]["kl"]["mean"] > 0
        assert found[number]["over_base"].keys() >= {"wins", "interval", "difference_interval"}
        assert [row["base"] for row in rows[number]] == [row["policy"] for row in rows[0]]
    assert [row["previous"] for row in rows[2]] == [row["policy"] for row in rows[1]]
    drawn = {
        line["id"]
        for n in (1, 2)
        for line in lines(plain / "rounds" / f"round-0{n}" / "prompts.jsonl")
    }
    assert not drawn & {row["id"] for row in rows[0]}
    summary = json.loads((plain / "rounds" / "rounds.json").read_text())
    best = max(range(3), key=lambda n: found[n]["reward"]["mean"])
    assert summary["best"] == best
    if best:
        assert (plain / "rounds" / "best").readlink() == Path(f"round-0{best}/next")


@pytest.mark.runs
def test_a_stage_taken_away_is_made_again_to_the_bit(plain: Path, tmp_path: Path) -> None:
    shutil.copytree(plain, tmp_path / "copy", symlinks=True)
    folder = tmp_path / "copy"
    for text in (folder / "rounds").glob("round-*/done.json"):
        text.unlink()  # its inputs are the same, but lie elsewhere
    last = folder / "rounds" / "round-02"
    wanted = small.hashes(folder / "rounds")
    for name in ("candidates.jsonl", "judged.jsonl", "pairs.jsonl"):
        (last / name).unlink()
    shutil.rmtree(last / "run")
    shutil.rmtree(last / "held_out")
    (last / "next").unlink()
    small.run(folder, resume=True)
    assert small.hashes(folder / "rounds") == wanted


@pytest.mark.runs
def test_one_round_more_goes_on_from_the_last(plain: Path, tmp_path: Path) -> None:
    before = small.hashes(plain / "rounds")
    found = small.run(
        plain, resume=True, rounds=small.sections(plain)["rounds"] | {"num": 3}, until=3
    )
    assert [one["round"] for one in found.measured] == [0, 1, 2, 3]
    after = small.hashes(plain / "rounds")
    assert {key: after[key] for key in before} == before
    shutil.rmtree(plain / "rounds" / "round-03")
    small.run(plain, resume=True)


@pytest.mark.runs
@pytest.mark.parametrize("lora", [False, True])
def test_momentum_of_alpha_0_is_plain_to_the_bit(lora: bool, tmp_path: Path) -> None:
    model = {"path": str(small.STORIES)} | ({"lora": {"rank": 4, "alpha": 8}} if lora else {})
    runs: list[dict[str, str]] = []
    for kind, settings in (("none", {}), ("momentum", {"alpha": 0.0})):
        folder = tmp_path / kind
        folder.mkdir()
        rounds = small.sections(folder)["rounds"] | {"between": {"kind": kind, **settings}}
        small.run(folder, model=model, rounds=rounds)
        runs.append(small.hashes(folder / "rounds"))
    assert runs[0] == runs[1]
    assert any("final" in name for name in runs[0])


@pytest.mark.runs
@pytest.mark.parametrize("lora", [False, True])
def test_the_second_round_starts_from_what_momentum_made(lora: bool, tmp_path: Path) -> None:
    model = {"path": str(small.STORIES)} | ({"lora": {"rank": 4, "alpha": 8}} if lora else {})
    between = {"kind": "momentum", "alpha": 0.5}
    found = small.run(
        tmp_path, model=model, rounds=small.sections(tmp_path)["rounds"] | {"between": between}
    )
    folder = tmp_path / "rounds"
    assert not (folder / "round-01" / "next").is_symlink()
    from mmalign.config import load

    derived = load(folder / "round-02" / "run" / "config.yaml")
    start = derived.model.adapter if lora else derived.model.path
    assert Path(str(start)) == folder / "round-01" / "next"
    assert derived.reference.path is None  # the start is the reference
    assert found.measured[2]["kl"]["mean"] > found.measured[1]["kl"]["mean"] > 0


@pytest.mark.runs
def test_the_reference_can_be_the_base_or_a_mixture(tmp_path: Path) -> None:
    from mmalign.config import load

    for name, wanted in (
        ("base", "base"), ("mixture", {"mixture": {"base": 0.25, "previous": 0.75}})
    ):  # fmt: skip
        folder = tmp_path / name
        folder.mkdir()
        small.run(folder, rounds=small.sections(folder)["rounds"] | {"reference": wanted})
        reference = load(folder / "rounds" / "round-02" / "run" / "config.yaml").reference
        if name == "base":
            assert reference.path == str(small.STORIES)
        else:
            weights = [(part.weight, part.path) for part in reference.mixture]
            assert weights == [(0.25, str(small.STORIES)), (0.75, None)]


@pytest.mark.runs
def test_each_round_can_start_from_the_base(tmp_path: Path) -> None:
    from mmalign.config import load

    model = {"path": str(small.STORIES), "lora": {"rank": 4, "alpha": 8}}
    small.run(tmp_path, model=model, rounds=small.sections(tmp_path)["rounds"] | {"start": "base"})
    derived = load(tmp_path / "rounds" / "round-02" / "run" / "config.yaml")
    assert derived.model.adapter is None
    assert derived.reference.path == str(tmp_path / "rounds" / "round-02" / "reference")


@pytest.mark.runs
def test_older_pairs_come_back(tmp_path: Path) -> None:
    from mmalign.config import load

    small.run(tmp_path, rounds=small.sections(tmp_path)["rounds"] | {"replay": 0.25})
    sources = load(tmp_path / "rounds" / "round-02" / "run" / "config.yaml").data.train
    own, old = (len(lines(Path(source.path))) for source in sources)
    assert sources[1].weight == pytest.approx(min(1.0, own / 3 / old))
    rows = json.loads((tmp_path / "rounds" / "round-02" / "run" / "env.json").read_text())
    assert rows["data"]["train_rows"] == own + round(sources[1].weight * old)


@pytest.mark.runs
def test_stop_rules_keep_the_best_round(tmp_path: Path) -> None:
    said: list[str] = []
    from mmalign.rounds import engine

    rounds = small.sections(tmp_path)["rounds"] | {"num": 3, "stop": {"kl": 1e-3}}
    made = small.config(tmp_path, rounds=rounds)
    found = engine.run(made, where=str(tmp_path / "c.yaml"), say=said.append)
    assert len(found.measured) == 2
    assert found.best == 0  # of those within the budget
    assert any("is above rounds.stop.kl 0.001" in line for line in said)
    assert not (tmp_path / "rounds" / "best").exists()


@pytest.mark.runs
def test_a_judge_that_tells_nothing_apart_gives_no_pair(tmp_path: Path) -> None:
    sections = small.sections(tmp_path)
    (tmp_path / "flat_rules.py").write_text("def flat(response):\n    return 1.0\n")
    sections["rounds"]["judge"] = [{"rule": "flat_rules:flat"}]
    with pytest.raises(
        DataError, match=r"no row has a pair.*all rewards are equal \(12 rows\).*temperature"
    ):
        small.run(tmp_path, rounds=sections["rounds"])


@pytest.mark.runs
def test_a_changed_file_or_setting_is_refused_by_name(plain: Path, tmp_path: Path) -> None:
    shutil.copytree(plain, tmp_path / "copy", symlinks=True)
    folder = tmp_path / "copy"
    rounds = small.sections(plain)["rounds"]
    with pytest.raises(DataError, match=r"generate.num 4, and it is 5 now"):
        small.run(
            plain, resume=True, rounds=rounds | {"generate": {"num": 5, "max_new_tokens": 24}}
        )
    with pytest.raises(DataError, match=r"run/final: was made with train.lr 0.0005, and it is"):
        small.run(plain, resume=True, train=small.sections(plain)["train"] | {"lr": 1e-4})
    pairs = plain / "rounds" / "round-01" / "pairs.jsonl"
    text = pairs.read_text()
    pairs.write_text("".join(text.splitlines(keepends=True)[1:]))
    with pytest.raises(DataError, match=r"run/final: was made of another round-01/pairs.jsonl"):
        small.run(plain, resume=True)
    pairs.write_text(text)
    small.run(plain, resume=True)
    assert folder.is_dir()


@pytest.mark.runs
def test_a_refused_config_changes_nothing_of_a_finished_run(tmp_path: Path) -> None:
    small.run(tmp_path, rounds=small.sections(tmp_path)["rounds"] | {"num": 1})
    folder = tmp_path / "rounds"
    measured = folder / "round-01" / "measured.json"

    def state() -> list[Any]:
        texts = [(folder / name).read_text() for name in ("config.yaml", "rounds.json")]
        return [*texts, measured.read_text(), sorted(path.name for path in folder.iterdir())]

    before = state()
    with pytest.raises(DataError, match=r"train.lr"):
        small.run(
            tmp_path,
            resume=True,
            rounds=small.sections(tmp_path)["rounds"] | {"num": 1},
            train=small.sections(tmp_path)["train"] | {"lr": 1e-4},
        )
    assert state() == before
    changed = [{"id": n, "prompt": f"Other {n}"} for n in range(40)]
    (tmp_path / "other.jsonl").write_text("".join(json.dumps(row) + "\n" for row in changed))
    with pytest.raises(DataError, match="another list of"):
        small.run(tmp_path, resume=True, data__train=str(tmp_path / "other.jsonl"))
    assert state() == before


@pytest.mark.runs
def test_a_judge_that_compares_runs_rounds(tmp_path: Path) -> None:
    (tmp_path / "pair_rules.py").write_text(
        "def longer(response, other):\n    a, b = len(response), len(other)\n"
        "    return 0.5 if a == b else float(a > b)\n"
    )
    rounds = small.sections(tmp_path)["rounds"] | {
        "num": 1, "judge": [{"rule": "pair_rules:longer"}],
        "select": {"kind": "win_rate", "cut": "wins"},
    }  # fmt: skip
    base, first = small.run(tmp_path, rounds=rounds).measured
    assert base["reward"]["mean"] == 0.5
    rows = lines(tmp_path / "rounds" / "round-01" / "held_out" / "rows.jsonl")
    lengths = [(len(row["policy"]), len(row["base"])) for row in rows]
    told = [0.5 if a == b else float(a > b) for a, b in lengths]
    assert first["reward"]["mean"] == pytest.approx(sum(told) / len(told))
    assert first["over_base"]["wins"] == pytest.approx(sum(a > b for a, b in lengths) / len(rows))


@pytest.mark.parametrize("way", ["sum", "worst_of", "missing"])
def test_judges_that_cannot_judge_rounds_are_refused_before_anything_is_written(
    way: str, tmp_path: Path
) -> None:
    (tmp_path / "few_rules.py").write_text(
        "def longer(response, other):\n    return float(len(response) > len(other))\n\n\n"
        "def length(response):\n    return len(response)\n"
    )
    both = [{"rule": "few_rules:length"}, {"rule": "few_rules:longer"}]
    judge = {"sum": both, "worst_of": [{"worst_of": both}], "missing": [{"rule": "few_rules:no"}]}
    match = "few_rules:no" if way == "missing" else "few_rules:longer compares responses"
    rounds = small.sections(tmp_path)["rounds"] | {"judge": judge[way]}
    with pytest.raises(MmalignError, match=match):
        small.run(tmp_path, rounds=rounds)
    assert not (tmp_path / "rounds").exists()


IMAGES = {"modality": "diffusion", "objective": {"name": "diffusion_dpo"}}


def test_what_rounds_cannot_do_is_refused_before_anything_is_written(tmp_path: Path) -> None:
    cases: list[tuple[dict[str, Any], type[Exception], str]] = [
        (
            {"reference": {"path": "some/model"}},
            ConfigError,
            "reference.path and reference.mixture",
        ),
        ({"data__eval_fraction": 0.0}, ConfigError, "holds out none"),
        ({"model__adapter": "some/adapter"}, ConfigError, "rounds start from a whole model"),
        ({"objective": {"name": "no_such"}}, ConfigError, "no_such"),
        ({"rounds__between": {"kind": "momentum", "rank": 4}}, ConfigError, "rank is only read"),
        ({"rounds__generate": {"num": 1}}, ValueError, "one response makes no pair"),
        (
            {"reference": {"kind": "lora-off"}, "model__lora": {"rank": 4}},
            ConfigError,
            "from the second round on",
        ),
        (
            {"modality": "video", "video": {"train": [], "clues": {}}, "text": {}},
            ConfigError,
            "no clue aggregator",
        ),
        (
            {**IMAGES, "rounds__stop": {"kl": 1.0}, "rounds__generate": {}},
            ConfigError,
            "rounds.stop.kl is in nats",
        ),
        ({**IMAGES, "rounds__generate": {"max_new_tokens": 9}}, ConfigError, "is for texts"),
    ]
    for changes, kind, message in cases:
        with pytest.raises(kind, match=message):
            small.run(tmp_path, **changes)
        assert not (tmp_path / "rounds").exists()


def test_one_training_refuses_a_config_of_rounds(tmp_path: Path) -> None:
    from mmalign.train.loop import train

    with pytest.raises(ConfigError, match=r"has a section `rounds`.*mmalign rounds CONFIG"):
        train(small.config(tmp_path))


@pytest.mark.runs
def test_a_folder_of_another_run_is_left_alone(plain: Path, tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"holds a run already; go on with --resume"):
        small.run(plain)
    (tmp_path / "rounds").mkdir()
    (tmp_path / "rounds" / "thesis.tex").write_text("x")
    with pytest.raises(
        (ConfigError, CheckpointError), match=r"is not empty \(it holds thesis.tex\)"
    ):
        small.run(tmp_path)


@pytest.mark.runs
def test_the_command_runs_and_writes_a_page(tmp_path: Path) -> None:
    from typer.testing import CliRunner

    from mmalign.cli.app import app
    from mmalign.config import yaml

    file = tmp_path / "rounds.yaml"
    file.write_text(yaml.dump(small.sections(tmp_path)))
    tried = CliRunner().invoke(app, ["rounds", str(file), "--dry-run"])
    assert tried.exit_code == 0, tried.output
    assert "pairs" in tried.output
    assert not (tmp_path / "rounds").exists()
    done = CliRunner().invoke(app, ["rounds", str(file), "--until", "1"])
    assert done.exit_code == 0, done.output
    assert "round 1: reward" in done.output
    again = CliRunner().invoke(app, ["rounds", str(file)])
    assert again.exit_code == 1
    assert "--resume" in again.output
    page = (tmp_path / "rounds" / "report.html").read_text()
    assert "Reward against KL" in page
    assert "1 of 2 rounds so far" in page
