"""Happier endings from a small story model: its own endings ranked, imitation and DPO, a report."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cache
from itertools import pairwise
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from markupsafe import Markup

from mmalign.config import RunConfig
from mmalign.data.jobs import write_lines
from mmalign.quickstart import driver
from mmalign.report import Section, blocks, figures, write_report
from mmalign.stats import bootstrap_interval, percentile_interval, resample_counts

if TYPE_CHECKING:
    from matplotlib.axes import Axes

STORIES = Path(__file__).parent / "stories260k"
"""A Llama of 260 thousand parameters that tells stories for children; credits in its README."""

BETA = 0.3
CLEARLY = 0.2  # by which the best ending of an opening must be happier than the worst
_OPENING, _ENDING = 10, 48  # tokens
_END = 2  # token; those up to it are marks and no text
_NUM_SHOWN = 6  # openings on the page

PLAN = {"load": 12.0, "pairs": 12.0, "train": 65.0, "report": 4.0}


@dataclass(frozen=True, slots=True)
class Arm:
    """What is trained on the pairs."""

    label: str
    objective: Mapping[str, Any]
    lr: float


def _divergence(name: str, label: str) -> Arm:
    objective = {"name": "f_dpo", "divergence": name, "beta": BETA}
    return Arm(f"{label} f-DPO", objective, 2e-4)


ARMS = {
    "sft": Arm("SFT on chosen", {"name": "sft"}, 1e-3),
    "dpo": Arm("DPO", {"name": "dpo", "beta": BETA}, 2e-4),
    "js": _divergence("js", "Jensen-Shannon"),
    "forward_kl": _divergence("forward_kl", "forward KL"),
}


@dataclass(frozen=True, slots=True)
class Sizes:
    """How much of everything; the defaults are those of the proven recipe."""

    held_out: int = 512  # openings to measure on, the same for every seed
    train: int = 256  # openings to make pairs of
    endings: int = 6  # of each
    steps: int = 48  # of 16 pairs


FAST = Sizes(held_out=8, train=16, endings=3, steps=2)


@dataclass(frozen=True, slots=True)
class Told:
    """The endings of a model for the held-out openings, in their order.

    Attributes:
        texts: One an opening.
        log_ratios: log of the probability under the model over that under the base, in nats.
        num_tokens: Of each.
    """

    texts: list[str]
    log_ratios: list[float]
    num_tokens: list[int]


@driver.interruptible()
def run(output: Path | None = None, seed: int = 0, fast: bool = False) -> dict[str, Any]:
    """Make pairs of a story model's own endings, train on them in several ways, write a report.

    Args:
        output: Folder for pairs and endings, a run for each arm, `report.html` and `summary.json`;
            by default runs/quickstart-text, or the first name with a number behind it that is free.
        seed: Decides the openings, the endings and the order of the pairs.
        fast: A smoke run: a few endings, two steps. Its numbers mean nothing.

    Returns:
        What `summary.json` holds: the numbers of `base` and of each arm, `gain_over_sft`,
        `seconds`, and how they came about.

    Raises:
        ConfigError: vaderSentiment is missing, `output` is not empty, or it was interrupted.
    """
    driver.require("vaderSentiment", "scores stories")
    sizes = FAST if fast else Sizes()
    demo = driver.Demo("text", output, seed, fast, PLAN)
    demo.stage("load", "Starting; a story model of 260 thousand parameters begins stories")
    held_out, others = demo.spread(
        openings, [(sizes.held_out, 990_000), (2 * sizes.train, 10_000 + seed)], "sets of openings"
    )
    train = [tokens for tokens in others if tokens not in held_out][: sizes.train]

    demo.stage("pairs", f"Writing {sizes.endings} endings to each of {len(train)}, to be ranked")
    jobs = [(train, 20_000 + 100 * seed + draw) for draw in range(sizes.endings)]
    drawn = demo.spread(endings, jobs, "sets of endings")
    texts = [others[tokens] for tokens in train]
    pairs = list(filter(None, map(pair_of, texts, zip(*drawn, strict=True))))
    file = demo.output / "pairs.jsonl"
    write_lines(file, pairs)

    demo.stage("train", f"Training {len(ARMS)} times on {len(pairs)} pairs, and telling stories")
    configs = {
        name: config(arm, file, demo.output / name, seed, sizes) for name, arm in ARMS.items()
    }
    arms = list(configs.values())
    work = [(arm, list(held_out), 5_000 + seed) for arm in (None, *arms)]
    by_arm = demo.spread(tell, work, "steps", lambda: driver.steps_of(arms))
    told = dict(zip(("base", *ARMS), by_arm, strict=True))
    sentiments = {
        name: np.array([sentiment(text) for text in one.texts]) for name, one in told.items()
    }
    rows = zip(held_out.values(), *(one.texts for one in told.values()), strict=True)
    write_lines(
        demo.output / "endings.jsonl",
        (dict(zip(("opening", *told), row, strict=True)) for row in rows),
    )
    gains = {name: sentiments[name] - sentiments["sft"] for name in ("dpo", "js")}
    return demo.finish(
        {name: numbers(one, sentiments[name]) for name, one in told.items()},
        {
            "gain_over_sft": {name: _mean(gain) for name, gain in gains.items()},
            "chosen": round(float(np.mean([sentiment(pair["chosen"]) for pair in pairs])), 3),
            "rejected": round(float(np.mean([sentiment(pair["rejected"]) for pair in pairs])), 3),
            "num_pairs": len(pairs),
            "num_openings": len(train),
            "num_endings": sizes.endings,
            "num_steps": sizes.steps,
            "num_held_out": len(held_out),
        },
        lambda result: write(demo.output, result, list(held_out.values()), told),
        lines,
    )


def config(arm: Arm, pairs: Path, output: Path, seed: int, sizes: Sizes = Sizes()) -> RunConfig:
    """The run of one arm.

    Args:
        arm: Objective and learning rate.
        pairs: The file of all of them.
        output: Folder of the run.
        seed: Of the order of the pairs.
        sizes: For the number of steps.
    """
    return RunConfig.model_validate(
        {
            "model": {"path": str(STORIES)},
            "data": {"train": str(pairs)},
            "objective": dict(arm.objective),
            "train": {
                "batch_size": 16,
                "num_steps": sizes.steps,
                "lr": arm.lr,
                "check_settings": False,  # of a model far smaller than any that was published
                "warmup": 0.1,
                "seed": seed,
                "num_threads": 1,
            },
            "sample": {"num_prompts": 0},
            "output": str(output),
        }
    )


# What processes of the demonstration do; the arguments of each are one tuple.


Tokens = tuple[int, ...]


def openings(job: tuple[int, int]) -> dict[Tokens, str]:
    """Different openings of stories, sampled from the base: tokens and text, up to a word's end.

    Args:
        job: How many, and a seed.
    """
    count, seed = job
    tokenizer, model = _tokenizer(), _load(STORIES)
    found: dict[Tokens, str] = {}
    while len(found) < count:
        for row in _sample(model, [(1,)] * 512, _OPENING + 1, seed).tolist():
            if min(row) > _END and tokenizer.convert_ids_to_tokens(row[-1]).startswith("▁"):
                found[(1, *row[:-1])] = _text(row[:-1])
        seed += 1000
    return dict(list(found.items())[:count])


def endings(job: tuple[Sequence[Tokens], int]) -> list[tuple[str, bool]]:
    """An ending of each opening, sampled from the base, and whether it was cut at its length.

    Args:
        job: Openings, and a seed.
    """
    opened, seed = job
    new = _sample(_load(STORIES), opened, _ENDING, seed).tolist()
    return [(_ending(*both), _END not in both[1]) for both in zip(opened, new, strict=True)]


def tell(job: tuple[RunConfig | None, Sequence[Tokens], int]) -> Told:
    """Train an arm, if any, and have it end the held-out openings.

    Args:
        job: Config of the arm (None: the base), openings, and a seed.
    """
    import torch

    config, opened, seed = job
    folder = STORIES if config is None else driver.train_arm(config) / "final"
    model, base = _load(folder), _load(STORIES)
    new = _sample(model, opened, _ENDING, seed)  # [N, L]
    whole, mask = torch.cat([torch.tensor(opened), new], 1), new > _END
    with torch.inference_mode():
        own, before = (
            one(input_ids=whole)
            .logits[:, len(opened[0]) - 1 : -1]
            .log_softmax(-1)  # [N, L, V]
            .gather(-1, new[..., None])[..., 0]
            for one in (model, base)
        )
    texts = list(map(_ending, opened, new.tolist()))
    return Told(texts, ((own - before) * mask).sum(1).tolist(), mask.sum(1).tolist())


@cache
def _tokenizer() -> Any:
    from transformers import AutoTokenizer

    return AutoTokenizer.from_pretrained(STORIES)


def _load(folder: Path) -> Any:
    import torch
    from transformers import AutoModelForCausalLM

    return AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()


def _sample(model: Any, opened: Sequence[Sequence[int]], length: int, seed: int) -> Any:
    """Continuations of openings of equal length, from the whole distribution: [N, L <= length]."""
    import torch
    from transformers import GenerationConfig

    torch.manual_seed(seed)
    tokens = torch.tensor(opened)
    settings = GenerationConfig(
        do_sample=True, top_k=0, max_new_tokens=length, eos_token_id=_END, pad_token_id=0
    )
    whole = model.generate(tokens, settings, attention_mask=torch.ones_like(tokens))
    return whole[:, tokens.shape[1] :]


def _text(tokens: Sequence[int]) -> str:
    return _tokenizer().decode([token for token in tokens if token > _END])


def _ending(opening: Sequence[int], rest: Sequence[int]) -> str:
    """The text of the tokens behind an opening, as it goes on from there: with its space."""
    return _text([*opening, *rest]).removeprefix(_text(opening))


@cache
def _vader() -> Any:
    from vaderSentiment.vaderSentiment import SentimentIntensityAnalyzer

    return SentimentIntensityAnalyzer()


def sentiment(text: str) -> float:
    """VADER's compound score of a text, from -1 (sad) to 1 (happy)."""
    return _vader().polarity_scores(text)["compound"]


def pair_of(opening: str, drawn: Sequence[tuple[str, bool]]) -> dict[str, Any] | None:
    """The happiest and the saddest ending of an opening; None where they are much alike.

    Args:
        opening: The prompt.
        drawn: Endings, each with whether it was cut.
    """
    ranked = sorted(drawn, key=lambda one: sentiment(one[0]))
    (worst, worst_cut), (best, best_cut) = ranked[0], ranked[-1]
    if sentiment(best) - sentiment(worst) <= CLEARLY:
        return None
    return {
        "prompt": opening,
        "chosen": best,
        "rejected": worst,
        "chosen_cut": best_cut,
        "rejected_cut": worst_cut,
    }


def numbers(told: Told, sentiments: np.ndarray) -> dict[str, Any]:
    """What an arm's endings are like; each mean with its 95 % interval over openings.

    Returns:
        `sentiment`: VADER's score. `kl`: nats a token to the base. `distinct_bigrams`: share of
        all pairs of neighbouring words that are different ones, without an interval. `*_interval`.
    """
    ratios, lengths = np.array(told.log_ratios), np.array(told.num_tokens, dtype=float)
    columns = np.stack([ratios, lengths], 1)
    sums = np.concatenate([draws @ columns for draws in resample_counts(len(ratios), 1000, 0)])
    words = [text.split() for text in told.texts]
    bigrams = [pair for one in words for pair in pairwise(one)]
    mean, interval = _mean(sentiments).values()
    return {
        "sentiment": mean,
        "sentiment_interval": interval,
        "kl": round(ratios.sum() / lengths.sum(), 4),
        "kl_interval": _rounded(percentile_interval(sums[:, 0] / sums[:, 1])),
        "distinct_bigrams": round(len(set(bigrams)) / len(bigrams), 3),
    }


def _mean(values: np.ndarray) -> dict[str, Any]:
    return {
        "mean": round(float(values.mean()), 3),
        "interval": _rounded(bootstrap_interval(values)),
    }


def _rounded(interval: tuple[float, float]) -> list[float]:
    return [round(value, 4) for value in interval]


def _number(value: float) -> str:
    return f"{value:.2f}".replace("-0.00", "0.00").replace("-", "−")


_ROWS = (  # key, what the reader sees
    ("sentiment", "sentiment of the endings"),
    ("kl", "KL to the base, nats a token"),
    ("distinct_bigrams", "distinct word pairs"),
)


def _label(name: str) -> str:
    return ARMS[name].label if name in ARMS else "base"


def _shown(one: Mapping[str, Any], key: str) -> str:
    """A number with its interval, where it has one and the base does not fix it."""
    low, high = one.get(f"{key}_interval", (0, 0))
    interval = f" [{_number(low)}, {_number(high)}]" if low < high else ""
    return _number(one[key]) + interval


def lines(result: Mapping[str, Any]) -> str:
    """The table for a terminal."""
    table = [("held-out openings", *(label for _, label in _ROWS)), *_cells(result)]
    return "\n".join(f"{name:22}" + "".join(f"{cell:>30}" for cell in row) for name, *row in table)


def _cells(result: Mapping[str, Any]) -> list[tuple[str, ...]]:
    """Name and numbers of each arm, the base first."""
    return [
        (_label(name), *(_shown(result[name], key) for key, _ in _ROWS)) for name in ("base", *ARMS)
    ]


def write(
    output: Path, result: Mapping[str, Any], opened: Sequence[str], told: Mapping[str, Told]
) -> Path:
    """Write `report.html`, which goes on with the run of DPO.

    Args:
        output: Folder of the demonstration.
        result: What `summary.json` will hold.
        opened: The held-out openings.
        told: How each arm ended them.
    """
    sections = [
        Section("What happened", _what_happened(result)),
        Section("The price, and a dial of divergences", _dial(result)),
        Section("Endings side by side", _endings(opened, told)),
        Section("What this does not show", blocks.bullets(_LIMITS)),
    ]
    title = "Happier endings from a small story model"
    return write_report([output / "dpo"], output / "report.html", title=title, sections=sections)


def _what_happened(result: Mapping[str, Any]) -> Markup:
    gain = result["gain_over_sft"]["dpo"]
    low, high = map(_number, gain["interval"])
    return Markup().join(
        [
            blocks.paragraph(
                "A language model of 260 thousand parameters, which tells stories for children, "
                f"wrote {result['num_endings']} endings to each of {result['num_openings']} of its "
                "openings. VADER, a lexicon that scores how happy a text is from −1 to 1, picked "
                f"the best and the worst: {result['num_pairs']} pairs. The model was trained on "
                f"them for {result['num_steps']} steps of 16 pairs: on the likelihood of the "
                "chosen endings alone (SFT, the control), and, again from the start, on the "
                "preference."
            ),
            driver.smoke(result, "a few openings and two steps"),
            blocks.table(
                ["", *(label for _, label in _ROWS)],
                _cells(result),
                f"{result['num_held_out']} openings that were never trained on, one sampled ending "
                f"each, with 95 % intervals over openings; seed {result['seed']}.",
            ),
            blocks.paragraph(
                f"DPO is {_number(gain['mean'])} [{low}, {high}] above imitation, opening by "
                "opening. Imitation leads at best to the chosen endings, whose sentiment is "
                f"{_number(result['chosen'])}; the rejected ones, at "
                f"{_number(result['rejected'])}, say what to leave."
            ),
            driver.took(result),
        ]
    )


def _dial(result: Mapping[str, Any]) -> Markup:
    base, dpo = (_number(result[name]["distinct_bigrams"]) for name in ("base", "dpo"))
    return Markup().join(
        [
            blocks.paragraph(
                "Happier is not better. A preference is met by going away from the base (KL), and "
                "by saying the same thing more often: of all pairs of neighbouring words "
                f"{base} were different ones under the base, {dpo} under DPO."
            ),
            blocks.paragraph(
                "DPO is held to its reference by the reverse KL. Other divergences weigh otherwise "
                "what the reference finds unlikely, and trade gain for price differently; data, "
                "steps, learning rate and `beta` are those of DPO. In a config it is one line: "
                "`objective: {name: f_dpo, divergence: js, beta: 0.3}`."
            ),
            blocks.figure(
                _panels(result),
                "Gain and price of each arm",
                "Lines: 95 % intervals over openings.",
            ),
        ]
    )


def _panels(result: Mapping[str, Any]) -> Markup:
    """A row an arm, a panel a number."""
    names = ["base", *ARMS]

    def draw(axes: Axes) -> None:
        figure: Any = axes.figure
        axes.remove()
        places = range(len(names) - 1, -1, -1)
        for index, (panel, (key, label)) in enumerate(
            zip(figure.subplots(1, len(_ROWS), sharey=True), _ROWS, strict=True)
        ):
            values = [result[name][key] for name in names]
            ends = [
                result[name].get(f"{key}_interval", (value, value))
                for name, value in zip(names, values, strict=True)
            ]
            colour = figures.colour(index)
            panel.hlines(places, *np.transpose(ends), color=colour)
            panel.plot(values, places, "o", color=colour)
            panel.set_yticks(places, [_label(name) for name in names])
            panel.set_ylim(-0.6, len(names) - 0.4)
            panel.set_xlabel(label.partition(",")[0])
            panel.locator_params(axis="x", nbins=3)
            panel.margins(x=0.15)

    told = "; ".join(
        f"{_label(name)}: " + ", ".join(f"{label} {result[name][key]}" for key, label in _ROWS)
        for name in names
    )
    return figures.svg(draw, alt=told, size=(6.4, 0.8 + 0.28 * len(names)))


def _endings(opened: Sequence[str], told: Mapping[str, Told]) -> Markup:
    rows: list[blocks.Answers] = []
    for index, opening in enumerate(opened[:_NUM_SHOWN]):
        texts = {_label(name): told[name].texts[index] for name in ("base", "sft", "dpo")}
        marks = {label: [_number(sentiment(text))] for label, text in texts.items()}
        stripped = {label: text.strip() for label, text in texts.items()}
        rows.append(blocks.Answers(f"{opening} …", stripped, marks))
    intro = (
        "The first held-out openings, not chosen ones, with the sentiment of each ending. Endings "
        f"are cut at {_ENDING} tokens; `endings.jsonl` has those of all arms."
    )
    return blocks.paragraph(intro) + blocks.side_by_side(rows)


_LIMITS = (
    "VADER counts words: what it finds happy need not be a good story. It ranked the pairs and "
    "measured the result, so this shows that training follows a preference, not that anybody "
    "would share it.",
    "The model is 26,000 times smaller than one of 7 billion parameters. Learning rates and the "
    "number of steps are its own, and the order of the arms need not hold elsewhere.",
    "One ending was sampled for each opening. The intervals are over openings and not over "
    "trainings; another `--seed` makes other pairs.",
)
