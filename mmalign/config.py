"""The configuration: one frozen pydantic model, read from YAML plus KEY=VALUE overrides.

All errors of a file are reported at once; an unknown key names the nearest valid one. Relative
paths are relative to the current directory, like any path given to a command.
"""

from __future__ import annotations

import hashlib
import json
import os
from importlib.util import find_spec
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal, Self

from pydantic import Field, ValidationError, model_validator

from mmalign import configfile
from mmalign.errors import ConfigError
from mmalign.sections import (
    DataConfig,
    DataSource,
    LoraSpec,
    MaskConfig,
    MixturePart,
    ModelConfig,
    ObjectiveConfig,
    ReferenceConfig,
    SampleConfig,
    Section,
    TextConfig,
    TrainConfig,
    default_of,
)
from mmalign.sections_diffusion import (
    DiffusionConfig,
    EstimatorSpec,
    ExportSpec,
    PictureSampleSpec,
    TimestepSpec,
)
from mmalign.sections_video import ClueSpec, CorruptionSpec, SelectionSpec, VideoConfig

if TYPE_CHECKING:
    from collections.abc import Sequence

    from mmalign.core import Needs, Objective

__all__ = [
    "ClueSpec",
    "CorruptionSpec",
    "DataConfig",
    "DataSource",
    "DiffusionConfig",
    "EstimatorSpec",
    "ExportSpec",
    "LoraSpec",
    "MaskConfig",
    "MixturePart",
    "ModelConfig",
    "ObjectiveConfig",
    "PictureSampleSpec",
    "ReferenceConfig",
    "RunConfig",
    "SampleConfig",
    "SelectionSpec",
    "TextConfig",
    "TimestepSpec",
    "TrainConfig",
    "VideoConfig",
    "check",
    "check_needs",
    "deciding",
    "dump",
    "load",
    "schema",
]

_TOKENS = ("text", "video")
_READ_BY: dict[str, tuple[str, ...]] = {
    "text": _TOKENS,
    "diffusion": ("diffusion",),
    "video": ("video",),
    "export": ("diffusion",),
    "model.adapter_text_encoders": ("diffusion",),
    "data.max_prompt_length": _TOKENS,
    "data.max_response_length": _TOKENS,
    "data.truncate_prompt": _TOKENS,
    "model.quantization": _TOKENS,
    "model.attention": _TOKENS,
    "model.trust_remote_code": _TOKENS,
    "sample.max_new_tokens": _TOKENS,
    "sample.temperature": _TOKENS,
    "sample.top_p": _TOKENS,
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
    output: Path = Field(description="folder of the run; relative to the current directory")

    @model_validator(mode="after")
    def _fits_together(self) -> Self:
        if self.model.quantization and self.model.lora is None and self.model.adapter is None:
            raise ValueError(
                "model.quantization needs model.lora: quantised weights are not trainable"
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
    """Whether a setting differs from its default."""
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
    raw = configfile.read(path)
    set_by = {configfile.override(raw, item) for item in overrides}
    try:
        # Strict: `rank: true` or `lr: "1"` is no number. As JSON: a list may be a tuple.
        config = RunConfig.model_validate_json(json.dumps(raw), strict=True)
    except ValidationError as error:
        raise configfile.explain(error, raw, RunConfig, str(path), set_by) from error
    # So that `model_fields_set` holds what differs from the defaults, for the whole config of a run
    # folder as for the short one it came from.
    config = RunConfig.model_validate(config.model_dump(exclude_defaults=True))
    config.objective.beside(path.absolute().parent)
    return config


def dump(config: RunConfig) -> str:
    """The whole config, defaults included, as YAML that `load` reads back equal."""
    return configfile.dump(config.model_dump(mode="json"))


def schema() -> dict[str, Any]:
    """The JSON schema of a config file, for completion in editors."""
    return RunConfig.model_json_schema()


def deciding(config: RunConfig) -> dict[str, Any]:
    """All that decides the trained numbers, not what is only reported or a matter of speed."""
    reporting = {"log_every", "eval_every", "eval_batch_size", "save_every", "sample_every"}
    settings = config.model_dump(
        mode="json",
        exclude={
            "output": True,
            "sample": True,
            "export": True,
            "train": {
                *reporting,
                "keep_checkpoints",
                "trackers",
                "num_threads",
                "check_reference",
                "check_settings",
            },
            "data": {
                **dict.fromkeys(("num_workers", "eval", "max_eval_samples"), True),
                "train": {"__all__": {"path", "pictures"}},
            },
            "diffusion": {"eval_draws", "cache_folder"}
            | (set() if config.diffusion.estimator.generated else {"sampling"}),
            # Of files counts what they hold (`train/inputs.py`), and not where they lie.
            "model": {"path", "revision", "adapter"},
            "reference": {"path": True, "cache": True, "mixture": {"__all__": {"path"}}},
            "video": {"clues": {"path"}},
        },
    )
    template = config.text.chat_template
    if isinstance(template, Path) and os.path.isfile(template):  # what it says, not its place
        digest = hashlib.sha256(template.read_bytes()).hexdigest()
        settings["text"]["chat_template"] = f"sha256 {digest}"
    return settings


def check(config: RunConfig, *, where: str = "config") -> Objective:
    """Build the objective and refuse, before any weight loads, what it or an option cannot have.

    Raises:
        ConfigError: An unknown preset or keyword, a need that nothing supplies, a missing extra.
    """
    from mmalign.core import presets
    from mmalign.models.adapter import adapter_class

    objective = presets.from_config(config.objective)
    adapter = adapter_class(config.modality)
    problems = _missing_extras(config) + adapter.problems(config)
    problems += check_needs(config, objective.needs, adapter.provides(config))
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
            "the KL at every position",
            f"reference.kind {kind} cannot give it. Use lora-off (needs model.lora) or frozen-copy",
        ),
        "weight": (
            "a weight for every token",
            "text.masks is not set. Set it, e.g. text: {masks: {kind: learned}}; `spans` and "
            "`steps` read the data"
            if config.modality in _TOKENS
            else f"modality {config.modality} has none. Use an objective without them, e.g. "
            "diffusion_dpo",
        ),
        "log_sum_p2": (
            "the probabilities of all tokens (wpo)",
            f"modality {config.modality} has none. Remove `wpo`, or use another objective",
        ),
        "prompt": (
            "log-probabilities of the prompt",
            f"modality {config.modality} has none. Use another objective",
        ),
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
            f"text.masks is set, but {name} reads no weights of tokens. Remove it, or "
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
