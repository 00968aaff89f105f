"""What a page shows of a run on pictures: sheets of samples, and numbers by noise level."""

from __future__ import annotations

import base64
import io
import os
import re
from dataclasses import replace
from typing import TYPE_CHECKING

from markupsafe import Markup

from mmalign.data.example import Picture
from mmalign.data.opening import Fence
from mmalign.data.pictures import open_picture, picture_bytes
from mmalign.errors import DataError
from mmalign.report import blocks
from mmalign.report.blocks import Section
from mmalign.report.shapes import is_number

if TYPE_CHECKING:
    from collections.abc import Sequence
    from pathlib import Path

    from mmalign.report.run import Record, Run

TERMS = {
    "Denoising error": "The mean squared difference between what the network predicts and what it "
    "should predict, at one drawn noise level. It stands in for the log-probability of a picture: "
    "the smaller the error, the better the model explains the picture.",
    "Error against the reference": "The trained model's error minus that of the frozen reference, "
    "on the same picture with the same noise. Below 0: the picture became more likely.",
    "Margin": "What the objective compares: for Diffusion-DPO beta / 2 times how much more the "
    "error fell on the preferred picture than on the rejected one.",
    "Implicit accuracy": "The share of pairs whose preferred picture gained more than the rejected "
    "one. Before training every pair is a tie, which counts half and says nothing. A model that "
    "breaks all pictures, the rejected ones faster, has an accuracy of 100 % too.",
    "Noise level": "The drawn timestep, in thousandths of the schedule: 0 is a clean picture, 1000 "
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
        if len(runs) > 1:
            parts.append(Markup("<h3>{}</h3>").format(run.name))
        *earlier, (step, file) = found
        parts.append(picture(file, f"After {step:,} steps" if step else "Before training"))
        shown = [_figure(*item) for item in _spread(earlier)]
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
            heading = Markup("<h3>{}</h3>").format(run.name) if len(runs) > 1 else Markup()
            parts.append(heading + table)
    return Section("By noise level", Markup().join(parts)) if parts else None


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
    """A picture file as part of the page, made smaller where it would be too large for one."""
    try:
        kind, data = _bounded(file)
    except DataError as error:
        return Markup('<p class="remark">{}</p>').format(f"{caption}: {error}")
    source = f"data:image/{kind};base64,{base64.b64encode(data).decode()}"
    image = Markup('<img class="sheet" src="{}" alt="{}">').format(source, caption)
    return blocks.figure(image, caption)


def _figure(step: int, file: Path) -> Markup:
    return picture(file, f"Step {step:,}" if step else "Before training")


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


def _spread(items: Sequence[tuple[int, Path]]) -> list[tuple[int, Path]]:
    """At most `_MAX_EARLIER` of them, the first among them, evenly spread."""
    if len(items) <= _MAX_EARLIER:
        return list(items)
    return [items[i * len(items) // _MAX_EARLIER] for i in range(_MAX_EARLIER)]


def _bounded(file: Path) -> tuple[str, bytes]:
    """Kind and bytes of a picture of at most `_MAX_BYTES`: as it is, else a smaller JPEG."""
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
    """Rows: ranges of noise levels. A preferred picture's error that rose is marked."""
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
        rows.append(
            [
                f"{low} to {high}",
                blocks.MISSING if accuracy is None else f"{100 * accuracy:.0f} %",
                _marked(values.get("errors/chosen_diff")),
                _signed(values.get("errors/rejected_diff")),
            ]
        )
    header = ["", "implicit accuracy", "error on preferred", "error on rejected"]
    caption = "At the last evaluation. Errors are those of the policy minus the reference's."
    return blocks.table(header, rows, caption)


def _signed(value: float | None) -> str:
    return blocks.MISSING if value is None else f"{value:+.2g}".replace("-", "−")


def _marked(value: float | None) -> Markup | str:
    if value is None or value <= 0:
        return _signed(value)
    return Markup('<span class="bad">{}</span>').format(_signed(value))
