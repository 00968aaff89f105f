"""Whether the tensors of a LoRA file are whole: factors that belong together, no layer left out."""

from __future__ import annotations

from types import SimpleNamespace
from typing import TYPE_CHECKING

from mmalign.errors import CheckpointError

if TYPE_CHECKING:
    from collections.abc import Collection, Iterable

    from torch import Tensor

    from mmalign.models.lora_files import LoraWeights

_PAIRS = (("A", "B"), ("embedding_A", "embedding_B"))  # B [out, r, ...] after A [r, in, ...]


def check_factors(weights: LoraWeights) -> None:
    """Refuse factors that cannot be multiplied.

    Raises:
        CheckpointError: Names the module.
    """
    for module, parts in weights.parts.items():
        for down, up in _PAIRS:
            if down in parts and up in parts:
                _check_pair(weights, module, parts[down], parts[up])
        odd = [part for part, tensor in parts.items() if not tensor.is_floating_point()]
        if odd and "full" not in odd:
            raise CheckpointError(
                f"{weights.path}: {odd[0]} of {module} holds {parts[odd[0]].dtype}, not weights"
            )


def _check_pair(weights: LoraWeights, module: str, down: Tensor, up: Tensor) -> None:
    if down.dim() < 2 or up.dim() != down.dim() or not len(down) or up.shape[1] != len(down):
        raise CheckpointError(
            f"{weights.path}: the factors of {module} are {list(down.shape)} and "
            f"{list(up.shape)}, which have no product"
        )


def left_out(weights: LoraWeights, adapted: Collection[str], modules: Iterable[str]) -> list[str]:
    """Modules that the settings of an adapter name and its file has nothing for.

    Args:
        weights: An adapter in the layout of peft.
        adapted: Modules of the base that the file has tensors for.
        modules: All modules of the base that have a weight.
    """
    from peft.tuners.tuners_utils import check_target_module_exists

    settings = weights.settings
    names = ("target_modules", "exclude_modules", "modules_to_save", "layers_to_transform")
    asked = SimpleNamespace(
        **{name: settings.get(name) for name in names},
        layers_pattern=settings.get("layers_pattern"),
        target_parameters=None,
    )
    if not asked.target_modules:
        return []
    return [n for n in modules if n not in adapted and check_target_module_exists(asked, n) is True]
