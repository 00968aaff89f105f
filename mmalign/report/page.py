"""The page's own sections, from what the run folders say."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from markupsafe import Markup, escape

from mmalign.config import yaml
from mmalign.report import blocks, clips, pictures
from mmalign.report.blocks import Answers, Section
from mmalign.report.curves import PICTURE_PLOTS, PLOTS
from mmalign.report.figures import plot
from mmalign.report.heldout import held_out
from mmalign.report.remarks import Remark, remarks
from mmalign.report.shapes import is_number

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence

    from mmalign.report.figures import Plot
    from mmalign.report.run import Run

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
    return f"A preference alignment run of {run.last_step:,} optimiser steps{on}."


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
    are_pictures = all(run.has_pictures for run in runs)
    sections: list[Section | None] = [
        _setup(runs),
        _rows(runs),
        _remarks(runs),
        pictures.sheets(runs),
        clips.questions([run for run in runs if run.has_media]),
        held_out(runs),
        pictures.by_noise_level(runs),
        _completions([run for run in runs if not run.has_pictures and not run.has_media]),
        clips.alterations(runs),
        _curves(runs, PICTURE_PLOTS if are_pictures else PLOTS),
        Section("How to read the numbers", _terms(pictures.TERMS if are_pictures else _TERMS)),
        Section("Configurations" if many else "Configuration", _configs(runs)),
    ]
    return [section for section in sections if section is not None]


def _remarks(runs: Sequence[Run]) -> Section | None:
    whose: dict[Remark, list[str]] = {}
    for run in runs:
        for remark in remarks(run):
            whose.setdefault(remark, []).append(run.name)
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
    rows: dict[str, dict[str, str]] = {}
    for run in runs:
        by_prompt: dict[str, list[Any]] = {}
        for sample in sorted(run.samples, key=lambda s: s.get("step", 0)):
            by_prompt.setdefault(_prompt(sample.get("prompt", "")), []).append(sample)
        for prompt, samples in by_prompt.items():
            columns = rows.setdefault(prompt, {})
            first, last = samples[0], samples[-1]
            if first.get("step") == 0 and last is not first:
                columns.setdefault("Before", str(first.get("response", "")))
            label = run.name if len(runs) > 1 else "After"
            columns[f"{label}, step {last.get('step', '?')}"] = str(last.get("response", ""))
    if not rows:
        return None
    answers = [Answers(prompt, columns) for prompt, columns in rows.items()]
    return Section("Completions before and after", blocks.side_by_side(answers))


def _prompt(prompt: Any) -> str:
    """A plain prompt, or the turns of a conversation; a single user turn needs no name."""
    turns = prompt if isinstance(prompt, list) else [{"role": "user", "content": prompt}]
    if len(turns) == 1:
        return str(turns[0].get("content", ""))
    return "\n".join(f"{turn.get('role')}: {turn.get('content')}" for turn in turns)


def _terms(terms: Mapping[str, str]) -> Markup:
    items = Markup().join(
        Markup("<dt>{}</dt><dd>{}</dd>").format(term, text) for term, text in terms.items()
    )
    return Markup('<dl class="terms">{}</dl>').format(items)


def _configs(runs: Sequence[Run]) -> Markup:
    parts: list[Markup] = []
    for run in runs:
        name = run.name if len(runs) > 1 else "config.yaml"
        if run.config:
            text = blocks.preformatted(yaml.dump(run.config))
            parts.append(blocks.folded(name, text))
        if run.env:
            label = (
                f"Versions and machine of {run.name}" if len(runs) > 1 else "Versions and machine"
            )
            parts.append(blocks.folded(label, blocks.preformatted(yaml.dump(run.env))))
    return Markup().join(parts) or escape("The run folder holds no config.yaml.")
