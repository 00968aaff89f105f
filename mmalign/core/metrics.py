"""What a preference term reports, with TRL's names, so that one dashboard fits both."""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch
from torch import Tensor

from mmalign.core.numerics import over_positions

if TYPE_CHECKING:
    from mmalign.core.score import Score
    from mmalign.core.types import CandidateLogps


@torch.no_grad()
def preference_metrics(c: CandidateLogps, score: Score) -> dict[str, Tensor]:
    """Rewards, margins, strict accuracy, ties and log-probabilities of the candidates in `c`.

    The chosen candidate is the one with the highest label, the rejected one that with the lowest;
    in a tie the earlier and the later. With one candidate a row (unpaired data) the two are groups
    of rows: labels above 1/2, and the others; a group without rows is left out.
    """
    values = {"rewards": score.rewards(c), "logps": over_positions(c.policy, c.mask)}
    if not score.is_log_ratio:
        values["log_ratio"] = score.log_ratio_rewards(c)
    metrics: dict[str, Tensor] = {}
    if c.labels.shape[1] == 1:
        desirable = c.labels[:, 0] > 0.5
        for name, value in values.items():
            for side, rows in (("chosen", desirable), ("rejected", ~desirable)):
                if bool(rows.any()):
                    metrics[f"{name}/{side}"] = value[rows, 0].mean()
        if "rewards/chosen" in metrics and "rewards/rejected" in metrics:
            metrics["rewards/margins"] = metrics["rewards/chosen"] - metrics["rewards/rejected"]
    else:
        last = c.labels.shape[1] - 1
        best = c.labels.argmax(1, keepdim=True)
        worst = last - c.labels.flip(1).argmin(1, keepdim=True)
        for name, value in values.items():
            chosen, rejected = value.gather(1, best), value.gather(1, worst)
            metrics[f"{name}/chosen"] = chosen.mean()
            metrics[f"{name}/rejected"] = rejected.mean()
            if name == "rewards":
                metrics["rewards/margins"] = (chosen - rejected).mean()
                metrics["rewards/accuracies"] = (chosen > rejected).to(value.dtype).mean()
                metrics["rewards/ties"] = (chosen == rejected).to(value.dtype).mean()
    if c.kl is not None:
        metrics["kl"] = over_positions(c.kl, c.mask).mean()
    return metrics
