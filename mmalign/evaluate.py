"""Metrics of a policy on held-out rows, with confidence intervals.

`evaluate` scores batches and keeps one record a row; everything else is a pure function of arrays,
so the same numbers can be had from a run folder's `eval.jsonl`.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn

from mmalign.core import CandidateLogps, Needs, Objective
from mmalign.models.batch import Batch
from mmalign.stats import bootstrap_interval

Floats = NDArray[np.float64]

SIMULATED_AGREEMENT = 0.75
"""Share of raters for the better response where the data give none, as in the paper's own code."""


def ranked(chosen: Floats, rejected: Floats) -> NDArray[np.bool_]:
    """Whether the policy gives the chosen response at least the probability of the rejected one.

    log pi(chosen) >= log pi(rejected), from summed or from per-token log-probabilities, [N] each.

    Source: Chen et al. 2024, arXiv:2405.19534, definition 2.3.
    """
    return chosen >= rejected


def rewarded(chosen_log_ratio: Floats, rejected_log_ratio: Floats) -> Floats:
    """1 where the implicit reward orders a pair rightly, 1/2 for a tie, as in training logs."""
    tied = chosen_log_ratio == rejected_log_ratio
    return np.where(tied, 0.5, chosen_log_ratio > rejected_log_ratio)


TIED = "reward_accuracy"
"""What says nothing before the first step, where every log-ratio is 0."""
_ROUNDING = 1e-5  # of a score, between two ways to compute it


def is_tied(evaluation: Mapping[str, Any]) -> bool:
    """Whether an evaluation is of a policy that still is its reference: all pairs are ties.

    Args:
        evaluation: A record of eval.jsonl.
    """
    if evaluation.get("step") != 0 or TIED not in evaluation:
        return False
    rows = evaluation.get("rows") or ()
    told = [row for row in rows if isinstance(row, dict) and {"logps", "ref_logps"} <= row.keys()]
    if not told:
        return evaluation[TIED] == 0.5
    pairs = [pair for row in told for pair in zip(row["logps"], row["ref_logps"], strict=False)]
    return all(abs(own - ref) <= _ROUNDING * max(1.0, abs(ref)) for own, ref in pairs)


def difficulty(ref_chosen: Floats, ref_rejected: Floats) -> Floats:  # [N], [N] -> [N]
    """c = log ref(rejected) - log ref(chosen), in nats; beta * c >> 1 is hardly fixable."""
    return ref_rejected - ref_chosen


def loss_threshold(c: Floats, beta: float) -> Floats:  # [N] -> [N]
    """-log sigmoid(beta * c): the policy ranks a pair rightly iff its DPO loss is at most this.

    Source: Chen et al. 2024, arXiv:2405.19534, theorem 4.1.
    """
    return np.logaddexp(0.0, -beta * c)


def idealised_log_ratio(
    ref_chosen: Floats, ref_rejected: Floats, agreement: Floats, beta: float, eps: float = 1e-3
) -> Floats:
    """log pi*(chosen) - log pi*(rejected) at the exact optimum pi* of the KL-regularized objective.

    = log ref(chosen) - log ref(rejected) + log(a / (1 - a)) / beta

    Args:
        ref_chosen: Summed log-probabilities under the reference, [N], in nats.
        ref_rejected: The same for the rejected response, [N].
        agreement: Share a of raters who prefer the chosen response, [N], kept in [eps, 1 - eps].
        beta: Inverse temperature of the implicit reward, in 1/nats.
        eps: Distance kept from certainty, where the optimum would be infinite.

    Source: Chen et al. 2024, arXiv:2405.19534, theorem 3.1.
    """
    a = np.clip(agreement, eps, 1.0 - eps)
    return ref_chosen - ref_rejected + (np.log(a) - np.log1p(-a)) / beta


def separation(scores: Floats, desirable: NDArray[np.bool_]) -> float:
    """Share of (desirable, undesirable) pairs of rows that scores order rightly; ties half."""
    good, bad = scores[desirable], np.sort(scores[~desirable])
    if not len(good) or not len(bad):
        return float("nan")
    below = np.searchsorted(bad, good, side="left") + np.searchsorted(bad, good, side="right")
    return float(below.mean() / 2 / len(bad))


@dataclass(frozen=True, slots=True)
class Evaluation:
    """Held-out numbers.

    Attributes:
        metrics: Means over rows.
        intervals: 95 % bootstrap intervals, for the metrics that are means of one value a row.
        rows: What each row contributed: `id`, `labels`, and per rated candidate `logps` (summed, in
            nats), `lengths` (positions), with a reference `ref_logps`, with a KL `kl` (summed).
    """

    metrics: dict[str, float]
    intervals: dict[str, tuple[float, float]] = field(default_factory=dict)
    rows: list[dict[str, Any]] = field(default_factory=list)


@dataclass(slots=True)
class Tally:
    """Scores of a share of the batches; shares of several processes are joined with `+`."""

    rows: list[dict[str, Any]] = field(default_factory=list)
    sums: dict[str, tuple[float, float]] = field(default_factory=dict)  # metric -> sum, rows

    def __add__(self, other: Tally) -> Tally:
        return Tally(self.rows + other.rows, merge([self.sums, other.sums]))


def merge(parts: Iterable[Mapping[str, tuple[float, float]]]) -> dict[str, tuple[float, float]]:
    """(sum, count) of every metric over parts that have their own."""
    merged: dict[str, tuple[float, float]] = {}
    for part in parts:
        for name, (total, count) in part.items():
            before = merged.get(name, (0.0, 0.0))
            merged[name] = (before[0] + total, before[1] + count)
    return merged


def evaluate(
    adapter: Callable[[Batch, Needs], CandidateLogps] | nn.Module,
    objective: Objective,
    batches: Iterable[Batch],
    *,
    needs: Needs | None = None,
    beta: float | None = None,
    columns: Callable[[Batch], dict[str, list[Any]]] | None = None,
    summary: Callable[[Sequence[Mapping[str, Any]]], Mapping[str, float]] | None = None,
) -> Evaluation:
    """Score held-out batches and summarise them.

    Args:
        adapter: Scores a batch; put in evaluation mode by the caller.
        objective: The loss that is reported; its own metrics are averaged over rows.
        batches: On the device of the adapter.
        needs: What to ask of the adapter; by default what the objective needs. Ask for more, e.g.
            the reference or the KL, to have more reported: only what is available is.
        beta: Inverse temperature for the idealised accuracy, in 1/nats; without it, it is left out.
        columns: `Adapter.per_row_columns`: more columns to keep of every row.
        summary: `Adapter.summarise`: more metrics made of the rows.
    """
    tally = Tally()
    for batch in batches:
        tally += score(adapter, objective, batch, needs or objective.needs, columns)
    return summarise(tally, beta=beta, also=summary(tally.rows) if summary else None)


@torch.no_grad()
def score(
    adapter: Callable[[Batch, Needs], CandidateLogps] | nn.Module,
    objective: Objective,
    batch: Batch,
    needs: Needs,
    columns: Callable[[Batch], dict[str, list[Any]]] | None = None,
) -> Tally:
    """Score one batch. The objective is in evaluation mode meanwhile, so its statistics stay.

    `columns` gives more to keep of every row, e.g. the timestep at which it was scored.
    """
    was_training = objective.training
    objective.eval()
    logps = adapter(batch, needs)
    loss = objective(logps)
    objective.train(was_training)

    num_rows = len(batch.ids)
    values = {"loss": loss.value, **loss.metrics}
    sums = {
        name: (float(value) * num_rows, float(num_rows))
        for name, value in values.items()
        if not bool(torch.isnan(value))
    }
    # Of a plain record one response is rated: the others are the same under other inputs.
    num_rated = 1 if needs.rows == "plain" else logps.policy.shape[1] - len(needs.roles)
    kept: dict[str, list[Any]] = {
        **(columns(batch) if columns else {}),
        "labels": logps.labels[:, :num_rated].tolist(),
        "logps": _summed(logps.policy, logps.mask, num_rated),
        "lengths": logps.mask[:, :num_rated].sum(-1).tolist(),
    }
    if logps.reference is not None:
        kept["ref_logps"] = _summed(logps.reference, logps.mask, num_rated)
    if logps.kl is not None:
        kept["kl"] = _summed(logps.kl, logps.mask, num_rated)
    if loss.rows is not None:
        kept["loss"] = loss.rows.tolist()
    rows = [
        {"id": row, **{name: column[i] for name, column in kept.items()}}
        for i, row in enumerate(batch.ids)
    ]
    return Tally(rows, sums)


def _summed(values: Tensor, mask: Tensor, num_rated: int) -> list[list[float]]:
    return values.double().where(mask, 0.0)[:, :num_rated].sum(-1).tolist()


def summarise(
    tally: Tally, *, beta: float | None = None, also: Mapping[str, float] | None = None
) -> Evaluation:
    """The means of a tally, with what the rows themselves tell about ranking, rewards and drift.

    `also` holds metrics that somebody else made of the same rows.
    """
    metrics = {name: total / count for name, (total, count) in tally.sums.items()}
    values = row_values(tally.rows, beta=beta)
    intervals = {}
    for name, column in values.items():
        present = ~np.isnan(column)
        if present.any():
            metrics.setdefault(name, float(column[present].mean()))
        independent = _per_row(column[present], [tally.rows[i] for i in np.flatnonzero(present)])
        if len(independent) > 1:
            intervals[name] = bootstrap_interval(independent)
    metrics |= _over_rows(tally.rows) | dict(also or {})
    if "idealised_accuracy" in metrics:
        metrics["alignment_gap"] = metrics["idealised_accuracy"] - metrics["ranking_accuracy"]
    return Evaluation(metrics, intervals, tally.rows)


def _per_row(values: Floats, rows: Sequence[Mapping[str, Any]]) -> Floats:
    """One value for each `row` that several records are of; they are not independent."""
    if not rows or "row" not in rows[0]:
        return values
    grouped: dict[str, list[float]] = defaultdict(list)
    for row, value in zip(rows, values.tolist(), strict=True):
        grouped[row["row"]].append(value)
    return np.asarray([sum(group) / len(group) for group in grouped.values()])


def row_values(
    rows: Sequence[Mapping[str, Any]], *, beta: float | None = None
) -> dict[str, Floats]:
    """Every metric that is a mean over rows, one value a row; nan where a row has none.

    A row with several rated candidates counts all pairs with different labels, so pairs and lists
    are one case. Names:
        ranking_accuracy, ranking_accuracy_per_token: by log-probability, summed and per position
        reward_accuracy, log_ratio_margin: by log-ratio with the reference
        ref_ranking_accuracy, difficulty, idealised_accuracy: of the reference
        drift/chosen, drift/rejected: summed log pi - log ref of the best and worst rated response;
            drift/desirable, drift/undesirable for single responses
        kl_per_token: mean KL(reference, policy)

    Those per token are left out where all responses have one position, as images do.
    """
    if not rows:
        return {}
    table = {
        name: np.asarray([row[name] for row in rows], dtype=np.float64)
        for name in ("labels", "logps", "lengths", "ref_logps", "kl", "loss")
        if name in rows[0]
    }
    labels, logps = table["labels"], table["logps"]  # [N, K]
    lengths = np.maximum(table["lengths"], 1.0)
    has_tokens = bool((lengths > 1).any())  # an image has one position
    values: dict[str, Floats] = {"loss": table["loss"]} if "loss" in table else {}
    if "kl" in table and has_tokens:
        values["kl_per_token"] = table["kl"].sum(1) / lengths.sum(1)
    log_ratio = logps - table["ref_logps"] if "ref_logps" in table else None

    if labels.shape[1] == 1:
        if log_ratio is not None:
            desirable = labels[:, 0] > 0.5
            values["drift/desirable"] = np.where(desirable, log_ratio[:, 0], np.nan)
            values["drift/undesirable"] = np.where(desirable, np.nan, log_ratio[:, 0])
        return values

    better = labels[:, :, None] > labels[:, None, :]  # [N, K, K]  candidate i is rated above j

    def over_pairs(function: Callable[..., Any], scores: Floats) -> Floats:
        """Mean of function(score of the better, score of the worse) over a row's pairs."""
        found = np.asarray(function(scores[:, :, None], scores[:, None, :]), dtype=np.float64)
        count = better.sum((1, 2))
        return np.where(count > 0, (found * better).sum((1, 2)) / np.maximum(count, 1), np.nan)

    values["ranking_accuracy"] = over_pairs(ranked, logps)
    if has_tokens:
        values["ranking_accuracy_per_token"] = over_pairs(ranked, logps / lengths)
    if log_ratio is None:
        return values
    ref = table["ref_logps"]
    values["reward_accuracy"] = over_pairs(rewarded, log_ratio)
    values["log_ratio_margin"] = over_pairs(np.subtract, log_ratio)
    values["ref_ranking_accuracy"] = over_pairs(ranked, ref)
    values["difficulty"] = over_pairs(difficulty, ref)
    at = np.arange(len(labels))
    values["drift/chosen"] = log_ratio[at, labels.argmax(1)]
    values["drift/rejected"] = log_ratio[at, labels.argmin(1)]
    if beta is not None and beta > 0:
        given = np.clip(labels[:, :, None], 0, 1) * np.ones_like(better)
        soft = labels.shape[1] == 2 and bool(((labels > 0) & (labels < 1)).any())
        agreement = given if soft else np.full(better.shape, SIMULATED_AGREEMENT)

        def ideal(chosen: Floats, rejected: Floats) -> NDArray[np.bool_]:
            return idealised_log_ratio(chosen, rejected, agreement, beta) > 0

        values["idealised_accuracy"] = over_pairs(ideal, ref)
    return values


def _over_rows(rows: Sequence[Mapping[str, Any]]) -> dict[str, float]:
    """Metrics that compare rows with each other: how well single rated responses are told apart."""
    if not rows or len(rows[0]["labels"]) != 1:
        return {}
    scores = [row["logps"][0] - row.get("ref_logps", [0.0])[0] for row in rows]
    desirable = [row["labels"][0] > 0.5 for row in rows]
    value = separation(np.asarray(scores), np.asarray(desirable))
    return {} if np.isnan(value) else {"separation": value}
