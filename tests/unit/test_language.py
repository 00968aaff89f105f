"""Code, docs and messages use the field's terms: phrases that read as translated stay out."""

from __future__ import annotations

import re
from functools import cache
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
FILES = [
    *sorted((ROOT / "mmalign").rglob("*.py")),
    *sorted((ROOT / "docs").glob("*.md")),
    *sorted((ROOT / "configs").glob("*.yaml")),
    ROOT / "README.md",
    ROOT / "CONTRIBUTING.md",
]

INSTEAD = {
    r"under altered clips": "against corrupted or augmented video",
    r"says yes to whatever": "has a yes-bias",
    r"said at once, before a weight": "reported together, before any weights are loaded",
    r"[Hh]ow sure one can be": "Verification",
    r"\bunaided\b": "automatically",
    r"\|.*on the margin of a pair": "pairwise (margin) losses",
    r"#[^`/]* pictures?\b(?!\.)": "image",
    r"^#+ (?:Pictures|Clips)$": "Images, Video",
    r"is told sizes|_is_told\b": "conditioned on sizes",
    r"place at which candidates are scored": "noised sample, evaluation point",
    r"\bnoisier\b": "with more noise",
    r"\bddim_(?:move|spread)\b|\bVPTable\b|\bclass _Move\b": "ddim_step, ddim_std, VPSchedule",
    r"\bbanked\b|\bErrorBank\b|\bPictureNotes\b": "precomputed, ErrorCache, ImageSizeCache",
    r"\bSTRATUM\b": "TIMESTEP_BIN",
    r"\bCorruptor\b": "Perturbation",
    r"model that hears|\bhears_clips?\b": "model with audio input, uses_clip_audio",
    r"\bclass (?:Kahneman|Positive|Several|Bag|Contrast)\b": "names of the papers",
    r"[Tt]rained weights at work": "inference",
    r"not to be had": "unavailable",
    r"is there already": "already exists",
    r"is no run folder": "is not a run folder",
    r"\banew\b": "again",
    r"in the course of a run": "during training",
    r"which text has not": "which text does not support",
    r"what a person sees": "console output",
    r"\b[Oo]ptimisers?\b": "optimizer",
    r"\b[Nn]ormalis(?:e|ed|es|ing|ation)\b": "normalize",
    r"\b[Tt]okenis(?:e|ed|es|ing|ation|er)\b": "tokenize",
}
"""What was once written, and what the field says."""

ALLOWED = {
    r"\b[Nn]ormalis(?:e|ed|es|ing|ation)\b": r"\bnormalised\(|import .*\bnormalised\b",
}
"""Lines in which a phrase may stay: the name of a function."""


@cache
def texts() -> dict[Path, str]:
    return {path: path.read_text(encoding="utf-8") for path in FILES}


@pytest.mark.parametrize("phrase", INSTEAD)
def test_the_field_says_it_otherwise(phrase: str) -> None:
    pattern = re.compile(phrase, re.MULTILINE)
    allowed = re.compile(ALLOWED.get(phrase, r"(?!)"))
    found = [
        f"{path.relative_to(ROOT)}:{number}: {line.strip()}"
        for path, text in texts().items()
        if pattern.search(text)  # most phrases are in no file: told at once, without its lines
        for number, line in enumerate(text.splitlines(), 1)
        if pattern.search(line) and not allowed.search(line)
    ]
    assert found == [], f"instead: {INSTEAD[phrase]}"
