"""The frozen model that log-ratios are taken against: which kind a run needs, and its making."""

from __future__ import annotations

from typing import TYPE_CHECKING

from mmalign.errors import ConfigError
from mmalign.models import lora
from mmalign.models.adapter_settings import adapter_in_place_of_model, refuse_adapter_path
from mmalign.models.frozen import (
    AdapterCopy,
    Cached,
    Copy,
    Ema,
    FrozenCopy,
    LoraOff,
    Mixture,
    NoReference,
    Reference,
)

if TYPE_CHECKING:
    from collections.abc import Callable

    from torch import nn

    from mmalign.config import ReferenceConfig, RunConfig
    from mmalign.core import Needs

__all__ = [
    "AdapterCopy",
    "Cached",
    "Ema",
    "FrozenCopy",
    "LoraOff",
    "Mixture",
    "NoReference",
    "Reference",
    "build_reference",
    "copy_of",
    "resolve",
]


def resolve(config: RunConfig, needs: Needs) -> str:
    """The kind of reference a run uses; looks at no weights.

    Returns:
        lora-off, frozen-copy, ema, mixture, cached or none.

    Raises:
        ConfigError: for a combination that cannot work, with the reason.
    """
    reference, model = config.reference, config.model
    _refuse_adapters(reference)
    kind = reference.kind
    if kind == "auto" and reference.path is not None:
        kind = "frozen-copy"
    if not (needs.reference or needs.kl):
        return "none"
    if kind == "auto":
        return "lora-off" if model.lora is not None else "frozen-copy"
    if kind == "none":
        raise ConfigError(
            "reference.kind is none, but the objective needs a reference model; remove the line to "
            "let it be chosen"
        )
    if kind == "lora-off" and model.adapter is not None:
        raise ConfigError(
            "reference.kind is lora-off, but model.adapter continues a trained adapter: without it "
            "the base would be the reference, and not the model that training starts from. Use "
            "frozen-copy (a second frozen adapter, almost free)"
        )
    if kind == "mixture":
        _check_mixture(config, needs)
    return kind


def build_reference(
    config: RunConfig,
    policy: nn.Module,
    needs: Needs,
    *,
    load: Callable[[str], nn.Module] | None = None,
) -> Reference:
    """The reference of a run; call it after the policy is complete and before the first step.

    Args:
        config: `config.reference` says which kind.
        policy: The model to train, a PeftModel where it has an adapter.
        needs: What the objective asks for.
        load: Loads another model from a folder or hub name, in the policy's dtype.

    Raises:
        ConfigError: for a combination that cannot work.
    """
    kind = resolve(config, needs)
    reference = config.reference
    if kind == "none":
        return NoReference()
    if kind == "cached":
        return Cached()
    if kind == "ema":
        return Ema(copy_of(policy), reference.decay, reference.every)
    if kind == "mixture":
        start: Reference | None = None
        parts: list[tuple[float, Reference]] = []
        for part in reference.mixture:
            if part.path is None:
                start = start or _start(config, policy)
                parts.append((part.weight, start))
            else:
                parts.append((part.weight, FrozenCopy(policy, _loaded(part.path, load))))
        return Mixture(parts)
    if reference.path is not None:
        return FrozenCopy(policy, _loaded(reference.path, load))
    return _start(config, policy) if kind == "lora-off" else copy_of(policy)


def _start(config: RunConfig, policy: nn.Module) -> Reference:
    """The policy's start, the cheapest way."""
    if config.model.lora is not None:
        return LoraOff(policy)  # pyright: ignore[reportArgumentType]  lora means a PeftModel
    return copy_of(policy)


def copy_of(policy: nn.Module) -> Copy:
    """A frozen copy of the policy as it is now, the cheapest way."""
    from peft import PeftModel

    if isinstance(policy, PeftModel) and lora.has_second_place(policy):
        return AdapterCopy(policy)
    return FrozenCopy(policy)


def _loaded(path: str, load: Callable[[str], nn.Module] | None) -> nn.Module:
    if load is None:
        raise ConfigError(f"reference {path}: this modality cannot load a second model")
    model = load(path)
    if getattr(model, "_hf_peft_config_loaded", False):  # one that transformers found on the hub
        base = str(getattr(model, "name_or_path", "")) or "BASE"
        raise ConfigError(adapter_in_place_of_model("reference.path", path, base))
    return model


def _refuse_adapters(reference: ReferenceConfig) -> None:
    if reference.path is not None:
        refuse_adapter_path("reference.path", reference.path)
    for i, part in enumerate(reference.mixture):
        if part.path is not None:
            refuse_adapter_path(f"reference.mixture.{i}.path", part.path)


def _check_mixture(config: RunConfig, needs: Needs) -> None:
    total = sum(part.weight for part in config.reference.mixture)
    if abs(total - 1.0) > 1e-6:
        raise ConfigError(
            f"reference.mixture has weights that sum to {total:g}; they must sum to 1, else equal "
            "models do not give log-ratio 0"
        )
    if needs.kl:
        raise ConfigError(
            "reference.kind is mixture, but the objective needs the per-token KL: a geometric "
            "mixture is not normalised over the vocabulary, so it has none. Use a single reference"
        )
