"""What a page shows of a run on images and on clips.

Samples, what the model saw, what was altered.
"""

from __future__ import annotations

import base64
import io
import os
import re
from collections import defaultdict
from collections.abc import Callable, Hashable, Sequence
from dataclasses import dataclass, field, replace
from itertools import zip_longest
from pathlib import Path
from typing import Any

from markupsafe import Markup

from mmalign.data.example import Picture
from mmalign.data.opening import Fence
from mmalign.data.pictures import open_picture, picture_bytes
from mmalign.errors import DataError
from mmalign.report import blocks
from mmalign.report.blocks import Section, changed, marked
from mmalign.report.run import Record, Run, is_number

TERMS = {
    "Denoising error": "The mean squared difference between what the network predicts and what it "
    "should predict, at one drawn noise level. It stands in for the log-probability of an image: "
    "the smaller the error, the better the model explains the image.",
    "Error against the reference": "The trained model's error minus that of the frozen reference, "
    "on the same image with the same noise. Below 0: the image became more likely.",
    "Margin": "What the objective compares: for Diffusion-DPO beta / 2 times how much more the "
    "error fell on the preferred image than on the rejected one.",
    "Implicit accuracy": "The share of pairs whose preferred image gained more than the rejected "
    "one. Before training every pair is a tie, which counts half and says nothing. A model that "
    "breaks all images, the rejected ones faster, has an accuracy of 100 % too.",
    "Noise level": "The drawn timestep, in thousandths of the schedule: 0 is a clean image, 1000 "
    "pure noise. Early levels decide fine detail, late ones the layout.",
    "Interval": "Made again and again in this way from other held-out rows, 95 % of the intervals "
    "would hold the true mean. The noise levels a row is scored at are drawn together.",
}

_MAX_BYTES = 400_000  # of one sheet within the page
_MAX_EARLIER = 6
_WIDTHS = (1600, 1200, 900, 640, 480)


def sheets(runs: Sequence[Run]) -> Section | None:
    """The last sheet of each run, and earlier ones folded; all from the same start noise."""
    parts: list[Markup] = []
    for run in runs:
        found = _sheets_of(run)
        if not found:
            continue
        parts.append(_heading(run, runs))
        *earlier, (step, file) = found
        parts.append(picture(file, f"After {step:,} steps" if step else "Before training"))
        most = min(len(earlier), _MAX_EARLIER)  # evenly spread, the first among them
        shown = [
            picture(file, f"Step {step:,}" if step else "Before training")
            for step, file in (earlier[i * len(earlier) // most] for i in range(most))
        ]
        if shown:
            title = "Earlier steps" if len(earlier) > 1 else f"Step {earlier[0][0]:,}"
            parts.append(blocks.folded(title, Markup().join(shown)))
    if not parts:
        return None
    explained = blocks.paragraph(
        "Each pair starts from the same noise, so what differs is what was learned."
    )
    return Section("Pictures before and after", explained + Markup().join(parts))


def by_noise_level(runs: Sequence[Run]) -> Section | None:
    """Held-out numbers of the last evaluation, for each range of noise levels."""
    parts: list[Markup] = []
    for run in runs:
        table = _levels(run.evals[-1]) if run.evals else None
        if table is not None:
            parts += [_heading(run, runs), table]
    return Section("By noise level", Markup().join(parts)) if parts else None


def _heading(run: Run, runs: Sequence[Run]) -> Markup:
    """The run's name, where there are several."""
    return Markup("<h3>{}</h3>").format(run.name) if len(runs) > 1 else Markup()


def with_error_intervals(run: Run) -> Run:
    """The run with intervals of its error differences, from those of its log-ratios.

    log-ratio = -logp_scale * (policy's error - reference's)
    """
    scale = (run.config.get("diffusion") or {}).get("logp_scale", 0.5)
    evals: list[Record] = []
    for record in run.evals:
        intervals = dict(record.get("intervals") or {})
        for side in ("chosen", "rejected"):
            low, high = intervals.get(f"drift/{side}") or (None, None)
            if is_number(low) and is_number(high):
                intervals[f"errors/{side}_diff"] = [0.0 - high / scale, 0.0 - low / scale]
        evals.append({**record, "intervals": intervals})
    return replace(run, evals=evals)


def picture(file: Path, caption: str) -> Markup:
    """An image file as part of the page, made smaller where it would be too large for one."""
    try:
        kind, data = _bounded(file)
    except DataError as error:
        return Markup('<p class="remark">{}</p>').format(f"{caption}: {error}")
    source = f"data:image/{kind};base64,{base64.b64encode(data).decode()}"
    image = Markup('<img class="sheet" src="{}" alt="{}">').format(source, caption)
    return blocks.figure(image, caption)


def _sheets_of(run: Run) -> list[tuple[int, Path]]:
    """Step and file of every sheet, in order."""
    fence = Fence(run.folder)
    found = [
        (int(match[1]), file)
        for file in run.folder.glob("samples/step-*/sheet.png")
        if (match := re.fullmatch(r"step-(\d{1,15})", file.parent.name))
        and fence.holds(os.path.realpath(file))  # a link in a stranger's run leads anywhere
    ]
    return sorted(found)


def _bounded(file: Path) -> tuple[str, bytes]:
    """Kind and bytes of an image of at most `_MAX_BYTES`: as it is, else a smaller JPEG."""
    data = picture_bytes(Picture(file))
    if len(data) <= _MAX_BYTES:
        return file.suffix.removeprefix("."), data
    image = open_picture(file)
    for width in _WIDTHS:
        out = io.BytesIO()
        smaller = image.copy()
        smaller.thumbnail((width, width * image.height))
        smaller.save(out, format="JPEG", quality=85)
        data = out.getvalue()
        if len(data) <= _MAX_BYTES:
            break
    return "jpeg", data


def _levels(record: Record) -> Markup | None:
    """Rows: ranges of noise levels. A preferred image's error that rose is marked."""
    names = {"reward_accuracy", "errors/chosen_diff", "errors/rejected_diff"}
    found: dict[tuple[int, int], dict[str, float]] = {}
    for key, value in record.items():
        match = re.fullmatch(r"(.+)/t(\d+)-(\d+)", key)
        if match and match[1] in names and is_number(value):
            found.setdefault((int(match[2]), int(match[3])), {})[match[1]] = value
    if not found:
        return None
    rows: list[list[object]] = []
    for (low, high), values in sorted(found.items()):
        accuracy = values.get("reward_accuracy")
        share = blocks.MISSING if accuracy is None else f"{100 * accuracy:.0f} %"
        chosen, rejected = (_signed(values.get(f"errors/{s}_diff")) for s in ("chosen", "rejected"))
        if values.get("errors/chosen_diff", 0.0) > 0:
            chosen = Markup('<span class="bad">{}</span>').format(chosen)
        rows.append([f"{low} to {high}", share, chosen, rejected])
    header = ["", "implicit accuracy", "error on preferred", "error on rejected"]
    caption = "At the last evaluation. Errors are those of the policy minus the reference's."
    return blocks.table(header, rows, caption)


def _signed(value: float | None) -> str:
    return blocks.MISSING if value is None else f"{value:+.2g}".replace("-", "−")


_MOST_OF_SHEETS = 4_000_000  # of all sheets of a section
_MAX_ALTERED = 4  # rows whose altered clips are shown

_MARKS = {
    "spans": "Marked in the answers of the data: the spans that the loss weighs.",
    "diff": "Marked in the answers of the data: where they differ, which is what the loss weighs.",
    None: "Marked in the answers of the data: their spans, which this objective does not read.",
}


@dataclass(slots=True)
class _Budget:
    """Bytes of images that a section may still hold."""

    left: int = _MOST_OF_SHEETS

    def picture(self, run: Run, name: Any, caption: str) -> Markup:
        """A sheet of the run folder; a remark where it is gone or the page is full."""
        file = run.folder / str(name)
        inside = file.resolve().is_relative_to(run.folder.resolve())
        if not (name and inside and file.suffix == ".webp" and file.is_file()):
            return Markup('<p class="remark">{}</p>').format(caption)
        self.left -= file.stat().st_size
        if self.left < 0:
            text = f"{caption}. Not shown, the page would grow too large: {name} in the run folder."
            return Markup('<p class="remark">{}</p>').format(text)
        return picture(file, caption)


@dataclass(slots=True)
class Row:
    """One question, its first record and the answers of all runs by their labels."""

    run: Run
    record: Record
    said: dict[str, str] = field(default_factory=dict[str, str])


def answered(
    runs: Sequence[Run], key: Callable[[Record], Hashable], alone: str = "After"
) -> dict[Any, Row]:
    """Questions by their `key`, with the untrained model's answer and the last of every run.

    A single run without an untrained answer has its last one under the label `alone`.
    """
    rows: dict[Any, Row] = {}
    for run in runs:
        for name, samples in _samples(run, key).items():
            first, last = samples[0], samples[-1]
            row = rows.setdefault(name, Row(run, first))
            if first.get("step") == 0 and last is not first:
                row.said.setdefault("Before", str(first.get("response", "")))
            label = run.name if len(runs) > 1 else "After" if row.said else alone
            row.said[f"{label}, step {last.get('step', '?')}"] = str(last.get("response", ""))
    return rows


def questions(runs: Sequence[Run]) -> Section | None:
    """Each question with what it shows, the answers of the data, and those of the model."""
    rows = answered(runs, lambda r: (str(r.get("id")), str(r.get("prompt"))), "Answer")
    if not rows:
        return None
    budget = _Budget()
    shown = Markup().join(_question(row, budget) for row in rows.values())
    return Section("What the model saw and said", _explained(runs, rows.values()) + shown)


def _explained(runs: Sequence[Run], rows: Any) -> Markup:
    lines = ["Times are seconds from where the clip begins."]
    masks = (runs[0].config.get("text") or {}).get("masks") or {}
    if any(answer.get("spans") for row in rows for answer in row.record.get("answers") or ()):
        lines.append(_MARKS.get(masks.get("kind"), _MARKS[None]))
    if any("Before" in row.said for row in rows):
        lines.append("Marked in the answers of the model: words that changed.")
    return blocks.paragraph(" ".join(lines))


def _question(row: Row, budget: _Budget) -> Markup:
    record = row.record
    parts = [blocks.prompt(record.get("prompt", ""))]
    media = [_medium(about) for about in record.get("media") or ()]
    if media:
        parts.append(budget.picture(row.run, record.get("frames"), "; ".join(media)))
    given: dict[str, str] = {}
    for number, answer in enumerate(record.get("answers") or (), 1):
        name = str(answer.get("name"))
        name = name if name not in given else f"{name} ({number})"
        given[name] = marked(str(answer.get("text", "")), answer.get("spans") or ())
    if given:
        parts.append(blocks.columns(given))
    said, remarks = dict(row.said), {}
    if len(said) == 2 and "Before" in said:
        after = next(label for label in said if label != "Before")
        said["Before"], said[after], remark = changed(said["Before"], said[after])
        remarks = {after: [remark]} if remark else {}
    parts.append(blocks.columns(said, remarks))
    return blocks.article(*parts)


def _medium(about: Record) -> str:
    """One medium in words, e.g. "a.mp4: 8 frames of 640 x 360, 0.00 to 9.50 s, with sound"."""
    text = f"{about.get('file')}: "
    size = f"{about.get('width')} × {about.get('height')}"
    shown: Any = about.get("shown")
    is_pair = isinstance(shown, list) and len(shown) == 2 and all(map(is_number, shown))
    at = " at {} × {}".format(*shown) if is_pair else ""
    cost = f", shown{at} in {about['tokens']} tokens" if is_number(about.get("tokens")) else ""
    if about.get("kind") == "image":
        return f"{text}{size}{cost}"
    if about.get("kind") == "audio":
        return f"{text}{about.get('seconds')} s of sound{cost.replace(' shown', '')}"
    times = about.get("times") or [0.0]
    heard = ", with sound" if about.get("heard") else ""
    frames = f"{len(times)} frame{'' if len(times) == 1 else 's'}"
    return f"{text}{frames} of {size}, {times[0]:.2f} to {times[-1]:.2f} s{heard}{cost}"


def alterations(runs: Sequence[Run]) -> Section | None:
    """Which operations the clips of a run got, and the altered clips of a few rows."""
    parts: list[Markup] = []
    budget = _Budget()
    for run in runs:
        table = _operations(run)
        if table is None:
            continue
        parts += [_heading(run, runs), table]
        of_questions = _samples(run, lambda record: str(record.get("id"))).values()
        rows = [samples for samples in of_questions if samples[-1].get("altered")]
        parts += [_altered(run, samples, budget) for samples in rows[:_MAX_ALTERED]]
    return Section("Altered clips", Markup().join(parts)) if parts else None


def _operations(run: Run) -> Markup | None:
    """Rows: operations. Means over the log lines."""
    keys = dict.fromkeys(key for record in run.metrics for key in record)
    names = [key.removeprefix("altered/") for key in keys if key.startswith("altered/")]
    if not names:
        return None
    header, starts = ["operation", "of all altered clips"], ["altered/"]
    chooses = any(f"pami/op/{name}" in record for record in run.metrics for name in names)
    if chooses:
        header += ["of the chosen ones", "closeness", "divergence, nats"]
        starts += ["pami/op/", "pami/close/", "pami/far/"]
    rows: list[list[object]] = []
    for name in names:
        series = [run.series(start + name)[1] for start in starts]
        values = [sum(found) / len(found) if found else None for found in series]
        if values[0]:  # what was never drawn is left out
            shares = [f"{100 * v:.0f} %" if v is not None else None for v in values[:2]]
            rows.append([Markup("<code>{}</code>").format(name), *shares, *values[2:]])
    explained = "Means over the training's log lines. "
    if chooses:
        explained += (
            "Closeness: cosine of the clip's mean features with the unaltered one's. Divergence: "
            "how differently the model answers under it (Jensen-Shannon, at most 0.69)."
        )
    return blocks.table(header, rows, explained)


def _altered(run: Run, samples: Sequence[Record], budget: _Budget) -> Markup:
    """The altered clips of a row: those that are trained on, and the others folded."""
    first, last = samples[0], samples[-1]
    clips: list[Record] = last["altered"]
    before: list[Record] = first.get("altered") or []
    weighs = any(is_number(clip.get("weight")) for clip in clips)
    parts = [blocks.prompt(last.get("prompt", ""))]
    other: list[Markup] = []
    for clip in clips:
        taken = not weighs or clip.get("weight", 0) > 0
        shown = budget.picture(run, clip.get("frames"), _caption(clip, weighs=weighs))
        (parts if taken else other).append(shown)
    if weighs:
        parts.append(_scores(clips, before if first is not last else []))
    if other:
        parts.append(blocks.folded("The clips that were not chosen", Markup().join(other)))
    return blocks.article(*parts)


def _caption(clip: Record, *, weighs: bool) -> str:
    role = str(clip.get("role", "")).replace("_", " ")
    nothing = "" if clip.get("changed", True) else ", which changes nothing here"
    chosen = ", chosen" if weighs and clip.get("weight", 0) > 0 else ""
    return f"{role}: {clip.get('operation')}{nothing}{chosen}"


def _scores(clips: Sequence[Record], before: Sequence[Record]) -> Markup:
    """The choice among a row's clips, before training and now."""
    header = ["operation", "closeness", "divergence", "weight"]
    if before:
        header[2:] = ["divergence before", "after", "weight before", "after"]
    rows: list[list[object]] = []
    for was, clip in zip_longest(before[: len(clips)], clips, fillvalue={}):
        if is_number(clip.get("weight")):
            pair = [was, clip] if before else [clip]
            values = [one.get(key) for key in ("far", "weight") for one in pair]
            name = Markup("<code>{}</code>").format(clip.get("operation"))
            rows.append([name, clip.get("close"), *values])
    return blocks.table(header, rows)


def _samples(run: Run, key: Callable[[Record], Hashable]) -> dict[Hashable, list[Record]]:
    """The records of each question, in order of the step."""
    found: dict[Hashable, list[Record]] = defaultdict(list)
    for sample in run.samples:
        found[key(sample)].append(sample)
    return found
