"""The contract between a modality and everything else, and the rows that a run takes through it."""

from __future__ import annotations

import hashlib
import logging
from abc import ABC, abstractmethod
from collections import Counter
from collections.abc import Callable, Hashable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from importlib import import_module
from pathlib import Path
from typing import Any, ClassVar, Literal, Self

from torch import Tensor, nn

from mmalign.config import RunConfig, SampleConfig, TrainConfig
from mmalign.core import CandidateLogps, Needs
from mmalign.data.cache import KeptRows, no_collection
from mmalign.data.example import Asked, Example, as_text
from mmalign.data.jobs import is_main_process
from mmalign.data.records import ProblemList
from mmalign.data.sources import load_examples
from mmalign.errors import ConfigError, DataError
from mmalign.models.batch import Batch

log = logging.getLogger("mmalign.data")


@dataclass(frozen=True, slots=True)
class Surveyed:
    """The rows that can be learned from, and what was found about all of them.

    Attributes:
        parts: Rows to train on and rows held out, without those that have problems.
        notes: A sentence for each thing that is to be known of the rows; none of clean ones.
        problems: Rows that cannot be used.
        logged: What was logged while the rows were read, a sentence each.
    """

    parts: list[list[Example]]
    notes: tuple[str, ...] = ()
    problems: ProblemList = field(default_factory=ProblemList)
    logged: tuple[str, ...] = ()

    @property
    def train(self) -> list[Example]:
        """Rows to train on."""
        return self.parts[0]

    @property
    def held_out(self) -> list[Example]:
        """Rows to evaluate on."""
        return self.parts[1]


def survey_rows(config: RunConfig, needs: Needs, *, first: int | None = None) -> Surveyed:
    """Rows of a run as `data.bad_rows` wants them: those with problems stop it, or are left out.

    Args:
        config: The run's configuration.
        needs: Of its objective.
        first: How many rows of either part are wanted; None: all.

    Raises:
        DataError: There are problems, or no row is left.
    """
    found = find_rows(config, needs, first=first)
    if not found.problems.groups:
        return found
    number = found.problems.num_records
    count, are = f"{number:,} rows" if number > 1 else "1 row", "are" if number > 1 else "is"
    if config.data.bad_rows == "stop":
        raise DataError(
            f"{found.problems.summary()} {count} cannot be used with this model and these "
            "settings; `mmalign data check --config CONFIG` lists them all, and data.bad_rows: "
            "drop leaves them out"
        )
    if not found.train:
        raise DataError(f"no row is left to train on: {' '.join(found.problems.lines())}")
    left_out = f"{count} cannot be used and {are} left out: {' '.join(found.problems.lines(0))}"
    return replace(found, notes=(left_out, *found.notes))


def find_rows(config: RunConfig, needs: Needs, *, first: int | None = None) -> Surveyed:
    """The same with the problems handed back."""

    with logged("mmalign") as heard:  # while they are read, and while they are looked at
        train, held_out = _read(config, needs)
        parts = (train[:first], held_out[:first])
        found = tools_of(config.modality).survey(config, needs, parts)
    return replace(found, logged=tuple(dict.fromkeys(heard)))


def _read(config: RunConfig, needs: Needs) -> tuple[list[Example], list[Example]]:
    """The rows of a config, from the files or as they were kept when the files were read."""
    seed = config.train.seed
    kept = KeptRows(config.output.parent / "cache" / "rows", config.data, needs, seed)
    known = kept.get()
    if known is not None:
        return known
    with no_collection(), logged(log.name) as lines:
        parts = load_examples(config.data, needs, seed=seed)
    if is_main_process():
        kept.put(parts, lines)
    return parts


@contextmanager
def logged(name: str, *, quiet: bool = False) -> Iterator[list[str]]:
    """What a logger is told meanwhile; where it is `quiet`, nobody else hears it."""
    lines: list[str] = []

    class Listener(logging.Handler):
        def emit(self, record: logging.LogRecord) -> None:
            lines.append(record.getMessage())
            # With a handler there, logging leaves out what it prints where there is none.
            if alone and logging.lastResort and record.levelno >= logging.lastResort.level:
                logging.lastResort.handle(record)

    logger, listener = logging.getLogger(name), Listener()
    before, alone = logger.propagate, not quiet and not logger.hasHandlers()
    logger.addHandler(listener)
    logger.propagate = before and not quiet
    try:
        yield lines
    finally:
        logger.propagate = before
        logger.removeHandler(listener)


def say(notes: Sequence[str]) -> None:
    """Log what is to be known of the rows of a run."""
    for note in notes:
        log.warning("%s", note)


@dataclass(frozen=True, slots=True)
class Saved:
    """What `Adapter.save` wrote.

    Attributes:
        readers: File, by its name in the folder, to the programs that read it.
        notes: A sentence for each file that could not be written.
    """

    readers: Mapping[str, str] = field(default_factory=dict[str, str])
    notes: tuple[str, ...] = ()


@dataclass(frozen=True, slots=True)
class LogpUnit:
    """What log-probabilities are counted in, which decides how large a loss's constants are.

    Attributes:
        of: Nats of tokens, or errors of images.
        factor: What a constant is multiplied by before it is compared with published ones; None:
            there are none of its unit.
        setting: What the factor is made of, for messages.
    """

    of: Literal["nats", "errors"] = "nats"
    factor: float | None = 1.0
    setting: str = ""


@dataclass(frozen=True, slots=True)
class Generated:
    """A response or image that a policy drew.

    Attributes:
        response: The text, or the image.
        tokens: Tokens of the text, without the end token; None: not counted.
        cut: The text ends where its tokens were used up, and not by itself.
        logp: Log-probability of the text, with its end token where that was drawn, under the model
            at temperature 1, whatever it was drawn at; nats. None: not known.
    """

    response: Any
    tokens: int | None = None
    cut: bool = False
    logp: float | None = None


class Adapter(nn.Module, ABC):
    """A trainable policy, its reference, and the way to score candidates under both.

    The adapter is the module that accelerate prepares: one forward per backward. Trainable
    parameters are those that require a gradient. The reference is held by a plain object, never a
    registered submodule.
    """

    @classmethod
    @abstractmethod
    def build(cls, config: RunConfig, needs: Needs) -> Self:
        """Load the model that `config` describes; all that is wrong with it is refused before."""

    @classmethod
    @abstractmethod
    def provides(cls, config: RunConfig) -> Needs:
        """What this adapter can supply under `config`; looks at no weights."""

    @abstractmethod
    def collate(self, examples: Sequence[Example], draws: Sequence[int] | None = None) -> Batch:
        """Examples to one batch, on the CPU; may run in worker processes.

        Args:
            examples: The rows.
            draws: A seed a row for all that is drawn at random for it (timesteps, noise, crops), a
                function of the run's seed and the row's visit alone. None: the row's own, always
                the same, so that held-out numbers of two steps can be compared.
        """

    @abstractmethod
    def forward(self, batch: Batch, needs: Needs) -> CandidateLogps:
        """Score every candidate under the policy and, if asked, the reference, and no more."""

    @abstractmethod
    def save(self, directory: Path) -> Saved | None:
        """Write the trained weights in the layout of the model's own library."""

    @abstractmethod
    def restore(self, directory: Path) -> nn.Module:
        """Load what `save` wrote into the policy, and return the module that has it.

        Raises:
            CheckpointError: The folder holds other weights than the policy has.
        """

    def parameter_groups(self, train: TrainConfig) -> list[dict[str, Any]]:
        """Optimizer groups; the default is one group of all trainable parameters."""
        return [{"params": [p for p in self.parameters() if p.requires_grad]}]

    def setup(self, examples: Sequence[Example], num_steps: int | None = None) -> None:
        """Called once before the first step or evaluation; e.g. to open a cache.

        Args:
            examples: All rows of the run.
            num_steps: Optimizer steps that the run takes; None: nothing is trained.
        """

    @property
    def vocab_size(self) -> int | None:
        """Tokens that a position may be; None: positions are not tokens."""
        return None

    def after_step(self, step: int) -> None:
        """Called after every optimizer step: EMA, reference refresh."""

    def num_positions(self, batch: Batch, needs: Needs) -> Tensor | None:  # [B, K, 2]
        """How many positions of response and prompt `forward` will score, known without a pass.

        For losses that take a mean over all tokens of a step. None: each micro-batch counts its
        own, which is the same where all rows have as many.
        """
        return None

    def split(self, batch: Batch, most: int) -> list[Batch]:
        """The batch in parts of at most `most` tokens, rows of like length together, longest first.

        A row's tokens are those of its prompt, once, and of its responses.
        """
        raise ConfigError(f"{type(self).__name__} knows no tokens to split a batch by")

    def metrics(self, batch: Batch, logps: CandidateLogps) -> dict[str, Tensor]:
        """What to log beside the objective's metrics, detached, means over rows."""
        return {}

    def per_row_columns(self, batch: Batch) -> dict[str, list[Any]]:
        """What to keep of each held-out row beside its scores, one value a row."""
        return {}

    def extra_state(self) -> dict[str, Tensor]:
        """Tensors outside `parameters()` that a resumed run needs (an EMA reference)."""
        return {}

    def load_extra_state(self, state: Mapping[str, Tensor]) -> None:
        """Restore what `extra_state` gave."""

    def sample(self, prompts: Sequence[Any], **options: Any) -> list[Any]:
        """Generate one response a prompt with the policy, for reports and `mmalign sample`.

        Models of tokens draw each by a seed of its own: one of `seeds`, else of the run's.
        """
        raise ConfigError(f"{type(self).__name__} cannot generate samples")

    def candidates(
        self,
        prompts: Sequence[Any],
        num: int,
        *,
        seeds: Sequence[Sequence[int]],
        batch_size: int | None = None,
        **options: Any,
    ) -> list[list[Generated]]:
        """Draw `num` responses a prompt with the policy, each by its own seed.

        A response depends on its prompt, its seed and `options` alone.

        Args:
            prompts: As `sample` takes them.
            num: Responses a prompt.
            seeds: `num` a prompt.
            batch_size: Responses at one time; None: as the modality chooses.
            **options: Those of `sample`.
        """
        drawn = [(prompt, seed) for prompt, own in zip(prompts, seeds, strict=True) for seed in own]
        made: list[Generated] = []
        size = batch_size or len(drawn)
        for part in (drawn[start : start + size] for start in range(0, len(drawn), size)):
            asked, own = map(list, zip(*part, strict=True))
            made += map(Generated, self.sample(asked, seeds=own, **options))
        return [made[start : start + num] for start in range(0, len(made), num)]


class Tools:
    """What a modality says of configs and rows without weights, and does for commands.

    Attributes:
        unit: What positions are called in logs.
        samples_images: What the model makes; else texts.
        pipeline_tag: What a hub calls the task.
    """

    unit: ClassVar[str] = "tokens"
    samples_images: ClassVar[bool] = False
    pipeline_tag: ClassVar[str] = "text-generation"

    def hub_library(self, *, lora: bool) -> str:
        """What loads trained weights, by the name that a hub has for it."""
        return "peft" if lora else "transformers"

    def problems(self, config: RunConfig) -> list[str]:
        """What `config` asks for and the modality cannot do, as sentences."""
        return []

    def named_models(self, config: RunConfig) -> Iterator[tuple[str, str | None, str | None]]:
        """Kind, path and revision of every model whose files decide what a run learns."""
        yield "model", config.model.path, config.model.revision
        yield "adapter", config.model.adapter, None
        yield "reference", config.reference.path, None
        for number, part in enumerate(config.reference.mixture):
            yield f"mixture {number + 1}", part.path, None

    def logp_unit(self, config: RunConfig) -> LogpUnit:
        """What scores are counted in."""
        return LogpUnit()

    def score_tolerance(self, config: RunConfig) -> float:
        """How far two ways to one log-probability may differ on average, in nats a position."""
        half = config.model.dtype == "bfloat16" or config.train.mixed_precision == "bf16"
        return 0.05 if half or config.model.quantization else 1e-3

    def resolve_config(self, config: RunConfig) -> RunConfig:
        """The config with what is decided on the day that a run begins, and kept by it."""
        return config

    def survey(
        self, config: RunConfig, needs: Needs, parts: Sequence[Sequence[Example]]
    ) -> Surveyed:
        """The rows that can be learned from, and all that can be known of them without a model.

        Args:
            config: Of the run.
            needs: Of its objective.
            parts: Rows to train on and rows held out, which may share files.

        Raises:
            DataError, ConfigError: They cannot be trained on, whatever `data.bad_rows` is.
        """
        return Surveyed([list(part) for part in parts])

    def eval_examples(self, config: RunConfig, examples: Sequence[Example]) -> list[Example]:
        """The rows to evaluate on; more than were given where one row is scored several times."""
        return list(examples)

    def summarise(self, config: RunConfig, rows: Sequence[Mapping[str, Any]]) -> dict[str, float]:
        """Held-out metrics that follow from the rows' scores and `Adapter.per_row_columns`."""
        return {}

    def to_prompt(self, example: Example) -> Any:
        """What `Adapter.sample` takes to answer a row, or to answer it again; hashable.

        Raises:
            DataError: The row shows something that a model of this modality does not look at.
        """
        if example.media:
            files = ", ".join(map(str, example.media.files()))
            raise DataError(
                f"{example.id}: shows {files}, which only a model of modality video looks at. "
                "Take it out, or use a config with modality: video"
            )
        row = example.template
        return Asked(example.prompt, row, example.place or example.id) if row else example.prompt

    def server_request(self, config: RunConfig) -> Callable[[Example], dict[str, Any]]:
        """What an OpenAI-compatible server is sent to answer a row: `prompt`, or `messages`.

        The server must make of it the context that `Adapter.sample` answers. A row that it cannot
        be sent raises a DataError.

        Raises:
            ConfigError: Models of the modality are not asked on servers.
        """
        raise ConfigError(
            f"generate.engine is server, which is for texts, but modality is {config.modality}; "
            "use engine: local"
        )

    def write_samples(
        self,
        adapter: Any,
        prompts: Mapping[str, Any],
        folder: Path,
        step: int,
        options: SampleConfig,
    ) -> list[dict[str, Any]]:
        """Generate for the prompts during training; here: texts, by `Adapter.sample`.

        Args:
            adapter: Of the modality, in evaluation mode.
            prompts: Row id to prompt.
            folder: The run folder; files go to `samples/step-N/` inside.
            step: Optimizer steps done.
            options: The config's `sample` section.

        Returns:
            One record a prompt for samples.jsonl: `id`, `prompt`, and `response` or file names.
        """
        settings = options.model_dump(exclude={"num_prompts", "prompts"})
        texts = adapter.sample(list(prompts.values()), **settings)
        return [
            {"id": row, "prompt": as_text(prompt), "response": str(text)}
            for (row, prompt), text in zip(prompts.items(), texts, strict=True)
        ]

    def write_cache(self, config: RunConfig, needs: Needs) -> str:
        """Store what training would compute again and again.

        Args:
            config: The run.
            needs: Of its objective.

        Returns:
            What was done, as sentences.

        Raises:
            ConfigError: Nothing of it can be stored, or the disk is too small.
            DataError: A file cannot be used.
        """
        raise ConfigError(f"a cache of modality {config.modality} is not supported")

    def plan_cache(self, config: RunConfig, needs: Needs) -> str:
        """What `write_cache` would write, and how large it is."""
        raise ConfigError(f"--plan: the size of a {config.modality} cache is not known beforehand")

    def show_rows(self, config: RunConfig, examples: Sequence[Example]) -> Any:
        """The rows as the model will see them, for a terminal."""
        return "\n".join(str(example) for example in examples)


ADAPTERS: dict[str, str] = {
    "text": "mmalign.text.adapter:TextAdapter",
    "diffusion": "mmalign.diffusion.adapter:DiffusionAdapter",
    "video": "mmalign.video.adapter:VideoAdapter",
}
TOOLS: dict[str, str] = {
    "text": "mmalign.text.tools:TextTools",
    "diffusion": "mmalign.diffusion.tools:DiffusionTools",
    "video": "mmalign.video.tools:VideoTools",
}


def adapter_class(modality: str) -> type[Adapter]:
    """The adapter of a modality, imported on first use."""
    return _named(ADAPTERS, modality)


def tools_of(modality: str) -> Tools:
    """The tools of a modality, imported on first use."""
    return _named(TOOLS, modality)()


def _named(places: Mapping[str, str], modality: str) -> Any:
    if modality not in places:
        raise ConfigError(f"modality is {modality!r}; it must be one of {sorted(places)}")
    module, name = places[modality].split(":")
    return getattr(import_module(module), name)


def load_usable(
    config: RunConfig, needs: Needs, *, first: int | None = None
) -> tuple[list[Example], list[Example]]:
    """Train and evaluation rows of a run; what is to be known of them is logged.

    Of either part only the `first`, where that is given.
    """
    found = survey_rows(config, needs, first=first)
    say(found.notes)
    return found.train, found.held_out


def build_adapter(config: RunConfig, needs: Needs) -> Adapter:
    """Build the adapter for `config.modality`."""
    return adapter_class(config.modality).build(config, needs)


def answer_seeds(seed: int, asked: Sequence[Hashable]) -> list[int]:
    """A 63-bit seed for the response to each question of a whole list, whatever is drawn beside it.

    It follows from the run's seed, from the question as its `repr` says it, and from how often the
    same question came before in the list: not from the question's place, nor from batches. So the
    samples of every step of a run, and of `mmalign sample` on its weights, draw alike.
    """
    before: Counter[Hashable] = Counter()
    seeds: list[int] = []
    for question in asked:
        key = repr((int(seed), question, before[question])).encode("utf-8", "surrogatepass")
        seeds.append(int.from_bytes(hashlib.blake2b(key, digest_size=8).digest(), "little") >> 1)
        before[question] += 1
    return seeds
