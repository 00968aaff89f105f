"""A loss of one's own is found beside its config, kept in the run folder, and never mistaken."""

from __future__ import annotations

import shutil
import sys
from pathlib import Path

import pytest
from toy_adapter import toy_config

from mmalign import config as configs
from mmalign.core import presets
from mmalign.core.presets import own
from mmalign.core.terms import Preference
from mmalign.errors import CheckpointError, ConfigError
from mmalign.preflight.check import check_config
from mmalign.train.loop import train

LOSS = """
from __future__ import annotations
from dataclasses import dataclass
from mmalign.core import presets

@dataclass(frozen=True)
class Doubled:  # a dataclass looks its module up while it is made
    factor: float = 2.0

def doubled(beta: float = 0.1):
    return presets.dpo(Doubled().factor * beta)
"""


MARKED = LOSS.replace("def doubled", "import mmalign\n\n@mmalign.objective\ndef doubled")


def write(folder: Path, text: str = LOSS, name: str = "my_losses.py") -> None:
    (folder / name).parent.mkdir(parents=True, exist_ok=True)
    (folder / name).write_text(text, encoding="utf-8")


def beta_of(config: configs.RunConfig) -> object:
    (term,) = check_config(config).terms.values()
    assert isinstance(term, Preference)
    return term.score.beta


OWN = 'objective={name: "my_losses:doubled", beta: 0.2}'


@pytest.mark.runs
def test_it_is_found_beside_the_config_and_in_the_current_directory(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    beside, current = tmp_path / "configs", tmp_path / "current"
    beside.mkdir()
    current.mkdir()
    monkeypatch.chdir(current)
    write(current, MARKED.replace("2.0", "3.0"))
    config = toy_config(beside, OWN)
    assert beta_of(config) == pytest.approx(0.6)
    write(beside)
    assert beta_of(config) == pytest.approx(0.4), "the config's folder comes first"
    mixed = toy_config(beside, 'objective={mix: {"my_losses:doubled": {weight: 0.5}, sft: 1}}')
    assert set(check_config(mixed).terms) == {"my_losses:doubled", "sft"}
    assert str(beside) not in sys.path


def test_two_folders_have_each_their_own(tmp_path: Path) -> None:
    found = []
    for factor in ("2.0", "5.0"):
        folder = tmp_path / factor
        write(folder, LOSS.replace("2.0", factor))
        write(folder, "from .parts import doubled\n", "package/__init__.py")
        write(folder, LOSS.replace("2.0", factor), "package/parts.py")
        found.append(toy_config(folder, OWN))
        found.append(toy_config(folder, 'objective={name: "package:doubled", beta: 0.2}'))
    assert [beta_of(one) for one in found] == pytest.approx([0.4, 0.4, 1.0, 1.0])
    assert [beta_of(one) for one in found] == pytest.approx([0.4, 0.4, 1.0, 1.0])


def test_a_module_of_that_name_elsewhere_is_left_alone(tmp_path: Path) -> None:
    import json

    write(tmp_path, name="json.py")
    config = toy_config(tmp_path, 'objective={name: "json:doubled", beta: 0.2}')
    assert beta_of(config) == pytest.approx(0.4)
    assert sys.modules["json"] is json


@pytest.mark.parametrize(
    ("name", "said"),
    [
        (".x:f", "'.x:f'; a loss of your own is written as module:function, e.g. my_losses:"),
        (":f", "':f'; a loss of your own is written as module:function"),
        ("my_losses:", "'my_losses:'; a loss of your own is written as"),
        ("a/b:f", "'a/b:f'; a loss of your own is written as"),
        ("no_such:f", "there is no no_such.py beside the config or in the current directory"),
        ("raises:f", "'raises' fails when it is imported: RuntimeError: at once"),
        ("calls:f", "'calls:f', which fails: ZeroDivisionError"),
        ("my_losses:missing", "'my_losses' has no such function \\(read from .*my_losses.py\\)"),
        ("broken:f", "'broken' cannot be imported: .*invalid syntax"),
        ("lacks:f", "'lacks' cannot be imported: No module named 'surely_not_there'"),
        ("other:f", "it returned 3, not an Objective"),
    ],
)
def test_what_cannot_be_used_is_said_in_one_sentence(tmp_path: Path, name: str, said: str) -> None:
    write(tmp_path)
    write(tmp_path, "def f(:\n", "broken.py")
    write(tmp_path, "import surely_not_there\n", "lacks.py")
    write(tmp_path, "raise RuntimeError('at once')\n", "raises.py")
    write(tmp_path, "def f():\n    return 1 / 0\n", "calls.py")
    write(tmp_path, "def f():\n    return 3\n", "other.py")
    with pytest.raises(ConfigError, match=said):
        check_config(toy_config(tmp_path, f'objective={{name: "{name}"}}'))


def test_a_seed_out_of_range_is_refused_by_the_schema(tmp_path: Path) -> None:
    for seed, said in ((-1, "train.seed: must be at least 0"), (2**31, "must be less than")):
        with pytest.raises(ConfigError, match=said):
            toy_config(tmp_path, f"train.seed={seed}")


def test_the_run_folder_keeps_it_and_stands_alone(tmp_path: Path) -> None:
    write(tmp_path)
    config = toy_config(tmp_path, OWN, "train.save_every=4", "train.num_steps=6")
    train(config)
    assert (config.output / "my_losses.py").read_text() == LOSS
    shutil.rmtree(config.output / "final")
    shutil.rmtree(config.output / "checkpoint-6")
    (tmp_path / "my_losses.py").unlink()
    again = configs.load(config.output / "config.yaml")
    assert beta_of(again) == pytest.approx(0.4)
    assert train(again, resume=True).steps == 6

    shutil.rmtree(config.output / "checkpoint-6")
    moved = tmp_path / "changed"
    write(moved, LOSS.replace("2.0", "3.0"))
    changed = toy_config(moved, OWN, "train.save_every=4", "train.num_steps=6")
    changed = changed.model_copy(update={"output": config.output})
    with pytest.raises(CheckpointError, match=r"losses.my_losses.py: '\w+' in the checkpoint"):
        train(changed, resume=True)


@pytest.mark.parametrize(
    ("text", "is_marked"),
    [
        (MARKED, True),
        (LOSS, False),
        (MARKED.replace("import mmalign\n", "from mmalign import objective\n").replace(
            "@mmalign.objective", "@objective"), True),
        ("import mmalign\n@mmalign.objective\ndef other(): ...\n" + LOSS, False),
        ("def broken(:\n", False),
    ],
)  # fmt: skip
def test_elsewhere_a_function_is_named_only_if_it_is_marked(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, text: str, is_marked: bool
) -> None:
    """Told before anything is imported: importing alone would run the module."""
    installed = tmp_path / "site"
    write(
        installed, "from pathlib import Path\nPath(__file__ + '.ran').touch()\n", "pack/__init__.py"
    )
    write(installed, text, "pack/losses.py")
    monkeypatch.syspath_prepend(installed)
    for name in ("pack", "pack.losses"):
        monkeypatch.delitem(sys.modules, name, raising=False)
    own._load.cache_clear()
    (tmp_path / "configs").mkdir()
    config = toy_config(tmp_path / "configs", 'objective={name: "pack.losses:doubled", beta: 0.2}')
    if is_marked:
        assert beta_of(config) == pytest.approx(0.4)
        return
    with pytest.raises(ConfigError, match=r"marked by @mmalign\.objective: put the module"):
        check_config(config)
    assert not (installed / "pack" / "__init__.py.ran").exists()


@pytest.mark.parametrize(
    "name", ["os:system", "antigravity:geohash", "antigravity.x:f", "json.tool:main", "sys:exit"]
)
def test_a_config_runs_nothing_of_the_library(tmp_path: Path, name: str) -> None:
    before = set(sys.modules)
    with pytest.raises(ConfigError, match="does not lie beside the config"):
        check_config(toy_config(tmp_path, f'objective={{name: "{name}"}}'))
    assert "antigravity" not in set(sys.modules) - before


@pytest.mark.runs
def test_a_stranger_s_run_is_sampled_and_reported_without_its_code(tmp_path: Path) -> None:
    from mmalign.inference import evaluate_checkpoint, trained_adapter
    from mmalign.report import write_report

    write(tmp_path)
    run = train(toy_config(tmp_path, OWN, "train.num_steps=1")).run_dir
    ran = tmp_path / "ran"
    write(run, f"{LOSS}\nfrom pathlib import Path\nPath({str(ran)!r}).touch()\n")
    own._load.cache_clear()
    config = configs.load(run / "config.yaml")
    with pytest.raises(ConfigError, match="--own-loss"):
        evaluate_checkpoint(config, None)
    trained_adapter(config, None)
    write_report([run], tmp_path / "report.html")
    assert not ran.exists()
    assert evaluate_checkpoint(config, None, own_loss=True).metrics["loss"] > 0
    assert ran.exists()


def test_presets_by_name_need_no_folder() -> None:
    assert presets.source("no_such_module:f", None) is None
