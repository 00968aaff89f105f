"""What the settings of a saved adapter ask for (peft's adapter_config.json); what is refused."""

from __future__ import annotations

import re
from pathlib import Path
from typing import TYPE_CHECKING, Any

from mmalign.errors import CheckpointError, ConfigError
from mmalign.models.files import ADAPTER_CONFIG, UnfitError, read_json

if TYPE_CHECKING:
    from collections.abc import Mapping

RECOMPUTED = ("pissa", "olora")
"""Starts that take a part out of the base which can be computed from the base again."""

_STARTS = ("gaussian", "eva", "orthogonal", "mica", *RECOMPUTED)  # the first four leave the base

# Neither B A, nor the settings below, nor notes for people.
_REFUSED = {
    "alora_invocation_tokens": "it acts behind an invocation string only, so it is no change of "
    "the weights (aLoRA)",
    "layer_replication": "its model has more layers than the base",
    "megatron_config": "it belongs to layers of Megatron",
    "use_qalora": "its inputs are pooled (QALoRA)",
    "monteclora_config": "its factors are drawn at random",
    "use_bdlora": "its factors are block-diagonal (BD-LoRA)",
    "arrow_config": "it chooses between adapters token by token (Arrow)",
    "kasa_config": "it takes a part out of the base (KaSA)",
}
_ACTS = (  # what decides how an adapter's tensors act
    "r",
    "lora_alpha",
    "use_rslora",
    "rank_pattern",
    "alpha_pattern",
    "use_dora",
    "fan_in_fan_out",
    "bias",
    "lora_bias",
    "modules_to_save",
    "trainable_token_indices",
)
_PLACES = (  # where they are; their names say so too
    "target_modules",
    "exclude_modules",
    "layers_to_transform",
    "layers_pattern",
    "target_parameters",
    "ensure_weight_tying",
)
_TRAINING = (  # how they were trained; starts are looked at apart
    "lora_dropout",
    "init_lora_weights",
    "loftq_config",
    "eva_config",
    "corda_config",
    "lora_ga_config",
    "velora_config",
    "qalora_group_size",
)
_NOTES = (  # notes for programs
    "task_type",
    "peft_type",
    "auto_mapping",
    "peft_version",
    "base_model_name_or_path",
    "revision",
    "inference_mode",
    "megatron_core",
    "runtime_config",
)
_READ = frozenset({*_ACTS, *_PLACES, *_TRAINING, *_NOTES, *_REFUSED})
_BY_MODEL = ("target_parameters", "trainable_token_indices", "lora_bias")


def read_settings(folder: Path) -> dict[str, Any]:
    """The settings of a LoRA, all of which are understood here.

    Raises:
        CheckpointError: They cannot be read, are of another kind of adapter, or ask for something
            that cannot be done here; the setting is named.
    """
    settings = read_json(folder / ADAPTER_CONFIG)
    kind = settings.get("peft_type")
    if kind != "LORA":
        raise UnfitError(
            f"{folder} is a {kind} adapter; only LORA can be trained or read from its file alone"
        )
    check_settings(folder, settings)
    return settings


def check_settings(where: Path, settings: Mapping[str, Any]) -> None:
    """Refuse what B A and the settings that are read here do not say.

    Raises:
        CheckpointError: Names the setting.
    """
    for name, reason in _REFUSED.items():
        if settings.get(name):
            raise CheckpointError(f"{where}: the adapter has {name}, and {reason}; not possible")
    unknown = [
        name for name, value in settings.items() if value and name not in _READ | {*_REFUSED}
    ]
    if unknown:
        raise CheckpointError(
            f"{where}: the adapter has the setting {unknown[0]} = {settings[unknown[0]]!r}, which "
            "is not known here and may change what its weights mean"
        )
    _check_start(where, settings)
    _check_numbers(where, settings)


def start_of(settings: Mapping[str, Any]) -> str:
    """pissa or olora where the adapter's base is the model less a part of it; else ""."""
    start = str(settings.get("init_lora_weights", "")).lower()
    return start if start in RECOMPUTED else ""


def needs_model(settings: Mapping[str, Any]) -> str:
    """The setting for which an adapter can be merged in a live model only; else ""."""
    if settings.get("bias", "none") != "none":
        return "bias"
    return next((name for name in _BY_MODEL if settings.get(name)), "")


def differences(mine: Mapping[str, Any], theirs: Mapping[str, Any]) -> list[str]:
    """How two adapters' tensors act differently: `name: mine, theirs`."""
    found: list[str] = []
    for name in _ACTS:
        one, other = (_plain(settings.get(name)) for settings in (mine, theirs))
        if one != other:
            found.append(f"{name}: {one!r} in the config, {other!r} in the file")
    one, other = start_of(mine), start_of(theirs)
    if one != other:
        found.append(f"init_lora_weights: {one or True!r} in the config, {other or True!r} there")
    return found


def refuse_adapter_path(key: str, path: str | Path) -> None:
    """Refuse an adapter's folder where a whole model is asked for.

    transformers would load the base that the folder names under an adapter that nothing trains.

    Args:
        key: Where in the config the path stands.
        path: Folder or hub name.

    Raises:
        ConfigError: It holds an adapter; the message says the ways to use it.
    """
    file = Path(path) / ADAPTER_CONFIG
    if not file.is_file():
        return
    try:
        named = read_json(file).get("base_model_name_or_path")
    except CheckpointError as error:
        raise ConfigError(f"{key}: {error}") from error
    raise ConfigError(adapter_in_place_of_model(key, path, str(named or "BASE")))


def adapter_in_place_of_model(key: str, path: str | Path, base: str) -> str:
    """The sentence for an adapter where a whole model is asked for."""
    ways = f"mmalign merge {base} --add {path}=1 --out DIR, then {key}: DIR"
    if key == "model.path":
        ways = f"model.path: {base} and model.adapter: {path} goes on training it; or {ways}"
    return f"{key} {path} is an adapter, and a whole model must stand there: {ways}"


def _check_start(where: Path, settings: Mapping[str, Any]) -> None:
    start = settings.get("init_lora_weights", True)
    if isinstance(start, bool) or start is None or str(start).lower() in _STARTS:
        return
    raise CheckpointError(
        f"{where}: the adapter has init_lora_weights = {start!r}, a start that changes the base by "
        "what cannot be computed again, so its tensors alone do not say what was trained. Save it "
        "with peft's save_pretrained(DIR, path_initial_model_for_weight_conversion=START), which "
        "makes it a plain LoRA"
    )


def _check_numbers(where: Path, settings: Mapping[str, Any]) -> None:
    for name in ("r", "lora_alpha"):
        value = settings.get(name, 1)
        if isinstance(value, bool) or not isinstance(value, int | float) or not value > 0:
            raise CheckpointError(f"{where}: {name} must be a number above 0, found {value!r}")
    for name in ("rank_pattern", "alpha_pattern"):
        patterns = settings.get(name) or {}
        if not isinstance(patterns, dict):
            raise CheckpointError(f"{where}: {name} must be a mapping, found {patterns!r}")
        for pattern, value in patterns.items():
            _check_pattern(where, name, pattern, value)


def _check_pattern(where: Path, name: str, pattern: str, value: Any) -> None:
    try:
        re.compile(pattern)
    except re.error as error:
        raise CheckpointError(
            f"{where}: {name} has {pattern!r}, which is no regular expression: {error}"
        ) from error
    if isinstance(value, bool) or not isinstance(value, int | float) or not value > 0:
        raise CheckpointError(
            f"{where}: {name} of {pattern!r} must be a number above 0, found {value!r}"
        )


def _plain(value: Any) -> Any:
    """Sets and lists alike, absent and empty alike."""
    if isinstance(value, list | set | tuple):
        value = sorted(map(str, value))
    return value or None
