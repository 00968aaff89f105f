"""A model's answers to the questions of a benchmark in the common file; `mmalign bench predict`."""

from __future__ import annotations

import hashlib
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path, PurePosixPath
from typing import TYPE_CHECKING, Any

from mmalign.bench.base import Question, write_predictions
from mmalign.config import RunConfig
from mmalign.data.example import Clip, Media
from mmalign.data.jobs import Journal, OnProgress, first_few, no_progress, require_new, resumable
from mmalign.errors import ConfigError, DataError

if TYPE_CHECKING:
    from mmalign.video.adapter import VideoAdapter

_SUFFIXES = (".mp4", ".mkv", ".webm", ".avi", ".mov", ".m4v", ".mpg", ".mpeg", ".flv", ".gif")


@dataclass(slots=True)
class Predicted:
    """What `predict` did.

    Attributes:
        out: The common file.
        num_questions: Lines in it.
        resumed: Answers that had been there before.
        broken: What is wrong with clips that cannot be shown, each once, and how many questions
            have no answer for it.
    """

    out: Path
    num_questions: int
    resumed: int = 0
    broken: Counter[str] = field(default_factory=Counter[str])

    def text(self) -> str:
        """For a terminal."""
        before = f", of which {self.resumed} had been before" if self.resumed else ""
        lines = [f"{self.out}: {self.num_questions} questions answered{before}"]
        if self.broken:
            lines.append(f"{self.broken.total()} of them have no answer (null):")
            lines += [f"  {text}" for text in first_few(list(self.broken))]
        return "\n".join(lines)


def predict(
    config: RunConfig,
    benchmark: str,
    questions: Sequence[Question],
    media: Path,
    out: Path,
    *,
    checkpoint: Path | None = None,
    base: bool = False,
    batch: int | None = None,
    progress: OnProgress = no_progress,
) -> Predicted:
    """Ask a model every question of a benchmark, with the settings of the config's `sample`.

    Answers go to OUT.partial as they come, so that the same call after an interruption goes on. A
    clip that cannot be shown costs the answers to its own questions alone: they are null.

    Args:
        config: Of a video model.
        benchmark: Its name.
        questions: All of them, with distinct ids.
        media: The folder that the paths of clips start from.
        out: The common file to write; it appears whole or not at all.
        checkpoint: Trained weights; None: the newest of the config's output.
        base: Ask the model as it was before training.
        batch: Questions at one time; None for the config's evaluation batch.
        progress: Told how many more are answered, and how many there are.

    Raises:
        ConfigError: The config is of another modality.
        DataError: The file is there, or no clip at all can be shown.
    """
    from mmalign.inference import trained_folder

    if config.modality != "video":
        raise ConfigError(
            f"modality is {config.modality}; video benchmarks need a config of modality video"
        )
    if not media.is_dir():
        raise DataError(f"--media {media}: there is no such folder")
    ids = Counter(question.id for question in questions)
    if len(ids) < len(questions):
        raise DataError(f"--questions: {ids.most_common(1)[0][0]!r} comes twice among the ids")
    require_new(out)
    folder = None if base else trained_folder(config, checkpoint)
    texts = repr([(q.id, q.prompt, q.video, q.start, q.end) for q in questions])
    facts = {  # what answers depend on, so that others are not mixed with these
        "benchmark": benchmark,
        "questions": hashlib.sha256(texts.encode()).hexdigest(),
        "media": str(media),
        "config": config.model_dump(mode="json", include={"model", "video", "text", "sample"}),
        "seed": config.train.seed,
        "weights": "base" if folder is None else str(folder),
    }
    with resumable(out, facts) as journal:
        result = Predicted(out, len(questions), resumed=len(journal.finished))
        progress(result.resumed, len(questions))
        _answer(config, folder, questions, media, journal, batch, progress)
        said = {key: line.get("prediction") for key, line in journal.done.items()}
        result.broken = Counter(journal.broken.values())
        if result.broken.total() == len(questions):
            raise DataError(f"no question can be asked; the first: {next(iter(result.broken))}")
        write_predictions(out, [q.answered(benchmark, said[q.id]) for q in questions])
    return result


def _answer(
    config: RunConfig,
    folder: Path | None,
    questions: Sequence[Question],
    media: Path,
    journal: Journal,
    batch: int | None,
    progress: OnProgress,
) -> None:
    """Ask the weights in a folder, or those of before training, what is not answered yet."""
    from mmalign.video.generate import Question as Asked

    before = journal.finished
    waiting: list[tuple[Question, Asked]] = []
    for question in questions:
        if question.id not in before:
            try:
                clip = Clip(find_clip(media, question.video), question.start or 0.0, question.end)
            except DataError as error:
                journal.add_broken(question.id, error)
                progress(1, len(questions))
            else:
                waiting.append((question, Asked(question.prompt, Media((clip,)))))
    if not waiting:
        return
    from mmalign.inference import trained_adapter
    from mmalign.pairs.answers import ask_all
    from mmalign.video.augment import seed_for

    adapter: VideoAdapter | Any = trained_adapter(config, folder, base=folder is None)
    seeds = [seed_for(config.train.seed, question.id, 0, 0) for question, _ in waiting]
    said = ask_all(adapter, config, [asked for _, asked in waiting], seeds, batch)
    for (question, _), text in zip(waiting, said, strict=True):
        if isinstance(text, DataError):
            journal.add_broken(question.id, text)
        else:
            journal.add({question.id: {"prediction": text.strip()}})
        progress(1, len(questions))


def find_clip(media: Path, name: str) -> Path:
    """The file of a clip, also where it has another ending than the benchmark says.

    Raises:
        DataError: It is not there, or the name leads out of the folder.
    """
    path = PurePosixPath(name)
    if path.is_absolute() or ".." in path.parts:
        raise DataError(f"{name}: clips must lie below --media {media}")
    file = media / path
    for found in (file, *(file.with_suffix(s) for s in _SUFFIXES), *(
        file.with_name(file.name + s) for s in _SUFFIXES
    )):  # fmt: skip
        if found.is_file():
            return found
    raise DataError(f"{file}: there is no such file")
