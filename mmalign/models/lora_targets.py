"""Which modules `all-linear` leaves out, as peft takes it, and what is said about that."""

from __future__ import annotations

import re
from typing import TYPE_CHECKING, Any

from torch import nn

if TYPE_CHECKING:
    from collections.abc import Collection, Iterable, Mapping

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
    more = f" and {len(shapes) - most} more" if len(shapes) > most else ""
    return ", ".join(shapes[:most]) + more


def _shape(name: str) -> str:
    """A pattern of the name with the numbers of layers left open."""
    return re.sub(r"\\\.\d+(?=\\\.)", r"\\.\\d+", re.escape(name))
