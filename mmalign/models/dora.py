"""DoRA: a magnitude for each output of a layer, beside the low-rank change of its direction.

W' = magnitude * (W + scale * B A) / |W + scale * B A|, norms over all inputs of an output.

Source: Liu et al. 2024, arXiv:2402.09353; peft's `lora_magnitude_vector`.
"""

from __future__ import annotations

from functools import cache
from typing import TYPE_CHECKING, Any

import torch

from mmalign.models.lora_load import TRAINED

if TYPE_CHECKING:
    from peft import PeftModel
    from torch import Tensor, nn


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
