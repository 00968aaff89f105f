"""Candidate files: what a line holds, one pass or several, what cannot be answered, the command."""

from __future__ import annotations

import json
import shutil
from typing import TYPE_CHECKING, Any

import pytest
import torch
from tiny import make_model, make_tokenizer, run_config
from typer.testing import CliRunner

from mmalign.cli.app import app
from mmalign.config import GenerateConfig
from mmalign.errors import ConfigError, DataError
from mmalign.rounds import generate as rounds
from mmalign.rounds.generate import Local, generate_file, generator

if TYPE_CHECKING:
    from collections.abc import Iterator
    from pathlib import Path

    from mmalign.data.example import Example
    from mmalign.models.adapter import Generated

TEXTS = ["Two?", "Why is the sky blue?", "Once upon a time", "Two and two", "Explain how bread"]
ROWS = [{"id": f"r{i}", "prompt": text, "answer": i} for i, text in enumerate(TEXTS)]


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    made = tmp_path_factory.mktemp("model")
    torch.manual_seed(0)
    make_model("gpt2").save_pretrained(made)
    make_tokenizer().save_pretrained(made)
    return made


@pytest.fixture(scope="module")
def engine(folder: Path) -> Local:
    return local(folder)


def local(folder: Path, **options: Any) -> Local:
    config = run_config(model={"path": str(folder)})
    made = generator(config, GenerateConfig(max_new_tokens=8, **options))
    assert isinstance(made, Local)
    return made


def lines(path: Path) -> list[dict[str, Any]]:
    return [json.loads(text) for text in path.read_text(encoding="utf-8").splitlines()]


def test_a_line_holds_the_row_and_what_is_known_of_each_response(
    engine: Local, tmp_path: Path
) -> None:
    out = tmp_path / "candidates.jsonl"
    made = generate_file(engine, ROWS, out, num=3, seed=7)
    found = lines(out)
    assert [{k: line[k] for k in ROWS[0]} for line in found] == ROWS
    assert "15 responses to 5 prompts" in made.text()
    about = [one for line in found for one in line["about"]]
    assert len({one["seed"] for one in about}) == 15
    assert all(one["logp"] < 0 and one["from"] == "policy" for one in about)
    assert sum(one["cut"] for one in about) == made.cut > 0
    assert all(one["tokens"] == 8 for one in about if one["cut"])
    assert len({text for line in found for text in line["responses"]}) > 12
    again = tmp_path / "again.jsonl"
    generate_file(engine, ROWS, again, num=3, seed=7)
    assert again.read_bytes() == out.read_bytes()
    generate_file(engine, ROWS[2:], tmp_path / "some.jsonl", num=2, seed=7)
    some = [line["responses"] for line in lines(tmp_path / "some.jsonl")]
    assert some == [line["responses"][:2] for line in found[2:]]
    generate_file(engine, ROWS, tmp_path / "other.jsonl", num=3, seed=8)
    assert [line["responses"] for line in lines(tmp_path / "other.jsonl")] != [
        line["responses"] for line in found
    ]


def test_a_pass_in_pieces_ends_with_the_same_bytes(
    engine: Local, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(rounds, "TOGETHER", 4)  # two rows
    whole, pieces = tmp_path / "whole.jsonl", tmp_path / "pieces.jsonl"
    generate_file(engine, ROWS, whole, num=2, seed=7)

    class Killed(Local):
        left = 3

        def __call__(self, *asked: Any) -> Iterator[list[Generated] | DataError]:
            for found in engine(*asked):
                if not self.left:
                    raise KeyboardInterrupt
                self.left -= 1
                yield found

    with pytest.raises(KeyboardInterrupt):
        generate_file(Killed(engine.config, engine.options), ROWS, pieces, num=2, seed=7)
    assert not pieces.exists()
    told: list[tuple[int, int]] = []
    made = generate_file(
        engine, ROWS, pieces, num=2, seed=7, progress=lambda *now: told.append(now)
    )
    assert (made.resumed, told) == (3, [(3, 5), (1, 5), (1, 5)])
    assert pieces.read_bytes() == whole.read_bytes()
    assert not pieces.with_name("pieces.jsonl.partial").exists()


def test_other_settings_do_not_go_on_with_a_file(
    engine: Local, folder: Path, tmp_path: Path
) -> None:
    out = tmp_path / "candidates.jsonl"

    class Broken(Local):
        def __call__(self, asked: Any, *given: Any) -> Iterator[list[Generated] | DataError]:
            yield from engine(asked[:1], *given)
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        generate_file(Broken(engine.config, engine.options), ROWS, out, num=1, seed=7)
    for changed, given in (
        (engine, {"num": 2, "seed": 7}),
        (engine, {"num": 1, "seed": 8}),
        (local(folder, temperature=0.5), {"num": 1, "seed": 7}),
    ):
        with pytest.raises(DataError, match="was begun for something else"):
            generate_file(changed, ROWS, out, **given)


def test_other_weights_in_the_same_place_do_not_go_on_with_a_file(
    folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(rounds, "TOGETHER", 1)
    shutil.copytree(folder, tmp_path / "model")
    made, out = local(tmp_path / "model"), tmp_path / "candidates.jsonl"

    def stop(done: int, total: int) -> None:
        if done:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        generate_file(made, ROWS, out, num=1, seed=7, progress=stop)
    torch.manual_seed(1)
    make_model("gpt2").save_pretrained(tmp_path / "model")
    with pytest.raises(DataError, match=r"begun for something else \(weights"):
        generate_file(local(tmp_path / "model"), ROWS, out, num=1, seed=7)


def test_a_prompt_that_cannot_be_answered_costs_no_other_its_responses(
    engine: Local, tmp_path: Path
) -> None:
    engine._adapter.encoder.data = engine.config.data.model_copy(  # pyright: ignore
        update={"max_prompt_length": 500}
    )
    long = {"id": "long", "prompt": "a" * 300}
    out = tmp_path / "candidates.jsonl"
    made = generate_file(engine, [ROWS[0], long, ROWS[1]], out, num=2, seed=7)
    assert [line["id"] for line in lines(out)] == ["r0", "r1"]
    assert "1 prompts have no responses:\n  a prompt has 300 tokens" in made.text()
    with pytest.raises(DataError, match="no prompt can"):
        generate_file(engine, [long], tmp_path / "none.jsonl", num=2, seed=7)


def test_what_is_empty_or_alike_is_counted(engine: Local, tmp_path: Path) -> None:
    class Silent(Local):
        def __call__(
            self, asked: list[Example], num: int, seeds: Any
        ) -> Iterator[list[Generated] | DataError]:
            for row, found in zip(asked, engine(asked, num, seeds), strict=True):
                empty = row.prompt == "Two?"
                yield [type(found[0])(" ", 1)] * num if empty else found  # pyright: ignore

    silent = Silent(engine.config, engine.options)
    made = generate_file(silent, ROWS, tmp_path / "candidates.jsonl", num=2, seed=7)
    assert (made.empty, made.alike) == (2, 1)
    assert "2 are empty" in made.text()
    assert "1 prompts have 2 equal responses" in made.text()


def test_ids_must_be_distinct_and_files_new(engine: Local, tmp_path: Path) -> None:
    out = tmp_path / "candidates.jsonl"
    with pytest.raises(DataError, match="'r0' comes twice"):
        generate_file(engine, [ROWS[0], ROWS[0]], out, num=1, seed=0)
    with pytest.raises(DataError, match="a prompt has no `id`"):
        generate_file(engine, [{"prompt": "Two?"}], out, num=1, seed=0)
    out.write_text("")
    with pytest.raises(DataError, match="already exists"):
        generate_file(engine, ROWS, out, num=1, seed=0)


def test_greedy_responses_are_asked_for_once() -> None:
    from mmalign.config.generate import generate_config

    with pytest.raises(ConfigError, match="would give the same response 8 times"):
        generate_config(temperature=0.0)
    with pytest.raises(ConfigError, match="`url` is only read with engine: server"):
        generate_config(url="http://localhost:1/v1")
    with pytest.raises(ConfigError, match="engine: server needs `url`"):
        generate_config(engine="server")


def test_texts_settings_are_refused_for_images() -> None:
    config = run_config(modality="diffusion", objective={"name": "diffusion_dpo"})
    with pytest.raises(ConfigError, match=r"temperature 0\.5 is for texts"):
        generator(config, GenerateConfig(temperature=0.5))
    with pytest.raises(ConfigError, match="max_new_tokens 65 is for texts"):
        generator(config, GenerateConfig(max_new_tokens=65))
    generator(config, GenerateConfig(num=2))


def test_the_command_draws_for_a_file_and_for_the_configs_own_rows(
    folder: Path, tmp_path: Path
) -> None:
    pairs = [{"id": 1, "prompt": "Two?", "chosen": "Four", "rejected": "No", "topic": "sums"}]
    (tmp_path / "pairs.jsonl").write_text("\n".join(map(json.dumps, pairs)))
    (tmp_path / "prompts.jsonl").write_text("\n".join(map(json.dumps, ROWS)))
    config = tmp_path / "config.yaml"
    config.write_text(
        f"model: {{path: {folder}}}\ndata: {{train: {tmp_path / 'pairs.jsonl'}}}\n"
        f"objective: {{name: dpo}}\noutput: {tmp_path / 'run'}\n"
    )

    def call(*given: str) -> Any:
        return CliRunner().invoke(app, ["data", "generate", str(config), *given])

    out = tmp_path / "a" / "candidates.jsonl"
    options = ["--num", "2", "--max-new-tokens", "4", "--out", str(out)]
    done = call("--data", str(tmp_path / "prompts.jsonl"), *options)
    assert done.exit_code == 0, done.output
    assert "10 responses to 5 prompts" in done.output
    assert [line["answer"] for line in lines(out)] == [0, 1, 2, 3, 4]
    done = call("--data", str(tmp_path / "prompts.jsonl"), *options)
    assert done.exit_code != 0
    assert "already exists" in done.output
    out.unlink()
    done = call(*options)
    assert done.exit_code == 0, done.output
    (line,) = lines(out)
    assert (line["id"], line["topic"]) == ("1", "sums")
    assert not {"chosen", "rejected"} & line.keys()
