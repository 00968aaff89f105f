"""Images to log-probabilities: the noised samples, and the networks' errors there."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Callable, Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import replace
from typing import Any, Literal

import torch
from torch import Tensor, nn

from mmalign.core import CandidateLogps, Needs
from mmalign.core.numerics import full_precision
from mmalign.diffusion.estimators import Networks, Point, Predict, RowRNG, build_estimator
from mmalign.diffusion.families import Condition
from mmalign.diffusion.inputs import ImageInputs, Inputs, Part
from mmalign.diffusion.process import NoiseProcess
from mmalign.models.batch import Batch
from mmalign.models.reference import Ema, Reference

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


class Scoring:
    """Scores images under policy and reference at the same point: -logp_scale * error.

    Args:
        inputs: Gives clean latents and the empty prompt, and how scores are made.
        reference: What log-ratios are taken against.
        teacher: With estimator.kind truncated: the moving average of the policy.
    """

    def __init__(self, inputs: Inputs, reference: Reference, teacher: Ema | None) -> None:
        self.inputs, self.reference, self.teacher = inputs, reference, teacher
        self.process, self.settings = inputs.process, inputs.config.diffusion
        self.estimator = build_estimator(self.settings)

    def __call__(
        self,
        policy: nn.Module,
        batch: Batch[ImageInputs],
        part: Part,
        flat: Tensor,
        condition: Condition,
        needs: Needs,
    ) -> dict[str, Tensor]:
        """`policy` and, where needed, `reference` and `kl` of the images of one shape, each [N].

        Nothing here waits for the device but an inversion, once, for its timesteps.

        Args:
            policy: The network to train.
            batch: The whole batch: B rows of K candidates.
            part: The rows of this shape.
            flat: [N] places of their candidates among the B * K.
            condition: [N] conditioning of the networks.
            needs: What to compute.
        """
        settings, num = self.settings, batch.labels.shape[1]
        rng = RowRNG(batch.inputs.seeds.flatten()[flat])
        own_rng = RowRNG(batch.inputs.picture_seeds.flatten()[flat])
        x0 = self.inputs.latents(part.images, own_rng)
        rows = part.rows.to(x0.device, non_blocking=True)
        t = batch.inputs.timesteps[rows].repeat_interleave(num)
        process = self.process.at((x0.shape[-2], x0.shape[-1]))
        networks = self._networks(policy, x0.device, condition)
        point = self.estimator(x0, t, rng, process, networks)

        spec, weight = settings.timesteps, None
        if spec.weighting != "constant":
            weight = self.process.error_weight(point.t, spec.weighting, spec.gamma)
        distance: dict[str, Any] = {}
        if self.teacher is not None:
            estimator = settings.estimator
            distance = {"distance": estimator.distance, "huber_c": estimator.huber_c}

        def predict(model: nn.Module) -> Tensor:
            return self._raw(model, point.x_t, point.t, condition)

        def score(prediction: Tensor, at: Point, **how: Any) -> Tensor:
            how |= {"reduction": settings.reduction, "weight": weight}
            return -settings.logp_scale * denoising_error(prediction, at, self.process, **how)

        found: dict[str, Tensor] = {}
        ref_prediction = None
        if needs.kl or (needs.reference and batch.inputs.ref_errors is None):
            # Before the policy, whose activations are kept.
            for share, member in self.reference.members():
                with member.active() as model:
                    ref_prediction = predict(model)
                own = share * score(ref_prediction, point, **distance)
                found["reference"] = found["reference"] + own if "reference" in found else own
        prediction = predict(policy)
        found["policy"] = score(prediction, point, **distance)
        if needs.kl and ref_prediction is not None:
            gap = replace(point, target=ref_prediction, in_x0=False)
            found["kl"] = -score(prediction, gap)
        return found

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

    def _raw(self, model: nn.Module, x: Tensor, t: Tensor, cond: Condition) -> Tensor:
        predict = self.inputs.components.family.predict
        return predict(model, x, self.process.timestep_input(t), cond)


NUM_BUCKETS = 4


@torch.no_grad()
def batch_metrics(logps: CandidateLogps, logp_scale: float, needs: Needs) -> dict[str, Tensor]:
    """Mean errors of the preferred and the rejected images.

    errors/chosen_diff is the policy's error minus the reference's on the preferred images: above
    0 the policy explains them worse than before, which implicit accuracy does not show.

    Args:
        logps: Scores -logp_scale * e, [B, K, 1].
        logp_scale: Log-probability a unit of error.
        needs: Of the objective: which candidates are not rated, and whether rows are.
    """
    num_rated = logps.labels.shape[1] - len(needs.roles)
    labels = logps.labels[:, :num_rated]
    at = torch.arange(len(labels), device=labels.device)
    best, worst = labels.argmax(1), num_rated - 1 - labels.flip(1).argmin(1)
    good = (labels[:, 0] > 0.5).to(logps.policy.dtype)

    def means(scores: Tensor) -> dict[str, Tensor]:
        errors = -scores[:, :num_rated, 0] / logp_scale  # [B, K rated]
        if num_rated > 1:
            return {"chosen": errors[at, best].mean(), "rejected": errors[at, worst].mean()}
        if needs.rows != "unpaired":
            return {"chosen": errors.mean()}
        # The mean of none is nan, which does not count; choosing rows would wait for a GPU.
        shares = {"chosen": good / good.sum(), "rejected": (1 - good) / (1 - good).sum()}
        return {side: (share * errors[:, 0]).sum() for side, share in shares.items()}

    policy = means(logps.policy)
    reference = {} if logps.reference is None else means(logps.reference)
    found: dict[str, Tensor] = {}
    for side, error in policy.items():
        found[f"errors/policy_{side}"] = error
        if side in reference:
            found[f"errors/ref_{side}"] = reference[side]
            found[f"errors/{side}_diff"] = error - reference[side]
    return found


def by_timestep(rows: Sequence[Mapping[str, Any]], logp_scale: float) -> dict[str, float]:
    """Held-out implicit accuracy and error differences, over all rows and by noise level.

    Args:
        rows: With `labels`, `logps`, `noise_level`, and `ref_logps` where there is a reference.
        logp_scale: Log-probability a unit of error.

    Returns:
        errors/policy_chosen, errors/chosen_diff, errors/rejected_diff over all rows; the last two
        and reward_accuracy also as NAME/tLOW-HIGH, where LOW and HIGH are per mille of the
        schedule.
    """
    columns: dict[str, list[float]] = defaultdict(list)
    for row in rows:
        labels, logps = row["labels"], row["logps"]
        best, worst = labels.index(max(labels)), len(labels) - 1 - labels[::-1].index(min(labels))
        side = "chosen" if labels[best] > 0.5 or len(labels) > 1 else "rejected"
        columns[f"errors/policy_{side}"].append(-logps[best] / logp_scale)
        if "ref_logps" not in row:
            continue
        ratios = [p - r for p, r in zip(logps, row["ref_logps"], strict=True)]
        values = {f"errors/{side}_diff": -ratios[best] / logp_scale}
        if len(labels) > 1:
            values["errors/rejected_diff"] = -ratios[worst] / logp_scale
            values["reward_accuracy"] = (
                0.5 if ratios[best] == ratios[worst] else float(ratios[best] > ratios[worst])
            )
        bucket = min(int(row["noise_level"] * NUM_BUCKETS), NUM_BUCKETS - 1)
        width = 1000 // NUM_BUCKETS
        name = f"t{bucket * width:03d}-{(bucket + 1) * width - 1:03d}"
        for key, value in values.items():
            if key != "reward_accuracy":
                columns[key].append(value)
            columns[f"{key}/{name}"].append(value)
    return {key: sum(found) / len(found) for key, found in sorted(columns.items())}
