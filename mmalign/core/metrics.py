"""What a preference term reports, with TRL's names, so that one dashboard fits both."""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch
from torch import Tensor

from mmalign.core.numerics import over_positions

if TYPE_CHECKING:
    from collections.abc import Callable

    from mmalign.core.score import Score
    from mmalign.core.types import CandidateLogps


@torch.no_grad()
def preference_metrics(
    c: CandidateLogps, score: Score, shares: Callable[[Tensor], Tensor] | None = None
) -> dict[str, Tensor]:
    """Rewards, margins, accuracy, ties and log-probabilities of the candidates in `c`.

    A tie counts half in the accuracy; TRL counts it as wrong.

    The chosen candidate is the one with the highest label, the rejected one that with the lowest;
    in a tie the earlier and the later. With one candidate a row (unpaired data) the two are groups
    of rows: labels above 1/2, and the others; a group without rows is left out.

    Args:
        c: The candidates that the loss compares.
        score: Gives the rewards.
        shares: `Several.shares` of a link of candidate 0 against all others. Then the rejected
            reward is the others' sum by share, as the loss has it, and the other numbers are means.
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
        for name, value in values.items():
            if shares is None:
                chosen, rejected = _by_label(value, c.labels)
            else:
                share = shares(c.labels).to(value.dtype)  # [B, K - 1]
                chosen, rejected = value[:, 0], (share * value[:, 1:]).sum(1)
                if name != "rewards":
                    rejected = rejected / share.sum(1).clamp(min=1.0)
            metrics[f"{name}/chosen"] = chosen.mean()
            metrics[f"{name}/rejected"] = rejected.mean()
            if name == "rewards":
                metrics["rewards/margins"] = (chosen - rejected).mean()
                won, tied = chosen > rejected, chosen == rejected
                metrics["rewards/ties"] = tied.to(value.dtype).mean()
                accuracy = won.to(value.dtype).mean() + 0.5 * metrics["rewards/ties"]
                metrics["rewards/accuracies"] = accuracy
    if c.kl is not None:
        metrics["kl"] = over_positions(c.kl, c.mask).mean()
    return metrics


def _by_label(values: Tensor, labels: Tensor) -> tuple[Tensor, Tensor]:  # [B, K] -> [B], [B]
    best = labels.argmax(1, keepdim=True)
    worst = labels.shape[1] - 1 - labels.flip(1).argmin(1, keepdim=True)
    return values.gather(1, best).squeeze(1), values.gather(1, worst).squeeze(1)
