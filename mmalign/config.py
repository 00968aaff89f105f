"""The configuration: one frozen pydantic model, read from YAML plus KEY=VALUE overrides.

All errors of a file are reported at once; an unknown key names the nearest valid one.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any, Literal, Self

import yaml
from pydantic import BaseModel, ConfigDict, Field, field_validator, model_validator

from mmalign.errors import ConfigError


class _Section(BaseModel):
    model_config = ConfigDict(frozen=True, extra="forbid")


class LoraSpec(_Section):
    """Low-rank adapters on the policy."""

    rank: int = Field(16, ge=1)
    alpha: float = Field(32, gt=0)
    dropout: float = Field(0.0, ge=0, lt=1, description="keep 0: dropout makes policy and reference differ")
    targets: str | list[str] = Field("all-linear", description="module names, or all-linear")
    dora: bool = False


class ModelConfig(_Section):
    """The model to train."""

    path: str = Field(description="folder or hub name")
    revision: str | None = None
    adapter: str | None = Field(None, description="an existing peft adapter to continue from")
    dtype: Literal["float64", "float32", "bfloat16"] = "float32"
    lora: LoraSpec | None = None
    quantization: Literal["4bit", "8bit"] | None = None
    gradient_checkpointing: bool = False
    attention: Literal["sdpa", "eager", "flash_attention_2", "flex_attention"] = "sdpa"
    trust_remote_code: bool = False


class MixturePart(_Section):
    """One member of a reference mixture: sum of weight times log-probability."""

    weight: float
    path: str | None = Field(None, description="folder or hub name; none means the policy's start")


class ReferenceConfig(_Section):
    """The frozen model that log-ratios are taken against."""

    kind: Literal["auto", "lora-off", "frozen-copy", "ema", "mixture", "cached", "none"] = "auto"
    path: str | None = Field(None, description="frozen-copy of another model than the policy's start")
    decay: float = Field(0.999, ge=0, le=1, description="ema: share of the old reference kept at a refresh")
    every: int = Field(1, ge=1, description="ema: optimiser steps between refreshes")
    mixture: list[MixturePart] = []
    cache: Path | None = Field(None, description="cached: folder; default is cache/ beside the output")


class DataSource(_Section):
    """One file or dataset."""

    path: str = Field(description="JSONL, JSON, parquet, CSV, save_to_disk folder, or hub name")
    name: str | None = Field(None, description="configuration of a hub dataset")
    split: str | None = Field(None, description="hub split, or the value of a `split` column to keep")
    weight: float = Field(1.0, gt=0, description="share in a mix of several sources")
    layout: str | None = Field(None, description="record layout; found by itself when left out")


class DataConfig(_Section):
    """What to learn from."""

    train: list[DataSource]
    eval: list[DataSource] = []
    eval_fraction: float = Field(0.0, ge=0, lt=1, description="held out by a hash of the prompt if no eval")
    max_samples: int | None = Field(None, ge=1)
    max_eval_samples: int | None = Field(None, ge=1)
    max_prompt_length: int = Field(512, ge=1, description="tokens")
    max_response_length: int = Field(512, ge=1, description="tokens, end token included")
    truncate_prompt: Literal["keep_end", "keep_start"] = "keep_end"
    ties: Literal["drop", "half", "soft"] = Field("drop", description="half: weight 1/2; soft: labels 1/2, 1/2")
    swap: bool = Field(False, description="exchange chosen and rejected (negative models)")
    num_workers: int = Field(0, ge=0)

    @field_validator("train", "eval", mode="before")
    @classmethod
    def _one_or_many(cls, value: Any) -> Any:
        many = value if isinstance(value, list) else [value]
        return [{"path": item} if isinstance(item, str) else item for item in many]


class ObjectiveConfig(BaseModel):
    """A preset by name, or a weighted mix; every further key is a keyword of the preset."""

    model_config = ConfigDict(frozen=True, extra="allow")

    name: str | None = Field(None, description="a preset, or my_package.module:function")
    mix: dict[str, float | dict[str, Any]] | None = Field(
        None, description="preset to weight, or to its keywords with a `weight`"
    )

    @model_validator(mode="after")
    def _one_of(self) -> Self:
        if (self.name is None) == (self.mix is None):
            raise ValueError("give exactly one of `name` and `mix`")
        return self

    @property
    def keywords(self) -> dict[str, Any]:
        """The preset's keyword arguments."""
        return dict(self.model_extra or {})


class TrainConfig(_Section):
    """The loop."""

    num_steps: int | None = Field(None, ge=1, description="overrides num_epochs")
    num_epochs: float = Field(1.0, gt=0)
    batch_size: int = Field(4, ge=1, description="rows a device and micro-batch")
    accumulate: int = Field(1, ge=1)
    eval_batch_size: int | None = Field(None, ge=1)
    lr: float = Field(1e-6, gt=0)
    optimizer: Literal["adamw", "adamw8bit", "adafactor", "sgd"] = "adamw"
    weight_decay: float = Field(0.0, ge=0)
    betas: tuple[float, float] = (0.9, 0.999)
    schedule: Literal["linear", "cosine", "constant"] = "linear"
    warmup: float = Field(0.0, ge=0, description="steps if at least 1, else a share of all steps")
    max_grad_norm: float = Field(1.0, gt=0)
    mixed_precision: Literal["no", "bf16"] = "no"
    backward: Literal["joint", "per_candidate"] = "joint"
    seed: int = 0
    log_every: int = Field(1, ge=1)
    eval_every: int | None = Field(None, ge=1, description="steps; the end is always evaluated")
    save_every: int | None = Field(None, ge=1, description="steps; the end is always saved")
    sample_every: int | None = Field(None, ge=1)
    keep_checkpoints: int = Field(2, ge=1)
    trackers: list[Literal["tensorboard", "wandb", "trackio"]] = []
    num_threads: int | None = Field(None, ge=1, description="CPU threads; 1 is faster for tiny models")
    check_reference: bool = Field(True, description="stop when policy and reference differ before step 1")


class SampleConfig(_Section):
    """Completions shown during training and in the report."""

    num_prompts: int = Field(4, ge=0, description="taken from the eval rows")
    max_new_tokens: int = Field(64, ge=1)
    temperature: float = Field(0.0, ge=0, description="0 is greedy")
    top_p: float = Field(1.0, gt=0, le=1)


class MaskConfig(_Section):
    """Position weights for SparsePO and tree losses."""

    kind: Literal["learned", "activations", "spans", "steps"] = "learned"
    common: bool = Field(True, description="learned: one head for reward and KL masks")
    on_reward: bool = True
    on_kl: bool = True
    lr: float | None = Field(None, description="learned: the head's own learning rate")
    weight_decay: float = Field(0.01, ge=0)
    dropout: float = Field(0.0, ge=0, lt=1)


class TextConfig(_Section):
    """Settings of the text adapter."""

    shared_prefix: Literal["auto", "on", "off"] = Field(
        "auto", description="prompt once, then each response; exact; off where a model cannot do it"
    )
    block_size: int = Field(1024, ge=1, description="response positions whose logits exist at one time")
    chat_template: bool = Field(True, description="use the tokenizer's template where it has one")
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
    output: Path


def load(path: str | Path, overrides: list[str] | None = None) -> RunConfig:
    """Read a YAML config and apply `a.b=value` overrides (values are parsed as YAML)."""
    raw = yaml.safe_load(Path(path).read_text(encoding="utf-8")) or {}
    for item in overrides or []:
        key, _, value = item.partition("=")
        *parents, last = key.split(".")
        node = raw
        for part in parents:
            node = node.setdefault(part, {})
        node[last] = yaml.safe_load(value)
    try:
        return RunConfig.model_validate(raw)
    except ValueError as error:
        raise ConfigError(f"{path}: {error}") from error
