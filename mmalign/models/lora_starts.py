"""Starts of a LoRA that take their product out of the base: PiSSA and OLoRA.

The policy is W - s B0 A0 + s B A, with B0 A0 a function of W: its r largest singular directions
(PiSSA), or the first r columns of its QR factors (OLoRA). So what was trained is s (B A - B0 A0),
which two stacked factors of rank 2 r say without a change of the base: [B, -B0] and [A; A0].

Source: PiSSA, Meng et al. 2024, arXiv:2404.02948; OLoRA, Büyükakyüz 2024, arXiv:2406.01775; factors
    as peft computes them, in float32.
Departs: nothing.
"""

from __future__ import annotations

from dataclasses import replace
from typing import TYPE_CHECKING

import torch

from mmalign.errors import CheckpointError
from mmalign.models.adapter_settings import start_of

if TYPE_CHECKING:
    from collections.abc import Callable, Mapping

    from torch import Tensor

    from mmalign.models.lora_files import LoraWeights


def without_start(weights: LoraWeights, weight_of: Callable[[str], Tensor]) -> LoraWeights:
    """The same change as a LoRA on the base itself; as it is where its start left the base alone.

    Args:
        weights: As read from a file.
        weight_of: Weight of a module of the base, as it is stored.

    Raises:
        CheckpointError: A start that is not computed like that for such a layer.
    """
    if not start_of(weights.settings):
        return weights
    parts: dict[str, Mapping[str, Tensor]] = {}
    for module, own in weights.parts.items():
        adapted = "A" in own
        parts[module] = parts_without_start(weights, module, weight_of(module)) if adapted else own
        if adapted:
            alpha = weights.scale(module) * len(parts[module]["A"])
            parts[module] = {**parts[module], "alpha": torch.tensor(alpha, dtype=torch.float64)}
    kept = {"fan_in_fan_out": weights.settings.get("fan_in_fan_out", False)}
    return replace(weights, settings=kept, parts=parts)


def parts_without_start(
    weights: LoraWeights, module: str, weight: Tensor
) -> Mapping[str, Tensor]:  # B [out, r or 2r], A [r or 2r, in]
    """A module's parts with the start's factors beside its own, to be scaled as before.

    Args:
        weights: As read from a file.
        module: Name of a module that it adapts.
        weight: Weight of that module in the base, as it is stored.
    """
    own, kind = weights.parts[module], start_of(weights.settings)
    if not kind or not {"A", "B"} <= own.keys():  # an embedding's start is 0
        return own
    turned = bool(weights.settings.get("fan_in_fan_out"))
    if kind == "olora" and turned:
        raise CheckpointError(
            f"{weights.path}: init_lora_weights is olora, which peft cannot compute for layers "
            "that store their weights turned (fan_in_fan_out)"
        )
    weight = (weight.T if turned else weight).float()
    shape = [own["B"].shape[0], own["A"].shape[-1]]
    if list(weight.shape) != shape:
        raise CheckpointError(
            f"{weights.path}: {module} has factors for {shape}, but the base's weight is "
            f"{list(weight.shape)}"
        )
    rank = len(own["A"])
    first = _pissa(weight, rank, weights.scale(module)) if kind == "pissa" else _olora(weight, rank)
    down, up = (factor.to(own["A"].device) for factor in first)
    return {**own, "A": torch.cat([own["A"], down]), "B": torch.cat([own["B"], -up], dim=1)}


def _pissa(weight: Tensor, rank: int, scale: float) -> tuple[Tensor, Tensor]:
    left, values, right = torch.linalg.svd(weight, full_matrices=False)
    root = (values[:rank] / scale).sqrt()
    return root[:, None] * right[:rank], left[:, :rank] * root


def _olora(weight: Tensor, rank: int) -> tuple[Tensor, Tensor]:
    q, r = torch.linalg.qr(weight)
    return r[:rank], q[:, :rank]
