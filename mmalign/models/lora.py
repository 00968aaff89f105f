"""Low-rank adapters through peft, DoRA among them: attach, load, copy, save, merge."""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from copy import copy
from functools import cache
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from mmalign.config import LoraSpec, ModelConfig
from mmalign.errors import CheckpointError, ConfigError
from mmalign.models import lora_settings
from mmalign.models.files import local_folder
from mmalign.models.lora_load import TRAINED, load_adapter

if TYPE_CHECKING:
    from peft import PeftModel

log = logging.getLogger(__name__)

REFERENCE = "reference"  # the frozen second adapter; never saved

# DoRA: a magnitude for each output of a layer, beside the low-rank change of its direction.
#
# W' = magnitude * (W + scale * B A) / |W + scale * B A|, norms over all inputs of an output.
#
# Source: Liu et al. 2024, arXiv:2402.09353; peft's `lora_magnitude_vector`.


@torch.no_grad()
def exact_start(policy: PeftModel) -> None:
    """Set the magnitudes of fresh adapters to the norms that their forward pass divides by.

    peft takes them in the dtype of the weights and divides in the wider one of its factors, so
    that a bfloat16 base would begin up to 0.4 % away from itself in every layer.
    """
    from peft.utils.integrations import dequantize_module_weight

    wide_norms(policy)
    for module in policy.modules():
        layers: Any = getattr(module, "lora_magnitude_vector", None) or {}
        if TRAINED not in layers:
            continue
        layer, base = layers[TRAINED], module.get_base_layer()  # pyright: ignore
        weight: Any = dequantize_module_weight(base)
        wide = weight.to(torch.promote_types(weight.dtype, torch.float32))
        # peft's own function: its axes and its order of summing, and so the same last bit.
        norm = layer.get_weight_norm(wide, torch.zeros((), device=wide.device), 0.0)
        layer.weight.copy_(norm.to(layer.weight.device).view_as(layer.weight))


def wide_norms(policy: nn.Module) -> None:
    """Make the convolutions of all adapters divide by norms that are computed in full precision.

    peft casts the weight of a linear layer for it, but not that of a convolution, whose norm is
    bfloat16's under autocast.
    """
    from peft.tuners.lora.dora import DoraConv1dLayer, DoraConv2dLayer, DoraConv3dLayer

    for module in policy.modules():
        if type(module) in (DoraConv1dLayer, DoraConv2dLayer, DoraConv3dLayer):
            module.__class__ = _wide(type(module))


@cache
def _wide(kind: Any) -> Any:
    def get_weight_norm(
        self: Any, weight: Tensor, lora_weight: Tensor, scaling: float, **options: Any
    ) -> Tensor:
        wide = weight.to(torch.promote_types(weight.dtype, torch.float32))
        with torch.autocast(weight.device.type, enabled=False):
            return kind.get_weight_norm(self, wide, lora_weight, scaling, **options)

    return type(kind.__name__, (kind,), {"get_weight_norm": get_weight_norm})


def comfyui_scale(
    weight: Tensor, product: Tensor, magnitude: Tensor
) -> Tensor:  # [out, 1] or [out, 1, 1, 1]
    """`dora_scale` of ComfyUI: magnitude * |W| / |W + product|, in float64.

    ComfyUI divides by the norm of the base's weight, where peft divides by that of the adapted one.

    Args:
        weight: [out, in] or [out, in, k, k], of the base.
        product: scale * B A, of any shape with as many numbers.
        magnitude: As many numbers as outputs.

    Source: ComfyUI `comfy/weight_adapter/base.py`, weight_decompose.
    """
    weight = weight.double()
    adapted = weight + product.double().view_as(weight)
    share = weight.flatten(1).norm(dim=1) / adapted.flatten(1).norm(dim=1)
    scale = magnitude.double().flatten() * share
    return scale.view(-1, *(1,) * (weight.dim() - 1))


def check(config: ModelConfig) -> None:
    """Refuse what cannot be trained, before a weight is loaded.

    Raises:
        ConfigError: lora and adapter together, a folder without an adapter, or an adapter where the
            whole model must stand.
    """
    lora_settings.refuse_adapter_path("model.path", config.path)
    refuse_both(config)
    if config.adapter is not None:
        folder = Path(config.adapter)
        if folder.exists() and not (folder / "adapter_config.json").is_file():
            raise ConfigError(
                f"model.adapter {folder} has no adapter_config.json; not a peft adapter"
            )


def refuse_both(config: ModelConfig) -> None:
    """Refuse a fresh LoRA beside an adapter that was trained before."""
    if config.lora is not None and config.adapter is not None:
        raise ConfigError(
            "model.lora and model.adapter are both set, but an existing adapter brings its own "
            "rank and targets. Remove model.lora to go on training it, or merge it into the base "
            f"first (mmalign merge {config.path} --add {config.adapter}=1 --out DIR)"
        )


def apply(model: nn.Module, config: ModelConfig, **options: Any) -> nn.Module:
    """The model ready to train: with a fresh LoRA, with the adapter to continue, or as it is.

    `options` are those of `attach`.
    """
    check(config)
    lora_settings.refuse_loaded_adapter("model.path", config.path, model)
    if config.adapter is not None:
        return load(model, config.adapter)
    if config.lora is None:
        return model
    return attach(model, config.lora, **options)


def attach(
    model: nn.Module,
    spec: LoraSpec,
    *,
    task: str | None = "CAUSAL_LM",
    auto: Sequence[str] | None = None,
    pattern: str | None = None,
    unfit: Callable[[], Mapping[str, str]] = dict,
) -> PeftModel:
    """The model with fresh low-rank adapters, which change nothing before the first step.

    Args:
        model: The base; its own parameters are frozen.
        spec: Rank, scale and targets.
        task: peft's task type, which decides the wrapper class.
        auto: Module names that the targets `auto` stand for; None for all linear layers. Those that
            the model lacks are passed over.
        pattern: A regular expression of whole module names, in place of the spec's targets.
        unfit: Finds the linear layers that cannot be trained in this modality, and says why; all
            linear layers are then all but those.

    Raises:
        ConfigError: when a target fits no module, fits the output head, or is refused by peft.
    """
    from peft import LoraConfig, get_peft_model

    layers = lora_settings.linear_layers(model, _head(model))
    reasons: dict[str, str] = {}
    targets = _targets(model, spec, auto) if pattern is None else pattern
    if targets == "all-linear":
        reasons = lora_settings.left_out(model, _head(model), unfit())
    config = LoraConfig(
        r=spec.rank,
        lora_alpha=spec.alpha,  # pyright: ignore[reportArgumentType]  peft takes any number
        lora_dropout=spec.dropout,
        target_modules=targets,
        exclude_modules=lora_settings.pattern_of(reasons, layers.keys() - reasons.keys()),
        use_dora=spec.dora,
        fan_in_fan_out=any(map(lora_settings.is_conv1d, model.modules())),  # GPT-2's, [in, out]
        task_type=task,  # pyright: ignore[reportArgumentType]
    )
    try:
        policy: Any = get_peft_model(model, config)  # pyright: ignore[reportArgumentType]
    except ValueError as error:
        raise ConfigError(f"model.lora: peft cannot adapt this model: {error}") from error
    if spec.dora:
        exact_start(policy)
    if pattern is None:
        _say_left_out(policy, targets, layers, reasons)
    return policy


def _say_left_out(
    policy: Any, targets: str | list[str], layers: Iterable[str], reasons: Mapping[str, str]
) -> None:
    """One line about linear layers and experts that have no adapter though the targets name them.

    Raises:
        ConfigError: Targets that name experts, which peft does not find in this class.
    """
    found = dict(reasons)
    base = policy.get_base_model()
    if targets == "all-linear":
        found |= lora_settings.spare_routers(policy, TRAINED)
        named = set(layers) - found.keys()
    else:
        named = {name for target in targets for name in _matched(layers, target)}
        adapted = policy.peft_config[TRAINED].target_parameters
        missing = [target for target in targets if not _matched(layers, target)]
        if missing and not adapted and set(missing) <= set(lora_settings.OF_EXPERTS):
            raise ConfigError(_fits_nothing(base, missing[0]))
    found |= lora_settings.passed_over(policy, named)
    experts = lora_settings.whole_experts(base) if targets == "all-linear" else []
    said = lora_settings.describe(found, experts)
    if said:
        log.warning("model.lora.targets: %s", said)


def load(model: nn.Module, folder: str | Path) -> PeftModel:
    """The model with an adapter that was trained before.

    Raises:
        ConfigError: when there is none, it does not fit to the last tensor, it is of a kind that
            cannot be trained here, or it replaces the output head.
    """
    try:
        place = local_folder(folder)
        lora_settings.read_settings(place)
        policy = load_adapter(model, place, trainable=True)
    except CheckpointError as error:
        raise ConfigError(f"model.adapter {error}") from error
    head = _head(policy)
    if hasattr(head, "base_layer") or hasattr(head, "original_module"):
        raise ConfigError(
            f"model.adapter {folder} changes the output head, which is scored directly; "
            "merge the adapter into the base (mmalign merge), then train from that"
        )
    return policy


def copy_adapter(policy: PeftModel) -> None:
    """Add a frozen second adapter with the weights that the trained one has now."""
    config: Any = copy(policy.peft_config[TRAINED])
    config.init_lora_weights = True  # PiSSA would take its part out of the base a second time
    config.lora_dropout = 0.0  # a reference scores without noise
    policy.add_adapter(REFERENCE, config)
    policy.set_adapter(TRAINED)
    wide_norms(policy)
    for _, trained, reference in adapter_pairs(policy):
        reference.data = trained.detach().clone()
        reference.requires_grad_(False)


def has_second_place(policy: PeftModel) -> bool:
    """Whether a second adapter of the same settings can stand beside the trained one."""
    settings = policy.peft_config[TRAINED].to_dict()
    return settings.get("peft_type") == "LORA" and not lora_settings.needs_model(settings)


def adapter_pairs(policy: nn.Module) -> Iterator[tuple[str, Tensor, Tensor]]:
    """Name, trained tensor and reference tensor of every adapter weight."""
    tensors = dict(policy.named_parameters())
    for name, trained in tensors.items():
        head, found, tail = f"{name}.".rpartition(f".{TRAINED}.")
        if found:
            yield name, trained, tensors[f"{head}.{REFERENCE}.{tail}".rstrip(".")]


def save(policy: PeftModel, folder: Path) -> None:
    """Write the trained adapter in peft's layout (adapter_model.safetensors and its config)."""
    policy.save_pretrained(str(folder), selected_adapters=[TRAINED])


def merge(policy: PeftModel) -> nn.Module:
    """The base with the trained adapter added to its weights; `policy` is used up."""
    return policy.merge_and_unload(adapter_names=[TRAINED])  # pyright: ignore


def _targets(model: nn.Module, spec: LoraSpec, auto: Sequence[str] | None) -> str | list[str]:
    """What is adapted: all-linear, or names that all fit; `auto` is what it stands for here."""
    modules = _adaptable(model)
    named = spec.targets
    if named == "auto":
        named = [target for target in auto or () if _matched(modules, target)] or "all-linear"
    if named == "all-linear":
        if not modules:
            raise ConfigError("model.lora: the model has no linear layer to adapt")
        return named
    named = [named] if isinstance(named, str) else list(named)
    head = _head(model)
    experts = lora_settings.OF_EXPERTS if lora_settings.whole_experts(model) else ()
    for target in named:
        matched = _matched(modules, target)
        if not matched and target not in experts:
            raise ConfigError(_fits_nothing(model, target))
        if head is not None and any(model.get_submodule(name) is head for name in matched):
            raise ConfigError(
                f"model.lora.targets: {target!r} is the output head, which is scored directly in "
                "blocks; leave it out"
            )
    return named


def _adaptable(model: nn.Module) -> list[str]:
    return [name for name, module in model.named_modules() if lora_settings.takes_lora(module)]


def _matched(modules: Iterable[str], target: str) -> list[str]:
    return [name for name in modules if f".{name}".endswith(f".{target}")]


def _fits_nothing(model: nn.Module, target: str) -> str:
    available = sorted({name.rpartition(".")[2] for name in _adaptable(model)})
    return (
        f"model.lora.targets: {target!r} fits no module of {type(model).__name__}; it has "
        f"{', '.join(available) or 'none that takes a LoRA'}. Or use all-linear"
    )


def _head(model: nn.Module) -> nn.Module | None:
    find = getattr(model, "get_output_embeddings", None)
    return find() if find is not None else None


def always_as_in_training(model: nn.Module) -> int:
    """Let quantized layers compute in evaluation what they do in training; returns how many.

    Their mode decides nothing but the kernel, and on a CPU the one for evaluation does harm. With
    AVX512-BF16, the first such pass rearranges a 4-bit weight in place, for a kernel without a
    gradient, and leaves it so: later training passes go without a gradient, and a merge reads the
    bytes in the wrong order. With 8 bits, evaluation rounds the inputs too, so that a reference,
    which is scored in evaluation mode, would not be the policy that it is.
    """
    count = 0
    for module in model.modules():
        if type(module).__module__.partition(".")[0] == "bitsandbytes":
            module.register_forward_pre_hook(_as_in_training)
            count += 1
    return count


def _as_in_training(module: nn.Module, inputs: Any) -> None:
    module.training = True
