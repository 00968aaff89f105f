"""One survey of all rows before a model is loaded: the same lines wherever rows are looked at."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from tiny import CHATML, make_model, make_tokenizer
from typer.testing import CliRunner, Result

from mmalign import config as configs
from mmalign.cli import app
from mmalign.config import RunConfig
from mmalign.errors import ConfigError, DataError
from mmalign.models import adapter as rows_of
from mmalign.models.adapter import adapter_class
from mmalign.preflight.check import check_config
from mmalign.report import write_report
from mmalign.text import survey as surveying
from mmalign.train.loop import train

LONG = "The cat liked to play in the sun. " * 40  # far more tokens than the model has positions


@pytest.fixture(scope="module")
def model_dir(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("model")
    make_model("llama").save_pretrained(folder)
    make_tokenizer().save_pretrained(folder)
    return folder


@pytest.fixture(scope="module")
def chat_dir(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("chat")
    make_model("llama").save_pretrained(folder)
    make_tokenizer(CHATML).save_pretrained(folder)
    return folder


def pair(number: int, **changes: Any) -> dict[str, Any]:
    row = {"id": f"r{number}", "prompt": f"What is {number} and two?"}
    return {**row, "chosen": f"It is {number} more.", "rejected": f"No {number}!", **changes}


def write(path: Path, rows: list[dict[str, Any]]) -> Path:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    return path


def settings(model: Path, file: Path, **sections: Any) -> RunConfig:
    given = {
        "model": {"path": str(model)},
        "data": {"train": str(file), **sections.pop("data", {})},
        "objective": {"name": "dpo", "beta": 0.1},
        "train": {"num_steps": 1, "batch_size": 2, "num_threads": 1},
        "sample": {"num_prompts": 0},
        "output": str(file.parent / "run"),
    }
    return RunConfig.model_validate({**given, **sections})


def notes(config: RunConfig) -> list[str]:
    return list(rows_of.survey_rows(config, check_config(config).needs).notes)


def check(config: RunConfig, tmp_path: Path, *options: str) -> Result:
    file = tmp_path / "config.yaml"
    file.write_text(configs.dump(config), encoding="utf-8")
    return CliRunner().invoke(app, ["data", "check", "--config", str(file), *options])


def test_clean_rows_are_not_spoken_of(
    model_dir: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    config = settings(model_dir, write(tmp_path / "rows.jsonl", [pair(i) for i in range(4)]))
    assert notes(config) == []
    assert caplog.text == ""


def test_row_beyond_the_positions_stops_the_run_before_a_model_is_loaded(
    model_dir: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    rows = [*(pair(i) for i in range(30)), pair(30, chosen=LONG), pair(31, rejected=LONG)]
    config = settings(model_dir, write(tmp_path / "rows.jsonl", rows))
    monkeypatch.setattr(adapter_class("text"), "build", lambda *_: pytest.fail("loads a model"))
    place = rf"{tmp_path}/rows.jsonl:31 \(id 'r30'\): rows must have at most 256 tokens"
    with pytest.raises(DataError, match=place) as error:
        train(config, dry_run=True)
    assert "1 more has the same problem: 32" in str(error.value)
    assert "2 rows cannot be used" in str(error.value)


@pytest.mark.runs
def test_bad_rows_drop_leaves_out_what_the_survey_finds(
    model_dir: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    rows = [pair(0), pair(1, chosen=LONG), pair(2)]
    config = settings(model_dir, write(tmp_path / "rows.jsonl", rows), data={"bad_rows": "drop"})
    result = train(config)
    (said,) = [line for line in caplog.messages if "left out" in line]
    assert said.startswith("1 row cannot be used and is left out: ")
    stored = json.loads((result.run_dir / "env.json").read_text())["data"]
    assert stored["train_rows"] == 2
    assert stored["notes"] == [said]
    page = write_report([result.run_dir], tmp_path / "page.html").read_text()
    assert "1 row cannot be used and is left out" in page


@pytest.mark.runs
def test_the_page_tells_what_reading_the_rows_told(
    model_dir: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    rows = [pair(i) for i in range(4)] + [pair(4, split="test")]
    data = write(tmp_path / "rows.jsonl", rows)
    result = train(settings(model_dir, data, data={"eval_fraction": 0.5}))
    said = "data.eval_fraction 0.5 is not used: the `split` column already holds out 1 rows"
    assert caplog.messages.count(said) == 1
    page = write_report([result.run_dir], tmp_path / "page.html").read_text()
    assert "is not used: the `split` column" in page
    assert "split of the training data (1 rows)" in page
    assert "50% of the prompts" not in page


def test_all_rows_with_problems_leave_nothing_to_train_on(model_dir: Path, tmp_path: Path) -> None:
    data = write(tmp_path / "rows.jsonl", [pair(0, chosen=LONG)])
    with pytest.raises(DataError, match=r"no row is left to train on: .*rows.jsonl:1"):
        notes(settings(model_dir, data, data={"bad_rows": "drop"}))


def test_cut_answers_and_prompts_are_counted_with_their_setting(
    model_dir: Path, tmp_path: Path
) -> None:
    rows = [pair(i) for i in range(3)] + [pair(3, chosen=LONG, cut=False, chosen_cut=True)]
    rows[3].pop("cut")
    data = write(tmp_path / "rows.jsonl", [*rows, pair(4, rejected=LONG)])
    limits = {"max_prompt_length": 4, "max_response_length": 60}
    prompts, answers = notes(settings(model_dir, data, data=limits))
    assert prompts.startswith("all 5 prompts cut at 4 tokens (data.max_prompt_length), of which")
    assert answers == (
        "2 of 10 responses cut at 60 tokens (data.max_response_length); 1 lost their end; "
        "the first rows are 'r3' and 'r4'"
    )


def test_pairs_equal_after_the_cut_are_counted_and_all_of_them_refused(
    model_dir: Path, tmp_path: Path
) -> None:
    start = "Yeast makes small bubbles of gas that lift the dough. "
    same = pair(0, chosen=start + "Yes.", rejected=start + "No.")
    limits = {"max_response_length": 8}
    some = write(tmp_path / "some.jsonl", [same, pair(1)])
    found = [
        line for line in notes(settings(model_dir, some, data=limits)) if "same tokens" in line
    ]
    assert found == [
        "1 of 2 pairs have the same tokens on both sides, of which nothing is learned; "
        "the row is 'r0'"
    ]
    every = write(tmp_path / "all.jsonl", [same])
    with pytest.raises(DataError, match=r"all 1 pairs .* or raise data.max_response_length"):
        notes(settings(model_dir, every, data=limits))


def test_conversations_without_a_template_are_said_once(model_dir: Path, tmp_path: Path) -> None:
    turns = [{"role": "user", "content": "Why is the sky blue?"}]
    data = write(tmp_path / "rows.jsonl", [pair(i, prompt=turns) for i in range(3)])
    (line,) = notes(settings(model_dir, data))
    assert line.startswith("all 3 rows: the prompt is a conversation, but no chat template is in")


def test_special_token_of_this_tokenizer_in_an_answer_is_counted(
    model_dir: Path, tmp_path: Path
) -> None:
    rows = [pair(0, chosen="This is <s>wrong right."), pair(1, chosen="a < b > s")]
    (line,) = notes(settings(model_dir, write(tmp_path / "rows.jsonl", rows)))
    assert line.startswith("1 of 4 responses have a special token of this tokenizer")


def test_answers_of_several_turns_are_trained_on_or_named(chat_dir: Path, tmp_path: Path) -> None:
    turns = [("assistant", "Which one?"), ("user", "The red one."), ("assistant", "Good.")]
    chosen = [{"role": role, "content": content} for role, content in turns]
    rows = [pair(i) for i in range(5)] + [pair(5, chosen=chosen)]
    config = settings(chat_dir, write(tmp_path / "rows.jsonl", rows))
    assert notes(config) == []
    assert train(config).steps == 1


def test_prompts_under_answers_of_other_rows_must_fit_too(model_dir: Path, tmp_path: Path) -> None:
    long, short = LONG[:500], "Yes."
    rows = [
        {"id": "a", "prompt": long, "response": short, "desirable": True},
        {"id": "b", "prompt": "Why?", "response": long, "desirable": False},
    ]
    limits = {"max_prompt_length": 200, "max_response_length": 200}
    data = write(tmp_path / "rows.jsonl", rows)
    config = settings(model_dir, data, data=limits, objective={"name": "kto"})
    with pytest.raises(ConfigError, match="under the prompts of other rows"):
        notes(config)


def test_second_start_reads_what_the_first_found_and_mends_a_damaged_file(
    model_dir: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    data = write(tmp_path / "rows.jsonl", [pair(0), pair(1, chosen=LONG[:400])])
    config = settings(model_dir, data, data={"max_response_length": 20})
    looked = 0

    def counted(*given: Any) -> Any:
        nonlocal looked
        looked += 1
        return survey(*given)

    survey = surveying.survey
    monkeypatch.setattr(surveying, "survey", counted)
    first = notes(config)
    assert len(first) == 1
    assert notes(config) == first
    assert looked == 1
    (file,) = (tmp_path / "cache" / "surveys").iterdir()
    whole = file.read_text()
    file.write_text(whole[: len(whole) // 2])
    assert notes(config) == first
    assert looked == 2
    assert file.read_text() == whole
    assert notes(settings(model_dir, data, data={"max_response_length": 30})) != first
    assert looked == 3


def test_faults_of_spans_are_found_though_a_run_without_them_was_looked_at(tmp_path: Path) -> None:
    folder = tmp_path / "model"
    make_model("llama").save_pretrained(folder)
    content = "message['content']"
    make_tokenizer(CHATML.replace(content, f"{content}.replace('  ', ' ')")).save_pretrained(folder)
    spans = {"spans_chosen": [[0, 3]], "spans_rejected": [[0, 2]]}
    data = write(tmp_path / "rows.jsonl", [pair(0, **spans), pair(1, chosen="It  is.", **spans)])
    assert notes(settings(folder, data)) == []
    masks = {"objective": {"name": "rrpo"}, "text": {"masks": {"kind": "spans"}}}
    with pytest.raises(DataError, match="the chat template rewrites it, so its spans"):
        notes(settings(folder, data, **masks))


@pytest.mark.runs
def test_processes_find_what_one_finds(
    model_dir: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    rows = [pair(i) for i in range(600)]
    rows[7]["prompt"] = rows[450]["prompt"] = LONG
    rows[300]["chosen"] = LONG[:300]
    data = write(tmp_path / "rows.jsonl", rows)
    limits = {"max_response_length": 60, "bad_rows": "drop"}
    config = settings(model_dir, data, data=limits, text={"shared_prefix": "off"})
    alone = notes(config)
    (file,) = (tmp_path / "cache" / "surveys").iterdir()
    file.unlink()
    monkeypatch.setattr(surveying, "_FEW", 10)
    monkeypatch.setattr("os.sched_getaffinity", lambda _: {0, 1}, raising=False)
    assert notes(config) == alone
    assert len(alone) == 2


def test_data_check_says_what_training_would(model_dir: Path, tmp_path: Path) -> None:
    rows = [pair(0), pair(1, chosen=LONG), pair(2, rejected=LONG[:300])]
    config = settings(
        model_dir, write(tmp_path / "rows.jsonl", rows), data={"max_response_length": 300}
    )
    stopped = check(config, tmp_path)
    assert stopped.exit_code == 1, stopped.output
    assert "rows.jsonl:2 (id 'r1'): rows must have at most 256 tokens" in stopped.output
    shorter = check(config, tmp_path, "data.max_response_length=20")
    assert shorter.exit_code == 0, shorter.output
    (line,) = notes(config.model_copy(update={"data": config.data.model_copy(
        update={"max_response_length": 20})}))  # fmt: skip
    assert line in shorter.output
    assert check(config, tmp_path, str(write(tmp_path / "b.jsonl", [pair(0)]))).exit_code == 0


def test_data_check_wants_files_or_a_config() -> None:
    result = CliRunner().invoke(app, ["data", "check"])
    assert result.exit_code == 1
    assert "name files, or a config with --config" in result.output


def test_rows_with_the_same_words_are_counted_one_by_one(model_dir: Path, tmp_path: Path) -> None:
    """Only one of them is encoded; what is said is as if all were."""
    limits = {"max_prompt_length": 20, "max_response_length": 30}
    same = {"prompt": LONG, "chosen": f"{LONG} a", "rejected": f"{LONG} b"}
    rows = [pair(0), *({"id": f"s{i}", **same} for i in range(4)), pair(1)]
    told = notes(settings(model_dir, write(tmp_path / "rows.jsonl", rows), data=limits))
    unlike = [{**row, "rejected": f"{row['rejected']}{i}"} for i, row in enumerate(rows)]
    assert told == notes(settings(model_dir, write(tmp_path / "other.jsonl", unlike), data=limits))
    assert any("4 of 6 pairs" in note and "'s0', 's1' and 's2'" in note for note in told)


def test_faults_of_rows_with_the_same_words_are_all_counted(
    model_dir: Path, tmp_path: Path
) -> None:
    rows = [pair(1), *({**pair(0, chosen=LONG * 9), "id": f"s{i}"} for i in range(3))]
    limits = {"max_response_length": 4000, "bad_rows": "drop"}
    (note,) = notes(settings(model_dir, write(tmp_path / "rows.jsonl", rows), data=limits))
    assert "3 rows cannot be used and are left out" in note


def test_what_tells_rows_apart_is_small(
    model_dir: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Texts of all rows must not lie in memory a second time."""
    found: list[Any] = []
    survey = surveying.survey

    def noted(encoder: Any, rows: Any, limits: Any, keys: Any, whole: Any) -> Any:
        found.extend(keys)
        return survey(encoder, rows, limits, keys, whole)

    monkeypatch.setattr(surveying, "survey", noted)
    data = write(tmp_path / "rows.jsonl", [pair(0), pair(1, chosen=LONG[:400])])
    notes(settings(model_dir, data, data={"max_response_length": 20}))
    assert [len(key) for key in found] == [32, 32]
    assert found[0] != found[1]
