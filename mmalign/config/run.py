"""The configuration of a run.

One frozen pydantic model, read from YAML plus KEY=VALUE overrides.
"""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Sequence
from pathlib import Path
from typing import Any, Literal, Self

from pydantic import Field, ValidationError, model_validator

from mmalign.config import yaml
from mmalign.config.diffusion import (
    DiffusionConfig,
    ExportSpec,
    as_before,
)
from mmalign.config.rounds import RoundsConfig
from mmalign.config.sections import (
    DataConfig,
    ModelConfig,
    ObjectiveConfig,
    ReferenceConfig,
    SampleConfig,
    Section,
    TextConfig,
    TrainConfig,
    default_of,
)
from mmalign.config.video import VideoConfig
from mmalign.errors import ConfigError

OF_TOKENS = ("text", "video")
_READ_BY: dict[str, tuple[str, ...]] = {
    "text": OF_TOKENS,
    "diffusion": ("diffusion",),
    "video": ("video",),
    "export": ("diffusion",),
    "model.adapter_text_encoders": ("diffusion",),
    "data.max_prompt_length": OF_TOKENS,
    "data.max_response_length": OF_TOKENS,
    "data.truncate_prompt": OF_TOKENS,
    "model.quantization": OF_TOKENS,
    "model.attention": OF_TOKENS,
    "model.trust_remote_code": OF_TOKENS,
    "train.tokens_per_batch": OF_TOKENS,
    "sample.max_new_tokens": OF_TOKENS,
    "sample.temperature": OF_TOKENS,
    "sample.top_p": OF_TOKENS,
    "sample.prompts": ("diffusion",),
}
"""Sections and settings that some modalities alone read."""


class RunConfig(Section):
    """Everything that decides a run."""

    modality: Literal["text", "diffusion", "video"] = "text"
    model: ModelConfig
    reference: ReferenceConfig = ReferenceConfig()
    data: DataConfig
    objective: ObjectiveConfig
    train: TrainConfig = TrainConfig()
    sample: SampleConfig = SampleConfig()
    text: TextConfig = TextConfig()
    diffusion: DiffusionConfig = DiffusionConfig()
    video: VideoConfig = VideoConfig()
    export: ExportSpec = ExportSpec()
    rounds: RoundsConfig | None = Field(default=None, description="read by `mmalign rounds`")
    output: Path = Field(description="folder of the run; relative to the current directory")

    @model_validator(mode="after")
    def _fits_together(self) -> Self:
        if self.model.quantization and self.model.lora is None and self.model.adapter is None:
            raise ValueError(
                "model.quantization needs model.lora: quantized weights are not trainable"
            )
        if self.model.revision is not None and os.path.isdir(self.model.path):
            raise ValueError(
                f"model.revision names a version on the hub, but model.path {self.model.path} is a "
                "folder; remove model.revision"
            )
        ignored = [k for k, readers in _READ_BY.items() if self.modality not in readers]
        ignored = [key for key in ignored if _is_set(self, key)]
        if ignored:
            are, them = ("is", "it") if len(ignored) == 1 else ("are", "them")
            raise ValueError(
                f"{', '.join(ignored)} {are} only read with modality: "
                f"{' or '.join(_READ_BY[ignored[0]])} "
                f"(found {self.modality}); remove {them}"
            )
        prompts_only = [s.path for s in self.data.train if s.layout == "prompts"]
        if prompts_only and not self.diffusion.estimator.generated:
            raise ValueError(
                f"data.train {prompts_only[0]} has layout: prompts, rows without a response; only "
                "diffusion.estimator: {kind: truncated, generated: true} learns from those"
            )
        lora = self.model.lora or self.model.adapter
        if self.reference.kind == "lora-off" and lora is None:
            raise ValueError(
                "reference.kind is lora-off, but model.lora is not set. Set it, e.g. "
                "`lora: {rank: 16}`, or use reference.kind: frozen-copy"
            )
        return self


def _is_set(config: RunConfig, key: str) -> bool:
    """True if a setting differs from its default."""
    section: Any = config
    *path, name = key.split(".")
    for part in path:
        section = getattr(section, part)
    return getattr(section, name) != default_of(section, name)


def load(path: str | Path, overrides: Sequence[str] = ()) -> RunConfig:
    """Read a YAML config and apply `a.b=value` overrides, whose values are YAML too.

    Raises:
        ConfigError: With every problem of the file, one line each.
    """
    path = Path(path)
    raw = yaml.read(path)
    set_by = {yaml.override(raw, item) for item in overrides}
    try:
        # Strict: `rank: true` or `lr: "1"` is no number. As JSON: a list may be a tuple.
        config = RunConfig.model_validate_json(json.dumps(raw), strict=True)
    except ValidationError as error:
        raise yaml.explain(error, raw, RunConfig, str(path), set_by) from error
    # So that `model_fields_set` holds what differs from the defaults, for the whole config of a run
    # folder as for the short one it came from.
    config = RunConfig.model_validate(config.model_dump(exclude_defaults=True))
    config.objective.beside(path.absolute().parent)
    return config


def begun_with(folder: Path, section: str, key: str) -> Any:
    """A setting of the run that was begun in a folder; None where none was, or it does not say."""
    try:
        found: Any = yaml.read(folder / "config.yaml").get(section)
        return found[key]
    except (ConfigError, KeyError, TypeError):  # whoever needs it says so
        return None


def dump(config: RunConfig) -> str:
    """The whole config, defaults included, as YAML that `load` reads back equal."""
    return yaml.dump(config.model_dump(mode="json"))


def schema() -> dict[str, Any]:
    """The JSON schema of a config file, for completion in editors."""
    return RunConfig.model_json_schema()


def deciding(config: RunConfig) -> dict[str, Any]:
    """All settings that decide the trained weights, without those of reports and speed."""
    reporting = {"log_every", "eval_every", "eval_batch_size", "save_every", "sample_every"}
    settings = config.model_dump(
        mode="json",
        exclude={
            "output": True,
            "sample": True,
            "export": True,
            "rounds": True,
            "train": {
                *reporting,
                "keep_checkpoints",
                "best_metric",
                "patience",
                "max_time",
                "trackers",
                "num_threads",
                "cpu_products",
                "check_reference",
                "check_settings",
            },
            "data": {
                **dict.fromkeys(("num_workers", "eval", "max_eval_samples"), True),
                "train": {"__all__": {"path", "pictures"}},
            },
            "diffusion": {"eval_draws", "cache_folder"}
            | (set() if config.diffusion.estimator.generated else {"sampling"}),
            # Of files counts what they hold (`train/files.py`), and not where they lie.
            "model": {"path", "revision", "adapter"},
            "reference": {"path": True, "cache": True, "mixture": {"__all__": {"path"}}},
            "video": {"clues": {"path"}},
        },
    )
    settings["diffusion"] = as_before(settings["diffusion"])
    template = config.text.chat_template
    if isinstance(template, Path) and os.path.isfile(template):  # what it says, not its place
        digest = hashlib.sha256(template.read_bytes()).hexdigest()
        settings["text"]["chat_template"] = f"sha256 {digest}"
    return settings
