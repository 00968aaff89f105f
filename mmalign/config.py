"""The configuration: one frozen pydantic model, read from YAML plus KEY=VALUE overrides.

All errors of a file are reported at once; an unknown key names the nearest valid one. Relative
paths are relative to the current directory, like any path given to a command.
"""

from __future__ import annotations

import json
from importlib.util import find_spec
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal, Self, cast

from pydantic import BaseModel, BeforeValidator, ConfigDict, Field, ValidationError, model_validator

from mmalign import configfile
from mmalign.errors import ConfigError

if TYPE_CHECKING:
    from collections.abc import Sequence

    from mmalign.core import Needs, Objective


class _Section(BaseModel):
    model_config = ConfigDict(frozen=True, extra="forbid", allow_inf_nan=False)


class LoraSpec(_Section):
    """Low-rank adapters on the policy."""

    rank: int = Field(default=16, ge=1)
    alpha: float = Field(default=32, gt=0)
    dropout: float = Field(
        default=0.0, ge=0, lt=1, description="keep 0: with it policy and reference differ"
    )
    targets: str | list[str] = Field(
        default="all-linear", description="module names, or all-linear"
    )
    dora: bool = False


class ModelConfig(_Section):
    """The model to train."""

    path: str = Field(description="folder or hub name")
    revision: str | None = None
    adapter: str | None = Field(
        default=None, description="an existing peft adapter to continue from"
    )
    dtype: Literal["float64", "float32", "bfloat16"] = "float32"
    lora: LoraSpec | None = None
    quantization: Literal["4bit", "8bit"] | None = None
    gradient_checkpointing: bool = False
    attention: Literal["sdpa", "eager", "flash_attention_2", "flex_attention"] = "sdpa"
    trust_remote_code: bool = False


class MixturePart(_Section):
    """One member of a reference mixture: sum of weight times log-probability."""

    weight: float
    path: str | None = Field(
        default=None, description="folder or hub name; none means the policy's start"
    )


class ReferenceConfig(_Section):
    """The frozen model that log-ratios are taken against."""

    kind: Literal["auto", "lora-off", "frozen-copy", "ema", "mixture", "cached", "none"] = "auto"
    path: str | None = Field(
        default=None, description="frozen-copy: a model other than the policy's start"
    )
    decay: float = Field(
        default=0.999, ge=0, le=1, description="ema: share of the old one kept at a refresh"
    )
    every: int = Field(default=1, ge=1, description="ema: optimiser steps between refreshes")
    mixture: list[MixturePart] = []
    cache: Path | None = Field(
        default=None, description="cached: folder; default: cache/ beside the output"
    )

    @model_validator(mode="after")
    def _only_what_the_kind_reads(self) -> Self:
        readers = {
            "path": ("frozen-copy", "auto"),
            "decay": ("ema",),
            "every": ("ema",),
            "mixture": ("mixture",),
            "cache": ("cached",),
        }
        for key, kinds in readers.items():
            default = type(self).model_fields[key].default
            if getattr(self, key) != default and self.kind not in kinds:
                raise ValueError(
                    f"`{key}` is only read with kind: {' or '.join(kinds)} (found {self.kind})"
                )
        if self.kind == "mixture" and not self.mixture:
            raise ValueError("kind: mixture needs `mixture`, a list of {weight, path}")
        return self


class DataSource(_Section):
    """One file or dataset."""

    path: str = Field(description="JSONL, JSON, parquet, CSV, save_to_disk folder, or hub name")
    name: str | None = Field(default=None, description="configuration of a hub dataset")
    split: str | None = Field(default=None, description="hub split, or value of a `split` column")
    weight: float = Field(
        default=1.0, gt=0, description="times an epoch uses each of its rows; 0.5 is a seeded half"
    )
    layout: str | None = Field(
        default=None, description="record layout; found by itself when left out"
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


class DataConfig(_Section):
    """What to learn from."""

    train: Sources = Field(min_length=1)
    eval: Sources = []
    eval_fraction: float = Field(
        default=0.0, ge=0, lt=1, description="held out by a hash of the prompt"
    )
    max_samples: int | None = Field(default=None, ge=1)
    max_eval_samples: int | None = Field(default=None, ge=1)
    max_prompt_length: int = Field(default=512, ge=1, description="tokens")
    max_response_length: int = Field(default=512, ge=1, description="tokens, end token included")
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
    num_workers: int = Field(default=0, ge=0)

    @model_validator(mode="after")
    def _one_way_to_hold_out(self) -> Self:
        if self.eval and self.eval_fraction:
            raise ValueError("give `eval` or `eval_fraction`, not both: the second makes the first")
        return self


class ObjectiveConfig(BaseModel):
    """A preset by name, or a weighted mix; every further key is a keyword of the preset."""

    model_config = ConfigDict(frozen=True, extra="allow", allow_inf_nan=False)

    name: str | None = Field(default=None, description="a preset, or my_package.module:function")
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

    @property
    def keywords(self) -> dict[str, Any]:
        """The preset's keyword arguments."""
        return dict(self.model_extra or {})


class TrainConfig(_Section):
    """The loop."""

    num_steps: int | None = Field(default=None, ge=1, description="overrides num_epochs")
    num_epochs: float = Field(default=1.0, gt=0)
    batch_size: int = Field(default=4, ge=1, description="rows a device and micro-batch")
    accumulate: int = Field(default=1, ge=1)
    eval_batch_size: int | None = Field(default=None, ge=1)
    lr: float = Field(default=1e-6, gt=0)
    optimizer: Literal["adamw", "adamw8bit", "adafactor", "sgd"] = "adamw"
    weight_decay: float = Field(default=0.0, ge=0)
    betas: tuple[float, float] = (0.9, 0.999)
    schedule: Literal["linear", "cosine", "constant"] = "linear"
    warmup: float = Field(
        default=0.0, ge=0, description="steps if at least 1, else a share of all steps"
    )
    max_grad_norm: float = Field(default=1.0, gt=0)
    mixed_precision: Literal["no", "bf16"] = "no"
    backward: Literal["joint", "per_candidate"] = "joint"
    seed: int = 0
    log_every: int = Field(default=1, ge=1)
    eval_every: int | None = Field(
        default=None, ge=1, description="steps; the end is always evaluated"
    )
    save_every: int | None = Field(default=None, ge=1, description="steps; the end is always saved")
    sample_every: int | None = Field(default=None, ge=1)
    keep_checkpoints: int = Field(default=2, ge=1)
    trackers: list[Literal["tensorboard", "wandb", "trackio"]] = []
    num_threads: int | None = Field(
        default=None, ge=1, description="CPU threads; 1 is best for tiny models"
    )
    check_reference: bool = Field(
        default=True, description="stop if policy and reference differ before step 1"
    )


class SampleConfig(_Section):
    """Completions shown during training and in the report."""

    num_prompts: int = Field(default=4, ge=0, description="taken from the eval rows")
    max_new_tokens: int = Field(default=64, ge=1)
    temperature: float = Field(default=0.0, ge=0, description="0 is greedy")
    top_p: float = Field(default=1.0, gt=0, le=1)


class MaskConfig(_Section):
    """Position weights for SparsePO and tree losses."""

    kind: Literal["learned", "activations", "spans", "steps"] = "learned"
    common: bool = Field(default=True, description="learned: one head for reward and KL masks")
    on_reward: bool = True
    on_kl: bool = True
    lr: float | None = Field(default=None, description="learned: the head's own learning rate")
    weight_decay: float = Field(default=0.01, ge=0)
    dropout: float = Field(default=0.0, ge=0, lt=1)


class TextConfig(_Section):
    """Settings of the text adapter."""

    shared_prefix: Literal["auto", "on", "off"] = Field(
        default="auto",
        description="prompt once, then each response; exact; off where a model cannot do it",
    )
    block_size: int = Field(
        default=1024, ge=1, description="response positions with logits at one time"
    )
    chat_template: bool = Field(
        default=True, description="use the tokenizer's template where it has one"
    )
    system_prompt: str | None = None
    masks: MaskConfig | None = None


class RunConfig(_Section):
    """Everything that decides a run."""

    modality: Literal["text"] = "text"
    model: ModelConfig
    reference: ReferenceConfig = ReferenceConfig()
    data: DataConfig
    objective: ObjectiveConfig
    train: TrainConfig = TrainConfig()
    sample: SampleConfig = SampleConfig()
    text: TextConfig = TextConfig()
    output: Path = Field(description="folder of the run; relative to the current directory")

    @model_validator(mode="after")
    def _fits_together(self) -> Self:
        if self.model.quantization and self.model.lora is None and self.model.adapter is None:
            raise ValueError(
                "model.quantization needs model.lora: quantised weights are not trainable"
            )
        if self.model.revision is not None and Path(self.model.path).is_dir():
            raise ValueError(
                f"model.revision names a version on the hub, but model.path {self.model.path} is a "
                "folder; remove model.revision"
            )
        lora = self.model.lora or self.model.adapter
        if self.reference.kind == "lora-off" and lora is None:
            raise ValueError(
                "reference.kind is lora-off, but model.lora is not set. Set it, e.g. "
                "`lora: {rank: 16}`, or use reference.kind: frozen-copy"
            )
        return self


def load(path: str | Path, overrides: Sequence[str] = ()) -> RunConfig:
    """Read a YAML config and apply `a.b=value` overrides, whose values are YAML too.

    Raises:
        ConfigError: With every problem of the file, one line each.
    """
    path = Path(path)
    raw = configfile.read(path)
    set_by = {configfile.override(raw, item) for item in overrides}
    try:
        # Strict: `rank: true` or `lr: "1"` is no number. As JSON: a list may be a tuple.
        config = RunConfig.model_validate_json(json.dumps(raw), strict=True)
    except ValidationError as error:
        raise configfile.explain(error, raw, RunConfig, str(path), set_by) from error
    # So that `model_fields_set` holds what differs from the defaults, for the whole config of a run
    # folder as for the short one it came from.
    return RunConfig.model_validate(config.model_dump(exclude_defaults=True))


def dump(config: RunConfig) -> str:
    """The whole config, defaults included, as YAML that `load` reads back equal."""
    return configfile.dump(config.model_dump(mode="json"))


def schema() -> dict[str, Any]:
    """The JSON schema of a config file, for completion in editors."""
    return RunConfig.model_json_schema()


def deciding(config: RunConfig) -> dict[str, Any]:
    """All that decides the trained numbers, not what is only reported or a matter of speed."""
    reporting = {"log_every", "eval_every", "eval_batch_size", "save_every", "sample_every"}
    return config.model_dump(
        mode="json",
        exclude={
            "output": True,
            "sample": True,
            "train": {
                *reporting,
                "keep_checkpoints",
                "trackers",
                "num_threads",
                "check_reference",
            },
            "data": {"num_workers", "eval", "max_eval_samples"},
        },
    )


def check(config: RunConfig, *, where: str = "config") -> Objective:
    """Build the objective and refuse, before any weight loads, what it or an option cannot have.

    Raises:
        ConfigError: An unknown preset or keyword, a need that nothing supplies, a missing extra.
    """
    from mmalign.core import presets
    from mmalign.models.adapter import adapter_class

    objective = presets.from_config(config.objective)
    provides = adapter_class(config.modality).provides(config)
    problems = _missing_extras(config) + check_needs(config, objective.needs, provides)
    if problems:
        raise ConfigError("\n  ".join(f"{where}: {problem}" for problem in problems))
    return objective


def check_needs(config: RunConfig, needs: Needs, provides: Needs) -> list[str]:
    """What the objective asks for and the adapter cannot supply under `config`, as sentences."""
    name = "the mix" if config.objective.name is None else f"objective '{config.objective.name}'"
    kind = config.reference.kind
    remedies = {
        "reference": (
            "a reference model",
            f"reference.kind is {kind}. Use reference.kind: auto, or an objective without one, "
            "e.g. simpo",
        ),
        "kl": (
            "the per-token KL",
            f"reference.kind {kind} cannot give it. Use lora-off (needs model.lora) or frozen-copy",
        ),
        "weight": (
            "a weight for every token",
            f"{config.modality}.masks is not set. Set it, e.g. {config.modality}: "
            "{masks: {kind: learned}}; `spans` and `steps` read the data",
        ),
        "log_sum_p2": ("the sum of squared probabilities", "this adapter cannot give it"),
        "prompt": ("log-probabilities of the prompt", "this adapter cannot give them"),
    }
    problems = [
        f"{name} needs {what}, but {remedy}."
        for field, (what, remedy) in remedies.items()
        if getattr(needs, field) and not getattr(provides, field)
    ]
    if kind not in ("auto", "none") and not needs.reference and not needs.kl:
        problems.append(
            f"reference.kind is {kind}, but {name} reads no reference. Remove `reference`, or use "
            "an objective with one."
        )
    if config.data.ties == "soft" and not needs.labels:
        problems.append(
            f"data.ties is soft, which gives tied rows the labels (1/2, 1/2), but {name} does not "
            "read labels. Use an objective that does, e.g. soft_dpo, or data.ties: drop or half."
        )
    if provides.weight and not needs.weight:
        problems.append(
            f"{config.modality}.masks is set, but {name} reads no weights of tokens. Remove it, or "
            "use an objective that does: sparse_po, rrpo, tpo_tree."
        )
    return problems


def _missing_extras(config: RunConfig) -> list[str]:
    wanted = {
        tracker: ("train.trackers", f"'mmalign[{tracker}]'") for tracker in config.train.trackers
    }
    if "trackio" in wanted:
        wanted["trackio"] = ("train.trackers", "trackio")
    if config.model.quantization:
        wanted["bitsandbytes"] = ("model.quantization", "'mmalign[gpu]'")
    if config.train.optimizer == "adamw8bit":
        wanted["bitsandbytes"] = ("train.optimizer: adamw8bit", "'mmalign[gpu]'")
    if config.model.attention == "flash_attention_2":
        wanted["flash_attn"] = ("model.attention: flash_attention_2", "flash-attn")
    return [
        f"{key} needs the package {package}, which is not installed. Run: pip install {command}"
        for package, (key, command) in wanted.items()
        if find_spec(package) is None
    ]
