"""A model's answers to the questions of records: sampled now, or read from a file."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, Protocol

from mmalign.data.fields import Fields, as_list, show
from mmalign.data.files import read_rows
from mmalign.errors import ConfigError, DataError
from mmalign.making.rows import Row, text_of

if TYPE_CHECKING:
    from mmalign.config import RunConfig
    from mmalign.video.adapter import VideoAdapter


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


class Answers(Protocol):
    """Where answers come from."""

    def __call__(self, row: Row) -> list[Answer] | DataError:
        """The answers to a row's question, or why it cannot be asked."""
        ...


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
    _adapter: VideoAdapter | None = field(default=None, init=False)

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
        from mmalign.video.asking import ask
        from mmalign.video.augment import seed_for
        from mmalign.video.generate import Question

        if self.changes and not row.media:
            return DataError("records without a clip: nothing is shown that could be altered")
        adapter = self._loaded()
        changes: list[Change | None] = [None] * self.num
        for k in range(self.num if self.changes else 0):
            operation = self.changes[k % len(self.changes)]
            changes[k] = Change(operation, seed_for(self.seed, row.id, 0, k))
        asked = [Question(row.prompt, replace(row.media, change=change)) for change in changes]
        seeds = [seed_for(self.seed, row.id, 1, k) for k in range(self.num)]
        sample, train = self.config.sample, self.config.train
        options = sample.model_dump(exclude={"num_prompts", "prompts"})
        size = train.eval_batch_size or train.batch_size
        said = [
            text
            for start in range(0, self.num, size)
            for text in ask(
                adapter, asked[start : start + size], seeds[start : start + size], **options
            )
        ]
        broken = next((text for text in said if isinstance(text, DataError)), None)
        if broken is not None:
            return broken
        notes = [c and {"operation": c.operation, "seed": c.seed} for c in changes]
        return [
            Answer(str(text).strip(), note, self._is_cut(str(text)))
            for text, note in zip(said, notes, strict=True)
        ]

    def _loaded(self) -> VideoAdapter:
        if self._adapter is None:
            from mmalign.inference import trained_adapter

            base = self.checkpoint is None
            adapter: Any = trained_adapter(self.config, self.checkpoint, base=base)
            self._adapter = adapter
        assert self._adapter is not None
        return self._adapter

    def _is_cut(self, text: str) -> bool:
        """Whether an answer is as long as it could be: its end was not the model's."""
        ids = self._loaded().encoder.tokenizer(text, add_special_tokens=False)["input_ids"]
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
    return {"id": row.id, "prompt": text_of(row), **true, "answers": said}
