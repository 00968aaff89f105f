"""The prompts of a rounds run: which are held out, and which each round draws for."""

from __future__ import annotations

import logging
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from mmalign.config import DataConfig
from mmalign.config.rounds import RoundsConfig
from mmalign.data.jobs import write_lines
from mmalign.data.sources import is_held_out, place_of
from mmalign.errors import ConfigError, DataError
from mmalign.rounds.asked import Question, different, prompt_rows, questions
from mmalign.rounds.ledger import seed_of
from mmalign.rounds.lines import named as by_id

log = logging.getLogger("mmalign.data")

log = logging.getLogger("mmalign.data")


@dataclass(frozen=True, slots=True)
class Prompts:
    """Prompts to draw for, and prompts to measure on."""

    train: list[Question]
    held_out: list[Question]


def read_prompts(config: DataConfig) -> Prompts:
    """The prompts of a config's `data`; rows with responses are read for their prompts alone.

    Held out are those of `data.eval`, else of rows whose `split` says so, else a share of the
    prompts by their hash, as for pairs.

    Raises:
        ConfigError: No prompts are held out, or a setting that prompts do not have.
        DataError: A row has no usable prompt.
    """
    here: list[Question] = []
    there: list[Question] = []
    for number, source in enumerate(config.train):
        for split, question in questions(source, number, config.bad_rows):
            (there if source.split is None and is_held_out(split) else here).append(question)
    if not here and not there:
        raise DataError(f"{config.train[0].path}: holds no prompts")
    if config.eval:
        numbered = enumerate(config.eval)
        there = [q for n, s in numbered for _, q in questions(s, n, config.bad_rows)]
    elif not there and config.eval_fraction:
        there = [q for q in here if place_of(q.example) < config.eval_fraction]
        there = there or [min(here, key=lambda q: place_of(q.example))]
    there = different(there)[: config.max_eval_samples]
    known = {q.example.prompt for q in there if not q.example.media}
    asked = {q.id: q.record for q in there}  # two files may count their rows from 1 alike
    named = [q for q in different(here) if asked.get(q.id) != q.record]
    here = [q for q in named if q.example.media or q.example.prompt not in known]
    if not here and named:  # a model of ten prompts, say, which the user has named twice
        log.warning(
            "all prompts that are drawn for are measured on too, under other ids: what is measured "
            "says nothing about new prompts"
        )
        here = named
    here = here[: config.max_samples]
    if not there:
        raise ConfigError(
            "rounds measure on prompts that are never trained on, and the config holds out none: "
            "set data.eval to a file of prompts, or data.eval_fraction, e.g. 0.1"
        )
    if not here:
        raise DataError(f"{config.train[0].path}: no prompt is left to draw for")
    return Prompts(here, there)


def per_round(spec: RoundsConfig, count: int) -> int:
    """How many prompts a round draws for.

    Raises:
        ConfigError: There are not as many.
    """
    wanted = spec.prompts.per_round
    if spec.prompts.how == "all":
        return count
    if wanted is None:
        return max(1, count // spec.num)
    if wanted > count:
        raise ConfigError(
            f"rounds.prompts.per_round is {wanted:,}, but there are {count:,} prompts to draw for; "
            "lower it, or give more prompts"
        )
    return wanted


def choose(
    asked: Sequence[Question], spec: RoundsConfig, number: int, seed: int, judged: Path | None
) -> list[Question]:
    """The prompts of a round.

    Args:
        asked: All that can be drawn for.
        spec: The section `rounds`.
        number: Of the round, from 1.
        seed: Of the run.
        judged: The last round's judged responses; None in the first round.
    """
    size = per_round(spec, len(asked))
    if spec.prompts.how == "all":
        return list(asked)
    chunks = len(asked) // size  # what is left over of a pass comes in the next one
    turn, chunk = divmod(number - 1, chunks)
    order = np.random.default_rng(seed_of(seed, "prompts", turn)).permutation(len(asked))
    order = np.roll(order, -chunk * size)
    known = {q.id: q for q in asked}
    hard = [known[name] for name in _hardest(judged) if name in known] if judged else []
    first = hard[: size // 2] if spec.prompts.how == "hard" else []
    taken = {q.id for q in first}
    rest = (asked[i] for i in order.tolist() if asked[i].id not in taken)
    return [*first, *(q for q, _ in zip(rest, range(size - len(first)), strict=False))]


def _hardest(judged: Path) -> list[str]:
    """Ids by their mean score, the lowest first; rows that nobody could score are left out."""
    means: list[tuple[float, str]] = []
    for key, row in by_id(judged).items():
        scores = [score for score in row.get("scores", ()) if score is not None]
        if scores:
            means.append((sum(scores) / len(scores), key))
    return [name for _, name in sorted(means)]


def write_prompts(asked: Sequence[Question], path: Path) -> None:
    """Write prompts, one a line."""
    write_lines(path, prompt_rows(asked, path))
