"""Responses to prompts, drawn by an engine and written as candidate lines."""

from __future__ import annotations

import hashlib
import json
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Any, Protocol

from mmalign.config import DataSource, RunConfig
from mmalign.config.generate import GenerateConfig
from mmalign.data.example import Example, Row
from mmalign.data.jobs import (
    OnProgress,
    first_few,
    no_progress,
    require_new,
    resumable,
    write_lines,
)
from mmalign.data.pictures import PictureRoot
from mmalign.data.records import read_asked
from mmalign.data.sheet import write_image
from mmalign.errors import ConfigError, DataError
from mmalign.models.adapter import Adapter, Generated, tools_of
from mmalign.rounds.asked import different, prompt_rows, questions
from mmalign.rounds.weights import weights_of

TOGETHER = 64
"""Responses that are drawn together and written down at once."""

_OF_TEXTS = {"temperature", "top_p", "max_new_tokens"}


class Generator(Protocol):
    """What draws responses: an engine."""

    def facts(self) -> dict[str, Any]:
        """What responses depend on, as JSON: those of other facts are not mixed with these."""
        ...

    def __call__(
        self, asked: Sequence[Example], num: int, seeds: Sequence[Sequence[int]]
    ) -> Iterator[list[Generated] | DataError]:
        """`num` responses to each prompt by its `num` seeds, in order, or why there are none.

        A response depends on its prompt and seed and not on what is asked beside it.
        """
        ...

    def notes(self) -> list[str]:
        """What was noticed on the way, a sentence each."""
        ...


@dataclass
class Local:
    """The policy, loaded here.

    Attributes:
        config: Of the model.
        options: How responses are drawn.
        checkpoint: Trained weights; None: those that the config names.
    """

    config: RunConfig
    options: GenerateConfig
    checkpoint: Path | None = None

    def __post_init__(self) -> None:
        """Refuse what the modality does not read."""
        changed = self.options.model_dump(include=_OF_TEXTS, exclude_defaults=True)
        if self._tools.samples_images and changed:
            odd = " and ".join(f"{name} {value:g}" for name, value in changed.items())
            raise ConfigError(
                f"generate: {odd} is for texts; how images are drawn stands in diffusion.sampling"
            )

    def facts(self) -> dict[str, Any]:
        """Settings of the model and of the draw, and the weights."""
        sections = {"modality", "model", "text", "video", "diffusion"}
        return {
            "config": self.config.model_dump(mode="json", include=sections),
            "data": self.config.data.model_dump(mode="json", exclude={"train", "eval"}),
            "options": self.options.model_dump(mode="json", exclude={"batch_size", "num"}),
            **weights_of(self.config, self.checkpoint),
        }

    def __call__(
        self, asked: Sequence[Example], num: int, seeds: Sequence[Sequence[int]]
    ) -> Iterator[list[Generated] | DataError]:
        """Where some cannot be answered, they are asked one by one: it costs no others theirs."""
        try:
            prompts = [self._tools.to_prompt(row) for row in asked]
            drawn = self._adapter.candidates(prompts, num, seeds=seeds, **self._settings)
        except DataError as error:
            if len(asked) == 1:
                yield error
                return
            for row, own in zip(asked, seeds, strict=True):
                yield from self([row], num, [own])
            return
        yield from drawn

    def notes(self) -> list[str]:
        """None."""
        return []

    @cached_property
    def _tools(self) -> Any:
        return tools_of(self.config.modality)

    @cached_property
    def _adapter(self) -> Adapter:
        from mmalign.inference import trained_adapter

        return trained_adapter(self.config, self.checkpoint, base=self.checkpoint is None)

    @property
    def _settings(self) -> dict[str, Any]:
        names: set[str] = set() if self._tools.samples_images else _OF_TEXTS
        return self.options.model_dump(include={"batch_size", *names})


def generator(
    config: RunConfig, options: GenerateConfig, checkpoint: Path | None = None
) -> Generator:
    """The engine that `options` names.

    Args:
        config: Of the model; its `model` names the weights to draw from.
        options: How responses are drawn.
        checkpoint: A `checkpoint-N` or `final` folder in place of those weights.

    Raises:
        ConfigError: Options that the model or the engine does not read.
    """
    if options.engine == "local":
        return Local(config, options, checkpoint)
    from mmalign.rounds.server import Server

    return Server(config, options, checkpoint)


def generate_for(
    config: RunConfig,
    options: GenerateConfig,
    out: Path,
    data: str | None = None,
    checkpoint: Path | None = None,
    *,
    seed: int = 0,
    progress: OnProgress = no_progress,
) -> Made:
    """Draw responses to all prompts of a file, or of a config's `data.train`; see `generate_file`.

    Args:
        config: Of the model.
        options: How responses are drawn.
        out: The file of candidate lines; media that lie elsewhere get a second name beside it.
        data: A file of rows with a prompt, in place of the config's.
        checkpoint: Trained weights in place of the config's: a path, or a name in `output`.
        seed: All are drawn by.
        progress: Told how many more rows are done, and how many there are.
    """
    from mmalign.inference import trained_folder

    if checkpoint is not None:
        checkpoint = trained_folder(config, checkpoint)
    engine = generator(config, options, checkpoint)
    require_new(out)
    sources = config.data.train if data is None else [DataSource(path=data)]
    asked = [
        question
        for number, source in enumerate(sources)
        for _, question in questions(source, number, config.data.bad_rows)
    ]
    if not asked:
        raise DataError(f"{sources[0].path}: holds no prompts")
    rows = prompt_rows(different(asked), out)
    return generate_file(engine, rows, out, num=options.num, seed=seed, progress=progress)


@dataclass(slots=True)
class Made:
    """What `generate_file` did.

    Attributes:
        out: The file of candidate lines.
        num_prompts: Lines in it.
        num: Responses a line.
        resumed: Lines that had been there before.
        cut: Responses without an end.
        empty: Responses without a word.
        alike: Prompts whose responses are all the same.
        broken: Why prompts have none, and how many.
        notes: What the engine noticed.
    """

    out: Path
    num_prompts: int
    num: int
    resumed: int = 0
    cut: int = 0
    empty: int = 0
    alike: int = 0
    broken: Counter[str] = field(default_factory=Counter[str])
    notes: list[str] = field(default_factory=list[str])

    def text(self) -> str:
        """For a terminal."""
        total = self.num_prompts * self.num
        before = f", of which {self.resumed} had been before" if self.resumed else ""
        lines = [f"{self.out}: {total:,} responses to {self.num_prompts:,} prompts{before}"]
        if self.cut:
            lines.append(f"{self.cut:,} are cut: their tokens were used up before they ended")
        if self.empty:
            lines.append(f"{self.empty:,} are empty")
        if self.alike:
            lines.append(f"{self.alike:,} prompts have {self.num} equal responses")
        if self.broken:
            lines.append(f"{self.broken.total():,} prompts have no responses:")
            lines += [f"  {text}" for text in first_few(list(self.broken))]
        return "\n".join([*lines, *self.notes])


def generate_file(
    engine: Generator,
    rows: Sequence[Mapping[str, Any]],
    out: Path,
    *,
    num: int,
    seed: int,
    progress: OnProgress = no_progress,
    root: Path | None = None,
) -> Made:
    """Draw responses to rows of prompts, and write a candidate line for each row.

    A line has all columns of its row, `responses` (or `images`, whose files lie in OUT_images/),
    and `about` each of them: `seed`, `cut`, `logp` (nats), `tokens`, `from`. Lines go to
    OUT.partial as they come; the same call after an interruption ends with the same bytes.

    Args:
        engine: Draws.
        rows: With distinct `id`s, and a prompt as `read_prompts` takes it.
        out: The file to write; it appears whole or not at all.
        num: Responses a prompt.
        seed: Each response is drawn by a seed that follows from this one, the row's id and its
            number.
        progress: Told how many more rows are done, and how many there are.
        root: Where paths of media start; None: OUT's folder.

    Raises:
        DataError: The file is there, ids are not distinct, or no prompt can be answered.
    """
    if any(row.get("id") is None for row in rows):
        raise DataError(f"{out}: a prompt has no `id`; give each one, as responses go by it")
    ids = [str(row["id"]) for row in rows]
    twice = next((name for name, count in Counter(ids).items() if count > 1), None)
    if twice is not None:
        raise DataError(f"{out}: the id {twice!r} comes twice among the prompts")
    places = PictureRoot(root or out.parent)
    asked = [
        read_asked(Row(name, dict(row)), places)[1] for name, row in zip(ids, rows, strict=True)
    ]
    require_new(out)
    text = json.dumps(list(rows), sort_keys=True, ensure_ascii=False, default=str)
    hashed = hashlib.sha256(text.encode("utf-8", "surrogatepass")).hexdigest()
    with resumable(out, {**engine.facts(), "num": num, "seed": seed, "rows": hashed}) as journal:
        before = journal.finished
        made = Made(out, len(rows), num, resumed=len(before))
        progress(made.resumed, len(rows))
        # The same rows are always drawn together, so that rounding, too, is that of one pass.
        together = max(1, TOGETHER // num)
        for start in range(0, len(rows), together):
            part = range(start, min(start + together, len(rows)))
            if before.issuperset(ids[i] for i in part):
                continue
            seeds = [[seed_of(seed, ids[i], k) for k in range(num)] for i in part]
            drawn = engine([asked[i] for i in part], num, seeds)
            for i, own, found in zip(part, seeds, drawn, strict=True):
                if ids[i] in before:
                    continue
                if isinstance(found, DataError):
                    journal.add_broken(ids[i], found)
                else:
                    journal.add({ids[i]: _columns(found, own, out, i)})
                progress(1, len(rows))
        made.broken = Counter(journal.broken.values())
        if rows and made.broken.total() == len(rows):
            raise DataError(f"no prompt can be answered; the first: {next(iter(made.broken))}")
        lines = [
            {**row, **journal.done[name]}
            for name, row in zip(ids, rows, strict=True)
            if name not in journal.broken
        ]
        _count(made, lines)
        made.notes = engine.notes()
        write_lines(out, lines)
    return made


def seed_of(seed: int, row: str, number: int) -> int:
    """A 48-bit seed, which any reader of JSON keeps, for one response to a row."""
    key = repr((seed, row, number)).encode("utf-8", "surrogatepass")
    return int.from_bytes(hashlib.blake2b(key, digest_size=6).digest(), "little")


def _columns(
    drawn: Sequence[Generated], seeds: Sequence[int], out: Path, number: int
) -> dict[str, Any]:
    """What a candidate line has beside its row's own columns; images are written."""
    about = [
        {
            "seed": seed,
            "cut": one.cut,
            "logp": None if one.logp is None else round(one.logp, 5),
            "tokens": one.tokens,
            "from": "policy",
        }
        for one, seed in zip(drawn, seeds, strict=True)
    ]
    if isinstance(drawn[0].response, str):
        return {"responses": [one.response for one in drawn], "about": about}
    names = [f"{out.stem}_images/{number:06d}-{k}.png" for k in range(len(drawn))]
    for one, name in zip(drawn, names, strict=True):
        write_image(one.response, out.parent / name)
    return {"images": names, "about": about}


def _count(made: Made, lines: Sequence[Mapping[str, Any]]) -> None:
    made.num_prompts = len(lines)
    for line in lines:
        made.cut += sum(about["cut"] for about in line["about"])
        said = [text.strip() for text in line.get("responses", ())]
        made.empty += said.count("")
        made.alike += len(said) > 1 and len(set(said)) == 1
