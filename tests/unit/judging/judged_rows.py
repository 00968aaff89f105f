"""Files of candidates and rules about them, for the tests of judges."""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

RULES = """
import mmalign

def short(response):
    return -len(response)

@mmalign.rule
def marked(response):
    return float(len(response))

def of_all(prompt, responses, answer):
    return [float(answer in one) for one in responses]

def cyclic(response, other):
    order = {"rock": 0, "paper": 1, "scissors": 2}
    return {0: 0.5, 1: 1.0, 2: 0.0}[(order[response] - order[other]) % 3]

def longer(response, other):
    return float(len(response) > len(other))

def unsure(response, **columns):
    return None if response in columns.get("skip", ()) else 1.0

def broken(response):
    return 1 / (len(response) - 3)

def text(response):
    return "good"

def huge(response):
    return 10**400

def short_list(responses):
    return [1.0]

def about(responses, about):
    return [one["seed"] for one in about]
"""


def write(path: Path, rows: Iterable[Mapping[str, Any]]) -> Path:
    """A JSONL file."""
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    return path


def read(path: Path) -> list[dict[str, Any]]:
    """Its rows."""
    return [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]


def drawn(name: str, *responses: str, **columns: Any) -> dict[str, Any]:
    """A line of candidates."""
    return {"id": name, "prompt": f"say {name}", "responses": list(responses), **columns}


def judged(name: str, scores: Iterable[float | None], **columns: Any) -> dict[str, Any]:
    """A judged line whose responses are their own numbers."""
    scores = list(scores)
    line = drawn(name, *(f"answer {k}" for k in range(len(scores))))
    return {**line, **columns, "rewards": {"rule": scores}, "scores": scores}
