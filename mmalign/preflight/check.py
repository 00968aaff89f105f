"""Requirements of a config that its adapter, an extra or its rows cannot meet."""

from __future__ import annotations

from collections.abc import Sequence
from importlib.util import find_spec
from typing import TYPE_CHECKING

from mmalign.config import RunConfig
from mmalign.config.run import OF_TOKENS as _TOKENS
from mmalign.data.jobs import waiting
from mmalign.data.validate import Decode, check_files
from mmalign.errors import ConfigError, MmalignError

if TYPE_CHECKING:
    from mmalign.core import Needs, Objective


def check_rows(
    config: RunConfig, *, show: int = 20, decode: Decode | None = None
) -> tuple[str, int]:
    """Every problem of a config's files, then what its tokenizer, template and limits do to them.

    Args:
        config: The run's configuration.
        show: Places named for each kind of problem.
        decode: What is wrong with the media of rows; None: they are only counted.

    Returns:
        The report, with the lines that training prints, and the exit code: 1 when it would stop.
    """
    needs = check_config(config).needs
    report = check_files(config.data.train, eval_paths=config.data.eval, decode=decode, sizes=False)
    summary = report.text(show)
    with waiting("loading libraries"):
        from mmalign.models.adapter import find_rows, logged

    # Problems of the records are in the report already; find those of the rows that are left.
    lenient = config.data.model_copy(update={"bad_rows": "drop"})
    try:
        with logged("mmalign", quiet=True) as logged_lines:
            found = find_rows(config.model_copy(update={"data": lenient}), needs)
    except MmalignError as error:
        return f"{summary}\nwith {config.model.path} and this config:\n  {error}", 1
    problems = found.problems.lines(show)
    lines = [f"{len(found.train):,} rows to train on, {len(found.held_out):,} held out"]
    lines += [line for line in logged_lines if line not in summary and _LEFT_OUT not in line]
    lines += found.notes
    if problems:
        lines.append(f"rows that cannot be used, {found.problems.num_records:,}:")
        lines += _indented(problems)
    stops = config.data.bad_rows == "stop" and bool(problems or report.exit_code)
    text = "\n".join([summary, f"with {config.model.path} and this config:", *_indented(lines)])
    return text, int(stops)


_LEFT_OUT = "have problems and are left out"  # reported in full before


def _indented(lines: Sequence[str]) -> list[str]:
    return [f"  {line}" for line in lines]


def check_config(config: RunConfig, *, where: str = "config") -> Objective:
    """Build the objective and refuse, before any weight loads, what it or an option cannot have.

    Raises:
        ConfigError: An unknown preset or keyword, a need that nothing supplies, a missing extra.
    """
    from mmalign.core import presets
    from mmalign.models.adapter import adapter_class, tools_of

    objective = presets.from_config(config.objective)
    adapter = adapter_class(config.modality)
    problems = _missing_extras(config) + tools_of(config.modality).problems(config)
    problems += check_needs(config, objective.needs, adapter.provides(config))
    problems += _check_parts(config, objective)
    if problems:
        raise ConfigError("\n  ".join(f"{where}: {problem}" for problem in problems))
    return objective


def _check_parts(config: RunConfig, objective: Objective) -> list[str]:
    """What keeps a micro-batch from passing the model in parts."""
    if config.train.tokens_per_batch is None:
        return []
    whole = [name for name, term in objective.terms.items() if term.across_rows]
    return whole and [
        "train.tokens_per_batch splits a micro-batch, but the rows of "
        f"{config.objective.name or ' and '.join(whole)} are compared with each other. Remove it, "
        "or use a loss whose rows are independent, e.g. dpo"
    ]


def check_needs(config: RunConfig, needs: Needs, provides: Needs) -> list[str]:
    """Needs of the objective that the adapter cannot supply under `config`, as sentences."""
    name = "the mix" if config.objective.name is None else f"objective '{config.objective.name}'"
    kind = config.reference.kind
    remedies = {
        "reference": (
            "a reference model",
            f"reference.kind is {kind}. Use reference.kind: auto, or an objective without one, "
            "e.g. simpo",
        ),
        "kl": (
            "the KL at every position",
            f"reference.kind {kind} cannot give it. Use lora-off (needs model.lora) or frozen-copy",
        ),
        "weight": (
            "a weight for every token",
            "text.masks is not set. Set it, e.g. text: {masks: {kind: learned}}; `spans` and "
            "`steps` read the data"
            if config.modality in _TOKENS
            else f"modality {config.modality} has none. Use an objective without them, e.g. "
            "diffusion_dpo",
        ),
        "log_sum_p2": (
            "the probabilities of all tokens (wpo)",
            f"modality {config.modality} has none. Remove `wpo`, or use another objective",
        ),
        "prompt": (
            "log-probabilities of the prompt",
            f"modality {config.modality} has none. Use another objective",
        ),
    }
    problems = [
        f"{name} needs {what}, but {remedy}."
        for field, (what, remedy) in remedies.items()
        if getattr(needs, field) and not getattr(provides, field)
    ]
    if kind not in ("auto", "none") and not needs.reference and not needs.kl:
        problems.append(
            f"reference.kind is {kind}, but {name} reads no reference. Remove `reference`, or use "
            "an objective with one."
        )
    if config.data.ties == "soft" and not needs.labels:
        problems.append(
            f"data.ties is soft, which gives tied rows the labels (1/2, 1/2), but {name} does not "
            "read labels. Use an objective that does, e.g. soft_dpo, or data.ties: drop or half."
        )
    if provides.weight and not needs.weight:
        problems.append(
            f"text.masks is set, but {name} reads no weights of tokens. Remove it, or "
            "use an objective that does: sparse_po, rrpo, tpo_tree."
        )
    return problems


def _missing_extras(config: RunConfig) -> list[str]:
    wanted = {
        tracker: ("train.trackers", "trackio" if tracker == "trackio" else f"'mmalign[{tracker}]'")
        for tracker in config.train.trackers
    }
    if config.model.quantization:
        wanted["bitsandbytes"] = ("model.quantization", "'mmalign[gpu]'")
    if config.train.optimizer == "adamw8bit":
        wanted["bitsandbytes"] = ("train.optimizer: adamw8bit", "'mmalign[gpu]'")
    if config.model.attention == "flash_attention_2":
        wanted["flash_attn"] = ("model.attention: flash_attention_2", "flash-attn")
    return [
        f"{key} needs the package {package}, which is not installed. Run: pip install {command}"
        for package, (key, command) in wanted.items()
        if find_spec(package) is None
    ]
