"""What the log and the report say of denoising errors."""

from __future__ import annotations

from collections import defaultdict
from typing import TYPE_CHECKING, Any

import torch

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence

    from torch import Tensor

    from mmalign.core import CandidateLogps, Needs

NUM_BUCKETS = 4


@torch.no_grad()
def batch_metrics(logps: CandidateLogps, logp_scale: float, needs: Needs) -> dict[str, Tensor]:
    """Mean errors of the preferred and the rejected pictures.

    errors/chosen_diff is the policy's error minus the reference's on the preferred pictures: above
    0 the policy explains them worse than before, which implicit accuracy does not show.

    Args:
        logps: Scores -logp_scale * e, [B, K, 1].
        logp_scale: Log-probability a unit of error.
        needs: Of the objective: which candidates are not rated, and whether rows are.
    """
    num_rated = logps.labels.shape[1] - len(needs.roles)
    labels = logps.labels[:, :num_rated]
    sides = {"policy": -logps.policy[:, :num_rated, 0] / logp_scale}  # [B, K rated]
    if logps.reference is not None:
        sides["ref"] = -logps.reference[:, :num_rated, 0] / logp_scale
    if num_rated == 1 and needs.rows != "unpaired":
        picked = {name: {"chosen": e.mean()} for name, e in sides.items()}
    elif num_rated == 1:
        # The mean of none is nan, which does not count; choosing rows would wait for a GPU.
        good = (labels[:, 0] > 0.5).to(logps.policy.dtype)
        shares = {"chosen": good / good.sum(), "rejected": (1 - good) / (1 - good).sum()}
        picked = {
            name: {side: (share * e[:, 0]).sum() for side, share in shares.items()}
            for name, e in sides.items()
        }
    else:
        at = torch.arange(len(labels), device=labels.device)
        best = labels.argmax(1)
        worst = num_rated - 1 - labels.flip(1).argmin(1)
        picked = {
            name: {"chosen": e[at, best].mean(), "rejected": e[at, worst].mean()}
            for name, e in sides.items()
        }
    found: dict[str, Tensor] = {}
    for side in picked["policy"]:
        errors = {name: values[side] for name, values in picked.items()}
        found |= {f"errors/{name}_{side}": value for name, value in errors.items()}
        if "ref" in errors:
            found[f"errors/{side}_diff"] = errors["policy"] - errors["ref"]
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
