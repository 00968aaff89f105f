"""The report of a run on clips: what was seen and said, marks in answers, altered clips."""

from __future__ import annotations

import base64
import html
import json
import re
import shutil
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pytest
from video_runs import configured, row, write_rows

from mmalign.report import write_report
from mmalign.report.blocks import changed, marked
from mmalign.report.pictures import alterations, questions
from mmalign.report.run import read_run
from mmalign.train.loop import train
from mmalign.train.metrics import append_json, read_json

if TYPE_CHECKING:
    from collections.abc import Callable

    from mmalign.report import Section

    Models = Callable[[str], Path]


@pytest.fixture(scope="module")
def pami_run(
    video_models: Models, clips_dir: Path, tmp_path_factory: pytest.TempPathFactory
) -> Path:
    """A real run of three steps on four rows; two held-out rows are shown."""
    folder = tmp_path_factory.mktemp("pami")
    files = {"train": range(4), "eval": (20, 25)}
    data = {
        name: {
            "path": str(write_rows(folder / f"{name}.jsonl", [row(i, "plain") for i in numbers])),
            "pictures": str(clips_dir),
        }
        for name, numbers in files.items()
    }
    config = configured(
        folder,
        video_models("llava_onevision"),
        data["train"],
        data={"eval": data["eval"]},
        objective={"name": "pami_vdpo"},
        train={"num_steps": 3, "lr": 1e-2},
        sample={"num_prompts": 2, "max_new_tokens": 4},
    )
    return train(config).run_dir


def hand_made(
    folder: Path, samples: list[dict[str, Any]], masks: dict[str, str] | None = None
) -> Path:
    """A run folder of a config and samples."""
    folder.mkdir()
    config = {"modality": "video", "objective": {"name": "rrpo"}, "text": {"masks": masks}}
    (folder / "config.yaml").write_text(json.dumps(config))
    append_json(folder / "samples.jsonl", samples)
    return folder


def text_of(page: str) -> str:
    return " ".join(html.unescape(re.sub(r"<[^>]+>", " ", page)).split())


def embedded(page: str) -> list[bytes]:
    return [base64.b64decode(d) for d in re.findall(r'src="data:image/webp;base64,([^"]+)"', page)]


def section(found: Section | None) -> str:
    assert found is not None
    return str(found.html)


@pytest.mark.runs
def test_a_page_shows_the_frames_that_were_seen(pami_run: Path, tmp_path: Path) -> None:
    page = write_report([pami_run], tmp_path / "page.html").read_text(encoding="utf-8")
    samples = [s for s in read_json(pami_run / "samples.jsonl") if s["step"] == 3]
    pictures = embedded(section(questions([read_run(pami_run)])))
    assert pictures == [(pami_run / s["frames"]).read_bytes() for s in samples]
    assert all(picture in embedded(page) for picture in pictures)
    assert not re.search(r'(?:src|href)="(?!data:|#)', page), "loads nothing"
    text = text_of(page)
    for words in (
        "What the model saw and said",
        "What does the yeast do after second 20?",
        "clip0.mp4: 4 frames of 64 × 64, 0.00 to 1.88 s, shown at 56 × 56 in 17 tokens",
        "Answer of the data 6 words The yeast plays in the sun.",
        "Divergence against perturbed video, training",
    ):
        assert words in text, words
    assert "Completions before and after" not in text
    before, after = (
        next(s["response"] for s in read_json(pami_run / "samples.jsonl") if s["step"] == step)
        for step in (0, 3)
    )
    assert all(" ".join(said.split()) in text for said in (before, after))


@pytest.mark.runs
def test_the_chosen_clip_stands_open_and_the_others_are_folded(pami_run: Path) -> None:
    page = section(alterations([read_run(pami_run)]))
    samples = [s for s in read_json(pami_run / "samples.jsonl") if s["step"] == 3]
    first = page[: page.index("What does the dog")]
    open_part, folded = first.split("<details>")
    files = {
        bool(c["weight"]): (pami_run / c["frames"]).read_bytes() for c in samples[0]["altered"]
    }
    assert embedded(open_part) == [files[True]]
    assert len(embedded(folded)) == 3
    assert files[False] in embedded(folded)
    chosen = next(c for c in samples[0]["altered"] if c["weight"])
    assert f"augmented: {chosen['operation']}, chosen" in open_part
    assert "divergence before" in open_part


def test_the_table_of_operations_is_the_mean_of_the_log(pami_run: Path) -> None:
    text = text_of(section(alterations([read_run(pami_run)])))
    logs = [line for line in read_json(pami_run / "metrics.jsonl") if "loss" in line]
    for name in ("reverse", "shuffle", "freeze", "crop"):
        drawn, chosen = (
            sum(line[key] for line in logs) / len(logs)
            for key in (f"altered/{name}", f"pami/op/{name}")
        )
        assert drawn == pytest.approx(0.25), "each of four operations once a row"
        assert f"{name} {100 * drawn:.0f} % {100 * chosen:.0f} %" in text


def test_spans_and_changed_words_are_marked(tmp_path: Path) -> None:
    answers = [
        {"name": "Chosen", "text": "It <rises> & falls.", "spans": [[3, 10]]},
        {"name": "Rejected", "text": "It sleeps.", "spans": [[3, 9], [5, 400], [-4, 2]]},
    ]
    said = ("The cat sleeps in the sun.", "The cat plays in the sun now.")
    samples = [
        {"step": step, "id": "a", "prompt": "What?", "response": text, "answers": answers}
        for step, text in zip((0, 9), said, strict=True)
    ]
    run = read_run(hand_made(tmp_path / "run", samples, {"kind": "spans"}))
    page = section(questions([run]))
    assert "It <mark>&lt;rises&gt;</mark> &amp; falls." in page
    assert "It <mark>sleeps</mark><mark>.</mark>" in page  # one starts before the text: left out
    assert "The cat <mark>sleeps</mark> in the <mark>sun.</mark>" in page
    assert "The cat <mark>plays</mark> in the <mark>sun now.</mark>" in page
    assert "the spans that the loss weighs" in page
    assert "After, step 9 <small>7 words</small>" in page
    plain = read_run(hand_made(tmp_path / "plain", samples))
    assert "spans, which this objective does not read" in section(questions([plain]))


@pytest.mark.parametrize(
    ("before", "after", "remark"),
    [
        ("One, two.", "One, two.", "unchanged"),
        ("One two three.", "Eins zwei drei.", "other words throughout"),
        ("", "Now something.", "other words throughout"),
    ],
)
def test_answers_alike_or_wholly_different_have_no_marks(
    before: str, after: str, remark: str
) -> None:
    assert changed(before, after) == (before, after, remark)


def test_marks_keep_every_character() -> None:
    before, after = "  a <b>\n\nc d e", "a <b> x\n\nc e "
    found = changed(before, after)
    for text, shown in zip((before, after), found, strict=False):
        assert html.unescape(re.sub(r"</?mark>", "", shown)) == text
    assert re.sub(r"</?mark>", "", marked("a b", [(0, 1), (1, 3)])) == "a b"


def test_only_sheets_inside_the_run_folder_are_shown(tmp_path: Path) -> None:
    (tmp_path / "secret.webp").write_bytes(b"secret")
    media = [{"kind": "audio", "file": "a.wav", "seconds": 2.0}]
    samples = [
        {"step": 0, "id": name, "prompt": "?", "response": "!", "media": media, "frames": name}
        for name in ("../secret.webp", "config.yaml", "gone.webp")
    ]
    run = read_run(hand_made(tmp_path / "run", samples))
    page = section(questions([run]))
    assert "data:" not in page
    assert page.count("a.wav: 2.0 s of sound") == 3


def test_a_page_stays_small(pami_run: Path, tmp_path: Path) -> None:
    run = shutil.copytree(pami_run, tmp_path / "run")
    samples = [s for s in read_json(run / "samples.jsonl") if s["step"] == 3]
    sheet = run / "samples" / "frames" / "000.webp"
    sheet.write_bytes(sheet.read_bytes() + bytes(300_000))
    (run / "samples.jsonl").unlink()
    append_json(run / "samples.jsonl", [samples[0] | {"id": str(i)} for i in range(40)])
    page = section(questions([read_run(run)]))
    assert len(embedded(page)) == 13, "of 300 kB each"
    assert page.count("Not shown, the page would grow too large") == 27


@pytest.mark.runs
@pytest.mark.parametrize("lacking", [
    "samples", pytest.param("samples.jsonl", marks=pytest.mark.slow), "metrics.jsonl"
])  # fmt: skip
def test_an_interrupted_run_is_shown_as_far_as_it_got(
    lacking: str, pami_run: Path, tmp_path: Path
) -> None:
    run = shutil.copytree(pami_run, tmp_path / "run")
    gone = run / lacking
    shutil.rmtree(gone) if gone.is_dir() else gone.unlink()
    page = write_report([run], tmp_path / "page.html").read_text(encoding="utf-8")
    assert ("What the model saw and said" in page) == (lacking != "samples.jsonl")
    assert ("Altered clips" in page) == (lacking != "metrics.jsonl")


def test_runs_side_by_side_share_questions(pami_run: Path, tmp_path: Path) -> None:
    other = shutil.copytree(pami_run, tmp_path / "other")
    page = section(questions([read_run(pami_run), read_run(other)]))
    assert page.count("<article") == 2
    first = page[: page.index("What does the dog")]
    labels = re.findall(r"<h4>(.*?) <small>", first)
    assert labels == ["Answer of the data", "Before", "run, step 3", "other, step 3"]
