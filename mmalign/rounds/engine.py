"""Rounds: draw, judge, select, train, between, measure; each stage a file in the round's folder.

    prompts -> candidates.jsonl -> judged.jsonl -> pairs.jsonl -> run/ -> next/ -> measured.json

A stage is done when what it makes is there; so a person can read it, replace it, or make it with
another tool. A killed run goes on at the row or step where it was and ends with the same bytes.
"""

from __future__ import annotations

import json
import os
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from mmalign import config as configs
from mmalign.config import DataSource, RunConfig
from mmalign.data.jobs import LOCK, only_writer
from mmalign.errors import ConfigError
from mmalign.judging.build import build
from mmalign.judging.combined import comparing
from mmalign.models.adapter import tools_of
from mmalign.preflight.check import check_config
from mmalign.rounds import measure, weights
from mmalign.rounds.generate import generator
from mmalign.rounds.prompts import Prompts, per_round, read_prompts
from mmalign.rounds.stages import Interrupted, Round, Shared
from mmalign.rounds.weights import BASE, spec_of, to_sample, to_train
from mmalign.safe import write_text

BEST = "best"
SUMMARY = "rounds.json"

Say = Callable[[str], Any]


@dataclass(frozen=True, slots=True)
class RoundsResult:
    """What a run of rounds came to.

    Attributes:
        folder: The run's.
        measured: What `measured.json` of each round holds, the base first.
        best: Number of the round with the highest held-out reward within the KL budget.
        stopped: Why it ended before `rounds.num`, as a sentence; "" where it did not.
        interrupted: Ctrl-C or SIGTERM ended a training; `--resume` goes on.
    """

    folder: Path
    measured: list[dict[str, Any]] = field(default_factory=list[dict[str, Any]])
    best: int = 0
    stopped: str = ""
    interrupted: bool = False


def run(
    config: RunConfig,
    *,
    resume: bool = False,
    until: int | None = None,
    where: str = "CONFIG",
    say: Say = print,
) -> RoundsResult:
    """Run the rounds that a config describes, and write everything to its `output`.

    Args:
        config: With a section `rounds`.
        resume: Go on where a run in the folder was; one that has not begun is begun.
        until: End after this round.
        where: The config's file, for messages; beside it lie the judges' own modules and files.
        say: Told a line about each round.

    Raises:
        ConfigError, DataError, CheckpointError: What is wrong, in one sentence.
    """
    shared = _shared(config, check(config), where)
    with only_writer(config.output, "output"):
        _require_output(config.output, resume=resume)
        if not (config.output / "config.yaml").exists():
            write_text(config.output / "config.yaml", configs.dump(config))
        return Rounds(shared, say).run(until)


def _shared(config: RunConfig, prompts: Prompts, where: str) -> Shared:
    beside = Path(where).absolute().parent
    judge = build(spec_of(config).judge, beside)
    if (name := comparing(judge)) is not None:
        raise ConfigError(
            f"rounds.judge: {name} compares responses, and says nothing of a single one, which is "
            "what the base has to a held-out prompt; it cannot be one of several, so use it alone"
        )
    return Shared(config, prompts, judge, beside)


def check(config: RunConfig) -> Prompts:
    """Refuse what cannot run, before anything is written or loaded; the prompts.

    Raises:
        ConfigError, DataError: What is wrong.
    """
    spec_of(config)
    if int(os.environ.get("WORLD_SIZE", "1")) > 1:
        raise ConfigError(
            "rounds run in one process: start them without a launcher; a round's training can be "
            "run by hand on several, from round-N/run/config.yaml"
        )
    weights.check(config)
    prompts = read_prompts(config.data)
    per_round(spec_of(config), len(prompts.train))
    check_config(to_train(config, BASE, [DataSource(path="pairs.jsonl")], 0, config.output))
    generator(to_sample(config, BASE), spec_of(config).generate)
    unit = tools_of(config.modality).logp_unit(config).of
    if spec_of(config).stop.kl is not None and unit != "nats":
        raise ConfigError(
            "rounds.stop.kl is in nats, and log-probabilities of images are not; remove it and "
            "look at the log-ratio of measured.json"
        )
    return prompts


def _require_output(folder: Path, *, resume: bool) -> None:
    names = sorted(path.name for path in folder.iterdir() if path.name != LOCK)
    begun = "config.yaml" in names
    own = ("config.yaml", "report.html", BEST, SUMMARY)
    foreign = [name for name in names if name not in own and not name.startswith((".", "round-"))]
    if begun and not resume and any(n.startswith("round-") for n in names):
        raise ConfigError(
            f"output {folder} holds a run already; go on with --resume, choose another output, or "
            "delete the folder"
        )
    if foreign:
        raise ConfigError(
            f"output {folder} is not empty (it holds {', '.join(foreign[:4])}); choose another "
            "output, or delete the folder"
        )


class Rounds:
    """Rounds in turn, as far as the stop rules let them."""

    def __init__(self, shared: Shared, say: Say) -> None:
        """Nothing is loaded yet; `say` is told a line about each round."""
        self.shared, self.say = shared, say
        self.output, self.spec = shared.config.output, shared.spec

    def run(self, until: int | None) -> RoundsResult:
        """All rounds that are left."""
        last = self.spec.num if until is None else min(until, self.spec.num)
        measured: list[dict[str, Any]] = []
        best, stopped, kept = 0, "", True
        for number in range(last + 1):
            began = time.perf_counter()
            try:
                measured.append(Round(self.shared, number).run())
            except Interrupted:
                return RoundsResult(self.output, measured, best, interrupted=True)
            self.say(_line(measured[-1], time.perf_counter() - began))
            best, stopped = self._best(measured), self._why_stop(measured)
            stopped = stopped if number < last else ""
            later = self.shared.folder(number + 1) / measure.FILE
            kept = bool(stopped) or not later.is_file()
            if kept:  # else what is there is of later rounds, which may be refused yet
                self._keep(measured, best, stopped)
            if stopped:
                self.say(f"stopped after round {number} of {last}: {stopped}")
                break
        if best and kept:
            place = f"{self.shared.folder(best).name}/next"
            self.say(f"best: round {best}, {self.output / BEST} -> {place}")
        elif kept and len(measured) > 1:
            self.say("no round is better than the base by its held-out reward")
        return RoundsResult(self.output, measured, best, stopped)

    def _why_stop(self, measured: Sequence[dict[str, Any]]) -> str:
        """The stop rule that holds, as a sentence; "" where none does."""
        stop, now = self.spec.stop, measured[-1]
        kl = now.get("kl")
        if stop.kl is not None and kl is not None and kl["mean"] > stop.kl:
            return f"KL {kl['mean']:.3g} nats is above rounds.stop.kl {stop.kl:g}"
        rewards = [one["reward"]["mean"] for one in measured]
        falls = 0
        while falls + 1 < len(rewards) and rewards[-1 - falls] < rewards[-2 - falls]:
            falls += 1
        if stop.worse is not None and falls >= stop.worse:
            return (
                f"the held-out reward fell {falls} rounds in succession (rounds.stop.worse "
                f"{stop.worse})"
            )
        if now["lost"] > stop.lost:
            return (
                f"{now['lost']:.0%} of the held-out responses could not be judged "
                f"(rounds.stop.lost {stop.lost:g})"
            )
        return ""

    def _best(self, measured: Sequence[dict[str, Any]]) -> int:
        budget = self.spec.stop.kl
        within = [
            one["round"]
            for one in measured
            if budget is None or one.get("kl") is None or one["kl"]["mean"] <= budget
        ]
        return max(within or [0], key=lambda number: (measured[number]["reward"]["mean"], -number))

    def _keep(self, measured: Sequence[dict[str, Any]], best: int, stopped: str) -> None:
        """Write the config, the summary, and `best`, a name of the best round's weights."""
        write_text(self.output / "config.yaml", configs.dump(self.shared.config))
        text = {"rounds": list(measured), "best": best, "stopped": stopped}
        write_text(self.output / SUMMARY, json.dumps(text, indent=1) + "\n")
        name, temporary = self.output / BEST, self.output / f".{BEST}.tmp"
        if best == 0:
            name.unlink(missing_ok=True)
            return
        temporary.unlink(missing_ok=True)
        temporary.symlink_to(f"{self.shared.folder(best).name}/next", target_is_directory=True)
        os.replace(temporary, name)


def _line(found: dict[str, Any], seconds: float) -> str:
    """A round in one line."""

    def mean(key: str, digits: str = ".3f") -> str:
        (low, high), value = found[key]["interval"], found[key]["mean"]
        return f"{value:{digits}} ({low:{digits}} to {high:{digits}})"

    name = f"round {found['round']}" if found["round"] else "base"
    parts = [f"reward {mean('reward')}"]
    if found.get("kl"):
        parts.append(f"KL {mean('kl', '.2f')} nats")
    for key, other in (("over_previous", "the last"), ("over_base", "the base")):
        if key in found:
            parts.append(f"wins {found[key]['wins']:.0%} over {other}")
    if found.get("length"):
        parts.append(f"{found['length']['mean']:.0f} tokens")
    if "made" in found:
        made = found["made"]
        parts.append(
            f"{made['pairs']} pairs of {made['prompts']} prompts ({made['ties']:.0%} ties, "
            f"{made['lost']:.0%} lost)"
        )
    said = f"; {found['between']}" if found.get("between") else ""
    return f"{name}: {', '.join(parts)}{said}; {seconds:.0f} s"


def dry_run(config: RunConfig, where: str = "CONFIG", say: Say = print, *, count: int = 4) -> None:
    """Each stage of one round with a few prompts, in a folder that is removed again.

    Args:
        config: With a section `rounds`.
        where: The config's file.
        say: Told what came of it.
        count: Prompts to draw for.
    """
    from tempfile import TemporaryDirectory

    from mmalign.train.loop import train

    prompts = check(config)
    with TemporaryDirectory() as scratch:
        few = Prompts(prompts.train[:count], prompts.held_out[:count])
        spec = spec_of(config).model_copy(
            update={
                "prompts": spec_of(config).prompts.model_copy(update={"per_round": None}),
                "num": 1,
            }
        )
        small = config.model_copy(update={"rounds": spec, "output": Path(scratch) / "rounds"})
        shared = _shared(small, few, where)
        base = Round(shared, 0).measure()
        first = Round(shared, 1)
        first.draw()
        first.score()
        first.select()
        made = measure.made(first.folder / "judged.jsonl", first.folder / "pairs.jsonl")
        say(
            f"{len(prompts.train):,} prompts to draw for, {len(prompts.held_out):,} held out; of "
            f"{made['prompts']} tried: {made['pairs']} pairs, mean reward "
            f"{base['reward']['mean']:.3f} held out"
        )
        derived = to_train(small, BASE, first.sources(), config.train.seed, first.folder)
        derived.objective.beside(shared.beside)
        train(derived, dry_run=True)
