"""What the log and the report say of denoising errors."""

from __future__ import annotations

from collections import defaultdict
from typing import TYPE_CHECKING, Any

import torch

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence

    from torch import Tensor

    from mmalign.core import CandidateLogps

NUM_BUCKETS = 4


@torch.no_grad()
def batch_metrics(logps: CandidateLogps, logp_scale: float) -> dict[str, Tensor]:
    """Mean errors of the preferred and the rejected pictures.

    errors/chosen_diff is the policy's error minus the reference's on the preferred pictures: above
    0 the policy explains them worse than before, which implicit accuracy does not show.

    Args:
        logps: Scores -logp_scale * e, [B, K, 1].
        logp_scale: Log-probability a unit of error.
    """
    sides = {"policy": -logps.policy[..., 0] / logp_scale}  # [B, K]
    if logps.reference is not None:
        sides["ref"] = -logps.reference[..., 0] / logp_scale
    if logps.labels.shape[1] == 1:
        good = logps.labels[:, 0] > 0.5
        picked = {
            name: {"chosen": e[good, 0], "rejected": e[~good, 0]} for name, e in sides.items()
        }
    else:
        at = torch.arange(len(logps.labels), device=logps.labels.device)
        best = logps.labels.argmax(1)
        worst = logps.labels.shape[1] - 1 - logps.labels.flip(1).argmin(1)
        picked = {
            name: {"chosen": e[at, best], "rejected": e[at, worst]} for name, e in sides.items()
        }
    found: dict[str, Tensor] = {}
    for side in ("chosen", "rejected"):
        errors = {name: values[side] for name, values in picked.items()}
        if not len(errors["policy"]):
            continue
        found |= {f"errors/{name}_{side}": value.mean() for name, value in errors.items()}
        if "ref" in errors:
            found[f"errors/{side}_diff"] = (errors["policy"] - errors["ref"]).mean()
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
            values["reward_accuracy"] = float(ratios[best] > ratios[worst])
        bucket = min(int(row["noise_level"] * NUM_BUCKETS), NUM_BUCKETS - 1)
        width = 1000 // NUM_BUCKETS
        name = f"t{bucket * width:03d}-{(bucket + 1) * width - 1:03d}"
        for key, value in values.items():
            if key != "reward_accuracy":
                columns[key].append(value)
            columns[f"{key}/{name}"].append(value)
    return {key: sum(found) / len(found) for key, found in sorted(columns.items())}
