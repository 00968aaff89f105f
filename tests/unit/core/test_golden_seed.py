"""Loss-level cases of golden/seed_losses.json; formulas known to be wrong must differ."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from goldens import columns, compare, gradient, load, pair_results, seq_pair, sequences, tensor

from mmalign.core import CandidateLogps, presets, weights
from mmalign.core.links import LambdaRank, PlackettLuce, nll

CASES: list[dict[str, Any]] = load("seed_losses")["cases"]

ELSEWHERE = {
    "egpo/tabular_exact": "an exact tabular loop, not a loss on samples: train/rounds",
    "gpm": "a preference model's score, not a policy loss: data/select.py",
    "spo_degree": "an auxiliary head's cross-entropy, no policy loss of its own: out of the core",
    "apo": "extrapolation of weights between rounds: models/merge.py",
    "ranking_accuracy": "an evaluation: evaluate.py",
    "rso/rejection_rounds_fixed_uniforms": "selection of responses: data/select.py",
    "otc": "a reward of tool use: data/select.py",
    "self_play_winrate": "a reward from win rates: data/select.py",
    "dpa_rps": "directions in reward space: data/select.py",
    "maxmin": "assignment of groups: data/select.py",
    "vision_r1": "rule rewards of boxes: data/select.py",
}

SEEN: list[int] = []


def key(case: dict[str, Any]) -> str:
    return f"{case['method']}/{case['variant']}"


def cases(*keys: str) -> pytest.MarkDecorator:
    found = [i for i, case in enumerate(CASES) if key(case) in keys]
    assert found, keys
    SEEN.extend(found)
    return pytest.mark.parametrize(
        "case", [CASES[i] for i in found], ids=[f"{key(CASES[i])}-{i}" for i in found]
    )


def check(case: dict[str, Any], got: dict[str, torch.Tensor], **skip: str) -> None:
    """Tolerance 1e-9, relative where a loss is thousands."""
    compare(case["outputs"], got, tol=1e-9, relative=True, skip=skip)


def pair_check(objective: Any, case: dict[str, Any], batch: CandidateLogps | None = None) -> None:
    """The file's gradients are of the sum of the rows, unless a key says `of_mean`."""
    batch = seq_pair(case["inputs"]) if batch is None else batch
    got = pair_results(objective, batch, of_sum=True)
    check(case, got | {"mean": got["loss"]})


@cases("rpo/sum_logp_beta_eta")
def test_rpo_released(case: dict[str, Any]) -> None:
    pair_check(presets.rpo(**case["hyper"]), case)


@cases("rpo/token_mean_nll")
def test_rpo_token_mean(case: dict[str, Any]) -> None:
    """Lengths matter here: each sequence sum is spread over its length in positions."""
    source, hyper = case["inputs"], case["hyper"]
    lengths = torch.tensor(source["chosen_lengths"], dtype=torch.long)
    width = int(lengths.max())
    mask = torch.ones(len(lengths), 2, width, dtype=torch.bool)
    mask[:, 0] = torch.arange(width) < lengths[:, None]
    whole = columns(source["policy_chosen_logps"], source["policy_rejected_logps"])
    share = mask / mask.sum(-1, keepdim=True).double()
    batch = CandidateLogps(
        policy=whole.requires_grad_() * share,
        reference=columns(source["ref_chosen_logps"], source["ref_rejected_logps"]) * share,
        mask=mask,
        labels=tensor([[1.0, 0.0]] * len(lengths)),
    )
    loss = presets.rpo(hyper["beta"], hyper["nll_coef"], nll_reduce="mean")(batch)
    grad = gradient(loss, whole)[0][..., 0]
    got = {
        "mean": loss.value,
        "grad_policy_chosen_of_mean": grad[:, 0],
        "grad_policy_rejected_of_mean": grad[:, 1],
    }
    check(case, got)


@cases("rdpo/debiased", "cdpo/label_smoothing")
def test_flipped_labels(case: dict[str, Any]) -> None:
    build = presets.rdpo if case["method"] == "rdpo" else presets.cdpo
    pair_check(build(case["hyper"]["beta"], case["hyper"]["epsilon"]), case)


@cases("asft/odds_absolute")
def test_asft(case: dict[str, Any]) -> None:
    source, hyper = case["inputs"], case["hyper"]
    batch = sequences(
        columns(source["policy_chosen_mean_logps"], source["policy_rejected_mean_logps"])
    )
    pair_check(presets.asft(hyper["beta"], hyper["lam"], hyper["ce_coef"]), case, batch)


@cases("hypo/dpo_plus_online_kl_rloo")
def test_hypo(case: dict[str, Any]) -> None:
    source, hyper = case["inputs"], case["hyper"]
    sides = ("chosen", "rejected")
    policy = torch.cat([columns(*(source[f"policy_{s}_logps"] for s in sides)),
                        tensor(source["online_policy_logps"]).unsqueeze(-1)], 1)  # fmt: skip
    reference = torch.cat([columns(*(source[f"ref_{s}_logps"] for s in sides)),
                           tensor(source["online_ref_logps"]).unsqueeze(-1)], 1)  # fmt: skip
    batch = sequences(policy, reference)
    objective = presets.hypo(hyper["beta"], hyper["lam"], hyper["k"])
    assert objective.needs.roles == ("online",) * 4
    loss = objective(batch)
    grad = gradient(loss, batch.policy)[0][..., 0]
    log_ratio = (policy - reference).detach()[:, 2:, 0]
    got = {
        "dpo_losses": objective.terms["preference"](batch),
        "kl_estimate_k1": objective.terms["online_kl"](batch),
        "rloo_baseline": (log_ratio.sum(1, keepdim=True) - log_ratio) / 3,
        "grad_policy_chosen": grad[:, 0],
        "grad_policy_rejected": grad[:, 1],
        "grad_online_policy": grad[:, 2:],
    }
    assert loss.metrics["kl"].item() == pytest.approx(log_ratio.mean().item(), abs=1e-12)
    check(case, got)


@cases("vpo/online_optimistic", "vpo/offline_pessimistic")
def test_vpo(case: dict[str, Any]) -> None:
    source, hyper = case["inputs"], case["hyper"]
    policy = ("policy_chosen", "policy_rejected", "cal_policy")
    reference = ("ref_chosen", "ref_rejected", "cal_ref")
    batch = sequences(
        columns(*(source[f"{n}_logps"] for n in policy)),
        columns(*(source[f"{n}_logps"] for n in reference)),
    )
    mode = "online" if hyper["sign"] == 1 else "offline"
    loss = presets.vpo(hyper["beta"], hyper["alpha"], mode)(batch)
    grad = gradient(loss, batch.policy, of_sum=True)[0][..., 0]
    assert loss.rows is not None
    got = {
        "losses": loss.rows,
        "mean": loss.value,
        "grad_policy_chosen": grad[:, 0],
        "grad_policy_rejected": grad[:, 1],
        "grad_cal_policy": grad[:, 2],
    }
    check(case, got)


@cases("egpo/online_ipo_pair")
def test_online_ipo(case: dict[str, Any]) -> None:
    labels = columns(case["inputs"]["pref_first"], case["inputs"]["pref_second"]).squeeze(-1)
    batch = seq_pair(case["inputs"], labels=labels)
    pair_check(presets.online_ipo(case["hyper"]["beta"]), case, batch)


@cases("inpo/two_reference_ipo")
def test_inpo_nash(case: dict[str, Any]) -> None:
    source, share = case["inputs"], case["hyper"]["tau"] / case["hyper"]["eta"]
    mixture = {
        f"ref_{side}_logps": (
            share * tensor(source[f"ref_{side}_logps"])
            + (1.0 - share) * tensor(source[f"prev_{side}_logps"])
        ).tolist()
        for side in ("chosen", "rejected")
    }
    pair_check(presets.inpo_nash(case["hyper"]["eta"]), case, seq_pair(source | mixture))


@cases("sppo/sppo", "sppo/sppo_single")
def test_sppo(case: dict[str, Any]) -> None:
    source = case["inputs"]
    win = tensor(source["chosen_probs"])
    labels = torch.stack([win, 1.0 - win], 1)
    if case["variant"] == "sppo":
        labels = columns(source["chosen_probs_win"], source["chosen_probs_lose"]).squeeze(-1)
    pair_check(presets.sppo(case["hyper"]["beta"]), case, seq_pair(source, labels=labels))


@cases("gpo/score_regression")
def test_gpo(case: dict[str, Any]) -> None:
    labels = columns(case["inputs"]["score_chosen"], case["inputs"]["score_rejected"]).squeeze(-1)
    batch = seq_pair(case["inputs"], labels=labels)
    pair_check(presets.gpo(case["hyper"]["beta"]), case, batch)


@cases("tpo/listwise_lambda")
def test_lambda_rank(case: dict[str, Any]) -> None:
    rewards = tensor(case["inputs"]["rewards"]).requires_grad_()
    losses = LambdaRank()(rewards, tensor(case["inputs"]["labels"]))
    _check_list(case, losses, rewards)


@cases("tpo/plackett_luce")
def test_plackett_luce(case: dict[str, Any]) -> None:
    rewards = tensor(case["inputs"]["rewards_best_to_worst"]).requires_grad_()
    labels = torch.arange(5, 0, -1, dtype=torch.float64).expand(3, 5)
    _check_list(case, PlackettLuce()(rewards, labels), rewards)


def _check_list(case: dict[str, Any], losses: torch.Tensor, rewards: torch.Tensor) -> None:
    (grad,) = torch.autograd.grad(losses.sum(), rewards)
    check(case, {"losses": losses, "mean": losses.mean(), "grad_rewards": grad})


@cases("tpo/official_code_as_is")
def test_released_tree_loss_is_not_reproduced(case: dict[str, Any]) -> None:
    """Its outer -log sigmoid makes descent push the best response down; ours pushes it up."""
    source, expected = case["inputs"], case["outputs"]
    labels = tensor(source["labels"])
    best = labels.argmax(1)
    policy = tensor(source["policy_token_logps"])
    batch = sequences(policy, tensor(source["ref_token_logps"]), labels=labels)
    loss = presets.tpo_tree(case["hyper"]["beta"], weighted=False)(batch)
    rows = torch.arange(len(best))
    ours = gradient(loss, batch.policy)[0].sum(-1)[rows, best]
    theirs = tensor(expected["grad_policy_token_logps"]).sum(-1)[rows, best]
    assert (ours <= 0).all()
    assert ours.min() < 0
    assert theirs.max() > 0
    assert abs(loss.value.item() - expected["loss"]) > 1e-3


@cases("sem_dpo/exp_cosine_weight")
def test_sem_dpo(case: dict[str, Any]) -> None:
    source = case["inputs"]
    weight = weights.semantic_weights(
        1.0 - tensor(source["cosine_distance"]), case["hyper"]["alpha"]
    )
    torch.testing.assert_close(weight, tensor(source["weight"]), rtol=0.0, atol=1e-12)
    batch = seq_pair(source, row_weight=weight)
    got = pair_results(presets.sem_dpo(case["hyper"]["beta"]), batch, of_sum=True)
    check(case, got | {"mean": got["loss"], "losses": got["losses"] * weight})
    scaled = weights.semantic_weights(tensor(source["cosine_distance"]), 2.0, normalize=True)
    assert scaled.mean().item() == pytest.approx(1.0)


@cases("dpo_gamma/scaled_reference_ratio")
def test_dpo_gamma(case: dict[str, Any]) -> None:
    pair_check(presets.dpo_gamma(**case["hyper"]), case)


@cases("rationale_dpo/log_sigmoid_rationale")
def test_rationale(case: dict[str, Any]) -> None:
    source = case["inputs"]
    zero = [0.0] * len(source["policy_rationale_logps"])
    batch = sequences(
        columns(
            source["policy_chosen_logps"],
            source["policy_rejected_logps"],
            source["policy_rationale_logps"],
        ),
        columns(source["ref_chosen_logps"], source["ref_rejected_logps"], zero),
    )
    objective = presets.rationale(**case["hyper"])
    assert objective.needs.roles == ("rationale",)
    loss = objective(batch)
    assert loss.rows is not None
    grad = gradient(loss, batch.policy, of_sum=True)[0][..., 0]
    got = {
        "losses": loss.rows,
        "mean": loss.value,
        "grad_policy_chosen": grad[:, 0],
        "grad_policy_rejected": grad[:, 1],
    }
    check(case, got)
    # d/dr of -log sigmoid(gamma r) is -gamma sigmoid(-gamma r)
    gamma = case["hyper"]["gamma"]
    slope = -gamma * torch.sigmoid(-gamma * tensor(source["policy_rationale_logps"]))
    torch.testing.assert_close(grad[:, 2], slope, rtol=0.0, atol=1e-12)


@cases("mcts_dpo/visit_count_label_smoothing")
def test_mcts_dpo(case: dict[str, Any]) -> None:
    source = case["inputs"]
    labels = weights.visit_labels(tensor(source["visits_better"]), tensor(source["visits_worse"]))
    torch.testing.assert_close(labels[:, 1], tensor(source["smoothing"]), rtol=0.0, atol=1e-12)
    pair_check(presets.mcts_dpo(case["hyper"]["beta"]), case, seq_pair(source, labels=labels))


@cases("upo/bald_weighted_smoothing")
def test_upo_printed_formula_is_not_reproduced(case: dict[str, Any]) -> None:
    source, hyper = case["inputs"], case["hyper"]
    uncertainty = weights.bald(tensor(source["mc_probs"]))
    torch.testing.assert_close(uncertainty, tensor(source["bald"]), rtol=0.0, atol=1e-12)
    chance = weights.uncertainty_sampling(uncertainty, hyper["mu"])
    torch.testing.assert_close(chance, tensor(source["sampling_prob"]), rtol=0.0, atol=1e-12)
    printed = tensor(source["alpha"])
    assert (printed >= 0.5).all()  # the flipped label would win
    literal = seq_pair(source, labels=torch.stack([1.0 - printed, printed], 1))
    pair_check(presets.upo(hyper["beta"]), case, literal)  # the loss itself agrees
    safe = weights.uncertainty_labels(uncertainty)
    assert ((safe[:, 1] >= 0.0) & (safe[:, 1] <= 0.5)).all()
    torch.testing.assert_close(safe[:, 1], 0.5 * uncertainty / math.log(2.0))
    ours = pair_results(presets.upo(hyper["beta"]), seq_pair(source, labels=safe))
    assert abs(ours["loss"].item() - case["outputs"]["mean"]) > 1e-3
    # From equal policies, descent raises every chosen response with ours, none with the printed.
    for labels, sign in ((safe, -1.0), (torch.stack([1.0 - printed, printed], 1), 1.0)):
        equal = sequences(torch.zeros(6, 2, 1).double(), torch.zeros(6, 2, 1).double(), labels)
        grad = pair_results(presets.upo(hyper["beta"]), equal)["grad_policy_chosen"]
        assert (sign * grad >= 0.0).all()
        assert grad.abs().max() > 0.0


def test_upo_likelihood_term_raises_the_chosen_response() -> None:
    batch = seq_pair(CASES[0]["inputs"], labels=tensor([[0.5, 0.5]] * 6))
    loss = presets.upo(0.1, nll_weight=0.3)(batch)
    assert loss.metrics["loss/nll"].item() == pytest.approx(-0.3 * batch.policy[:, 0].mean().item())


@cases("rso/hinge_norm")
def test_rso_hinge(case: dict[str, Any]) -> None:
    pair_check(presets.rso(case["hyper"]["gamma"]), case)


@cases("flex_dpo/separate_betas")
def test_flex_dpo(case: dict[str, Any]) -> None:
    hyper = case["hyper"]
    pair_check(presets.flex_dpo(hyper["beta_plus"], hyper["beta_minus"]), case)


def test_ranked_correctly_iff_loss_is_under_the_difficulty_threshold() -> None:
    """Preference rankings, theorem 4.1, on our dpo."""
    found = [case for case in CASES if case["method"] == "ranking_accuracy"]
    assert len(found) == 2
    for case in found:
        beta = case["hyper"]["beta"]
        source = case["inputs"]
        loss = presets.dpo(beta)(seq_pair(source))
        assert loss.rows is not None
        torch.testing.assert_close(
            loss.rows, tensor(case["outputs"]["dpo_losses"]), rtol=0, atol=1e-9
        )
        difficulty = tensor(source["ref_rejected_logps"]) - tensor(source["ref_chosen_logps"])
        right = tensor(source["policy_chosen_logps"]) >= tensor(source["policy_rejected_logps"])
        assert torch.equal(loss.rows <= nll(beta * difficulty), right)


def test_every_case_is_tested_or_explained() -> None:
    for i, case in enumerate(CASES):
        explained = key(case) in ELSEWHERE or case["method"] in ELSEWHERE
        assert (i in SEEN) != explained, key(case)
