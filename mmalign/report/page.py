"""The page's own sections, from what the run folders say."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Literal

from markupsafe import Markup, escape

from mmalign.config import yaml
from mmalign.report import blocks, pictures
from mmalign.report.blocks import Answers, Section
from mmalign.report.figures import PLOTS, Plot, plot
from mmalign.report.run import Record, Remark, Run, Scores, is_number, remarks


@dataclass(frozen=True, slots=True)
class _Metric:
    key: str
    label: str
    meaning: str
    kind: Literal["", "share", "tiny"] = ""  # tiny: shown with significant digits
    changes: bool = True


_AGAINST = "nats against the reference"
_SEPARATION = "how often a desirable {} scores above an undesirable one of another row"
_LOSS = _Metric("loss", "Loss", "the objective on held-out rows")

_OF_IMAGES = (
    _Metric(
        "errors/chosen_diff",
        "Error on preferred images",
        "policy minus reference; above 0 the model explains them worse than before",
        "tiny",
    ),
    _Metric(
        "errors/rejected_diff",
        "Error on rejected images",
        "policy minus reference; above 0 the model has moved away from them",
        "tiny",
    ),
    _Metric(
        "reward_accuracy",
        "Implicit accuracy",
        "pairs whose preferred image gained more than the rejected one",
        "share",
    ),
    _Metric("separation", "Separation", _SEPARATION.format("picture"), "share"),
    _LOSS,
    _Metric(
        "errors/policy_chosen",
        "Denoising error of preferred images",
        "under the trained model",
        "tiny",
    ),
)
_OF_ANSWERS = (
    _Metric(
        "ranking_accuracy",
        "Ranking accuracy",
        "pairs whose chosen answer the model itself finds at least as likely",
        "share",
    ),
    _Metric(
        "ranking_accuracy_per_token",
        "Ranking accuracy per token",
        "the same by mean log-probability, which does not favour short answers",
        "share",
    ),
    _Metric(
        "reward_accuracy",
        "Reward accuracy",
        "pairs whose chosen answer gained more than the rejected one",
        "share",
    ),
    _Metric(
        "idealised_accuracy",
        "Idealised ranking accuracy",
        "what the exact optimum would reach from this reference",
        "share",
        changes=False,
    ),
    _Metric("separation", "Separation", _SEPARATION.format("answer"), "share"),
    _LOSS,
    _Metric("log_ratio_margin", "Log-ratio margin", "chosen minus rejected, in nats"),
    _Metric("drift/chosen", "Log-ratio of the chosen answers", _AGAINST),
    _Metric("drift/rejected", "Log-ratio of the rejected answers", _AGAINST),
    _Metric("drift/desirable", "Log-ratio of desirable answers", _AGAINST),
    _Metric("drift/undesirable", "Log-ratio of undesirable answers", _AGAINST),
    _Metric("kl_per_token", "KL per token", "KL(reference, policy), in nats"),
)


def _scores(runs: Sequence[Run]) -> Scores:
    """What the numbers of all runs can be read as."""
    return "errors" if all(run.has_pictures for run in runs) else "tokens"


def eval_section(runs: Sequence[Run]) -> Section | None:
    """The first and the last evaluation of a run; of several runs the last of each."""
    runs = [pictures.with_error_intervals(run) if run.has_pictures else run for run in runs]
    runs = [run for run in runs if run.evals]
    if not runs:
        return None
    metrics = _OF_IMAGES if _scores(runs) == "errors" else _OF_ANSWERS
    first, lasts = runs[0].evals[0], [run.evals[-1] for run in runs]
    is_start = first.get("step") == 0
    columns = list(zip([run.name for run in runs], lasts, strict=True))
    changes: dict[str, Markup] | None = None
    if len(runs) > 1:
        columns[:0] = [("before", first)] if is_start else []
    elif first is lasts[0]:
        columns = [(f"at step {first.get('step')}", first)]
    else:
        before = "before" if is_start else f"at step {first.get('step')}"
        columns = [(before, first), (f"after {lasts[0].get('step'):,} steps", lasts[0])]
        changes = _changes(first, lasts[0], metrics)
    rows = [
        [
            Markup("{} <small>{}</small>").format(metric.label, metric.meaning),
            *(_cell(record, metric) for _, record in columns),
            *([] if changes is None else [changes.get(metric.key, blocks.MISSING)]),
        ]
        for metric in metrics
        if any(_has(record, metric) for record in lasts)
    ]
    header = ["", *(title for title, _ in columns), *([] if changes is None else ["change"])]
    return Section("Held-out numbers", blocks.table(header, rows, _caption(runs[0])))


def _caption(run: Run) -> str:
    rows = run.evals[-1].get("rows") or []
    interval = "Below each mean: its 95 % bootstrap interval."
    if not rows:
        return interval
    count = len(rows)
    # A held-out image row is scored at several noise levels, as ROW@0, ROW@1, ...
    num_rows = len({str(row.get("id")).rpartition("@")[0] or row.get("id") for row in rows})
    if run.has_pictures and num_rows < count:
        return f"{num_rows:,} held-out rows at {count // num_rows} noise levels each. {interval}"
    return (
        f"{count:,} held-out rows: one row is {100 / count:.2g} percentage points of an accuracy. "
        f"{interval}"
    )


def _changes(first: Record, last: Record, metrics: Sequence[_Metric]) -> dict[str, Markup]:
    """Change of each metric, with its interval over the same rows where there are such."""
    from mmalign.evaluate import TIED, is_tied, row_values
    from mmalign.stats import bootstrap_interval

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
    if is_tied(first):  # by construction, and no result that a gain could be counted from
        changes.pop(TIED, None)
    return changes


def _has(record: Record, metric: _Metric) -> bool:
    return is_number(record.get(metric.key))


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
        plain = ".3f" if abs(number) < 1 else ".2f"
        digits = {"share": ".0f", "tiny": ".3g"}.get(metric.kind, plain)
        scaled = 100 * number if metric.kind == "share" else number
        return f"{scaled:{sign}{digits}}".replace("-", "−")

    unit = (" points" if sign else " %") if metric.kind == "share" else ""
    shown = Markup("{}{}").format(text(value), unit)
    if interval is None or not all(is_number(end) for end in interval):
        return shown
    low, high = interval
    return shown + Markup(" <small>{} to {}</small>").format(text(low), text(high))


_TERMS = {
    "Log-ratio": "The log-probability of an answer under the trained model minus the same under "
    "the frozen reference, in nats. Above 0: the answer became more likely.",
    "Implicit reward": "What the objective compares; for DPO, beta times the log-ratio.",
    "Margin": "Implicit reward of the chosen answer minus that of the rejected one.",
    "Reward accuracy": "The share of pairs whose chosen answer gained more than the rejected one. "
    "Before training every pair is a tie, which counts half and says nothing.",
    "Ranking accuracy": "The share of pairs in which the model itself finds the chosen answer at "
    "least as likely as the rejected one. It says what the model would do, and moves far less than "
    "reward accuracy: training can widen a gap without turning its sign.",
    "Interval": "Made again and again in this way from other held-out rows, 95 % of the intervals "
    "would hold the true mean. With few rows they are wide: read the trend, not the decimals.",
}


def describe(runs: Sequence[Run]) -> str:
    """A heading: what was trained with what."""
    if len(runs) > 1:
        return f"{len(runs)} runs compared"
    run = runs[0]
    return f"{objective(run)} on {model(run)}" if run.config else run.name


def lead(runs: Sequence[Run]) -> str:
    """One sentence below the heading."""
    if len(runs) > 1:
        return "Each run has its own colour in every figure; line styles tell the curves apart."
    run = runs[0]
    rows = (run.env.get("data") or {}).get("train_rows")
    on = f" on {rows:,} rows of preference data" if isinstance(rows, int) else ""
    return f"A preference alignment run of {run.last_step:,} optimizer steps{on}."


def state(run: Run) -> dict[str, str]:
    """Whether the run came to its end, as a mark."""
    if run.is_finished:
        return {"kind": "done", "text": f"finished after {run.last_step:,} steps"}
    return {"kind": "stopped", "text": f"stopped early, at step {run.last_step:,}"}


def objective(run: Run) -> str:
    """The preset's name, or the mix."""
    section = run.config.get("objective") or {}
    mix = section.get("mix")
    return section.get("name") or (" + ".join(mix) if mix else "unknown objective")


def model(run: Run) -> str:
    """The model's short name."""
    path = str((run.config.get("model") or {}).get("path", "unknown model"))
    return path.rstrip("/").split("/")[-1]


def run_sections(runs: Sequence[Run]) -> list[Section]:
    """All sections that have something to say."""
    many = len(runs) > 1
    scores = _scores(runs)
    terms = pictures.TERMS if scores == "errors" else _TERMS
    sections: list[Section | None] = [
        _setup(runs),
        _rows(runs),
        _remarks(runs),
        pictures.sheets(runs),
        pictures.questions([run for run in runs if run.has_media]),
        eval_section(runs),
        pictures.by_noise_level(runs),
        _completions([run for run in runs if not run.has_pictures and not run.has_media]),
        pictures.alterations(runs),
        _curves(runs, [spec for spec in PLOTS if spec.of in (None, scores)]),
        Section("How to read the numbers", blocks.glossary(terms)),
        Section("Configurations" if many else "Configuration", _configs(runs)),
    ]
    return [section for section in sections if section is not None]


def _remarks(runs: Sequence[Run]) -> Section | None:
    whose: dict[Remark, list[str]] = defaultdict(list)
    for run in runs:
        for remark in remarks(run):
            whose[remark].append(run.name)
    notes = [
        blocks.note(
            remark.text if len(runs) == 1 else f"{', '.join(names)}: {remark.text}",
            "warning" if remark.is_warning else "info",
        )
        for remark, names in sorted(whose.items(), key=lambda item: not item[0].is_warning)
    ]
    return Section("What to look at first", Markup().join(notes)) if notes else None


def _setup(runs: Sequence[Run]) -> Section:
    facts = [_facts(run) for run in runs]
    if len(runs) == 1:
        items = Markup().join(
            Markup("<div><dt>{}</dt><dd>{}</dd></div>").format(k, v) for k, v in facts[0].items()
        )
        return Section("What was trained", Markup('<dl class="facts">{}</dl>').format(items))
    keys = list(dict.fromkeys(key for one in facts for key in one))
    rows = [[key, *(one.get(key, blocks.MISSING) for one in facts)] for key in keys]
    return Section("What was trained", blocks.table(["", *(run.name for run in runs)], rows))


def _rows(runs: Sequence[Run]) -> Section | None:
    """What was found about the rows before the first step: what was cut, what was left out."""
    notes = [
        blocks.note(note if len(runs) == 1 else f"{run.name}: {note}", "info")
        for run in runs
        for note in (run.env.get("data") or {}).get("notes") or ()
    ]
    return Section("What was found in the rows", Markup().join(notes)) if notes else None


def _facts(run: Run) -> dict[str, str]:
    get = run.config.get
    counts = run.env.get("data") or {}
    train, data, reference = get("train") or {}, get("data") or {}, get("reference") or {}
    keywords = {
        key: value for key, value in (get("objective") or {}).items() if key not in ("name", "mix")
    }
    weights = (get("objective") or {}).get("mix") or {}
    options = ", ".join(f"{k} {_plain(v)}" for k, v in (keywords | weights).items())
    lora = (get("model") or {}).get("lora")
    # A `split` column wins over the share, and a note that begins with the setting says so.
    told = [str(note) for note in counts.get("notes") or ()]
    unused = any(note.startswith("data.eval_fraction") for note in told)
    share = 0 if unused else data.get("eval_fraction")
    facts: dict[str, Any] = {
        "Model": (get("model") or {}).get("path"),
        "Objective": f"{objective(run)} ({options})" if options else objective(run),
        "Trained": f"LoRA, rank {lora['rank']}" if lora else "all weights",
        "Reference": reference.get("kind"),
        "Training data": _with_count(_sources(data.get("train")), counts.get("train_rows")),
        "Held-out data": _with_count(
            _sources(data.get("eval")) or (f"{share:.0%} of the prompts" if share else ""),
            counts.get("eval_rows"),
        ),
        "Rows a step": (train.get("batch_size") or 1) * (train.get("accumulate") or 1),
        "Learning rate": _plain(train.get("lr")),
        "Steps": f"{run.last_step:,}",
        "Seed": train.get("seed"),
    }
    return {key: str(value) for key, value in facts.items() if value not in (None, "")}


def _plain(value: Any) -> str:
    return f"{value:g}" if is_number(value) else str(value)


def _with_count(sources: str, count: Any) -> str:
    if not count:
        return sources
    return f"{sources or 'split of the training data'} ({count:,} rows)"


def _sources(sources: Any) -> str:
    many = sources if isinstance(sources, list) else [sources] if sources else []
    return ", ".join(str(s["path"] if isinstance(s, dict) else s) for s in many)


def _curves(runs: Sequence[Run], plots: Sequence[Plot]) -> Section | None:
    drawn = [
        blocks.figure(image, spec.title, spec.note)
        for spec in plots
        if (image := plot(spec, runs)) is not None
    ]
    return Section("Curves", blocks.figures(drawn)) if drawn else None


def _completions(runs: Sequence[Run]) -> Section | None:
    """The first and the last completion of every prompt; of several runs the last of each."""
    rows = pictures.answered(runs, lambda record: _prompt(record.get("prompt", "")))
    if not rows:
        return None
    answers = [Answers(prompt, row.said) for prompt, row in rows.items()]
    return Section("Completions before and after", blocks.side_by_side(answers))


def _prompt(prompt: Any) -> str:
    """A plain prompt, or the turns of a conversation; a single user turn needs no name."""
    turns = prompt if isinstance(prompt, list) else [{"role": "user", "content": prompt}]
    if len(turns) == 1:
        return str(turns[0].get("content", ""))
    return "\n".join(f"{turn.get('role')}: {turn.get('content')}" for turn in turns)


def _configs(runs: Sequence[Run]) -> Markup:
    parts: list[Markup] = []
    for run in runs:
        name, of = (run.name, f" of {run.name}") if len(runs) > 1 else ("config.yaml", "")
        for label, values in ((name, run.config), (f"Versions and machine{of}", run.env)):
            if values:
                parts.append(blocks.folded(label, blocks.preformatted(yaml.dump(values))))
    return Markup().join(parts) or escape("The run folder holds no config.yaml.")
