"""Every file in configs/ for text trains: dry-run on a tiny model and tiny data of its kind.

Those for images: `test_diffusion_configs.py`, for clips: `test_video_configs.py`. What all of
them share is tested here.
"""

from __future__ import annotations

import inspect
import json
import math
import re
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pytest
from selected import some_configs
from video_runs import KIND_OF

from mmalign import config as configs
from mmalign.core import presets

if TYPE_CHECKING:
    from mmalign.config import RunConfig
    from mmalign.core import Needs

ROOT = Path(__file__).resolve().parents[2]
CONFIGS = sorted((ROOT / "configs").glob("*.yaml"))
MODELS = ("smollm2", "sd15", "sdxl", "sd3", "flux", *KIND_OF)
"""What the name of a config ends in; `dpo_stories260k` is a second one of its method."""


def preset_names(config: RunConfig) -> list[str]:
    return list(config.objective.mix or [config.objective.name or ""])


def record(number: int, name: str, needs: Needs, mask_kind: str) -> dict[str, Any]:
    """One row of the kind the objective reads, with every field it needs."""
    row: dict[str, Any] = {"id": f"row-{number}", "prompt": f"How many cats are {number}?"}
    good, bad = f"Some of {number} cats like the sun.", f"No cat. Not one of {number} is here."
    third = "Cats play."
    if needs.rows == "unpaired":
        return row | {"response": good if number % 2 else bad, "desirable": bool(number % 2)}
    if needs.rows == "list":
        responses = [good, bad, third]
        row |= {"responses": responses, "scores": [2.0, 0.0, 1.0]}
        if mask_kind == "steps":
            row["steps"] = [[[0, 5], [5, len(text)]] for text in responses]
        return row
    row |= {"chosen": good, "rejected": bad}
    if mask_kind == "spans":
        row |= {"spans_chosen": [[0, 4]], "spans_rejected": [[0, 2]]}
    if name in ("soft_dpo", "upo", "mcts_dpo", "sppo"):
        row["p_chosen"] = 0.8
    if name in ("gpo", "online_ipo"):
        row |= {"label_chosen": 0.7, "label_rejected": 0.4}
    if name == "sem_dpo":
        row["weight"] = 0.5
    extra: dict[str, Any] = {
        "calibration": third,
        "rationale": third,
        "online": [third, f"{number} cats."],
    }
    row |= {role: extra[role] for role in dict.fromkeys(needs.roles)}
    if "rationale" in needs.roles:
        row["rationale_prompt"] = "Why is that better?"
    return row


def shrunk(path: Path, model: Path, folder: Path) -> RunConfig:
    """The config with a tiny model and tiny data in place of its own, all else as it is."""
    config = configs.load(path)
    needs = presets.from_config(config.objective).needs
    kind = config.text.masks.kind if config.text.masks else ""
    name = preset_names(config)[0]
    rows = [record(number, name, needs, kind) for number in range(24)]
    data = folder / "data.jsonl"
    data.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    overrides = [f"model.path={model}", f"data.train={data}", f"output={folder / 'run'}"]
    if config.reference.mixture:
        parts = [{"weight": part.weight} for part in config.reference.mixture]
        parts[0]["path"] = str(model)
        overrides.append(f"reference.mixture={json.dumps(parts)}")
    return configs.load(path, overrides)


TEXT = [path for path in CONFIGS if configs.load(path).modality == "text"]


@pytest.mark.parametrize("path", some_configs(TEXT))
def test_config_dry_runs(
    path: Path, tiny_llama_dir: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    from mmalign.train.loop import train

    config = shrunk(path, tiny_llama_dir, tmp_path)
    train(config, dry_run=True)
    said = capsys.readouterr().out
    found = re.search(r"loss\s+(-?[\d.e+-]+|nan|-?inf)", said)
    assert found, said
    assert math.isfinite(float(found[1]))
    assert not config.output.exists(), "a dry run writes nothing"


@pytest.mark.parametrize("path", CONFIGS, ids=lambda path: path.stem)
def test_config_says_what_hardware_and_data_first(path: Path) -> None:
    lines = path.read_text(encoding="utf-8").splitlines()
    assert 15 <= len(lines) <= 30
    assert lines[1].startswith("# Hardware:")
    assert lines[2].startswith("# Data:")
    assert max(map(len, lines)) <= 110


def test_every_preset_has_a_config() -> None:
    covered = {name for path in CONFIGS for name in preset_names(configs.load(path))}
    assert covered == set(presets.PRESETS)


def test_config_is_named_after_its_method() -> None:
    for name in presets.PRESETS:
        paths = [ROOT / "configs" / f"{name}_{model}.yaml" for model in MODELS]
        named = [path for path in paths if path.is_file()]
        assert named, name
        assert all(preset_names(configs.load(path)) == [name] for path in named)


def test_a_config_for_pictures_or_clips_is_named_after_method_and_model() -> None:
    for path in set(CONFIGS) - set(TEXT):
        config = configs.load(path)
        method, _, model = path.stem.rpartition("_")
        assert model in MODELS
        assert method.removesuffix("_full") == config.objective.name
        assert method.endswith("_full") <= (config.model.lora is None)
        assert config.output == Path("runs") / path.stem.replace("_", "-")


def sections() -> dict[str, str]:
    """Preset to the text of its section in docs/papers.md; one section may serve several."""
    text = (ROOT / "docs" / "papers.md").read_text(encoding="utf-8")
    parts = re.split(r"^### (.+)$", text, flags=re.M)[1:]
    return {
        name.strip(): body
        for names, body in zip(parts[::2], parts[1::2], strict=True)
        for name in names.split(",")
    }


def test_every_preset_has_a_section_in_the_papers() -> None:
    assert set(sections()) == set(presets.PRESETS)


def test_papers_name_every_compat_option() -> None:
    found = sections()
    for name, function in presets.PRESETS.items():
        parameter = inspect.signature(function).parameters.get("compat")
        for option in re.findall(r"'([^']+)'", str(parameter.annotation)) if parameter else []:
            assert f"`{option}`" in found[name], f"{name}: compat {option}"
