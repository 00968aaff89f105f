"""What saved settings of a LoRA ask for (peft's adapter_config.json), and the layers it takes."""

from __future__ import annotations

import re
from collections.abc import Collection, Iterable, Mapping
from pathlib import Path
from typing import Any

from torch import nn

from mmalign.data.jobs import first_few
from mmalign.errors import CheckpointError, ConfigError
from mmalign.models.files import ADAPTER_CONFIG, UnfitError, read_json

RECOMPUTED = ("pissa", "olora")
"""Starts that take a part out of the base which can be computed from the base again."""

_STARTS = ("gaussian", "eva", "orthogonal", "mica", *RECOMPUTED)  # the first four leave the base

# Neither B A, nor the settings below, nor notes for people.
_REFUSED = {
    "alora_invocation_tokens": "it acts behind an invocation string only, so it is not a change of "
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
_SAY_NO_MORE = (
    # Where the tensors are; their names say so too.
    "target_modules",
    "exclude_modules",
    "layers_to_transform",
    "layers_pattern",
    "target_parameters",
    "ensure_weight_tying",
    # How they were trained; starts are looked at apart.
    "lora_dropout",
    "init_lora_weights",
    "loftq_config",
    "eva_config",
    "corda_config",
    "lora_ga_config",
    "velora_config",
    "qalora_group_size",
    # Notes for programs.
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
_READ = frozenset({*_ACTS, *_SAY_NO_MORE, *_REFUSED})
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
    unknown = [name for name, value in settings.items() if value and name not in _READ]
    if unknown:
        raise CheckpointError(
            f"{where}: the adapter has the setting {unknown[0]} = {settings[unknown[0]]!r}, which "
            "is not known here and may change what its weights mean"
        )
    start = settings.get("init_lora_weights", True)
    plain = isinstance(start, bool) or start is None
    if not plain and str(start).lower() not in _STARTS:
        raise CheckpointError(
            f"{where}: the adapter has init_lora_weights = {start!r}, a start that changes the "
            "base by what cannot be computed again, so its tensors alone do not say what was "
            "trained. Save it with peft's save_pretrained(DIR, "
            "path_initial_model_for_weight_conversion=START), which makes it a plain LoRA"
        )
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
    raise ConfigError(_in_place_of_model(key, path, str(named or "BASE")))


def refuse_loaded_adapter(key: str, path: str, model: nn.Module) -> None:
    """Refuse the same where transformers found the adapter on the hub, and loaded its base.

    Raises:
        ConfigError: It did.
    """
    if getattr(model, "_hf_peft_config_loaded", False):
        base = str(getattr(model, "name_or_path", ""))
        raise ConfigError(_in_place_of_model(key, path, base or "BASE"))


def _in_place_of_model(key: str, path: str | Path, base: str) -> str:
    ways = f"mmalign merge {base} --add {path}=1 --out DIR, then {key}: DIR"
    if key == "model.path":
        ways = f"model.path: {base} and model.adapter: {path} goes on training it; or {ways}"
    return f"{key} {path} is an adapter, and a whole model must stand there: {ways}"


def _check_numbers(where: Path, settings: Mapping[str, Any]) -> None:
    numbers = {name: settings.get(name, 1) for name in ("r", "lora_alpha")}
    for name in ("rank_pattern", "alpha_pattern"):
        patterns = settings.get(name) or {}
        if not isinstance(patterns, dict):
            raise CheckpointError(f"{where}: {name} must be a mapping, found {patterns!r}")
        for pattern, value in patterns.items():
            try:
                re.compile(pattern)
            except re.error as error:
                raise CheckpointError(
                    f"{where}: {name} has {pattern!r}, which is not a regular expression: {error}"
                ) from error
            numbers[f"{name} of {pattern!r}"] = value
    for name, value in numbers.items():
        if isinstance(value, bool) or not isinstance(value, int | float) or not value > 0:
            raise CheckpointError(f"{where}: {name} must be a number above 0, found {value!r}")


def _plain(value: Any) -> Any:
    """Sets and lists alike, absent and empty alike."""
    if isinstance(value, list | set | tuple):
        value = sorted(map(str, value))
    return value or None


ROUTER = "routers of experts"
MAMBA = "projections that the kernels of Mamba read past an adapter"
SILENT = "layers that get no gradient from text"
ODD = "layers of another form than a linear one"
BY_PEFT = "layers that peft passes over"

# Names that experts had as single layers, by which peft finds them in their common tensor.
OF_EXPERTS = ("gate_proj", "up_proj", "down_proj", "w1", "w2", "w3")

_ROUTERS = ("gate", "router")
_PAST_ADAPTERS = ("out_proj", "x_proj", "dt_proj")


def routers(model: nn.Module) -> dict[str, nn.Module]:
    """The modules that choose experts, by name."""
    found: dict[str, nn.Module] = {}
    for name, module in model.named_modules():
        parent, _, last = name.rpartition(".")
        if last in _ROUTERS:
            kind = type(module).__name__
            is_router = hasattr(model.get_submodule(parent), "experts")
            if is_router or "Router" in kind or "Gating" in kind:
                found[name] = module
    return found


def takes_lora(module: nn.Module) -> bool:
    """Whether peft can put a LoRA on a module."""
    kinds = (nn.Linear, nn.Embedding, nn.Conv1d, nn.Conv2d, nn.Conv3d)
    return isinstance(module, kinds) or is_conv1d(module)


def is_conv1d(module: nn.Module) -> bool:
    """Whether it is GPT-2's linear layer, whose weight is stored [in, out]."""
    return type(module).__name__ == "Conv1D"


def linear_layers(model: nn.Module, head: nn.Module | None) -> dict[str, nn.Module]:
    """What `all-linear` means, by name: linear layers but the output head."""
    return {
        name: module
        for name, module in model.named_modules()
        if (isinstance(module, nn.Linear) or is_conv1d(module)) and module is not head
    }


def left_out(model: nn.Module, head: nn.Module | None, unfit: Mapping[str, str]) -> dict[str, str]:
    """The linear layers that `all-linear` leaves out, each with the reason.

    Args:
        model: Without adapters.
        head: Its output layer.
        unfit: Those that cannot be trained in this modality, each with the reason.
    """
    found = dict(unfit)
    for name, module in model.named_modules():
        if hasattr(module, "A_log") and hasattr(module, "D"):  # a Mamba mixer, of either version
            found |= {f"{name}.{last}": MAMBA for last in _PAST_ADAPTERS if hasattr(module, last)}
    layers = linear_layers(model, head)
    for router in routers(model):
        inside = (name for name in layers if name == router or name.startswith(f"{router}."))
        found |= dict.fromkeys(inside, ROUTER)
    return {name: reason for name, reason in found.items() if name in layers}


def pattern_of(names: Collection[str], others: Iterable[str]) -> str | None:
    """A regular expression of whole names that fits these and none of the others."""
    if not names:
        return None
    shapes = {_shape(name) for name in names}
    whole = re.compile("|".join(sorted(shapes)))
    if any(whole.fullmatch(other) for other in others):  # the same in some layers, but not in all
        shapes = {re.escape(name) for name in names}
    return "|".join(sorted(shapes))


def spare_routers(policy: Any, adapter: str) -> dict[str, str]:
    """Take adapters off routers whose weight peft adapts as a parameter; their names and why."""
    found: dict[str, str] = {}
    base = policy.get_base_model()
    for router in routers(base):
        inside = (n for n, m in base.named_modules() if hasattr(m, "base_layer"))
        for name in [n for n in inside if n == router or n.startswith(f"{router}.")]:
            parent, _, last = name.rpartition(".")
            setattr(base.get_submodule(parent), last, base.get_submodule(name).base_layer)
            found[name] = ROUTER
    config = policy.peft_config[adapter]
    if found and config.target_parameters:
        kept = {n for n in config.target_parameters if n.rpartition(".")[0] not in _ROUTERS}
        config.target_parameters = kept
    return found


def passed_over(policy: Any, names: Iterable[str]) -> dict[str, str]:
    """Those of some modules of the base that have no adapter after all."""
    modules = dict(policy.get_base_model().named_modules())
    lacking = (n for n in names if n in modules and not hasattr(modules[n], "base_layer"))
    return dict.fromkeys(sorted(lacking), BY_PEFT)


def whole_experts(model: nn.Module) -> list[str]:
    """Weights of all experts in one tensor, which no linear layer holds and no adapter changes."""
    return [
        name
        for name, parameter in model.named_parameters()
        if parameter.dim() == 3 and "experts" in name.split(".") and "base_layer" not in name
    ]


def describe(reasons: Mapping[str, str], experts: Collection[str]) -> str | None:
    """One sentence about what got no adapter; None where everything did."""
    groups: dict[str, list[str]] = {}
    for name, reason in reasons.items():
        groups.setdefault(reason, []).append(name)
    if experts:
        groups["tensors that hold all experts of a layer"] = list(experts)
    parts = [f"{len(names)} {reason} ({_few(names)})" for reason, names in groups.items()]
    return f"no adapter is on {'; '.join(parts)}" if parts else None


def _few(names: Collection[str], most: int = 4) -> str:
    shapes = list(dict.fromkeys(re.sub(r"(?<=\.)\d+(?=\.)", "N", name) for name in names))
    return ", ".join(first_few(shapes, most))


def _shape(name: str) -> str:
    """A pattern of the name with the numbers of layers left open."""
    return re.sub(r"\\\.\d+(?=\\\.)", r"\\.\\d+", re.escape(name))
