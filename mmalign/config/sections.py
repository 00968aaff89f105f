"""The sections of a configuration: what may be set, and which settings exclude each other."""

from __future__ import annotations

import datetime
import logging
import math
import re
from functools import cache
from pathlib import Path
from typing import Annotated, Any, Literal, Self, cast

from pydantic import (
    BaseModel,
    BeforeValidator,
    ConfigDict,
    Field,
    PrivateAttr,
    field_validator,
    model_validator,
)
from pydantic.fields import FieldInfo

COUNT = 2**31 - 1
"""The largest number of steps, rows or seeds: what every library below takes."""
log = logging.getLogger("mmalign.config")

LARGEST_RATE = 1e38
"""Of learning; what is merely far from published values is warned of elsewhere."""

Count = Annotated[int, Field(ge=1, le=COUNT)]
Size = Annotated[int, Field(ge=1, le=16_384)]
Number = Annotated[int, Field(ge=1, le=1024)]
Tokens = Annotated[int, Field(ge=1, le=2**24)]
Seed = Annotated[int, Field(ge=0, lt=2**31)]
Share = Annotated[float, Field(ge=0, le=1)]
Below1 = Annotated[float, Field(ge=0, lt=1)]
Rate = Annotated[float, Field(gt=0, le=LARGEST_RATE)]
Decay = Annotated[float, Field(ge=0, le=1000)]
Factor = Annotated[float, Field(ge=-1000, le=1000)]
HeldOutMetric = Literal[
    "loss", "ranking_accuracy", "ranking_accuracy_per_token", "reward_accuracy", "log_ratio_margin",
    "separation",
]  # fmt: skip
Positive = Annotated[float, Field(ge=1e-6, le=1e6)]


class Section(BaseModel):
    """Frozen; an unknown key is an error. Every number has bounds: what libraries can take."""

    model_config = ConfigDict(frozen=True, extra="forbid", allow_inf_nan=False)


@cache
def say_once(text: str) -> None:
    """Log a warning, once a process."""
    log.warning("%s", text)


def default_of(section: BaseModel, name: str) -> object:
    """The default of a setting."""
    fields: dict[str, FieldInfo] = type(section).model_fields
    return fields[name].default


def only_read_by(section: Section, choice: str, readers: dict[str, tuple[str, ...]]) -> None:
    """Refuse a setting that differs from its default where the section's `choice` ignores it."""
    chosen = getattr(section, choice)
    for key, kinds in readers.items():
        if getattr(section, key) != default_of(section, key) and chosen not in kinds:
            raise ValueError(
                f"`{key}` is only read with {choice}: {' or '.join(kinds)} (found {chosen})"
            )


def api_url(url: str) -> str:
    """The address of a server's API, without a slash at its end.

    Raises:
        ValueError: It is none; one with a password is not quoted.
    """
    if "@" in url.partition("://")[2].partition("/")[0]:
        raise ValueError("must not hold a name or password; use key_env")
    usable = url.isascii() and url.isprintable() and " " not in url
    if not usable or not url.startswith(("http://", "https://")):
        raise ValueError(f"must begin with http:// or https:// and be a URL (found {url!r})")
    return url.rstrip("/")


class LoraSpec(Section):
    """Low-rank adapters on the policy."""

    rank: Size = 16
    alpha: float = Field(default=32, ge=1e-4, le=1e6)
    dropout: Below1 = Field(default=0.0, description="keep 0: with it policy and reference differ")
    targets: str | list[str] = Field(
        default="auto",
        description="module names, or all-linear; auto: all-linear for text, the attention's "
        "projections for diffusion",
    )
    dora: bool = False


class ModelConfig(Section):
    """The model to train."""

    path: str = Field(description="folder or hub name")
    revision: str | None = None
    adapter: str | None = Field(
        default=None, description="an existing peft adapter to continue from"
    )
    adapter_text_encoders: Literal["stop", "ignore"] = Field(
        default="stop",
        description="diffusion: what an adapter that changes text encoders too does; ignore: they "
        "stay as they are, with a count",
    )
    dtype: Literal["float64", "float32", "bfloat16"] = "float32"
    lora: LoraSpec | None = None
    quantization: Literal["4bit", "8bit"] | None = None
    gradient_checkpointing: bool = False
    attention: Literal["auto", "sdpa", "eager", "flash_attention_2", "flex_attention"] = Field(
        default="auto", description="auto: sdpa where the model's class has it, else eager"
    )
    trust_remote_code: bool = False

    @model_validator(mode="after")
    def _reads_the_adapter(self) -> Self:
        if self.adapter_text_encoders != "stop" and self.adapter is None:
            raise ValueError("`adapter_text_encoders` is only read with `adapter`, which is unset")
        return self


class MixturePart(Section):
    """One member of a reference mixture: sum of weight times log-probability."""

    weight: float = Field(ge=-1000, le=1000)
    path: str | None = Field(
        default=None, description="folder or hub name; none means the policy's start"
    )


class ReferenceConfig(Section):
    """The frozen model that log-ratios are taken against."""

    kind: Literal["auto", "lora-off", "frozen-copy", "ema", "mixture", "cached", "none"] = "auto"
    path: str | None = Field(
        default=None, description="frozen-copy: a model other than the policy's start"
    )
    decay: Share = Field(default=0.999, description="ema: share of the old one kept at a refresh")
    every: Count = Field(default=1, description="ema: optimizer steps between refreshes")
    mixture: list[MixturePart] = []
    cache: Path | None = Field(
        default=None, description="cached: folder; default: cache/ beside the output"
    )

    @model_validator(mode="after")
    def _only_what_the_kind_reads(self) -> Self:
        readers: dict[str, tuple[str, ...]] = {
            "path": ("frozen-copy", "auto"),
            "decay": ("ema",),
            "every": ("ema",),
            "mixture": ("mixture",),
            "cache": ("cached",),
        }
        only_read_by(self, "kind", readers)
        if self.kind == "mixture" and not self.mixture:
            raise ValueError("kind: mixture needs `mixture`, a list of {weight, path}")
        return self


class DataSource(Section):
    """One file or dataset."""

    path: str = Field(
        description="JSONL, JSON, parquet, CSV, a folder of images, of parquet or of "
        "save_to_disk, a .txt of prompts, or a hub name"
    )
    name: str | None = Field(default=None, description="configuration of a hub dataset")
    split: str | None = Field(default=None, description="hub split, or value of a `split` column")
    weight: float = Field(
        default=1.0,
        ge=1e-6,
        le=1000,
        description="times an epoch uses each of its rows; 0.5 is a seeded half",
    )
    layout: str | None = Field(
        default=None, description="record layout; found by itself when left out"
    )
    pictures: Path | None = Field(
        default=None, description="folder that image paths start from; default: the file's own"
    )


def _one_or_many(value: Any) -> Any:
    if not isinstance(value, str | dict | list):
        found = "nothing" if value is None else repr(value)
        raise ValueError(
            f"must be a path, a section with `path`, or a list of them (found {found})"
        )
    many = cast("list[Any]", value if isinstance(value, list) else [value])
    return [{"path": item} if isinstance(item, str) else item for item in many]


Sources = Annotated[
    list[DataSource],
    BeforeValidator(_one_or_many, json_schema_input_type=str | DataSource | list[str | DataSource]),
]
"""A path, a source, or a list of them."""


class DataConfig(Section):
    """The training and evaluation data."""

    train: Sources = Field(min_length=1)
    eval: Sources = []
    eval_fraction: Below1 = Field(
        default=0.0,
        description="held out by a hash of the prompt or clip, unless a `split` column holds out",
    )
    max_samples: Count | None = Field(
        default=None,
        description="train on the first rows alone, and read no more; sources take turns",
    )
    max_eval_samples: Count | None = Field(
        default=None, description="evaluate on the first rows alone"
    )
    max_prompt_length: Tokens = Field(default=512, description="tokens")
    max_response_length: Tokens = Field(default=512, description="tokens, end token included")
    truncate_prompt: Literal["keep_end", "keep_start"] = "keep_end"
    ties: Literal["drop", "half", "soft"] = Field(
        default="drop", description="half: both orders, weight 1/2; soft: labels (1/2, 1/2)"
    )
    swap: bool = Field(default=False, description="exchange chosen and rejected (negative models)")
    list_pairs: Literal["best_worst", "all"] = Field(
        default="best_worst", description="how a ranked list becomes pairs, for losses on pairs"
    )
    bad_rows: Literal["stop", "drop"] = Field(
        default="stop", description="drop: leave out, and count, records that have problems"
    )
    num_workers: int = Field(default=0, ge=0, le=256)

    @property
    def paths(self) -> list[str]:
        """Of all sources, to train on and held out."""
        return [source.path for source in (*self.train, *self.eval)]

    @model_validator(mode="after")
    def _one_way_to_hold_out(self) -> Self:
        if self.eval and self.eval_fraction:
            raise ValueError("give `eval` or `eval_fraction`, not both: the second makes the first")
        return self


class ObjectiveConfig(BaseModel):
    """A preset by name, or a weighted mix; every further key is a keyword of the preset."""

    model_config = ConfigDict(frozen=True, extra="allow", allow_inf_nan=False)

    name: str | None = Field(
        default=None,
        description="a preset, or module:function of your own, beside the config or installed",
    )
    mix: dict[str, float | dict[str, Any]] | None = Field(
        default=None, description="preset to weight, or to its keywords with a `weight`"
    )

    @model_validator(mode="after")
    def _one_of(self) -> Self:
        if (self.name is None) == (self.mix is None):
            raise ValueError("give exactly one of `name` and `mix`; see `mmalign objectives`")
        if self.mix is not None and not self.mix:
            raise ValueError("`mix` is empty; write e.g. {dpo: 1, sft: 0.1}")
        return self

    _folder: Path | None = PrivateAttr(default=None)

    @property
    def folder(self) -> Path | None:
        """The folder of the config, if it names the user's own losses."""
        return self._folder

    @property
    def own(self) -> list[str]:
        """The user's own losses, as `module:function`."""
        return [name for name in (self.mix or {self.name or "": 1.0}) if ":" in name]

    def beside(self, folder: Path) -> None:
        """Say where the config lies: there its own losses are looked for first."""
        if self.own:
            self._folder = folder

    @property
    def keywords(self) -> dict[str, Any]:
        """The preset's keyword arguments."""
        return dict(self.model_extra or {})


def _seconds(time: str) -> float:
    found = re.fullmatch(r"(?:(\d{1,4})h)?(?:(\d{1,4})m)?(?:(\d{1,6})s)?", time)
    if not time or found is None:
        raise ValueError(f"must be hours, minutes and seconds, e.g. 7h30m or 90s (found {time!r})")
    hours, minutes, seconds = (float(part or 0) for part in found.groups())
    return 3600 * hours + 60 * minutes + seconds


class TrainConfig(Section):
    """The loop."""

    num_steps: Count | None = Field(default=None, description="overrides num_epochs")
    num_epochs: Positive = 1.0
    batch_size: Size = Field(default=4, description="rows a device and micro-batch")
    accumulate: int = Field(default=1, ge=1, le=65_536)
    eval_batch_size: Size | None = None
    tokens_per_batch: Count | None = Field(
        default=None,
        description="text, video: a micro-batch of more tokens passes the model in parts of at "
        "most so many, rows of like length together; memory is bounded, losses are the same",
    )
    lr: Rate = 1e-6
    optimizer: Literal["adamw", "adamw8bit", "adafactor", "sgd"] = "adamw"
    weight_decay: Decay = 0.0
    betas: tuple[Below1, Below1] = (0.9, 0.999)
    schedule: Literal["linear", "cosine", "constant"] = "linear"
    warmup: float = Field(
        default=0.0, ge=0, le=COUNT, description="steps if at least 1, else a share of all steps"
    )
    max_grad_norm: float = Field(default=1.0, ge=1e-12, le=1e12)
    mixed_precision: Literal["no", "bf16"] = "no"
    bf16_weights: Literal["stochastic", "master", "nearest"] = Field(
        default="stochastic",
        description="how weights that are trained in bfloat16 take a step: rounded up or down at "
        "random (exact on average); from a float32 copy of each; or rounded off, which loses small "
        "steps",
    )
    backward: Literal["joint", "per_candidate"] = "joint"
    seed: Seed = 0
    log_every: Count = 1
    eval_every: Count | Literal["auto"] | None = Field(
        default="auto",
        description="steps; auto: a tenth of the run, at least 50; null: at start and end alone",
    )
    save_every: Count | Literal["auto"] | None = Field(
        default="auto",
        description="steps; auto: a tenth of the run, at least 50, at most 500; null: at the end",
    )
    sample_every: Count | None = None
    keep_checkpoints: Count = 2
    best_metric: HeldOutMetric | None = Field(
        default=None, description="held-out metric; the weights that were best by it lie in best/"
    )
    patience: Count | None = Field(
        default=None,
        description="end the run after so many evaluations without a better best_metric",
    )
    max_time: str | None = Field(
        default=None, description="e.g. 7h30m: then save and stop, as on Ctrl-C; --resume goes on"
    )
    trackers: list[Literal["tensorboard", "wandb", "trackio"]] = []
    num_threads: Number | None = Field(
        default=None, description="CPU threads; 1 is best for tiny models"
    )
    cpu_products: Literal["auto", "onednn", "mkl", "mixed"] = Field(
        default="auto",
        description="the library of products on a CPU; mixed: oneDNN, MKL for gradients of "
        "weights; auto: for a model of more than 16 million weights, the fastest by a measurement "
        "of 2 s; a resumed run keeps it",
    )
    check_reference: bool = Field(
        default=True, description="stop if policy and reference differ before step 1"
    )
    check_settings: bool = Field(
        default=True, description="warn of rates, betas and warm-ups far from any published"
    )

    @field_validator("max_time")
    @classmethod
    def _is_a_time(cls, value: str | None) -> str | None:
        if value is not None:
            _seconds(value)
        return value

    @model_validator(mode="after")
    def _patience_has_a_metric(self) -> Self:
        if self.patience is not None and self.best_metric is None:
            raise ValueError(
                "train.patience is set, but best_metric is not. Set it, e.g. best_metric: "
                "reward_accuracy"
            )
        return self

    def evaluates_every(self, num_steps: int) -> int | None:
        """Steps between two evaluations of a run of `num_steps`; None: at start and end alone."""
        return max(50, num_steps // 10) if self.eval_every == "auto" else self.eval_every

    def saves_every(self, num_steps: int) -> int | None:
        """Steps between two checkpoints of a run of `num_steps`; None: at the end alone."""
        return min(max(50, num_steps // 10), 500) if self.save_every == "auto" else self.save_every

    @property
    def max_seconds(self) -> float:
        """`max_time` in seconds; infinite without."""
        return math.inf if self.max_time is None else _seconds(self.max_time)


class SampleConfig(Section):
    """Completions or images made during training and shown in the report."""

    num_prompts: int = Field(default=4, ge=0, le=65_536, description="taken from the eval rows")
    prompts: list[str] = Field(
        default=[], description="diffusion: prompts to show in place of those of the eval rows"
    )
    max_new_tokens: int = Field(default=64, ge=1, le=2**20)
    temperature: float = Field(
        default=0.0, ge=0, le=100, description="0 is greedy; else at least 0.001"
    )
    top_p: float = Field(default=1.0, ge=1e-6, le=1)

    @model_validator(mode="after")
    def _temperature_divides(self) -> Self:
        if 0 < self.temperature < 1e-3:
            raise ValueError(
                f"temperature must be 0, which is greedy, or at least 0.001 (found "
                f"{self.temperature:g})"
            )
        return self


class MaskConfig(Section):
    """Position weights for SparsePO and tree losses."""

    kind: Literal["learned", "activations", "spans", "diff", "steps"] = Field(
        default="learned",
        description="spans: 1 on the record's spans; diff: 1 on what differs within a pair",
    )
    common: bool = Field(default=True, description="learned: one head for reward and KL masks")
    on_reward: bool = True
    on_kl: bool = True
    on_empty: Literal["drop", "full"] = Field(
        default="drop",
        description="spans, diff: rows without any are left out and counted, or count whole",
    )
    min_match: Count = Field(default=3, description="diff: tokens in a row that count as the same")
    lr: Rate | None = Field(default=None, description="learned: the head's own learning rate")
    weight_decay: Decay = 0.01
    dropout: Below1 = 0.0


class TextConfig(Section):
    """Settings of models of tokens: text and video."""

    shared_prefix: Literal["auto", "on", "off"] = Field(
        default="auto",
        description="prompt once, then each response; exact; off where a model cannot do it",
    )
    block_size: Count = Field(
        default=1024, description="response positions with logits at one time"
    )
    chat_template: bool | Path = Field(
        default=True,
        description="true: the tokenizer's template where it has one; or a Jinja file to use",
    )
    template_kwargs: dict[str, Any] = Field(
        default={},
        description="what the template reads beside the messages, e.g. {enable_thinking: false}; "
        "a row's chat_template_kwargs go first",
    )
    date: datetime.date | None = Field(
        default=None,
        description="today, for templates that write the date; default: the day a run begins",
    )
    train_on: Literal["all", "last"] = Field(
        default="all", description="assistant turns that are scored in an answer of several turns"
    )
    system_prompt: str | None = None
    masks: MaskConfig | None = None
