"""Rewards and pairs from them, against the golden values of independent implementations."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from mmalign.data import select
from mmalign.errors import DataError

GOLDEN = Path(__file__).parents[2] / "golden" / "seed_losses.json"
FOUR = [0.5, 2.0, -1.0, 2.0]


def golden(method: str, variant: str) -> tuple[dict[str, Any], dict[str, Any], dict[str, Any]]:
    """Hyperparameters, inputs and outputs of one case."""
    cases = json.loads(GOLDEN.read_text())["cases"]
    (case,) = [c for c in cases if (c["method"], c["variant"]) == (method, variant)]
    return case["hyper"], case["inputs"], case["outputs"]


# Pairs


def test_best_worst() -> None:
    assert select.best_worst(FOUR) == (1, 2)
    with pytest.raises(DataError, match="2 responses all have the reward 1; none is better"):
        select.best_worst([1, 1])


def test_all_pairs_differ_by_more_than_the_margin() -> None:
    assert select.all_pairs(FOUR) == [(0, 2), (1, 0), (1, 2), (3, 0), (3, 2)]
    assert select.all_pairs(FOUR, margin=1.5) == [(1, 2), (3, 2)]
    assert select.wider_than(select.all_pairs(FOUR), FOUR, 1.5) == [(1, 2), (3, 2)]


def test_first_round_is_disjoint() -> None:
    assert select.first_round(FOUR) == [(1, 0), (3, 2)]
    assert select.first_round(FOUR, [1, 3, 2, 0]) == [(0, 2)]  # 1 and 3 draw


def test_tournament() -> None:
    # 0 loses to 1, 2 to 3, 4 sits out; 1 beats 3; 4 beats 1.
    assert select.tournament([0.0, 4.0, 1.0, 3.0, 5.0]) == [(1, 0), (3, 2), (1, 3), (4, 1)]
    assert select.tournament([0.0, 1.0, 2.0], order=[2, 0, 1]) == [(2, 0), (2, 1)]
    assert select.tournament(FOUR) == [(1, 0), (3, 2)]  # the final is a draw
    assert select.tournament([1.0]) == []


@pytest.mark.parametrize("k", [2, 3, 7, 16])
def test_a_tournament_without_draws_has_one_pair_less_than_responses(k: int) -> None:
    scores = np.random.default_rng(k).permutation(k).tolist()
    pairs = select.tournament(scores)
    assert len(pairs) == k - 1
    assert sorted(j for _, j in pairs) == [i for i in range(k) if scores[i] != k - 1]


# Rejection sampling


def test_rejection_rounds_golden() -> None:
    hyper, inputs, outputs = golden("rso", "rejection_rounds_fixed_uniforms")
    rounds = select.rejection_rounds(inputs["rewards"], inputs["uniforms"], beta=hyper["beta"])
    assert rounds == outputs["accepted_per_round"]
    assert [i for accepted in rounds for i in accepted] == outputs["accepted_order"]


def test_rejection_limits_of_beta() -> None:
    uniforms = np.full((4, 4), 0.9)
    assert select.rejection_rounds([1, 3, 2, 0], uniforms, beta=1e-9) == [[1], [2], [0], [3]]
    assert select.rejection_rounds([1, 3, 2, 0], uniforms, beta=1e9) == [[0, 1, 2, 3]]


def test_rejection_keeps_equal_rewards_apart_by_index() -> None:
    assert select.rejection_rounds([2, 2, 0], np.full((3, 3), 0.9), beta=0.5) == [[0, 1], [2]]


def test_rejection_sample_ends_and_is_deterministic() -> None:
    first, second = (
        select.rejection_sample(FOUR, 4, np.random.default_rng(3), beta=0.1) for _ in range(2)
    )
    assert first == second
    assert sorted(first) == [0, 1, 2, 3]
    assert len(select.rejection_sample(FOUR, 2, np.random.default_rng(0))) == 2
    with pytest.raises(DataError, match="cannot keep 5 of 4 responses"):
        select.rejection_sample(FOUR, 5, np.random.default_rng(0))
    with pytest.raises(DataError, match="beta is 0; it must be above 0"):
        select.rejection_sample(FOUR, 2, np.random.default_rng(0), beta=0)
    with pytest.raises(DataError, match="finite"):
        select.rejection_sample([1.0, float("nan")], 1, np.random.default_rng(0))


# Rewards


def test_win_rate_golden() -> None:
    _, inputs, outputs = golden("self_play_winrate", "spo_minimaximalist")
    rate = select.win_rate(inputs["pref_matrix"])
    np.testing.assert_allclose(rate, outputs["reward"], rtol=1e-12)
    np.testing.assert_allclose(
        select.leave_one_out(rate), outputs["rloo_advantage"], rtol=1e-12, atol=1e-15
    )


def test_win_rate_leaves_out_the_diagonal_and_allows_cycles() -> None:
    cycle = np.array([[9.0, 1, 0], [0, 9, 1], [1, 0, 9]])
    assert select.win_rate(cycle).tolist() == [0.5, 0.5, 0.5]
    with pytest.raises(DataError, match=r"has shape \[1, 2\]"):
        select.win_rate([[0.5, 0.5]])


def test_direction_golden() -> None:
    hyper, inputs, outputs = golden("dpa_rps", "direction_projection")
    towards = select.direction(hyper["degree"])
    np.testing.assert_allclose(towards, outputs["direction"], rtol=1e-12)
    assert np.round(100 * towards).astype(int).tolist() == outputs["prompt_ints"]
    scores = select.project(inputs["reward_vectors"], towards)
    np.testing.assert_allclose(scores, outputs["scores"], rtol=1e-12)
    assert scores.argmax() == outputs["best"]
    near = select.direction(hyper["degree"] + np.array(inputs["neighbour_offsets_deg"]))
    np.testing.assert_allclose(near, outputs["neighbours"], atol=1e-12)


def test_tool_reward_golden() -> None:
    hyper, inputs, outputs = golden("otc", "tool_reward")
    grouped = select.tool_reward(inputs["m"], inputs["n"], budget=hyper["c"])
    np.testing.assert_allclose(grouped, outputs["grpo"], atol=1e-12)
    alone = select.tool_reward(inputs["m"], budget=hyper["c"])
    np.testing.assert_allclose(alone, outputs["ppo"], rtol=1e-12)


def test_assign_users_golden() -> None:
    _, inputs, outputs = golden("maxmin", "em_assignment_and_worst_group")
    groups, loglik = select.assign_users(inputs["reward_margins_user_group_pair"])
    np.testing.assert_allclose(loglik, outputs["user_loglik"], rtol=1e-12)
    assert groups.tolist() == outputs["assignment"]
    samples = inputs["group_rewards_of_policy_samples"]
    assert select.worst_group(samples) == outputs["worst_group"]


def test_assigning_users_survives_huge_margins() -> None:
    _, loglik = select.assign_users([[[-1e5], [1e5]]])
    assert loglik.tolist() == [[-1e5, 0.0]]


def test_box_rewards_golden() -> None:
    _, inputs, outputs = golden("vision_r1", "threshold_rules")
    iou = inputs["matched_iou"]
    for stage, (low, high) in {1: (0.5, 0.75), 2: (0.75, 0.9)}.items():
        precision = select.precision_reward(iou, low, high)
        # The published helpers run in float32.
        np.testing.assert_allclose(precision, outputs[f"precision_stage{stage}"], rtol=1e-6)
        hits = select.recall_hits(iou, low)
        np.testing.assert_array_equal(hits, outputs[f"recall_hits_stage{stage}"])
    np.testing.assert_allclose(select.precision_reward(iou), outputs["recall_list"], rtol=1e-6)
