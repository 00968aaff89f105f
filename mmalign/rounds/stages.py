"""The stages of one round: each makes a file in the round's folder, unless it is there."""

from __future__ import annotations

import gc
import hashlib
import json
import logging
import shutil
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from mmalign import config as configs
from mmalign.config import DataSource, RunConfig
from mmalign.config.rounds import RoundsConfig
from mmalign.data.jobs import write_lines
from mmalign.errors import ConfigError
from mmalign.judging.base import Judge
from mmalign.judging.score import Scored, score_file
from mmalign.judging.select import select_file
from mmalign.models.adapter import tools_of
from mmalign.rounds import measure
from mmalign.rounds.asked import Question
from mmalign.rounds.between import next_weights, weights_in
from mmalign.rounds.generate import Made, generate_file, generator
from mmalign.rounds.ledger import Ledger, seed_of
from mmalign.rounds.lines import Line, about_of, kind_of, named, read
from mmalign.rounds.prompts import Prompts, choose, write_prompts
from mmalign.rounds.weights import BASE, Weights, spec_of, to_sample, to_train

log = logging.getLogger("mmalign.rounds")

_ONLY_HOW = {"batch_size", "url", "key_env", "verify"}
"""Settings of a draw that decide no response: a server may come back at another port."""


class Interrupted(Exception):
    """A training was stopped and saved."""


@dataclass(frozen=True)
class Shared:
    """What all rounds of a run have in common.

    Attributes:
        config: Of the run.
        prompts: To draw for and to measure on.
        judge: Says which response is better.
        beside: Where the config lies, and the user's own losses and rules.
    """

    config: RunConfig
    prompts: Prompts
    judge: Judge
    beside: Path

    @property
    def spec(self) -> RoundsConfig:
        """The section `rounds`."""
        return spec_of(self.config)

    @property
    def seed(self) -> int:
        """Of the run."""
        return self.config.train.seed

    def folder(self, number: int) -> Path:
        """Of a round."""
        return self.config.output / f"round-{number:02d}"


class Round:
    """One round; round 0 is the base, which is only measured."""

    def __init__(self, shared: Shared, number: int) -> None:
        """Nothing is done yet."""
        self.shared, self.number = shared, number
        self.config, self.spec = shared.config, shared.spec
        self.folder = shared.folder(number)
        self.folder.mkdir(parents=True, exist_ok=True)
        self.ledger = Ledger(self.folder)

    @property
    def previous(self) -> Weights:
        """What the last round came to."""
        if self.number <= 1:
            return BASE
        return weights_in(self.shared.folder(self.number - 1) / "next")

    @property
    def own(self) -> Weights:
        """What this round came to."""
        return weights_in(self.folder / "next") if self.number else BASE

    def run(self) -> dict[str, Any]:
        """All stages that are left; what `measured.json` holds."""
        if self.number:
            self.draw()
            self.score()
            self.select()
            self.train()
            self.move()
        return self.measure()

    def _stage(
        self,
        name: str,
        inputs: dict[str, Path | str],
        settings: dict[str, Any],
        make: Callable[[Path], Any],
    ) -> None:
        """Make what is not there yet; `make` gets its path, and may return what is worth noting."""
        if self.ledger.is_done(name, inputs, settings):
            return
        began = time.perf_counter()
        for left in self.folder.glob(f"{name}.part-*"):  # of a merge that was killed
            shutil.rmtree(left, ignore_errors=True)
        told = make(self.folder / name)
        _free()
        self.ledger.note(
            name, inputs, settings, seconds=round(time.perf_counter() - began, 3), told=told or ""
        )

    def _weights(self, which: Weights) -> Path | str:
        """What stands for weights among the inputs of a stage."""
        if which.folder is not None:
            return which.folder
        path = Path(self.config.model.path)
        return path if path.is_dir() else f"{path} {self.config.model.revision or ''}".strip()

    def draw(self) -> None:
        """Choose prompts and draw responses to them."""
        spec, number = self.spec, self.number
        judged = None
        if spec.prompts.how == "hard" and number > 1:
            judged = self.shared.folder(number - 1) / "judged.jsonl"
        chosen = choose(self.shared.prompts.train, spec, number, self.shared.seed, judged)
        settings = {"prompts": spec.prompts.model_dump(), "seed": self.shared.seed}
        inputs: dict[str, Path | str] = {"list of prompts": _digest(chosen)}
        self._stage("prompts.jsonl", inputs, settings, lambda out: write_prompts(chosen, out))
        asked = spec.generate.reference
        if asked is None:
            self._draw("candidates.jsonl", self.previous, spec.generate.num)
            return
        base = spec.reference == "base"
        own, others = "candidates-policy.jsonl", "candidates-reference.jsonl"
        self._draw(own, self.previous, spec.generate.num)
        self._draw(others, BASE if base else self.previous, asked.num)
        parts: dict[str, Path | str] = {name: self.folder / name for name in (own, others)}
        first, second = self.folder / own, self.folder / others

        def put_together(out: Path) -> str:
            judged = asked.role != "calibration"
            lines = measure.joined(first, [("reference", second)] if judged else [], out)
            if asked.role != "candidate":
                lines, told = _calibrated(lines, second)
            else:
                told = ""
            write_lines(out, lines)
            return told

        self._stage("candidates.jsonl", parts, {"role": asked.role}, put_together)

    def _draw(self, name: str, which: Weights, num: int) -> None:
        options = self.spec.generate
        inputs: dict[str, Path | str] = {
            "prompts.jsonl": self.folder / "prompts.jsonl",
            "model": self._weights(which),
        }
        seed = seed_of(self.shared.seed, "draw", self.number, name)
        settings = {"generate": options.model_dump(exclude=_ONLY_HOW), "seed": seed}

        def make(out: Path) -> str:
            rows = read(self.folder / "prompts.jsonl")
            made = generator(to_sample(self.config, which), options)
            return _said(generate_file(made, rows, out, num=num, seed=seed))

        self._stage(name, inputs, settings, make)

    def score(self) -> None:
        """Judge the responses."""
        candidates = self.folder / "candidates.jsonl"
        most = self.spec.stop.lost
        self._stage(
            "judged.jsonl",
            {"candidates.jsonl": candidates},
            {"judge": self.shared.judge.facts()},
            lambda out: _said(score_file(candidates, out, self.shared.judge, most_lost=most)),
        )

    def select(self) -> None:
        """Make pairs of judged responses."""
        judged, seed = self.folder / "judged.jsonl", seed_of(self.shared.seed, "pairs", self.number)
        spec, number = self.spec.select, self.number
        self._stage(
            "pairs.jsonl",
            {"judged.jsonl": judged},
            {"select": spec.model_dump(), "seed": seed},
            lambda out: select_file(judged, out, spec, seed=seed, round=number).text(),
        )

    def sources(self) -> list[DataSource]:
        """This round's pairs, and a share of each of the older rounds'."""
        own = self.folder / "pairs.jsonl"
        older = [self.shared.folder(n) / "pairs.jsonl" for n in range(1, self.number)]
        share = self.spec.replay
        if not share or not older:
            return [DataSource(path=str(own))]
        count, total = len(read(own)), sum(len(read(path)) for path in older)
        weight = min(1.0, share * count / ((1 - share) * total))  # none of them more than once
        replayed = [DataSource(path=str(path), weight=weight) for path in older]
        return [DataSource(path=str(own)), *replayed]

    def train(self) -> None:
        """Train the policy on the pairs, as `mmalign train` does."""
        seed = seed_of(self.shared.seed, "train", self.number)
        sources = self.sources()
        if not (self.folder / "run").exists():  # a merge for a training that was taken away
            shutil.rmtree(self.folder / "reference", ignore_errors=True)
        derived = to_train(self.config, self.previous, sources, seed, self.folder)
        derived.objective.beside(self.shared.beside)
        inputs: dict[str, Path | str] = {
            Path(source.path).relative_to(self.config.output).as_posix(): Path(source.path)
            for source in sources
        }
        inputs |= {"model": self._weights(self.previous), "base": self._weights(BASE)}
        name = "run/final"
        self._stage(name, inputs, configs.deciding(derived), lambda _: self._train(derived))

    def _train(self, derived: RunConfig) -> None:
        from mmalign.train.loop import train

        begun = (derived.output / "config.yaml").is_file()
        if train(derived, resume=begun).stopped:
            raise Interrupted

    def move(self) -> None:
        """Make what the next round starts from."""
        hat = self.folder / "run" / "final"
        before = self.shared.folder(self.number - 1) / "run" / "final"
        inputs: dict[str, Path | str] = {"run/final": hat, "base": self._weights(BASE)}
        if self.number > 1:
            inputs["the last round's run/final"] = before
        self._stage(
            "next",
            inputs,
            {"between": self.spec.between.model_dump()},
            lambda out: next_weights(
                self.config.model.path,
                self.spec.between,
                hat,
                before if self.number > 1 else None,
                out,
            ),
        )

    def measure(self) -> dict[str, Any]:
        """Measure what the round came to on held-out prompts."""
        held = self.shared.prompts.held_out
        name = f"{measure.FOLDER}/prompts.jsonl"
        inputs: dict[str, Path | str] = {"list of held-out prompts": _digest(held)}
        self._stage(name, inputs, {}, lambda out: write_prompts(held, out))
        self._answer(self.folder / name)
        responses = self.folder / measure.RESPONSES
        others = [("previous", self.number - 1), ("base", 0)] if self.number > 1 else []
        others = [("base", 0)] if self.number == 1 else others
        files = [(n, self.shared.folder(i) / measure.RESPONSES) for n, i in others]
        self._stage(
            measure.CANDIDATES,
            {"responses": responses, **{f"responses of {n}": p for n, p in files}},
            {},
            lambda out: measure.join(responses, files, out),
        )
        candidates = self.folder / measure.CANDIDATES
        self._stage(
            measure.JUDGED,
            {"held-out responses": candidates},
            {"judge": self.shared.judge.facts()},
            lambda out: _said(score_file(candidates, out, self.shared.judge, most_lost=None)),
        )
        judged = self.folder / measure.JUDGED
        measured = {"held_out/judged.jsonl": judged, "model": self._weights(self.own)}
        self._stage(measure.ROWS, measured, {}, lambda out: self._rows(judged, out))
        rows = read(self.folder / measure.ROWS)
        unit = tools_of(self.config.modality).logp_unit(self.config).of
        found: dict[str, Any] = {"round": self.number, **measure.summary(rows, unit)}
        if self.number:
            pairs = self.folder / "pairs.jsonl"
            found["made"] = measure.made(self.folder / "judged.jsonl", pairs)
            found["between"] = self.ledger.told("next", "told") or ""
        measure.write(found, self.folder / measure.FILE)
        return found

    def _answer(self, prompts: Path) -> None:
        """One response to each held-out prompt at temperature 1, by the same seed each round."""
        own = {"temperature": 1.0, "top_p": 1.0, "reference": None}
        options = self.spec.generate.model_copy(update=own)
        seed = seed_of(self.shared.seed, "held out")
        settings = {"generate": options.model_dump(exclude={*_ONLY_HOW, "num"}), "seed": seed}
        which = self.own

        def make(out: Path) -> str:
            made = generator(to_sample(self.config, which), options)
            return _said(generate_file(made, read(prompts), out, num=1, seed=seed))

        inputs: dict[str, Path | str] = {"prompts": prompts, "model": self._weights(which)}
        self._stage(measure.RESPONSES, inputs, settings, make)

    def _rows(self, judged: Path, out: Path) -> None:
        priced: dict[str, tuple[float, int]] = {}
        if self.number:
            responses, scratch = self.folder / measure.RESPONSES, out.with_name(".whole")
            priced = measure.prices(self.config, self.own, responses, scratch)
        write_lines(out, measure.rows_of(judged, priced))


def _said(result: Made | Scored) -> str:
    """What a stage says of itself; what the user has to know now is a warning too."""
    lost = result.reasons() if isinstance(result, Scored) else []
    told = [f"rows without a verdict: {'; '.join(lost)}"] if lost else []
    for note in [*told, *result.notes]:
        log.warning("%s: %s", result.out, note)
    return result.text()


def _free() -> None:
    """Give back an accelerator's memory: what held a model is gone, or waits in a circle."""
    import torch

    if torch.cuda.is_available():
        gc.collect()
        torch.cuda.empty_cache()


def _digest(questions: Sequence[Question]) -> str:
    """A text that stands for a list of prompts and what stands beside them."""
    asked = [[q.id, q.record, q.beside] for q in questions]
    text = json.dumps(asked, sort_keys=True, default=str)
    return hashlib.sha256(text.encode()).hexdigest()


def _calibrated(lines: Sequence[Line], others: Path) -> tuple[list[Line], str]:
    """Candidates with the reference's response as `calibration`; those without one are left out."""
    found = named(others)
    kept: list[Line] = []
    for line in lines:
        other = found.get(str(line.get("id")))
        if other is None:  # a prompt that could not be answered
            continue
        if kind_of(other) != "responses":
            raise ConfigError("generate.reference.role: only losses on texts read a calibration")
        text = other["responses"][0]
        if text.strip():
            cut = {"calibration_cut": True} if about_of(other)[0].get("cut") else {}
            kept.append({**line, "calibration": text, **cut})
    left = len(lines) - len(kept)
    return kept, f"{left} prompts left out, to which the reference says nothing" if left else ""
