"""The report of a run on images: sheets, errors against the reference, noise levels."""

from __future__ import annotations

import base64
import io
import json
import re
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

from mmalign.report import write_report
from mmalign.report.pictures import by_noise_level, picture, sheets
from mmalign.report.run import read_run, remarks

CONFIG = """\
modality: diffusion
model: {path: some/tiny-model, lora: {rank: 16}}
data: {train: [{path: data/pairs.jsonl}], eval_fraction: 0.1}
objective: {name: diffusion_dpo, beta: 2000}
train: {lr: 1e-5, batch_size: 4, seed: 3}
output: runs/x
"""


def write_lines(path: Path, records: list[dict[str, Any]]) -> None:
    path.write_text("".join(json.dumps(record) + "\n" for record in records), encoding="utf-8")


def evaluation(step: int, chosen: float) -> dict[str, Any]:
    """Two rows at two noise levels each; `chosen` is how far the error on preferred ones rose."""
    levels = {
        f"{name}/t{low:03d}-{low + 499:03d}": value + low / 1e6
        for low in (0, 500)
        for name, value in (
            ("errors/chosen_diff", chosen),
            ("errors/rejected_diff", 0.02 if step else 0.0),
            ("reward_accuracy", 0.75 if step else 0.0),
        )
    }
    return {
        "step": step,
        "loss": 0.69 - 0.001 * step,
        "reward_accuracy": 0.9 if step else 0.0,
        "ranking_accuracy": 0.6,
        "drift/chosen": -chosen / 2,
        "errors/chosen_diff": chosen,
        "errors/rejected_diff": 0.02 if step else 0.0,
        "errors/policy_chosen": 0.2,
        **levels,
        "intervals": {"reward_accuracy": [0.8, 0.95], "drift/chosen": [-chosen / 2, 0.001]},
        "rows": [
            {
                "id": f"row-{i}@{k}",
                "labels": [1.0, 0.0],
                "lengths": [1, 1],
                "logps": [-0.1 - chosen / 2, -0.11 if step else -0.1],
                "ref_logps": [-0.1, -0.1],
                "loss": 0.5,
            }
            for i in range(2)
            for k in range(2)
        ],
    }


def make_run(
    folder: Path, *, chosen: float = -0.0013, side: int = 64, every: int = 10, noisy: bool = False
) -> Path:
    """A finished run of 30 steps with a sheet at every `every`th of them."""
    (folder / "final").mkdir(parents=True)
    (folder / "config.yaml").write_text(CONFIG)
    write_lines(
        folder / "metrics.jsonl",
        [
            {
                "step": step,
                "loss": 0.69,
                "rewards/margins": 0.1 * step,
                "rewards/accuracies": 0.8,
                "errors/policy_chosen": 0.2,
                "errors/ref_chosen": 0.2 - chosen * step / 30,
                "errors/chosen_diff": chosen * step / 30,
                "errors/rejected_diff": 0.001 * step,
            }
            for step in range(1, 31)
        ],
    )
    write_lines(folder / "eval.jsonl", [evaluation(0, 0.0), evaluation(30, chosen)])
    for step in range(0, 31, every):
        levels = np.full((side, side, 3), step, np.uint8)
        if noisy:
            levels = np.random.default_rng(step).integers(0, 256, levels.shape).astype(np.uint8)
        target = folder / "samples" / f"step-{step}" / "sheet.png"
        target.parent.mkdir(parents=True)
        Image.fromarray(levels).save(target)
    return folder


def shown(html: str) -> list[Image.Image]:
    """The images that a page holds, in their order."""
    found = re.findall(r'src="data:image/(?:png|jpeg);base64,([^"]+)"', html)
    return [Image.open(io.BytesIO(base64.b64decode(data))) for data in found]


def text_of(html: str) -> str:
    return " ".join(re.sub(r"<[^>]+>", " ", html).split())


@pytest.fixture(scope="module")
def whole_page(tmp_path_factory: pytest.TempPathFactory) -> str:
    folder = tmp_path_factory.mktemp("whole")
    page = write_report([make_run(folder / "run")], folder / "page.html")
    return page.read_text(encoding="utf-8")


def test_a_page_shows_the_last_sheet_and_folds_the_earlier_ones(whole_page: str) -> None:
    html = whole_page
    levels = [image.convert("RGB").getpixel((0, 0)) for image in shown(html)]
    assert levels == [(s, s, s) for s in (30, 0, 10, 20)]
    assert html.index("After 30 steps") < html.index("<details><summary>Earlier steps")
    assert "<script" not in html
    assert not re.search(r'(?:src|href)="(?!data:|#)', html), "loads nothing"


def test_a_page_speaks_of_pictures(whole_page: str) -> None:
    html = whole_page
    text = text_of(html[html.index("<main>") : html.index("Configuration</h2>")])
    for words in (
        "Pictures before and after",
        "Error on preferred images policy minus reference; above 0 the model explains them worse "
        "than before 0 −0.002 to 0 −0.0013 −0.002 to −0.0013 −0.0013",
        "2 held-out rows at 2 noise levels each",
        "Implicit accuracy",
        "By noise level",
        "0 to 499 75 % −0.0013 +0.02",
        "Denoising error of preferred images",
    ):
        assert words in text, words
    for word in ("token", "answer", "nats", "Ranking", "Completions"):
        assert word not in text, word


@pytest.mark.runs
def test_the_error_on_preferred_pictures_has_a_band_and_a_warning_above_zero(
    tmp_path: Path,
) -> None:
    good, bad = make_run(tmp_path / "good"), make_run(tmp_path / "bad", chosen=0.0105)
    band = "var(--series-6)"
    pages = [write_report([run], tmp_path / "page.html").read_text() for run in (good, bad)]
    drawings = [
        next(d for d in re.findall(r"<svg.*?</svg>", page, re.DOTALL) if "Error on preferred" in d)
        for page in pages
    ]
    assert band in drawings[1]
    assert "fill-opacity: 0.13" in drawings[1] or "opacity: 0.13" in drawings[1]
    assert "explains the preferred images worse" not in " ".join(
        remark.text for remark in remarks(read_run(good))
    )
    warning = next(r for r in remarks(read_run(bad)) if "explains the preferred images" in r.text)
    assert warning.is_warning
    assert "held out, its denoising error on them is 0.011 higher" in warning.text
    section = by_noise_level([read_run(bad)])
    assert section is not None
    assert '<span class="bad">+0.011</span>' in section.html


def test_without_held_out_rows_the_training_errors_warn(tmp_path: Path) -> None:
    run = make_run(tmp_path / "run", chosen=0.003)
    (run / "eval.jsonl").unlink()
    text = " ".join(remark.text for remark in remarks(read_run(run)))
    assert "in training, its denoising error on them is 0.0029 higher" in text


def test_text_warnings_are_not_said_of_pictures(tmp_path: Path) -> None:
    """drift/chosen falls whenever the error rises; it is said once, in terms of errors."""
    found = remarks(read_run(make_run(tmp_path / "run", chosen=0.0105)))
    assert not any("answers" in remark.text for remark in found)


@pytest.mark.runs
def test_a_page_stays_small(tmp_path: Path) -> None:
    """Noise does not compress: 8 sheets of 750 kB would make 8 MB."""
    run = make_run(tmp_path / "run", side=500, every=4, noisy=True)
    page = write_report([run], tmp_path / "page.html")
    pictures = shown(page.read_text())
    assert len(pictures) == 1 + 6
    assert all(image.format == "JPEG" for image in pictures)
    assert page.stat().st_size < 7 * 400_000 * 4 / 3 + 500_000


def test_small_sheets_are_embedded_byte_for_byte(tmp_path: Path) -> None:
    file = tmp_path / "sheet.png"
    Image.fromarray(np.arange(64, dtype=np.uint8).reshape(8, 8)).save(file)
    data = base64.b64encode(file.read_bytes()).decode()
    assert data in picture(file, "a caption & more")
    assert "a caption &amp; more" in picture(file, "a caption & more")


def test_several_runs_have_a_sheet_each(tmp_path: Path) -> None:
    runs = [make_run(tmp_path / name) for name in ("one", "two")]
    html = write_report(runs, tmp_path / "page.html").read_text()
    assert html.index("<h3>one</h3>") < html.index("<h3>two</h3>")
    assert len(shown(html)) == 8
    assert "2 runs compared" in html


@pytest.mark.runs
@pytest.mark.parametrize("lacking", ["samples", "eval.jsonl", "metrics.jsonl"])
def test_an_interrupted_run_is_shown_as_far_as_it_got(tmp_path: Path, lacking: str) -> None:
    run = make_run(tmp_path / "run")
    if lacking == "samples":
        for file in run.glob("samples/*/sheet.png"):
            file.unlink()
        assert sheets([read_run(run)]) is None
    else:
        (run / lacking).unlink()
    assert "Configuration" in write_report([run], tmp_path / "page.html").read_text()
