"""What the README shows is true: its snippets run, its files and commands exist."""

from __future__ import annotations

import re
from pathlib import Path

import yaml

ROOT = Path(__file__).resolve().parents[2]
README = (ROOT / "README.md").read_text(encoding="utf-8")


def blocks(language: str) -> list[str]:
    return re.findall(rf"^```{language}\n(.*?)^```", README, re.M | re.S)


def test_python_snippets_run() -> None:
    import torch

    losses, own = blocks("python")
    names: dict[str, object] = {}
    exec(compile(losses, "README.md", "exec"), names)
    policy = names["policy"]
    assert isinstance(policy, torch.Tensor)
    assert policy.grad is not None
    assert policy.grad.abs().sum() > 0
    exec(compile(own, "README.md", "exec"), names)
    assert len(own.strip().splitlines()) <= 10, "the README says ten lines"


def test_own_loss_works_from_a_config() -> None:
    import sys
    from types import ModuleType

    from mmalign.core import presets

    module = ModuleType("my_losses")
    exec(compile(blocks("python")[1], "README.md", "exec"), module.__dict__)
    sys.modules["my_losses"] = module
    try:
        objective = presets.build("my_losses:cautious_dpo", beta=0.2)
    finally:
        del sys.modules["my_losses"]
    assert objective.needs.reference


def test_config_snippet_is_valid(tmp_path: Path) -> None:
    from mmalign import config as configs
    from mmalign.core import presets

    (shown,) = blocks("yaml")
    path = tmp_path / "shown.yaml"
    path.write_text(shown, encoding="utf-8")
    presets.from_config(configs.load(path).objective)
    shipped = yaml.safe_load((ROOT / "configs/dpo_sft_smollm2.yaml").read_text(encoding="utf-8"))
    assert yaml.safe_load(shown) | {"output": ""} == shipped | {"output": ""}


def test_data_snippets_are_read(tmp_path: Path) -> None:
    import json

    from mmalign.data.parse import parse_record
    from mmalign.data.pictures import PictureRoot

    clips, shown = blocks("json")
    for name in re.findall(r"\w+\.(?:mp4|wav)", clips):
        (tmp_path / name).write_bytes(b"x")
    for line in clips.splitlines():
        row = parse_record(json.loads(line), where="README", root=PictureRoot(tmp_path))
        assert row.media.videos
    kinds = []
    for line in shown.splitlines():
        record = json.loads(line)
        texts = [key for key, value in record.items() if value == "..."]
        record |= {key: f"{key} text" for key in texts}
        if "responses" in record:
            record["responses"] = ["one", "two", "three"]
        kinds.append(parse_record(record, where="README").kind)
    assert kinds == ["pair", "pair", "list", "unpaired"]


def test_named_files_exist() -> None:
    for target in re.findall(r"\]\(([^)#:]+)\)", README):
        assert (ROOT / target).exists(), target
    for config in re.findall(r"configs/\w+\.yaml", README):
        assert (ROOT / config).is_file(), config


def test_named_commands_exist() -> None:
    from typer.main import get_command

    from mmalign.cli import app

    known: set[str] = set()
    for name, command in get_command(app).commands.items():  # type: ignore[attr-defined]
        known |= {f"{name} {child}" for child in getattr(command, "commands", {})} or {name}
    table = re.findall(r"^\| `mmalign ([a-z ]+?)(?: [A-Z\[].*?)?` \|", README, re.M)
    assert set(table) == known
