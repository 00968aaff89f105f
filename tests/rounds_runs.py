"""Rounds on the story model of the package, in seconds: prompts, a rule, and a config."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import mmalign
from mmalign.config import RunConfig

STORIES = Path(mmalign.__file__).parent / "quickstart" / "stories260k"

RULE = '''
"""How happy a story is, by counting words."""
GOOD = ("happy", "fun", "love", "smile", "laugh", "play", "friend", "good", "nice", "big")
BAD = ("sad", "cry", "scared", "angry", "bad", "not", "no", "hurt", "lost", "mean")


def happy(response):
    words = response.lower().split()
    count = lambda stems: sum(any(stem in word for stem in stems) for word in words)
    return float(count(GOOD) - count(BAD))
'''

NAMES = ("Lily", "Tom", "Sue", "Max", "Ben", "Mia", "Sam", "Anna", "Tim", "Lucy")
STARTS = (
    "One day {} saw a",
    "Once upon a time {} had a",
    "{} was in the",
    "{} and her mom went to",
)


def write_prompts(folder: Path, count: int = 40) -> Path:
    """Openings of stories, a record a line."""
    asked = [start.format(name) for name in NAMES for start in STARTS][:count]
    file = folder / "prompts.jsonl"
    file.write_text("".join(json.dumps({"prompt": text}) + "\n" for text in asked))
    return file


def sections(folder: Path, **changes: Any) -> dict[str, Any]:
    """Of a config whose rounds take a second each."""
    (folder / "my_rules.py").write_text(RULE)
    found: dict[str, Any] = {
        "model": {"path": str(STORIES)},
        "data": {"train": str(write_prompts(folder)), "eval_fraction": 0.3},
        "objective": {"name": "dpo", "beta": 0.1},
        "train": {
            "batch_size": 8, "lr": 5e-4, "num_threads": 1, "check_settings": False,
            "save_every": 1,
        },
        "rounds": {
            "num": 2,
            "prompts": {"per_round": 12},
            "generate": {"num": 4, "max_new_tokens": 24},
            "judge": [{"rule": "my_rules:happy"}],
            "select": {"cut": "wins"},
        },
        "output": str(folder / "rounds"),
    }  # fmt: skip
    for key, value in changes.items():
        section, _, name = key.partition("__")
        found[section] = found.get(section, {}) | {name: value} if name else value
    return found


def config(folder: Path, **changes: Any) -> RunConfig:
    """The same as a config."""
    return RunConfig.model_validate(sections(folder, **changes))


def run(folder: Path, **changes: Any) -> Any:
    """Run the rounds of a config that lies in a folder."""
    from mmalign.rounds import engine

    options = {key: changes.pop(key) for key in ("resume", "until") if key in changes}
    made = config(folder, **changes)
    return engine.run(made, where=str(folder / "rounds.yaml"), say=lambda line: None, **options)


def hashes(folder: Path) -> dict[str, str]:
    """Of all weights and stage files of a run, without clocks."""
    from mmalign.rounds.ledger import digest

    names = ("*.safetensors", "*.jsonl", "measured.json")
    found = {path for name in names for path in folder.glob(f"round-*/{name}")}
    found |= set(folder.glob("round-*/*/*.jsonl")) - set(folder.glob("round-*/run/*"))
    found |= set(folder.glob("round-*/run/final/*.safetensors"))
    return {path.relative_to(folder).as_posix(): digest(path) for path in sorted(found)}
