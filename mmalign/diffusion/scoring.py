"""The denoising error of a prediction: a candidate's score is minus a multiple of it."""

from __future__ import annotations

from typing import Literal

import torch
from torch import Tensor

from mmalign.core.numerics import full_precision
from mmalign.diffusion.point import Point
from mmalign.diffusion.process import NoiseProcess

Distance = Literal["mse", "pseudo_huber"]


def denoising_error(
    pred: Tensor,
    point: Point,
    process: NoiseProcess,
    *,
    reduction: Literal["mean", "sum"] = "mean",
    weight: Tensor | None = None,
    distance: Distance = "mse",
    huber_c: float = 1e-3,
) -> Tensor:  # [N]
    """Distance between a prediction and its target, one number per picture.

    mse: (prediction - target)^2; pseudo_huber: sqrt(d^2 + c^2) - c. Both are summed or averaged
    over the elements of a picture, in float32, or float64 where that comes in.

    Args:
        pred: [N, ...] raw output of the network at `point`, any float type.
        point: Where the network was called. With `in_x0` the clean picture that the prediction
            implies is compared.
        process: The noise process of `point`.
        reduction: "mean" does not depend on the size of a picture; "sum" grows with it.
        weight: [N] factor of each error, or None.
        distance: Which distance.
        huber_c: pseudo_huber: below it quadratic, above it linear; in units of the target.
    """
    if point.in_x0:
        pred = process.x0_from(pred, point.x_t, point.t)
    gap = full_precision(pred) - full_precision(point.target)
    if distance == "mse":
        cost = gap.square()
    else:  # sqrt(d^2 + c^2) - c without the cancellation at small d
        cost = gap.square() / (torch.sqrt(gap.square() + huber_c**2) + huber_c)
    cost = cost.flatten(1)
    error = cost.mean(1) if reduction == "mean" else cost.sum(1)
    return error if weight is None else error * weight.to(error)
