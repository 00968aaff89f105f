"""Shipped configs with values, keys and bytes changed: they load, or say one sentence."""

from __future__ import annotations

import json
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import yaml
from harness import changed, mutated, numbers, odd, outcome, stream

from mmalign import config as configs
from mmalign.preflight.check import check_config

PATHS = sorted((Path(__file__).resolve().parents[2] / "configs").glob("*.yaml"))
NAMES = ("path", "lr", "model", "weight", "kind", "masks", "estimator", "eval", "mix", "beta")
YAML_OWN = (
    "&a [*a]", "*nowhere", "!!python/name:os.getcwd", "!!binary aGk=", "!!set {a, b}", "<<: [1, 2]",
    "? [a, b]\n: c", "---", "...", "%YAML 9.9", "\t- x", "'", "|\n x", "[" * 1500, "{a: " * 800,
    "1_000", "0o17", "=", "2020-01-01", "!!float 'x'", "!!omap [a: 1]", "a: 1\na: 2",
)  # fmt: skip


def check(few: int, folder: Path) -> None:
    texts = [path.read_text(encoding="utf-8") for path in PATHS]
    values: list[Any] = [yaml.safe_load(text) for text in texts]
    values.append(json.loads(configs.load(PATHS[0]).model_dump_json()))
    file = folder / "config.yaml"
    for name in ("dpo_smollm2", "diffusion_dpo_sd15", "dpo_qwen3vl"):  # loads what takes long
        check_config(configs.load(PATHS[0].with_name(f"{name}.yaml")))
    for number in numbers(few):
        rng = stream("config", number)
        overrides: list[str] = []
        how = rng.randrange(8)
        if how < 3:
            data = json.dumps(mutated(rng.choice(values), rng, NAMES)).encode()
        elif how < 5:
            data = changed(rng.choice(texts).encode(), rng)
        elif how == 5:
            lines = rng.choice(texts).splitlines()
            at = rng.randrange(len(lines))
            lines.insert(at, lines[at].split(":")[0] + ": " + rng.choice(YAML_OWN))
            data = "\n".join(lines).encode()
        elif how == 6:
            data = rng.choice(texts).encode()
            key = ".".join(rng.choice([*NAMES, "train", "data", "0", ""]) for _ in range(2))
            value = odd(rng)
            overrides = [f"{key}={value if isinstance(value, str) else json.dumps(value)}"]
        else:
            data = rng.randbytes(rng.choice([0, 1, 10, 1000]))
        file.write_bytes(data)
        outcome(partial(comes_back, file, overrides), number)


def comes_back(file: Path, overrides: list[str]) -> None:
    """What can be read and checked is the same after it was written and read again."""
    config = configs.load(file, overrides)
    check_config(config)
    file.write_text(configs.dump(config), encoding="utf-8")
    assert configs.load(file) == config


def test_a_few_changed_configs(tmp_path: Path) -> None:
    check(40, tmp_path)


@pytest.mark.slow
def test_many_changed_configs(tmp_path: Path) -> None:
    check(5000, tmp_path)
