"""Held-out numbers before and after, with their intervals."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from markupsafe import Markup

from mmalign.report import blocks, pictures
from mmalign.report.blocks import Section
from mmalign.report.run import is_number

if TYPE_CHECKING:
    from collections.abc import Sequence

    from mmalign.report.run import Record, Run


@dataclass(frozen=True, slots=True)
class _Metric:
    key: str
    label: str
    meaning: str
    is_share: bool = False
    changes: bool = True
    is_tiny: bool = False  # shown with significant digits


_METRICS = (
    _Metric(
        "ranking_accuracy",
        "Ranking accuracy",
        "pairs whose chosen answer the model itself finds at least as likely",
        is_share=True,
    ),
    _Metric(
        "ranking_accuracy_per_token",
        "Ranking accuracy per token",
        "the same by mean log-probability, which does not favour short answers",
        is_share=True,
    ),
    _Metric(
        "reward_accuracy",
        "Reward accuracy",
        "pairs whose chosen answer gained more than the rejected one",
        is_share=True,
    ),
    _Metric(
        "idealised_accuracy",
        "Idealised ranking accuracy",
        "what the exact optimum would reach from this reference",
        is_share=True,
        changes=False,
    ),
    _Metric(
        "separation",
        "Separation",
        "how often a desirable answer scores above an undesirable one of another row",
        is_share=True,
    ),
    _Metric("loss", "Loss", "the objective on held-out rows"),
    _Metric("log_ratio_margin", "Log-ratio margin", "chosen minus rejected, in nats"),
    _Metric("drift/chosen", "Log-ratio of the chosen answers", "nats against the reference"),
    _Metric("drift/rejected", "Log-ratio of the rejected answers", "nats against the reference"),
    _Metric("drift/desirable", "Log-ratio of desirable answers", "nats against the reference"),
    _Metric("drift/undesirable", "Log-ratio of undesirable answers", "nats against the reference"),
    _Metric("kl_per_token", "KL per token", "KL(reference, policy), in nats"),
)

_PICTURE_METRICS = (
    _Metric(
        "errors/chosen_diff",
        "Error on preferred pictures",
        "policy minus reference; above 0 the model explains them worse than before",
        is_tiny=True,
    ),
    _Metric(
        "errors/rejected_diff",
        "Error on rejected pictures",
        "policy minus reference; above 0 the model has moved away from them",
        is_tiny=True,
    ),
    _Metric(
        "reward_accuracy",
        "Implicit accuracy",
        "pairs whose preferred picture gained more than the rejected one",
        is_share=True,
    ),
    _Metric(
        "separation",
        "Separation",
        "how often a desirable picture scores above an undesirable one of another row",
        is_share=True,
    ),
    _Metric("loss", "Loss", "the objective on held-out rows"),
    _Metric(
        "errors/policy_chosen",
        "Denoising error of preferred pictures",
        "under the trained model",
        is_tiny=True,
    ),
)


def held_out(runs: Sequence[Run]) -> Section | None:
    """The first and the last evaluation of a run; of several runs the last of each."""
    runs = [pictures.with_error_intervals(run) if run.has_pictures else run for run in runs]
    runs = [run for run in runs if run.evals]
    if not runs:
        return None
    shown = _PICTURE_METRICS if all(run.has_pictures for run in runs) else _METRICS
    table = _before_and_after(runs[0], shown) if len(runs) == 1 else _compared(runs, shown)
    return Section("Held-out numbers", table)


def _before_and_after(run: Run, metrics: Sequence[_Metric]) -> Markup:
    first, last = run.evals[0], run.evals[-1]
    if first is last:
        header = ["", f"at step {last.get('step')}"]
        rows = [[_name(m), _cell(last, m)] for m in metrics if _has(last, m)]
        return blocks.table(header, rows, _caption(run))
    from mmalign.evaluate import TIED, is_tied

    changes = _changes(first, last, metrics)
    if is_tied(first):  # by construction, and no result that a gain could be counted from
        changes.pop(TIED, None)
    before = "before" if first.get("step") == 0 else f"at step {first.get('step')}"
    header = ["", before, f"after {last.get('step'):,} steps", "change"]
    rows = [
        [_name(m), _cell(first, m), _cell(last, m), changes.get(m.key, blocks.MISSING)]
        for m in metrics
        if _has(last, m)
    ]
    return blocks.table(header, rows, _caption(run))


def _compared(runs: Sequence[Run], metrics: Sequence[_Metric]) -> Markup:
    start = runs[0].evals[0]
    has_start = start.get("step") == 0
    header = ["", *(["before"] if has_start else []), *(run.name for run in runs)]
    rows: list[list[object]] = []
    for metric in metrics:
        if any(_has(run.evals[-1], metric) for run in runs):
            before = [_cell(start, metric)] if has_start else []
            rows.append([_name(metric), *before, *(_cell(run.evals[-1], metric) for run in runs)])
    return blocks.table(header, rows, _caption(runs[0]))


def _caption(run: Run) -> str:
    rows = run.evals[-1].get("rows") or []
    interval = "Below each mean: its 95 % bootstrap interval."
    if not rows:
        return interval
    count = len(rows)
    # A held-out picture row is scored at several noise levels, as ROW@0, ROW@1, ...
    num_rows = len({str(row.get("id")).rpartition("@")[0] or row.get("id") for row in rows})
    if run.has_pictures and num_rows < count:
        return f"{num_rows:,} held-out rows at {count // num_rows} noise levels each. {interval}"
    return (
        f"{count:,} held-out rows: one row is {100 / count:.2g} percentage points of an accuracy. "
        f"{interval}"
    )


def _changes(first: Record, last: Record, metrics: Sequence[_Metric]) -> dict[str, Markup]:
    """Change of each metric, with its interval over the same rows where there are such."""
    from mmalign.evaluate import bootstrap_interval, row_values

    old, new = first.get("rows") or [], last.get("rows") or []
    paired = bool(old) and [row.get("id") for row in old] == [row.get("id") for row in new]
    columns = (row_values(old), row_values(new)) if paired else ({}, {})
    changes: dict[str, Markup] = {}
    for metric in metrics:
        if not (metric.changes and _has(first, metric) and _has(last, metric)):
            continue
        interval = None
        if metric.key in columns[0] and metric.key in columns[1]:
            gap = columns[1][metric.key] - columns[0][metric.key]
            gap = gap[gap == gap]  # rows that have the metric both times
            interval = bootstrap_interval(gap) if len(gap) > 1 else None
        changes[metric.key] = _shown(last[metric.key] - first[metric.key], interval, metric, "+")
    return changes


def _has(record: Record, metric: _Metric) -> bool:
    return is_number(record.get(metric.key))


def _name(metric: _Metric) -> Markup:
    return Markup("{} <small>{}</small>").format(metric.label, metric.meaning)


def _cell(record: Record, metric: _Metric) -> Markup | str:
    if not _has(record, metric):
        return blocks.MISSING
    if metric.key == "reward_accuracy" and record.get("step") == 0:
        from mmalign.evaluate import is_tied

        if is_tied(record):
            return "all tied"
    interval: Any = (record.get("intervals") or {}).get(metric.key)
    return _shown(record[metric.key], interval, metric)


def _shown(value: float, interval: Any, metric: _Metric, sign: str = "") -> Markup:
    def text(number: float) -> str:
        if metric.is_share:
            return f"{100 * number:{sign}.0f}".replace("-", "−")
        if metric.is_tiny:
            return f"{number:{sign}.3g}".replace("-", "−")
        digits = 3 if abs(number) < 1 else 2
        return f"{number:{sign}.{digits}f}".replace("-", "−")

    unit = (" points" if sign else " %") if metric.is_share else ""
    shown = Markup("{}{}").format(text(value), unit)
    if interval is None or not all(is_number(end) for end in interval):
        return shown
    low, high = interval
    return shown + Markup(" <small>{} to {}</small>").format(text(low), text(high))
