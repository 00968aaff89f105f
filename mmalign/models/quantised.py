"""Weights quantised by bitsandbytes: what training needs of them."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from torch import nn


def always_as_in_training(model: nn.Module) -> int:
    """Let quantised layers compute in evaluation what they do in training; returns how many.

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
