"""All loss-level cases of golden/text.json: values, rows, rewards and gradients."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from goldens import (
    Tokens,
    columns,
    compare,
    fold,
    gradient,
    load,
    pair_results,
    seq_pair,
    sequences,
    tensor,
    unfold,
)
from torch import Tensor

from mmalign.core import (
    Alpha,
    ChiSquaredKL,
    ForwardKL,
    Hellinger,
    Jeffreys,
    JensenShannon,
    Objective,
    ReverseKL,
    Transform,
    presets,
)
from mmalign.core.links import DiscoPop
from mmalign.core.numerics import over_positions

GOLDEN = load("text")
INPUTS: dict[str, Any] = GOLDEN["inputs"]
CASES: dict[str, dict[str, Any]] = {case["id"]: case for case in GOLDEN["cases"]}

ELSEWHERE = {
    "mapo/mask/official_fp16stats": "a mask, not a loss: text/masks.py",
    "mapo/mask/float64stats": "a mask, not a loss: text/masks.py",
    "sparsepo/mask_head": "a mask, not a loss: text/masks.py",
}

LOGGED_OTHERWISE = {
    "orpo": "released code logs lam * mean log-probability; our reward is the score, log-odds",
    "ld": "TRL logs LD-weighted sums as logps; ours are the log-probabilities themselves",
}


def cases(*prefixes: str) -> pytest.MarkDecorator:
    found = [i for i in CASES if i.startswith(prefixes)]
    assert found, prefixes
    SEEN.update(found)
    return pytest.mark.parametrize("case", [CASES[i] for i in found], ids=found)


SEEN: set[str] = set()


def check(case: dict[str, Any], got: dict[str, Tensor], skip: dict[str, str] | None = None) -> None:
    relative = case["tol_mode"] == "abs_or_rel"
    compare(case["expected"], got, tol=case["tol"], relative=relative, skip=skip)


@cases("fdpo/")
def test_f_dpo_official(case: dict[str, Any]) -> None:
    hyper = case["hyper"]
    objective = presets.f_dpo(hyper["divergence"], hyper["beta"], alpha=hyper.get("alpha"))
    got = pair_results(objective, seq_pair(INPUTS["seq"]))
    # The official scores drop the constant of f'(1) = 0; it shows in the rewards only.
    constant = {"forward_kl": 1.0, "alpha_divergence": 1.0 / hyper.get("alpha", 1.0)}
    for side in ("chosen_rewards", "rejected_rewards"):
        got[side] = got[side] - hyper["beta"] * constant.get(hyper["divergence"], 0.0)
    check(case, got)


@cases("dpo_orig/")
def test_dpo_original_code(case: dict[str, Any]) -> None:
    hyper = case["hyper"]
    if hyper["ipo"]:
        objective = presets.ipo(hyper["beta"], compat="official")
    else:
        objective = presets.cdpo(hyper["beta"], flip=hyper["label_smoothing"])
    check(case, pair_results(objective, seq_pair(INPUTS["seq"])))


@cases("sppo/sppo")
def test_sppo_official(case: dict[str, Any]) -> None:
    probs = INPUTS["sppo_probs"]
    if case["id"] == "sppo/sppo":
        labels = columns(probs["chosen_probs_win"], probs["chosen_probs_lose"]).squeeze(-1)
    else:
        win = tensor(probs["chosen_probs"])
        labels = torch.stack([win, 1.0 - win], dim=1)
    batch = seq_pair(INPUTS["seq"], labels=labels)
    got = pair_results(presets.sppo(case["hyper"]["beta"]), batch)
    # Targets are hundreds of nats and the loss 4e4: 1e-9 there is under float64's last digits.
    compare(case["expected"], got, tol=1e-13 * case["expected"]["loss"])


@cases("sppo/kto_pair")
def test_kto_pair_official(case: dict[str, Any]) -> None:
    got = pair_results(presets.kto_pair(0.1, compat="official"), seq_pair(INPUTS["seq"]))
    both = tensor(case["expected"]["losses"]).chunk(2)  # chosen block, rejected block
    torch.testing.assert_close(got["losses"], (both[0] + both[1]) / 2, rtol=0.0, atol=1e-9)
    check(case, got, skip={"losses": "one row here is the mean of the two blocks, compared above"})


def trl_objective(hyper: dict[str, Any]) -> Objective:
    beta = hyper["beta"]
    smooth = hyper.get("label_smoothing", 0.0)
    divergence: dict[str, Any] = {}
    if "f_divergence_type" in hyper:
        divergence = {"divergence": hyper["f_divergence_type"]}
        if "f_alpha_divergence_coef" in hyper:
            divergence["alpha"] = hyper["f_alpha_divergence_coef"]
    keywords: dict[str, dict[str, Any]] = {
        "sigmoid": {"beta": beta},
        "hinge": {"beta": beta, **divergence},
        "nca_pair": {"beta": beta},
        "bco_pair": {"beta": beta, "compat": "trl-1.16"},
        "sppo_hard": {"beta": beta, "compat": "trl-1.16"},
        "apo_zero": {"beta": beta},
        "apo_down": {"beta": beta},
        "discopop": {"beta": beta, "tau": hyper.get("discopop_tau"), **divergence},
        "robust": {"beta": beta, "flip": smooth, **divergence},
        "exo_pair": {"beta": beta, "flip": smooth, **divergence},
        "aot": {"beta": beta, "flip": smooth},
        "aot_unpaired": {"beta": beta, "flip": smooth},
        "ipo": {"tau": beta, "compat": "trl-1.16", **divergence},
        "sigmoid_norm": {"beta": beta, "compat": "trl-1.16", **divergence},
        "sft": {},
    }
    modifiers: dict[str, Any] = {}
    if "ld_alpha" in hyper:
        modifiers["ld_alpha"] = hyper["ld_alpha"]
    if hyper.get("use_weighting"):
        modifiers["wpo"] = {"clamp_max": None}
    names = list(hyper["loss_type"])
    if len(names) == 1 and divergence and names[0] == "sigmoid":
        return presets.build("f_dpo", beta=beta, compat="trl-1.16", **divergence)
    if len(names) == 1:
        return presets.build(names[0], **keywords[names[0]], **modifiers)
    parts = {
        name: {"weight": weight, **keywords[name]}
        for name, weight in zip(names, hyper["loss_weights"], strict=True)
    }
    return presets.build_mix(parts, **modifiers)


@cases("trl/")
def test_trl_sequence_losses(case: dict[str, Any]) -> None:
    dtype = getattr(torch, case["hyper"].get("dtype", "float64"))
    check(case, pair_results(trl_objective(case["hyper"]), seq_pair(INPUTS["seq"], dtype)))


@cases("trl_tok/")
def test_trl_token_losses(case: dict[str, Any]) -> None:
    tokens = Tokens(INPUTS["tok"])
    objective = trl_objective(case["hyper"])
    batch = tokens.batch()
    loss = objective(batch)
    per_token, logits = gradient(loss, batch.policy, tokens.logits)
    metrics = loss.metrics
    if case["id"] == "trl_tok/sft":  # no preference term: the rewards are those of plain dpo
        metrics = metrics | presets.dpo(0.5)(batch).metrics
    got = {
        "loss": loss.value,
        "losses": loss.rows,
        "grad_policy_per_token_logps": unfold(per_token),
        "grad_policy_logits": logits,
        "rewards_chosen_mean": metrics.get("log_ratio/chosen", metrics["rewards/chosen"]),
        "rewards_rejected_mean": metrics.get("log_ratio/rejected", metrics["rewards/rejected"]),
        "logps_chosen_mean": metrics["logps/chosen"],
        "logps_rejected_mean": metrics["logps/rejected"],
    }
    ld = case["hyper"].get("ld_alpha", 1.0) != 1.0
    why = LOGGED_OTHERWISE["ld"]
    check(case, got, {"logps_chosen_mean": why, "logps_rejected_mean": why} if ld else None)


@pytest.mark.parametrize("case", [CASES["trl_tok/rpo"]], ids=["trl_tok/rpo"])
def test_rpo_preset_is_trls_combination(case: dict[str, Any]) -> None:
    loss = presets.rpo(0.5, eta=1.0, nll_reduce="batch_token")(Tokens(INPUTS["tok"]).batch())
    assert loss.value.item() == pytest.approx(case["expected"]["loss"], abs=1e-9)


@pytest.mark.parametrize("case", [CASES["trl_tok/mpo"]], ids=["trl_tok/mpo"])
def test_mpo_preset_is_trls_combination(case: dict[str, Any]) -> None:
    weights = dict(zip(("preference", "quality", "generation"), case["hyper"]["loss_weights"],
                       strict=True))  # fmt: skip
    loss = presets.mpo(0.5, **weights, compat="trl-1.16")(Tokens(INPUTS["tok"]).batch())
    assert loss.value.item() == pytest.approx(case["expected"]["loss"], abs=1e-9)


@cases("logps/")
def test_log_probabilities(case: dict[str, Any]) -> None:
    tokens = Tokens(INPUTS["tok"])
    mask = tokens.mask
    if case["id"] == "logps/per_token":
        got = {
            "policy_per_token_logps": torch.where(mask, tokens.policy, 0.0),
            "mask": mask.double(),
            "log_sum_sq_probs": torch.where(mask, tokens.log_sum_p2, 0.0),
        }
        check(case, got)
        return
    reduce = "mean" if case["hyper"]["average_log_prob"] else "sum"
    both = {"policy_logps": tokens.policy, "ref_logps": tokens.reference}
    check(case, {k: over_positions(v, mask, reduce=reduce) for k, v in both.items()})


@cases("tdpo/")
def test_tdpo_official(case: dict[str, Any]) -> None:
    hyper = case["hyper"]
    tokens = Tokens(INPUTS["tok"])
    if hyper["method"] == "tdpo1":
        objective = presets.tdpo1(hyper["beta"])
    else:
        objective = presets.tdpo2(hyper["beta"], hyper["alpha"])
    loss = objective(tokens.batch())
    assert loss.rewards is not None
    summed = {
        "logps_margin": tokens.policy - tokens.reference,
        "position_kl": tokens.kl,
        "policy_logps": tokens.policy,
    }
    got = {
        "loss": loss.value,
        "losses": loss.rows,
        "chosen_rewards": loss.rewards[:, 0],
        "rejected_rewards": loss.rewards[:, 1],
        "grad_policy_logits": gradient(loss, tokens.logits)[0],
        **{name: over_positions(value, tokens.mask) for name, value in summed.items()},
    }
    check(case, got)


@cases("wpo_official")
def test_wpo_official(case: dict[str, Any]) -> None:
    tokens = Tokens(INPUTS["tok"])
    objective = presets.wpo(case["hyper"]["beta"])
    loss, plain = objective(tokens.batch()), presets.dpo(case["hyper"]["beta"])(tokens.batch())
    assert loss.rewards is not None
    got = {
        "loss": loss.value,
        "losses": loss.rows,
        "weights": loss.rows / plain.rows,
        "chosen_rewards": loss.rewards[:, 0],
        "rejected_rewards": loss.rewards[:, 1],
        "grad_policy_logits": gradient(loss, tokens.logits)[0],
    }
    check(case, got)


@cases("exo_official")
def test_exo_official(case: dict[str, Any]) -> None:
    objective = presets.exo(case["hyper"]["beta"], compat="official")
    check(case, {"loss": objective(Tokens(INPUTS["tok"]).batch()).value})


def sparse_weights(hyper: dict[str, Any]) -> dict[str, Tensor]:
    reward = tensor(INPUTS["masks"]["rw_mask"])
    kl = tensor(INPUTS["masks"]["kl_mask"])
    reward = fold(reward if hyper["mask_on_reward"] else torch.ones_like(reward)).requires_grad_()
    kl = fold(kl if hyper["mask_on_kl"] else torch.ones_like(kl)).requires_grad_()
    return {"weight": reward, "kl_weight": reward if hyper["common"] else kl}


@cases("sparsepo/independent", "sparsepo/common", "sparsepo/reward", "sparsepo/kl", "sparsepo/none")
def test_sparse_po_official(case: dict[str, Any]) -> None:
    hyper = case["hyper"]
    tokens, weights = Tokens(INPUTS["tok"]), sparse_weights(case["hyper"])
    # The nominal coefficients: the half of a common mask is ours to apply.
    objective = presets.sparse_po(hyper["beta"], hyper["l1_u"], hyper["l1_d"], compat="official")
    loss = objective(tokens.batch(**weights))
    assert loss.rewards is not None
    logits, reward, kl = gradient(loss, tokens.logits, weights["weight"], weights["kl_weight"])
    got = {
        "loss": loss.value,
        "losses": loss.rows,
        "chosen_rewards": loss.rewards[:, 0],
        "rejected_rewards": loss.rewards[:, 1],
        "grad_policy_logits": logits,
        "grad_rw_mask": unfold(reward),
        "grad_kl_mask": unfold(kl),
    }
    check(case, got)


@cases("mapo/loss")
def test_mapo_loss(case: dict[str, Any]) -> None:
    tokens = Tokens(INPUTS["tok"])
    mask = fold(tensor(CASES[case["hyper"]["mask"]]["expected"]["mask"]))
    objective = presets.sparse_po(case["hyper"]["beta"], compat="official")
    loss = objective(tokens.batch(weight=mask, kl_weight=mask))
    assert loss.rewards is not None
    got = {
        "loss": loss.value,
        "losses": loss.rows,
        "chosen_rewards": loss.rewards[:, 0],
        "rejected_rewards": loss.rewards[:, 1],
        "grad_policy_logits": gradient(loss, tokens.logits)[0],
    }
    check(case, got)


def averages(dtype: torch.dtype = torch.float64) -> Any:
    source = INPUTS["avg"]
    names = ("policy_chosen_avg_logps", "policy_rejected_avg_logps")
    return sequences(columns(*(source[n] for n in names), dtype=dtype))


@cases("simpo_official/")
def test_simpo_official(case: dict[str, Any]) -> None:
    hyper = case["hyper"]
    gamma = hyper["gamma_beta_ratio"] * hyper["beta"]
    objective = presets.simpo(
        hyper["beta"], gamma, link=hyper["loss"], label_smoothing=hyper["label_smoothing"]
    )
    check(case, pair_results(objective, averages()))


@cases("trl_cpo/")
def test_trl_cpo(case: dict[str, Any]) -> None:
    hyper = case["hyper"]
    if hyper["loss"] == "simpo" and hyper["alpha"]:
        objective = presets.alphapo(hyper["beta"], hyper["simpo_gamma"], alpha=hyper["alpha"])
    elif hyper["loss"] == "simpo":
        objective = presets.simpo(hyper["beta"], hyper["simpo_gamma"])
    else:
        objective = presets.cpo(
            hyper["beta"], 0.0, link=hyper["loss"], label_smoothing=hyper["label_smoothing"]
        )
    check(case, pair_results(objective, averages()))


@cases("trl_orpo/")
def test_trl_orpo_odds(case: dict[str, Any]) -> None:
    dtype = getattr(torch, case["hyper"].get("dtype", "float64"))
    batch = averages(dtype)
    loss = presets.orpo(case["hyper"]["beta"])(batch)
    odds = presets.orpo(case["hyper"]["beta"]).terms["preference"]
    rows = odds.coef * odds(batch)
    grad = torch.autograd.grad(-rows.mean(), batch.policy)[0][..., 0]
    why = LOGGED_OTHERWISE["orpo"]
    got = {
        "losses": -rows,
        "loss": -loss.metrics["loss/preference"],
        "grad_policy_chosen": grad[:, 0],
        "grad_policy_rejected": grad[:, 1],
    }
    check(case, got, {"chosen_rewards": why, "rejected_rewards": why})


@cases("orpo/full")
def test_trl_orpo_whole_loss(case: dict[str, Any]) -> None:
    tokens = Tokens(INPUTS["tok"])
    objective = presets.orpo(case["hyper"]["beta"], compat="trl-1.16")
    assert objective.needs.prompt
    batch = tokens.batch()
    loss = objective(batch)
    got = {
        "loss": loss.value,
        "nll": loss.metrics["loss/nll"],
        "odds_ratio_losses": -0.1 * objective.terms["preference"](batch),
        "avg_logps": over_positions(tokens.policy, tokens.mask, reduce="mean"),
        "grad_policy_logits": gradient(loss, tokens.logits)[0],
    }
    check(case, got)


@cases("cpo/full")
def test_trl_cpo_whole_loss(case: dict[str, Any]) -> None:
    hyper = case["hyper"]
    objective = presets.cpo(hyper["beta"], hyper["cpo_alpha"], compat="trl-1.16")
    batch = Tokens(INPUTS["tok"]).batch()
    loss = objective(batch)
    got = {
        "loss": loss.value,
        "nll": loss.metrics["loss/nll"],
        "losses": objective.terms["preference"](batch),
    }
    check(case, got)


def unpaired(shift: tuple[float, float] = (0.0, 0.0)) -> Any:
    """Nine rows; candidate 1 is the mismatched response."""
    source = INPUTS["unpaired"]
    sides = ("chosen", "rejected")
    policy = torch.cat(
        [tensor(source[f"policy_{s}_logps"]) + d for s, d in zip(sides, shift, strict=True)]
    )
    reference = torch.cat([tensor(source[f"ref_{side}_logps"]) for side in sides])
    labels = torch.zeros(9, 2, dtype=torch.float64)
    labels[:4, 0] = 1.0
    return sequences(
        torch.stack([policy, tensor(source["policy_KL_logps"])], 1).unsqueeze(-1),
        torch.stack([reference, tensor(source["ref_KL_logps"])], 1).unsqueeze(-1),
        labels=labels,
    )


@cases("trl_kto/", "halos_kto/")
def test_kto(case: dict[str, Any]) -> None:
    hyper = case["hyper"]
    objective = presets.build(
        hyper["loss"],
        beta=hyper["beta"],
        desirable_weight=hyper["desirable_weight"],
        undesirable_weight=hyper["undesirable_weight"],
    )
    batch = unpaired()
    loss = objective(batch)
    assert loss.rows is not None
    assert loss.rewards is not None
    grad = gradient(loss, batch.policy)[0][:, 0, 0]
    assert gradient(loss, batch.policy)[0][:, 1].abs().max() == 0.0  # z0 carries no gradient
    rewards = loss.rewards[:, 0] / hyper["beta"]  # HALOs logs log-ratios
    got = {
        "loss": loss.value,
        "losses": loss.rows,
        "kl": loss.metrics["kl"],
        "chosen_rewards": rewards[:4],
        "rejected_rewards": rewards[4:],
        "grad_policy_chosen_logps": grad[:4],
        "grad_policy_rejected_logps": grad[4:],
    }
    check(case, got)


@cases("halos/")
def test_halos_pairs(case: dict[str, Any]) -> None:
    hyper = case["hyper"]
    if hyper["loss"] == "simpo":
        objective = presets.simpo(hyper["beta"], hyper["gamma_beta_ratio"] * hyper["beta"])
    elif hyper["loss"] == "cdpo":
        objective = presets.cdpo(hyper["beta"], hyper["epsilon"])
    elif hyper["loss"] == "ipo":
        objective = presets.ipo(hyper["tau"])
    else:
        objective = presets.dpo(hyper["beta"])
    loss = objective(Tokens(INPUTS["tok"]).batch())
    assert loss.rewards is not None
    unscaled = hyper["loss"] in ("ipo", "simpo")
    rewards = loss.rewards / hyper["beta"] if unscaled else loss.rewards
    got = {
        "loss": loss.value,
        "losses": loss.rows,
        "chosen_rewards": rewards[:, 0],
        "rejected_rewards": rewards[:, 1],
    }
    check(case, got)


@cases("bco/two_steps")
def test_bco_running_shift(case: dict[str, Any]) -> None:
    objective = presets.bco(case["hyper"]["beta"], rows="unpaired")
    first = objective(unpaired())
    second = objective(unpaired(tuple(case["hyper"]["step2_shift"])))
    got = {
        "losses_step1": first.rows,
        "delta_step1": first.metrics["delta"],
        "losses_step2": second.rows,
        "delta_step2": second.metrics["delta"],
    }
    check(case, got)


def transform_named(name: str) -> Transform:
    if name.startswith("alpha="):
        return Alpha(float(name.removeprefix("alpha=")), limit=None)
    return {
        "reverse_kl": ReverseKL(),
        "forward_kl": ForwardKL(limit=None),
        "js_divergence": JensenShannon(),
        "hellinger": Hellinger(limit=None),
        "jeffreys": Jeffreys(limit=None),
        "chi2_kl": ChiSquaredKL(limit=None),
    }[name]


@cases("fprime/")
def test_score_and_slope(case: dict[str, Any]) -> None:
    log_u = tensor(case["hyper"]["log_ratio"]).requires_grad_()
    score = transform_named(case["hyper"]["divergence"])(log_u)
    (slope,) = torch.autograd.grad(score.sum(), log_u)
    constant = 1.0 if case["hyper"]["divergence"] == "chi2_kl" else 0.0  # the paper's score(0)
    check(case, {"score": score + constant, "dscore_dlogratio": slope})


@cases("stable/discopop")
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32], ids=str)
def test_discopop_is_stable(case: dict[str, Any], dtype: torch.dtype) -> None:
    margin = tensor(case["hyper"]["beta_margin"], dtype).requires_grad_()
    score = torch.stack([margin, torch.zeros_like(margin)], 1)
    losses = DiscoPop(case["hyper"]["tau"])(score, torch.zeros_like(score))
    (grad,) = torch.autograd.grad(losses.sum(), margin)
    assert grad.isfinite().all()
    tol = case["tol"] if dtype == torch.float64 else 1e-5
    compare(case["expected"], {"losses": losses}, tol=tol, relative=True)


@cases("dpop")
def test_dpop(case: dict[str, Any]) -> None:
    objective = presets.dpop(case["hyper"]["beta"], case["hyper"]["dpop_lambda"])
    check(case, pair_results(objective, seq_pair(INPUTS["seq"])))


@cases("chipo/")
def test_chi_po(case: dict[str, Any]) -> None:
    objective = presets.chi_po(case["hyper"]["beta"], case["hyper"]["rmax"])
    check(case, pair_results(objective, seq_pair(INPUTS["seq"])))


def test_every_case_is_tested_or_explained() -> None:
    assert not SEEN & set(ELSEWHERE)
    assert SEEN | set(ELSEWHERE) == set(CASES)
