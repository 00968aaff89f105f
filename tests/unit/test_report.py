"""The report: what it says about a run, what it survives, and that it needs nothing else."""

from __future__ import annotations

import json
import math
import random
import re
from copy import deepcopy
from functools import cache
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import pytest

from mmalign.errors import ConfigError
from mmalign.evaluate import Tally, summarise
from mmalign.report import Section, blocks, place_of, write_report
from mmalign.report.figures import colour, svg
from mmalign.report.page import eval_section
from mmalign.report.run import read_run, remarks

CONFIG = """\
modality: text
model: {path: some/tiny-model, lora: {rank: 16}}
reference: {kind: auto}
data: {train: [{path: data/pairs.jsonl}], eval_fraction: 0.1}
objective: {name: dpo, beta: 0.1}
train: {lr: 1e-5, batch_size: 4, accumulate: 2, seed: 3}
output: runs/x
"""


def write_lines(path: Path, records: list[dict[str, Any]]) -> None:
    path.write_text("".join(json.dumps(record) + "\n" for record in records), encoding="utf-8")


def evaluation(step: int, chosen: float, rejected: float) -> dict[str, Any]:
    """48 rows whose log-ratios are about `chosen` and `rejected`; the base ranks 3 in 4 rightly."""
    return {"step": step, **deepcopy(held_out_numbers(chosen, rejected))}


@cache
def held_out_numbers(chosen: float, rejected: float) -> dict[str, Any]:
    rows = []
    for index in range(48):
        noise = random.Random(index)
        ref = [-20.0, -25.0 if index % 4 else -15.0]
        drift = [chosen * noise.uniform(0.5, 1.5), rejected * noise.uniform(0.5, 1.5)]
        rows.append(
            {
                "id": f"row-{index}",
                "labels": [1.0, 0.0],
                "logps": [r + d for r, d in zip(ref, drift, strict=True)],
                "lengths": [10, 12],
                "ref_logps": ref,
                "kl": [0.1 * abs(chosen), 0.1 * abs(rejected)],
                "loss": math.log1p(math.exp(-0.1 * (drift[0] - drift[1]))),
            }
        )
    found = summarise(Tally(rows), beta=0.1)
    return {**found.metrics, "intervals": found.intervals, "rows": found.rows}


def make_run(
    folder: Path,
    *,
    steps: int = 30,
    chosen: float = 2.0,
    rejected: float = -3.0,
    final: bool = True,
    evals: bool = True,
) -> Path:
    folder.mkdir(parents=True)
    (folder / "config.yaml").write_text(CONFIG)
    (folder / "env.json").write_text(
        json.dumps({"python": "3.11.2", "data": {"train_rows": 240, "eval_rows": 48}})
    )
    write_lines(
        folder / "metrics.jsonl",
        [
            {
                "step": step,
                "loss": 0.7 - 0.01 * step,
                "rewards/chosen": 0.01 * step,
                "rewards/rejected": -0.02 * step,
                "rewards/margins": 0.03 * step,
                "rewards/accuracies": min(1.0, 0.5 + 0.03 * step),
                "learning_rate": 1e-5,
                "grad_norm": 1.0,
            }
            for step in range(1, steps + 1)
        ],
    )
    if evals:
        write_lines(
            folder / "eval.jsonl", [evaluation(0, 0.0, 0.0), evaluation(steps, chosen, rejected)]
        )
    question = [{"role": "user", "content": "Why is <b>bread</b> soft?"}]
    write_lines(
        folder / "samples.jsonl",
        [
            {"step": 0, "id": "a", "prompt": question, "response": "A long & winding answer."},
            {"step": steps, "id": "a", "prompt": question, "response": "Yeast."},
        ],
    )
    if final:
        (folder / "final").mkdir()
    return folder


def bare_run(folder: Path) -> Path:
    """A run whose page has one figure, for tests of something else: figures take its time."""
    run = make_run(folder, steps=2, evals=False)
    write_lines(run / "metrics.jsonl", [{"step": step, "loss": 0.7} for step in (1, 2)])
    return run


class Page(HTMLParser):
    """Collects what a test wants to know, and that every element is closed."""

    VOID = frozenset(("meta", "br", "link", "img", "use", "path"))

    def __init__(self, text: str) -> None:
        super().__init__()
        self.open: list[str] = []
        self.links: list[str] = []
        self.words: list[str] = []
        self.feed(text)
        assert self.open == []

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        if tag not in self.VOID:
            self.open.append(tag)
        self.links += [
            value or "" for name, value in attrs if name in ("src", "href", "xlink:href")
        ]

    def handle_endtag(self, tag: str) -> None:
        if tag not in self.VOID:
            assert self.open.pop() == tag

    def handle_data(self, data: str) -> None:
        if self.open and self.open[-1] != "style":
            self.words.append(data)

    @property
    def text(self) -> str:
        return " ".join(" ".join(self.words).split())


@pytest.fixture(scope="module")
def whole_page(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("whole")
    return write_report([make_run(folder / "run")], folder / "page.html")


def test_a_page_is_one_file_and_says_what_happened(whole_page: Path) -> None:
    raw = whole_page.read_text(encoding="utf-8")
    page = Page(raw)

    assert all(link.startswith("#") for link in page.links), "loads nothing"
    assert not re.search(r"url\((?!#)", raw)
    assert "<script" not in raw
    for words in (
        "dpo on tiny-model",
        "finished after 30 steps",
        "some/tiny-model",
        "dpo (beta 0.1)",
        "LoRA, rank 16",
        "data/pairs.jsonl (240 rows)",
        "10% of the prompts (48 rows)",
        "Why is <b>bread</b> soft?",  # as text
        "Before 5 words A long & winding answer.",
        "After, step 30 1 word Yeast.",
        "Reward accuracy",
        "learning rate",
        "lr: 1.0e-05",
        "python: 3.11.2",
    ):
        assert words in page.text, words
    assert "<b>bread" not in raw, "what a model says is escaped"
    assert list(whole_page.parent.glob(".*")) == [], "no temporary file is left"


def test_figures_have_axes_text_and_a_description(whole_page: Path) -> None:
    raw = whole_page.read_text()
    drawings = re.findall(r"<svg.*?</svg>", raw, re.DOTALL)
    assert len(drawings) == 9
    for drawing in drawings:
        assert "optimizer step" in drawing
        assert re.search(r'role="img" aria-label="\w[^"]+ over the optimizer steps: ', drawing)
        assert "#0" not in re.sub(r"#[0-9a-z]{8,}", "", drawing), (
            "colours are variables of the page"
        )
    ids = re.findall(r' id="([^"]+)"', raw)
    assert len(ids) == len(set(ids)), "several drawings share one page"


def test_held_out_numbers_have_intervals_and_a_paired_change(tmp_path: Path) -> None:
    run = read_run(make_run(tmp_path / "run", chosen=2.0, rejected=-12.0))
    section = eval_section([run])
    assert section is not None
    text = Page(str(section.html)).text
    first, last = run.evals
    assert (first["ranking_accuracy"], last["ranking_accuracy"]) == (0.75, 1.0)
    low, high = first["intervals"]["ranking_accuracy"]
    assert f"75 % {100 * low:.0f} to {100 * high:.0f} 100 % 100 to 100 +25 points +" in text
    assert "Reward accuracy" in text
    assert "one row is 2.1 percentage points" in text
    # Log-ratios are 0 before, so the paired change is the number itself, interval and all.
    number, interval = last["drift/chosen"], last["intervals"]["drift/chosen"]
    assert f"+{number:.2f} +{interval[0]:.2f} to +{interval[1]:.2f}" in text


@pytest.mark.runs
def test_several_runs_share_a_page(tmp_path: Path) -> None:
    runs = [make_run(tmp_path / name) for name in ("one", "two")]
    raw = write_report(runs, tmp_path / "page.html").read_text()
    page = Page(raw)
    assert "2 runs compared" in page.text
    assert "one, step 30" in page.text
    assert "two, step 30" in page.text
    assert "var(--series-2)" in raw
    assert page.text.count("one, two: Training reward accuracy is 100 %") == 1


def test_a_page_of_several_runs_takes_nobodys_place(tmp_path: Path) -> None:
    runs = [bare_run(tmp_path / name) for name in ("one", "two")]
    own = write_report(runs[:1], place_of(runs[:1]))
    assert own == runs[0] / "report.html"
    before = own.read_text()
    first = write_report(runs, place_of(runs))
    second = write_report(runs, place_of(runs))
    assert [page.name for page in (first, second)] == [
        "report-one-two.html",
        "report-one-two-2.html",
    ]
    assert own.read_text() == before


def test_a_tied_start_is_no_number_to_gain_from(tmp_path: Path) -> None:
    """Every log-ratio is 0 before the first step, so that an accuracy says nothing then."""
    run = read_run(make_run(tmp_path / "run"))
    section = eval_section([run])
    assert section is not None
    text = Page(str(section.html)).text
    (told,) = re.findall(r"Reward accuracy pairs whose .*? one (.*?) Loss", text)
    assert told.startswith("all tied 100 %")
    assert "points" not in told


@pytest.mark.parametrize(
    ("values", "words"),
    [
        ({"chosen": -4.0, "rejected": -9.0}, "The chosen answers became less likely"),
        ({"chosen": 1.0, "rejected": -9.0}, "nats for every nat that the chosen ones gained"),
        ({"chosen": 1.0, "rejected": -2.0}, "Reward accuracy is 100%, ranking accuracy only 75%"),
        ({"chosen": 1.0, "rejected": 4.0}, "The held-out loss rose from 0.693 to "),
        ({"final": False}, "stopped at step 30, before its end"),
    ],
)
def test_what_went_wrong_is_said(tmp_path: Path, values: dict[str, Any], words: str) -> None:
    found = remarks(read_run(make_run(tmp_path / "run", **values)))
    assert any(words in remark.text for remark in found)


def test_an_accuracy_like_a_coins_is_called_that(tmp_path: Path) -> None:
    folder = make_run(tmp_path / "run")
    last = {**evaluation(30, 1.0, 0.0), "reward_accuracy": 0.55}
    last["intervals"]["reward_accuracy"] = [0.42, 0.67]
    write_lines(folder / "eval.jsonl", [evaluation(0, 0.0, 0.0), last])
    text = " ".join(remark.text for remark in remarks(read_run(folder)))
    assert "reward accuracy is 55% (42% to 67%), which a coin would reach" in text


def test_single_responses_have_their_own_warning(tmp_path: Path) -> None:
    folder = make_run(tmp_path / "run")
    drift = {"drift/desirable": -40.0, "drift/undesirable": -35.0}
    write_lines(folder / "eval.jsonl", [{"step": 30, "loss": 0.5, **drift}])
    text = " ".join(remark.text for remark in remarks(read_run(folder)))
    assert "The desirable answers became less likely than under the reference" in text


def test_a_healthy_run_has_no_warning(tmp_path: Path) -> None:
    found = remarks(read_run(make_run(tmp_path / "run", chosen=6.0, rejected=-8.0)))
    assert not any(remark.is_warning for remark in found)


@pytest.mark.runs
def test_an_interrupted_run_is_shown_as_far_as_it_got(tmp_path: Path) -> None:
    folder = make_run(tmp_path / "run", final=False)
    for name in ("eval.jsonl", "samples.jsonl", "env.json"):
        (folder / name).unlink()
    first = (folder / "metrics.jsonl").read_text().splitlines()[0]
    (folder / "metrics.jsonl").write_text(first + '\n{"step": 2, "lo')
    text = Page(write_report([folder], tmp_path / "page.html").read_text()).text
    assert "stopped early, at step 1" in text
    assert "metrics.jsonl: 1 unreadable line left out" in text
    assert "Completions" not in text
    assert "Held-out numbers" not in text


@pytest.mark.runs
@pytest.mark.parametrize("value", [None, math.nan, math.inf])
def test_numbers_that_are_none_do_not_break_the_page(tmp_path: Path, value: float | None) -> None:
    folder = make_run(tmp_path / "run")
    write_lines(
        folder / "metrics.jsonl",
        [{"step": 1, "loss": 0.7, "kl": value}, {"step": 2, "loss": value, "kl": value}],
    )
    last = {**evaluation(2, 1.0, -1.0), "loss": value}
    last["rows"][0]["logps"][0] = None
    write_lines(folder / "eval.jsonl", [evaluation(0, 0.0, 0.0), last])
    text = Page(write_report([folder], tmp_path / "page.html").read_text()).text
    assert "The loss was not finite at step 2" in text
    assert "KL to the reference, training" not in text


def test_a_run_with_only_a_config_gets_a_page(tmp_path: Path) -> None:
    folder = tmp_path / "run"
    folder.mkdir()
    (folder / "config.yaml").write_text(CONFIG)
    text = Page(write_report([folder], tmp_path / "page.html").read_text()).text
    assert "stopped before its first log line" in text


@pytest.mark.parametrize(
    ("file", "value", "said"),
    [
        ("config.yaml", "objective: [a]\nmodel: {path: m}\n", "config.yaml: 1 odd value"),
        ("config.yaml", "model: {path: [1], lora: {}}\ntrain: {batch_size: {a: 1}}\n", "odd value"),
        ("env.json", '{"data": {"train_rows": "many", "eval_rows": [1], "notes": [3]}}', "3 odd"),
        ("env.json", "[1]", "env.json"),
        ("metrics.jsonl", '{"step": 1, "loss": {"a": 1}}\n{"step": [2]}\n', "metrics.jsonl: 1"),
        ("eval.jsonl", '{"step": 0, "loss": 1, "intervals": [], "rows": 3}\n', "intervals, rows"),
        ("eval.jsonl", '{"step": 2, "loss": 1, "intervals": {"loss": 3}}\n', "1 odd value"),
        (
            "eval.jsonl",
            '{"step": 1, "rows": [{"labels": [1, 0], "logps": [1, 2], "lengths": [1]}]}\n',
            "left out: rows",
        ),
        ("samples.jsonl", '{"step": 2, "prompt": [3], "response": 1}\n{"step": "a"}\n', "odd"),
        ("samples.jsonl", '{"step": 1, "prompt": {"a": 1}, "answers": {"b": 2}}\n', "answers"),
    ],
)
def test_what_a_run_holds_of_another_type_is_left_out_and_counted(
    tmp_path: Path, file: str, value: str, said: str
) -> None:
    run = bare_run(tmp_path / "run")
    (run / file).write_text(value)
    found = read_run(run)
    assert said in " ".join(found.problems)
    text = write_report([run], tmp_path / "page.html").read_text()
    assert "left out" in Page(text).text


def test_a_sheet_elsewhere_is_not_shown(tmp_path: Path) -> None:
    """A run folder of a stranger must not put other files of this machine on a page."""
    run = bare_run(tmp_path / "run")
    (tmp_path / "secret.png").write_bytes(b"SECRET")
    (run / "samples" / "step-2").mkdir(parents=True)
    (run / "samples" / "step-2" / "sheet.png").symlink_to(tmp_path / "secret.png")
    text = write_report([run], tmp_path / "page.html").read_text()
    assert "U0VDUkVU" not in text  # SECRET in base64


def test_what_is_no_run_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="no such folder"):
        write_report([tmp_path / "absent"], tmp_path / "page.html")
    with pytest.raises(ConfigError, match="not a run folder"):
        write_report([tmp_path], tmp_path / "page.html")
    assert not (tmp_path / "page.html").exists()


def test_own_sections_come_first_and_are_escaped(tmp_path: Path) -> None:
    answers = [blocks.Answers("Q?", {"before": "one two", "after": ""}, {"after": ["keyword"]})]
    drawing = svg(lambda axes: axes.bar([1, 2], [3, 4], color=colour(0)), alt='A "bar" chart')
    section = Section(
        "The effect",
        blocks.paragraph("Run `mmalign` & see <it>.")
        + blocks.bullets(["Another `--seed` & so on."])
        + blocks.table(["", "words", "note"], [["before", 41.4, "cut"], ["after", None, "–"]])
        + blocks.figures([blocks.figure(drawing, "Lengths", "In words.")])
        + blocks.side_by_side(answers),
    )
    plain = Section("Plain", "a < b")
    out = write_report(
        [bare_run(tmp_path / "run")],
        tmp_path / "page.html",
        title="T & T",
        sections=[section, plain],
    )
    raw = out.read_text()
    text = Page(raw).text
    assert text.index("The effect") < text.index("What was trained")
    for words in (
        "T & T",
        "Run mmalign & see <it>.",
        "before 41.4 cut after – –",
        "after 0 words · keyword (empty)",
        "a < b",
    ):
        assert words in text, words
    assert "<code>mmalign</code>" in raw
    assert "<ul><li>Another <code>--seed</code> &amp; so on.</li></ul>" in raw
    assert 'aria-label="A &#34;bar&#34; chart"' in raw


@pytest.mark.parametrize(
    ("value", "shown"),
    [
        (41.4, "41.4"), (0.69314, "0.6931"),
        (12345.678, "12,346"), (12340.2, "12,340"), (1e-5, "1e-05"), (0, "0"),
        (3.0, "3"), (1234567, "1,234,567"), (-0.5, "-0.5"), (100.04, "100"), (None, "–"),
        (math.nan, "–"), (True, "True"), ("text", "text"),
    ],
)  # fmt: skip
def test_numbers_are_short(value: object, shown: str) -> None:
    assert blocks.number(value) == shown


def test_columns_of_numbers_are_right_aligned() -> None:
    html = blocks.table(
        ["", "n", "m", "t"], [["a", "41 %", blocks.MISSING, "x"], ["b", 1, -2.5, "3"]]
    )
    assert html.count('class="text"') == 4, "the row names and the last column"


def _luminance(colour: str) -> float:
    channels = [int(colour[i : i + 2], 16) / 255 for i in (1, 3, 5)]
    linear = [c / 12.92 if c <= 0.04045 else ((c + 0.055) / 1.055) ** 2.4 for c in channels]
    return 0.2126 * linear[0] + 0.7152 * linear[1] + 0.0722 * linear[2]


def _contrast(one: str, other: str) -> float:
    high, low = sorted((_luminance(one), _luminance(other)), reverse=True)
    return (high + 0.05) / (low + 0.05)


def test_colours_can_be_read_in_light_and_dark() -> None:
    css = Path(blocks.__file__).with_name("page.css").read_text()
    themes = [dict(re.findall(r"--([\w-]+): (#\w{6})", part)) for part in css.split("@media")[:2]]
    assert all(len(theme) == 19 for theme in themes)
    for theme in themes:
        for text, ground in (
            ("ink", "paper"),
            ("ink", "raised"),
            ("ink-soft", "paper"),
            ("ink-soft", "raised"),
            ("warn-ink", "warn-paper"),
            ("good-ink", "good-paper"),
            ("ink", "mark"),
        ):
            assert _contrast(theme[text], theme[ground]) >= 4.5, (text, ground)
        for index in range(1, 7):
            assert _contrast(theme[f"series-{index}"], theme["paper"]) >= 4.5, index


def test_long_curves_are_thinned_and_keep_their_ends(tmp_path: Path) -> None:
    folder = bare_run(tmp_path / "run")
    write_lines(
        folder / "metrics.jsonl", [{"step": s, "loss": 1.0 + s % 2} for s in range(1, 20_001)]
    )
    size = write_report([folder], tmp_path / "page.html").stat().st_size
    assert size < 400_000
