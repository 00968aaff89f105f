"""The optimiser, and the learning rate as a pure function of the step."""

from __future__ import annotations

import math
from typing import TYPE_CHECKING, Any

import torch

from mmalign.errors import ConfigError
from mmalign.train.bfloat16 import Bfloat16Optimizer, has_bfloat16

if TYPE_CHECKING:
    from torch.optim import Optimizer

    from mmalign.config import TrainConfig
    from mmalign.models.adapter import Adapter

_FUSED_DEVICES = {"cpu", "cuda", "xpu", "mps"}


def build_optimizer(adapter: Adapter, train: TrainConfig) -> Optimizer:
    """The optimiser of `train.optimizer` over the adapter's parameter groups.

    A group may bring its own `lr` and `weight_decay`. AdamW runs as one fused kernel wherever all
    parameters lie on a device that has it. Adafactor takes `lr` as it is, as in the release of
    Diffusion-DPO and in transformers' trainer; torch's own would multiply it by the size of each
    weight. SGD is plain: no momentum. Weights in bfloat16 are stepped in float32 whichever it is,
    unless `train.bf16_weights` is nearest.

    Raises:
        ConfigError: Nothing can be trained.
    """
    groups = [{"lr": train.lr, **g} for g in adapter.parameter_groups(train) if g["params"]]
    groups = [{"initial_lr": group["lr"], **group} for group in groups]
    if not groups:
        raise ConfigError(
            "the model has no trainable parameter; set model.lora, or train the whole model"
        )
    if train.bf16_weights == "nearest" or not has_bfloat16(groups):
        return _optimizer(groups, train)
    return Bfloat16Optimizer(
        groups,
        lambda float32: _optimizer(float32, train),
        master=train.bf16_weights == "master",
        seed=train.seed,
    )


def _optimizer(groups: list[dict[str, Any]], train: TrainConfig) -> Optimizer:
    common: dict[str, Any] = {"lr": train.lr, "weight_decay": train.weight_decay}
    if train.optimizer == "adafactor":
        from transformers.optimization import Adafactor

        return Adafactor(groups, scale_parameter=False, relative_step=False, **common)
    if train.optimizer == "sgd":
        return torch.optim.SGD(groups, **common)
    if train.optimizer == "adamw8bit":
        from bitsandbytes.optim import AdamW8bit  # type: ignore[import-not-found]

        return AdamW8bit(groups, betas=train.betas, **common)
    fused = all(p.device.type in _FUSED_DEVICES for group in groups for p in group["params"])
    return torch.optim.AdamW(groups, betas=train.betas, fused=fused, **common)


def warmup_steps(train: TrainConfig, num_steps: int) -> int:
    """`train.warmup` in steps: a number of steps from 1 on, a share of the run below."""
    return round(train.warmup if train.warmup >= 1 else train.warmup * num_steps)


def lr_scale(step: int, num_steps: int, train: TrainConfig) -> float:
    """The factor on every learning rate at `step`, counted from 0.

    Warm-up reaches 1 at its last step and starts above 0, so no step is wasted. `linear` and
    `cosine` would reach 0 one step after the last.
    """
    warmup = warmup_steps(train, num_steps)
    if step < warmup:
        return (step + 1) / warmup
    if train.schedule == "constant":
        return 1.0
    done = (step - warmup) / max(1, num_steps - warmup)  # [0, 1)
    return 1.0 - done if train.schedule == "linear" else 0.5 * (1.0 + math.cos(math.pi * done))


def set_lr(optimizer: Optimizer, scale: float) -> float:
    """Put every group at its own learning rate times `scale`; returns the first group's.

    The schedule has no state of its own: a resumed run asks for the same step and gets the same
    rate.
    """
    for group in optimizer.param_groups:
        group["lr"] = group["initial_lr"] * scale
    return float(optimizer.param_groups[0]["lr"])
