from __future__ import annotations

import itertools
import json
import math
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from mmalign import evaluate as ev
from mmalign.core import CandidateLogps, Needs, presets
from mmalign.models.batch import Batch, ModelInputs
from mmalign.stats import bootstrap_interval

GOLDEN = Path(__file__).resolve().parent.parent / "golden" / "seed_losses.json"
CASES = [
    case
    for case in json.loads(GOLDEN.read_text(encoding="utf-8"))["cases"]
    if case["method"] == "ranking_accuracy"
]


@pytest.mark.parametrize("case", CASES, ids=lambda case: f"beta={case['hyper']['beta']}")
def test_preference_rankings_against_the_golden(case: dict[str, Any]) -> None:
    inputs = {name: np.asarray(value) for name, value in case["inputs"].items()}
    chosen, rejected = inputs["policy_chosen_logps"], inputs["policy_rejected_logps"]
    ref_chosen, ref_rejected = inputs["ref_chosen_logps"], inputs["ref_rejected_logps"]
    beta, eps, out = case["hyper"]["beta"], case["hyper"]["eps"], case["outputs"]
    ideal = ev.idealised_log_ratio(ref_chosen, ref_rejected, inputs["agreement"], beta, eps)
    c = ev.difficulty(ref_chosen, ref_rejected)
    threshold = ev.loss_threshold(c, beta)

    assert ev.ranked(chosen, rejected).mean() == out["ranking_accuracy"]
    reward = ev.rewarded(chosen - ref_chosen, rejected - ref_rejected)
    assert reward.mean() == out["reward_accuracy"]
    np.testing.assert_allclose(ideal, out["idealized_log_ratio"], rtol=1e-12)
    assert (ideal > 0).mean() == out["idealized_accuracy"]
    np.testing.assert_allclose(c, out["difficulty_c"], rtol=1e-12)
    np.testing.assert_allclose(threshold, out["loss_threshold"], rtol=1e-9)
    # Theorem 4.1: the DPO loss tells by the threshold whether the pair is ranked rightly.
    under = np.asarray(out["dpo_losses"]) <= threshold
    assert (
        under.tolist()
        == ev.ranked(chosen, rejected).tolist()
        == [bool(flip) for flip in out["flips_by_threshold"]]
    )


def row(labels: list[float], logps: list[float], **columns: Any) -> dict[str, Any]:
    return {"id": "r", "labels": labels, "logps": logps, "lengths": [2] * len(labels)} | columns


def test_a_pair_by_hand() -> None:
    values = ev.row_values(
        [row([1, 0], [-6.0, -5.0], lengths=[4, 2], ref_logps=[-9.0, -4.0], kl=[0.6, 0.3])], beta=0.1
    )
    assert {name: column.tolist() for name, column in values.items()} == {
        "ranking_accuracy": [0.0],  # -6 < -5
        "ranking_accuracy_per_token": [1.0],  # -1.5 > -2.5
        "reward_accuracy": [1.0],  # +3 > -1
        "log_ratio_margin": [4.0],
        "ref_ranking_accuracy": [0.0],
        "difficulty": [5.0],
        "drift/chosen": [3.0],
        "drift/rejected": [-1.0],
        "idealised_accuracy": [1.0],  # -5 + log(3) / 0.1 = 5.99
        "kl_per_token": [pytest.approx(0.15)],
    }


def test_a_list_counts_all_pairs_with_different_labels() -> None:
    labels, logps = [3.0, 1.0, 1.0, 0.0], [-1.0, -4.0, -2.0, -3.0]
    pairs = [
        logps[i] >= logps[j]
        for i, j in itertools.permutations(range(4), 2)
        if labels[i] > labels[j]
    ]
    values = ev.row_values([row(labels, logps), row([1.0] * 4, logps)])
    assert values["ranking_accuracy"][0] == sum(pairs) / len(pairs) == 4 / 5
    assert math.isnan(values["ranking_accuracy"][1]), "a row of ties says nothing"


def test_soft_labels_are_the_raters_agreement() -> None:
    rows = [row([p, 1 - p], [-1.0, -2.0], ref_logps=[-3.0, -2.0]) for p in (0.6, 0.9, 0.2)]
    ideal = ev.row_values(rows, beta=1.0)["idealised_accuracy"]
    # log(.6/.4) = .41 < 1; log(.9/.1) = 2.2 > 1; turned round: log(.8/.2) + 1 > 0
    assert ideal.tolist() == [0.0, 1.0, 1.0]


def test_without_a_reference_nothing_is_said_about_it() -> None:
    values = ev.row_values([row([1, 0], [-1.0, -2.0])], beta=0.1)
    assert set(values) == {"ranking_accuracy", "ranking_accuracy_per_token"}


def test_separation_equals_the_share_of_ordered_pairs() -> None:
    rng = np.random.default_rng(0)
    scores = rng.integers(0, 6, 40).astype(float)  # with ties
    desirable = rng.random(40) < 0.4
    pairs = [
        1.0 if a > b else 0.5 if a == b else 0.0
        for a in scores[desirable]
        for b in scores[~desirable]
    ]
    assert ev.separation(scores, desirable) == pytest.approx(sum(pairs) / len(pairs))
    assert math.isnan(ev.separation(scores, np.ones(40, dtype=bool)))


def test_single_responses_drift_by_group() -> None:
    rows = [row([1], [-1.0], ref_logps=[-3.0]), row([0], [-5.0], ref_logps=[-4.0])]
    result = ev.summarise(ev.Tally(rows, {}))
    assert result.metrics == {"drift/desirable": 2.0, "drift/undesirable": -1.0, "separation": 1.0}


def test_the_interval_covers_the_mean_as_often_as_it_says() -> None:
    rng = np.random.default_rng(1)
    hits = 0
    for _ in range(200):
        low, high = bootstrap_interval(rng.random(50), num_resamples=200)
        hits += low <= 0.5 <= high
    assert 180 <= hits <= 199  # 95 % of 200, within four standard deviations


def test_the_interval_is_the_same_every_time_and_holds_the_mean() -> None:
    values = np.arange(20.0)
    assert bootstrap_interval(values) == bootstrap_interval(values)
    low, high = bootstrap_interval(values)
    assert low < 9.5 < high


def batch(num_rows: int) -> Batch:
    return Batch(
        ModelInputs(), torch.tensor([[1.0, 0.0]] * num_rows), None, tuple(map(str, range(num_rows)))
    )


def fixed_scores(batch: Batch, needs: Needs) -> CandidateLogps:
    """Chosen -1 a position and rejected -2, the reference -1.5; only what is needed."""
    policy = torch.tensor([[[-1.0, -1.0, 9.0], [-2.0, -2.0, -2.0]]]).repeat(len(batch.ids), 1, 1)
    mask = torch.tensor([[[True, True, False], [True, True, True]]]).repeat(len(batch.ids), 1, 1)
    return CandidateLogps(
        policy=policy,
        mask=mask,
        labels=batch.labels,
        reference=torch.full_like(policy, -1.5) if needs.reference else None,
        kl=torch.full_like(policy, 0.25) if needs.kl else None,
    )


def test_evaluate_reports_what_was_asked_for_and_no_more() -> None:
    simpo = presets.build("simpo")
    plain = ev.evaluate(fixed_scores, simpo, [batch(2)])
    assert plain.metrics["ranking_accuracy"] == 1.0
    assert not {"reward_accuracy", "kl_per_token", "drift/chosen"} & plain.metrics.keys()
    more = ev.evaluate(fixed_scores, simpo, [batch(2)], needs=Needs(reference=True, kl=True))
    assert more.metrics["drift/chosen"] == pytest.approx(1.0)  # 2 * (-1 + 1.5)
    assert more.metrics["kl_per_token"] == pytest.approx(0.25)


def test_evaluate_means_over_rows_of_unequal_batches() -> None:
    dpo = presets.build("dpo", beta=1.0)
    result = ev.evaluate(fixed_scores, dpo, [batch(3), batch(1)])
    expected = math.log1p(math.exp(-(1.0 + 1.5)))  # margin: 2 * .5 - 3 * (-.5)
    assert result.metrics["loss"] == pytest.approx(expected)
    assert [r["id"] for r in result.rows] == ["0", "1", "2", "0"]
    assert result.rows[0]["logps"] == pytest.approx([-2.0, -6.0])
    assert result.rows[0]["lengths"] == [2, 3]
    assert result.intervals["loss"] == pytest.approx((expected, expected))


def test_evaluation_leaves_running_statistics_alone() -> None:
    bco = presets.build("bco")
    before = {name: value.clone() for name, value in bco.state_dict().items()}
    assert before, "bco has a running shift"
    ev.evaluate(fixed_scores, bco, [batch(2)])
    assert all(torch.equal(before[name], value) for name, value in bco.state_dict().items())
    assert bco.training


def test_intervals_are_over_rows_and_not_over_their_draws() -> None:
    def record(name: str, good: float) -> dict[str, Any]:
        return {"id": name, "labels": [1.0, 0.0], "logps": [good, 0.5], "lengths": [1, 1]}

    alone = [record(f"r{i}", float(i % 2)) for i in range(20)]
    fourfold = [{**row, "row": row["id"]} for row in alone for _ in range(4)]
    few, many = (ev.summarise(ev.Tally(rows)) for rows in (alone, fourfold))
    assert few.metrics["ranking_accuracy"] == many.metrics["ranking_accuracy"] == 0.5
    assert few.intervals["ranking_accuracy"] == many.intervals["ranking_accuracy"]


def test_of_a_plain_row_only_the_response_itself_is_rated() -> None:
    """The other columns are the same response under augmented clips, whose labels are weights."""
    shape = (2, 4, 3)
    logps = CandidateLogps(
        policy=-torch.rand(shape),
        reference=-torch.rand(shape),
        mask=torch.ones(shape, dtype=torch.bool),
        labels=torch.tensor([[1.0, 0.0, 1.0, 0.0], [1.0, 0.5, 0.5, 0.0]]),
    )
    batch = Batch(ModelInputs(), logps.labels, torch.ones(2), ("a", "b"))
    result = ev.evaluate(lambda *_: logps, presets.pami_vdpo(), [batch])
    assert [len(row["labels"]) for row in result.rows] == [1, 1]
    assert [row["logps"] for row in result.rows] == [
        pytest.approx([value]) for value in logps.policy[:, 0].sum(-1).tolist()
    ]
    assert {"rewards/accuracies", "rewards/margins", "loss"} <= set(result.metrics)
    assert "ranking_accuracy" not in result.metrics
