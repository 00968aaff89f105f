"""A model's answers to the questions of records, sampled or read from a file."""

from __future__ import annotations

import json
import os
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any

from mmalign.config import RunConfig
from mmalign.data.example import (
    Asked,
    Candidate,
    Clip,
    Example,
    Media,
    Picture,
    Prompt,
    Sound,
    as_text,
)
from mmalign.data.fields import Fields, as_list, show
from mmalign.data.files import read_rows
from mmalign.data.jobs import Source
from mmalign.data.records import ProblemList, Record
from mmalign.errors import ConfigError, DataError

if TYPE_CHECKING:
    from mmalign.video.adapter import VideoAdapter
    from mmalign.video.generate import Question


@dataclass(frozen=True, slots=True)
class Row:
    """One record to make pairs from.

    Attributes:
        id: Its own, or its file's name and line.
        prompt: Of its best answer.
        media: What that prompt shows.
        question: What is asked last.
        truth: The true answer; "" where the record has none.
        columns: What a pair takes over from the record; paths start from the new file's folder.
        clues: What a record says is seen and heard, by kind.
    """

    id: str
    prompt: Prompt | Asked
    media: Media
    question: str
    truth: str
    columns: Mapping[str, Any]
    clues: Mapping[str, str] | None = None


def rows_of(source: Source, out: Path) -> tuple[list[Row], int]:
    """All records of a source that can be used, and how many were left out.

    Args:
        source: The records; those with problems are left out where it says so.
        out: The file that pairs go to.

    Raises:
        DataError: Records have problems, or media do not lie below the folder of `out`.
    """
    problems = ProblemList()
    rows: list[Row] = []
    for record in source.records():
        problems.add(record, *record.problems)
        if record.example is not None:
            rows.append(_row(record, record.example, out))
    if problems.groups and not source.drop_bad:
        raise problems.error(source.path)
    if not rows:
        raise DataError(f"{source.path}: holds no records that can be used")
    return rows, problems.num_records


def _row(record: Record, example: Example, out: Path) -> Row:
    best = example.candidates[max(range(example.num_rated), key=example.labels.__getitem__)]
    media = best.media or example.media
    prompt = example.prompt if best.prompt is None else best.prompt
    asked = prompt if isinstance(prompt, str) else prompt[-1].content if prompt else ""
    given = prompt if isinstance(prompt, str) else [turn.as_dict() for turn in prompt]
    beside = {"tools": example.template.tools, "chat_template_kwargs": example.template.options}
    given = {"prompt": given} | {key: json.loads(text) for key, text in beside.items() if text}
    split = {"split": record.split} if record.split else {}
    return Row(
        id=Path(record.id).name if record.id == record.place else record.id,
        prompt=Asked(prompt, example.template) if example.template else prompt,
        media=media,
        question=asked,
        truth=_truth(record, example, best),
        columns={**_columns(media, record.place, out), **given, **split},
        clues=_clues(record, example),
    )


def _truth(record: Record, example: Example, best: Candidate) -> str:
    """The best answer of a record; "" where it is not a good one."""
    if example.kind == "unpaired" and not any(example.labels):
        return ""
    answer = best.response
    if isinstance(answer, tuple) and len(answer) == 1:
        return answer[0].content.strip()
    if not isinstance(answer, str):
        raise DataError(
            f"{record.place}: the answer must be one text; pairs are made of what is said about a "
            "clip in one turn"
        )
    return answer.strip()


def _clues(record: Record, example: Example) -> dict[str, str] | None:
    given = example.meta.get("clues")
    if given is None:
        return None
    named = {"": given} if isinstance(given, str) else given
    if not isinstance(named, Mapping) or not all(isinstance(v, str) for v in named.values()):
        raise DataError(
            f"{record.place}: `clues` must be a text, or texts by kind such as "
            '{"video": ..., "audio": ...}'
        )
    return {f"{kind} clue".strip(): text for kind, text in named.items()}


def _columns(media: Media, place: str, out: Path) -> dict[str, Any]:
    """What a prompt shows, as a record in the folder of `out` names it.

    Raises:
        DataError: A file does not lie below that folder.
    """
    folder = Path(os.path.realpath(out.parent))

    def named(medium: Clip | Picture | Sound) -> Any:
        file = Path(os.path.realpath(medium.path))
        if isinstance(medium, Picture) and medium.row >= 0:
            raise DataError(f"{place}: {medium} is a cell of a table; give the image as a file")
        if not file.is_relative_to(folder):
            raise DataError(
                f"{place}: {file} does not lie below {folder}, and the paths of a data file start "
                "from its folder; choose an --out in or above the folder of the media"
            )
        path = file.relative_to(folder).as_posix()
        if isinstance(medium, Picture):
            return path
        frames = list(medium.frames) if isinstance(medium, Clip) else []
        part = {"start": medium.start or None, "end": medium.end, "frames": frames or None}
        part = {key: value for key, value in part.items() if value is not None}
        return {"path": path, **part} if part else path

    columns: dict[str, Any] = {}
    for kind, items in media.by_kind().items():
        if len(items) == 1:
            columns[kind] = named(items[0])
        elif items:
            columns[f"{kind}s"] = [named(medium) for medium in items]
    return columns


@dataclass(frozen=True, slots=True)
class Answer:
    """What was said to a question.

    Attributes:
        text: Without spaces around it.
        change: How the clip was altered before it was shown: `operation` and `seed`; None: not.
        cut: Whether it was cut off at the longest length, so that no end may be learned.
        wrong: Known to be wrong: a file says so, and no rule is asked.
    """

    text: str
    change: Mapping[str, Any] | None = None
    cut: bool = False
    wrong: bool = False

    def record(self) -> dict[str, Any]:
        """As a file of answers holds it; what is empty is left out."""
        rest = {"change": self.change, "cut": self.cut, "wrong": self.wrong}
        return {"text": self.text, **{key: value for key, value in rest.items() if value}}


Answers = Callable[[Row], list[Answer] | DataError]
"""Where answers come from: those to a row's question, or why it cannot be asked."""


@dataclass
class Sampled:
    """Answers of a model, drawn by seeds of their own row: the same wherever a run begins.

    Attributes:
        config: Of the model; `sample` says how answers are drawn.
        checkpoint: Trained weights; None: the model as it was before training.
        num: Answers a row.
        seed: Of what is drawn.
        changes: Operations on the clip, one an answer, in turn; (): the clip as it is.
    """

    config: RunConfig
    checkpoint: Path | None
    num: int
    seed: int
    changes: Sequence[str] = ()

    def __post_init__(self) -> None:
        """Refuse what no answers, or always the same, would come from."""
        from mmalign.video.augment import NEEDS_DONOR, OPERATIONS

        if self.config.modality != "video":
            raise ConfigError(
                f"modality is {self.config.modality}; pairs are made of answers about clips, which "
                "need a config of modality video"
            )
        known = sorted(OPERATIONS - NEEDS_DONOR)
        unknown = [name for name in self.changes if name not in known]
        if unknown:
            raise ConfigError(f"--change {unknown[0]}: must be one of {', '.join(known)}")
        if self.num > 1 and not self.changes and not self.config.sample.temperature:
            raise ConfigError(
                f"sample.temperature is 0, which would give the same answer {self.num} times; set "
                "sample.temperature=0.8"
            )

    def facts(self) -> dict[str, Any]:
        """What answers depend on."""
        return {
            "config": self.config.model_dump(
                mode="json", include={"model", "video", "text", "sample"}
            ),
            "checkpoint": None if self.checkpoint is None else str(self.checkpoint),
            "num": self.num,
            "seed": self.seed,
            "changes": list(self.changes),
        }

    def __call__(self, row: Row) -> list[Answer] | DataError:
        """Ask about the row's clip, altered where that is wanted; an unusable clip is an error."""
        from mmalign.data.example import Change
        from mmalign.video.augment import seed_for
        from mmalign.video.generate import Question

        if self.changes and not row.media:
            return DataError("records without a clip: nothing is shown that could be altered")
        changes: list[Change | None] = [None] * self.num
        for k in range(self.num if self.changes else 0):
            operation = self.changes[k % len(self.changes)]
            changes[k] = Change(operation, seed_for(self.seed, row.id, 0, k))
        asked = [Question(row.prompt, replace(row.media, change=change)) for change in changes]
        seeds = [seed_for(self.seed, row.id, 1, k) for k in range(self.num)]
        said = list(ask_all(self._adapter, self.config, asked, seeds))
        broken = next((text for text in said if isinstance(text, DataError)), None)
        if broken is not None:
            return broken
        notes = [c and {"operation": c.operation, "seed": c.seed} for c in changes]
        return [
            Answer(str(text).strip(), note, self._is_cut(str(text)))
            for text, note in zip(said, notes, strict=True)
        ]

    @cached_property
    def _adapter(self) -> VideoAdapter:
        from mmalign.inference import trained_adapter

        adapter: Any = trained_adapter(self.config, self.checkpoint, base=self.checkpoint is None)
        return adapter

    def _is_cut(self, text: str) -> bool:
        """Whether an answer is as long as it could be: its end was not the model's."""
        ids = self._adapter.encoder.tokenizer(text, add_special_tokens=False)["input_ids"]
        return len(ids) >= self.config.sample.max_new_tokens


class Filed:
    """Answers of a JSONL file, from any model.

    A line has the row's `id` and `answers`, a list of texts or of what `Answer.record` writes, or
    `pred`, one text; with `wrong: true`, which says so of its answers, no rule is asked.
    """

    def __init__(self, path: Path) -> None:
        """Read the file.

        Raises:
            DataError: A line without an id or answers.
        """
        self.path = path
        self._known: dict[str, list[Answer]] = {}
        for row in read_rows(path):
            fields = Fields(row.value or {})
            given = as_list(fields.get("answers")) or [fields.get("pred")]
            wrong = bool(fields.flag("wrong"))
            name = fields.get("id")
            try:
                if name is None or fields.problems:
                    raise ValueError(row.problem or "has no `id`")
                self._known.setdefault(str(name), []).extend(_answer(item, wrong) for item in given)
            except ValueError as error:
                raise DataError(f"{row.place}: {error}") from None

    def __call__(self, row: Row) -> list[Answer] | DataError:
        """The answers under the row's id."""
        found = self._known.get(row.id)
        return DataError(f"{self.path}: has no answers to some records") if found is None else found


def _answer(value: Any, wrong: bool) -> Answer:
    if isinstance(value, str):
        return Answer(value.strip(), wrong=wrong)
    if isinstance(value, Mapping) and isinstance(value.get("text"), str):
        change = value.get("change")
        if isinstance(change, Mapping | None):
            known = wrong or value.get("wrong") is True
            return Answer(value["text"].strip(), change, value.get("cut") is True, known)
    raise ValueError(f"`answers` or `pred` must hold text, but holds {show(value)}")


def answers_record(row: Row, answers: Sequence[Answer]) -> dict[str, Any]:
    """A line of a file of answers; question and true answer are for who judges them."""
    true = {"truth": row.truth} if row.truth else {}
    said = [answer.record() for answer in answers]
    return {"id": row.id, "prompt": as_text(row.prompt), **true, "answers": said}


def ask_all(
    adapter: VideoAdapter,
    config: RunConfig,
    questions: Sequence[Question],
    seeds: Sequence[int],
    size: int | None = None,
) -> Iterator[str | DataError]:
    """An answer to each question as the config's `sample` says, or why there is none.

    Args:
        adapter: In evaluation mode.
        config: The run's.
        questions: All of them, asked batch after batch.
        seeds: One an answer, of what is drawn for it.
        size: Questions of a batch; None for the config's evaluation batch.
    """
    options = config.sample.model_dump(exclude={"num_prompts", "prompts"})
    size = size or config.train.eval_batch_size or config.train.batch_size
    for start in range(0, len(questions), size):
        part = slice(start, start + size)
        yield from ask(adapter, questions[part], seeds[part], **options)


def ask(
    adapter: VideoAdapter, questions: Sequence[Question], seeds: Sequence[int], **options: Any
) -> list[str | DataError]:
    """The answers to one batch; `options` are those of `generate`.

    Where it cannot be answered, its questions are asked one by one, so that a broken clip costs no
    answer but its own.
    """
    try:
        return list(adapter.sample(questions, seeds=seeds, **options))
    except DataError as error:
        if len(questions) == 1:
            return [error]
    alone = zip(questions, seeds, strict=True)
    return [ask(adapter, [question], [seed], **options)[0] for question, seed in alone]
