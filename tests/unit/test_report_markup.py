"""Markup in anything that a report quotes stays text: no element, no handler, no reference."""

from __future__ import annotations

import json
import re
import shutil
import subprocess
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

from mmalign.report import write_report

HOSTILE = (
    "<script>document.title='RUN'</script><img src=x onerror=document.body.dataset.mark=1>"
    "\"'><svg onload=document.body.dataset.mark=1></svg><!-- </style></title></pre> "
    "{{7*7}} &lt;i&gt; javascript:alert(1)"
)
"""What would leave a mark on a page that took it for markup."""

CONFIGS: dict[str, dict[str, Any]] = {
    "text": {"objective": {"name": "dpo", "beta": 0.1}},
    "diffusion": {"objective": {"name": "diffusion_dpo", "beta": 2000}},
    "video": {"objective": {"name": "rrpo"}, "text": {"masks": {"kind": "spans"}}},
}


def spoilt(value: Any) -> Any:
    """The value with hostile text behind every text, and under a further name of every object."""
    if isinstance(value, str):
        return value + HOSTILE
    if isinstance(value, list):
        return [spoilt(item) for item in value]
    if isinstance(value, dict):
        return {**{key: spoilt(item) for key, item in value.items()}, f"x/{HOSTILE}": 1.0}
    return value


def hostile_run(folder: Path, modality: str) -> Path:
    """A run folder in which every text, and a name of every object, is hostile."""
    frames = folder / "samples" / "frames" / "000.webp"
    sheet = folder / "samples" / "step-9" / "sheet.png"
    for file in (frames, sheet):
        file.parent.mkdir(parents=True)
        Image.fromarray(np.zeros((16, 16, 3), np.uint8)).save(file)
    row = {
        "id": "row", "labels": [1.0, 0.0], "logps": [-9.0, -8.0], "ref_logps": [-9.0, -9.0],
        "lengths": [5, 6], "kl": [0.1, 0.1], "loss": 0.6,
    }  # fmt: skip
    evaluation = {"loss": 0.6, "reward_accuracy": 1.0, "intervals": {"loss": [0.5, 0.7]}}
    media = [{"kind": "clip", "file": "a.mp4", "seconds": 2.0, "size": [16, 16], "times": [0.0]}]
    sample = {
        "prompt": [{"role": "user", "content": "Why?"}],
        "response": "Because.",
        "answers": [{"name": "Chosen", "text": "So it is.", "spans": [[0, 2]]}],
        "media": media,
    }
    config = {"model": {"path": "m"}, "data": {"train": [{"path": "p.jsonl"}]}, "output": "runs/x"}
    env = {"python": "3", "packages": {"torch": "2"}, "data": {"train_rows": 8, "eval_rows": 2}}
    about = {"modality": modality, **CONFIGS[modality]}
    (folder / "config.yaml").write_text(json.dumps(spoilt(config) | about))
    (folder / "env.json").write_text(json.dumps(spoilt(env)))
    lines = {
        "metrics": [{"step": s, **spoilt({"loss": 0.7, "rewards/margins": 0.1})} for s in (1, 9)],
        "eval": [
            {"step": s, **spoilt(evaluation), "rows": [spoilt(row) for _ in range(3)]}
            for s in (0, 9)
        ],
        "samples": [
            {"step": s, "id": f"a{HOSTILE}", **spoilt(sample), "frames": "samples/frames/000.webp"}
            for s in (0, 9)
        ],
    }
    for name, records in lines.items():
        text = "".join(json.dumps(record) + "\n" for record in records)
        (folder / f"{name}.jsonl").write_text(text)
    return folder


class Elements(HTMLParser):
    """The elements of a page, their handlers, and what they refer to."""

    def __init__(self, text: str) -> None:
        super().__init__()
        self.tags: set[str] = set()
        self.handlers: list[str] = []
        self.outside: list[str] = []
        self.feed(text)

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.add(tag)
        self.handlers += [name for name, _ in attrs if name.startswith("on")]
        named = [value or "" for name, value in attrs if name in ("src", "href", "xlink:href")]
        self.outside += [value for value in named if not value.startswith(("data:image/", "#"))]


def hostile_page(folder: Path, modality: str) -> Path:
    name = f"r<svg onload=document.body.dataset.mark=1>{modality}&amp;"
    return write_report([hostile_run(folder / name, modality)], folder / f"{modality}.html")


@pytest.mark.parametrize("modality", CONFIGS)
def test_markup_in_a_run_stays_text(tmp_path: Path, modality: str) -> None:
    text = hostile_page(tmp_path, modality).read_text(encoding="utf-8")
    page = Elements(text)
    assert not page.tags & {"script", "iframe", "object", "embed", "base", "form", "link"}
    assert (page.handlers, page.outside) == ([], [])
    assert text.count("document.title") > 3, "it is shown"
    assert text.count("<style") == text.count("</style>")
    assert "49" not in re.findall(r"\{\{7\*7\}\}|\b49\b", text), "no template is run"


@pytest.mark.slow
@pytest.mark.parametrize("modality", CONFIGS)
def test_nothing_runs_in_a_browser(tmp_path: Path, modality: str) -> None:
    browser = next(filter(None, map(shutil.which, ("chromium", "google-chrome", "chrome"))), None)
    if browser is None:
        pytest.skip("no Chromium is installed")
    page = hostile_page(tmp_path, modality)
    options = ["--headless", "--no-sandbox", "--disable-gpu", "--virtual-time-budget=2000"]
    done = subprocess.run(
        [browser, *options, f"--user-data-dir={tmp_path / 'chrome'}", "--dump-dom", page.as_uri()],
        capture_output=True, text=True, timeout=120, check=True,
    )  # fmt: skip
    body = re.search(r"<body[^>]*>", done.stdout)
    assert body, done.stderr[-500:]
    assert "data-mark" not in body[0]
    title = re.search(r"<title>(.*?)</title>", done.stdout, re.DOTALL)
    assert title
    assert title[1] != "RUN"
    found = Elements(done.stdout)
    assert ("script" in found.tags, found.handlers, found.outside) == (False, [], [])
