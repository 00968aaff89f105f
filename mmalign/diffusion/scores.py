"""Images to log-probabilities: the noised samples, and the networks' errors there."""

from __future__ import annotations

from contextlib import nullcontext
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any, Literal

import torch
from torch import Tensor

from mmalign.core.numerics import full_precision
from mmalign.diffusion.estimators import Networks, Point, RowRNG, build_estimator
from mmalign.diffusion.process import NoiseProcess

if TYPE_CHECKING:
    from collections.abc import Callable
    from contextlib import AbstractContextManager

    from torch import nn

    from mmalign.config import DiffusionConfig
    from mmalign.core import Needs
    from mmalign.diffusion.estimators import Predict
    from mmalign.diffusion.families import Condition, Family
    from mmalign.diffusion.inputs import ImageInputs, Inputs, Part
    from mmalign.models.batch import Batch
    from mmalign.models.reference import Ema, Reference


# The denoising error of a prediction: a candidate's score is minus a multiple of it.

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
    """Distance between a prediction and its target, one number per image.

    mse: (prediction - target)^2; pseudo_huber: sqrt(d^2 + c^2) - c. Both are summed or averaged
    over the elements of an image, in float32, or float64 where that comes in.

    Args:
        pred: [N, ...] raw output of the network at `point`, any float type.
        point: Where the network was called. With `in_x0` the clean image that the prediction
            implies is compared.
        process: The noise process of `point`.
        reduction: "mean" does not depend on the size of an image; "sum" grows with it.
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


# Images to log-probabilities: the noised samples, and the networks' errors there.


@dataclass(frozen=True, slots=True)
class Scores:
    """Log-probabilities of N images at one timestep each."""

    policy: Tensor  # [N]
    reference: Tensor | None = None  # [N]
    kl: Tensor | None = None  # [N]


class Scoring:
    """Scores images under policy and reference at the same point: -logp_scale * error.

    Args:
        settings: Timestep weights, estimator, reduction and logp_scale.
        family: How the networks are called.
        process: The noise process.
        inputs: Gives clean latents and the empty prompt.
        reference: What log-ratios are taken against.
        teacher: With estimator.kind truncated: the moving average of the policy.
    """

    def __init__(
        self,
        settings: DiffusionConfig,
        family: Family,
        process: NoiseProcess,
        inputs: Inputs,
        *,
        reference: Reference,
        teacher: Ema | None,
    ) -> None:
        self.settings, self.family, self.process, self.inputs = settings, family, process, inputs
        self.reference, self.teacher = reference, teacher
        self.estimator = build_estimator(settings)

    def __call__(
        self,
        policy: nn.Module,
        batch: Batch[ImageInputs],
        part: Part,
        flat: Tensor,
        condition: Condition,
        needs: Needs,
    ) -> Scores:
        """Scores of the images of one shape.

        Nothing here waits for the device but an inversion, once, for its timesteps.

        Args:
            policy: The network to train.
            batch: The whole batch: B rows of K candidates.
            part: The rows of this shape.
            flat: [N] places of their candidates among the B * K.
            condition: [N] conditioning of the networks.
            needs: What to compute.
        """
        settings = self.settings
        num = batch.labels.shape[1]
        own_rng = RowRNG(batch.inputs.picture_seeds.flatten()[flat])
        rng = RowRNG(batch.inputs.seeds.flatten()[flat])
        x0 = self.inputs.latents(part.images, own_rng)
        rows = part.rows.to(x0.device, non_blocking=True)
        t = batch.inputs.timesteps[rows].repeat_interleave(num)
        process = self.process.at((x0.shape[-2], x0.shape[-1]))
        networks = self._networks(policy, x0.device, condition)
        point = self.estimator(x0, t, rng, process, networks)

        spec = settings.timesteps
        weight = None
        if spec.weighting != "constant":
            weight = self.process.error_weight(point.t, spec.weighting, spec.gamma)
        options: dict[str, Any] = {"reduction": settings.reduction, "weight": weight}
        compare = dict(options)
        if self.teacher is not None:
            estimator = settings.estimator
            compare |= {"distance": estimator.distance, "huber_c": estimator.huber_c}

        def score(prediction: Tensor, at: Point, **how: Any) -> Tensor:
            error = denoising_error(prediction, at, self.process, **how)
            return -settings.logp_scale * error

        reference = kl = ref_prediction = None
        live = needs.kl or (needs.reference and batch.inputs.ref_errors is None)
        if live:  # before the policy, whose activations are kept
            for share, member in self.reference.members():
                with member.active() as model:
                    ref_prediction = self._predict(model, point, condition)
                part_of = share * score(ref_prediction, point, **compare)
                reference = part_of if reference is None else reference + part_of
        prediction = self._predict(policy, point, condition)
        own_score = score(prediction, point, **compare)
        if needs.kl and ref_prediction is not None:
            gap = replace(point, target=ref_prediction, in_x0=False)
            kl = -score(prediction, gap, **options)
        return Scores(own_score, reference, kl)

    def _networks(self, policy: nn.Module, device: torch.device, condition: Condition) -> Networks:
        """What the estimator may call."""

        def seen_by(
            active: Callable[[], AbstractContextManager[nn.Module]], given: Condition
        ) -> Predict:
            def noise(x: Tensor, t: Tensor, rows: Tensor | None = None, /) -> Tensor:
                cond = given if rows is None else given.rows(rows)
                with active() as model:
                    return self.process.eps_from(self._raw(model, x, t, cond), x, t)

            return noise

        own = seen_by(lambda: nullcontext(policy), condition)
        reference = seen_by(self.reference.active, condition)
        if self.teacher is None:
            return Networks(own, reference)
        empty = self.inputs.empty(device).repeat(len(condition))
        empty = replace(empty, time_ids=condition.time_ids)  # they differ by the prompt alone
        teacher = (seen_by(self.teacher.active, given) for given in (condition, empty))
        return Networks(own, reference, *teacher)

    def _predict(self, model: nn.Module, point: Point, condition: Condition) -> Tensor:
        return self._raw(model, point.x_t, point.t, condition)

    def _raw(self, model: nn.Module, x: Tensor, t: Tensor, condition: Condition) -> Tensor:
        times = self.process.timestep_input(t)
        return self.family.predict(model, x, times, condition)
