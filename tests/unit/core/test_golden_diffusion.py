"""Loss-level cases of golden/diffusion.json: per-sample errors in, value and gradient out."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from goldens import compare, fold, gradient, load, tensor
from torch import Tensor

from mmalign.core import CandidateLogps, Objective, presets

GOLDEN = load("diffusion")
TOL = 1e-9

ELSEWHERE = {
    "meta": "conventions, no case",
    "schedule": "test_process.py",
    "diffusion_dpo_e2e": "test_golden_denoising.py",
    "dcpo": "test_golden_denoising.py",
    "flow_dpo": "test_golden_denoising.py",
    "inversion": "test_golden_inversion.py",
    "spo": "test_stepwise.py",
    "npo": "test_guidance.py",
    "self_npo": "test_teacher.py",
    "evaluation": "test_scorers.py",
}
"""Groups that are more than a loss, and the file in tests/unit/diffusion that runs them."""

HERE = {
    "meta": "conventions",
    "schedule": "noise tables: diffusion/process.py",
    "diffusion_dpo_e2e": "the forward process around the same loss: diffusion adapter",
    "dcpo": "the same loss with two captions: diffusion adapter",
    "inversion": "where to score: diffusion/estimators.py",
    "spo": "on-policy steps with a trajectory log-density: diffusion package",
    "flow_dpo": "the same loss on a velocity target: diffusion adapter",
    "npo": "merging and guidance: models/merge.py, diffusion/sample.py",
    "self_npo": "teacher loop: diffusion package",
    "evaluation": "scorers: diffusion/scorers.py",
}
HERE = {
    "diffusion_dpo",
    "npo_dpo",
    "hf_lora_dpo",
    "smpo",
    "mapo",
    "diffusion_orpo",
    "diffusion_kto",
    "f_divergence_surrogate",
}


def test_every_group_is_tested() -> None:
    assert HERE | set(ELSEWHERE) == set(GOLDEN)
    folder = Path(__file__).resolve().parents[1] / "diffusion"
    for group, name in ELSEWHERE.items():
        if group != "meta":
            assert f'["{group}"]' in (folder / name).read_text(encoding="utf-8"), group


class Errors:
    """Denoising errors of a case, as an adapter hands them over: -scale * mean squared error."""

    def __init__(self, case: dict[str, Any], scale: float = 0.5) -> None:
        self.prediction = tensor(case["model_pred"]).requires_grad_()
        target = tensor(case["target"])
        self.policy = (self.prediction - target).square().flatten(1).mean(1)  # [2B]
        self.reference: Tensor | None = None
        if "ref_pred" in case:
            self.reference = (tensor(case["ref_pred"]) - target).square().flatten(1).mean(1)
        self.scale = scale

    def pairs(self, labels: Tensor | None = None, swap: bool = False) -> CandidateLogps:
        policy = fold(-self.scale * self.policy).unsqueeze(-1)  # [B, 2, 1]
        reference = None
        if self.reference is not None:
            reference = fold(-self.scale * self.reference).unsqueeze(-1)
        rows = policy.shape[0]
        batch = CandidateLogps(
            policy=policy,
            mask=torch.ones(policy.shape, dtype=torch.bool),
            labels=tensor([[1.0, 0.0]] * rows) if labels is None else labels,
            reference=reference,
        )
        return batch.columns((1, 0)) if swap else batch

    def singles(self, labels: Tensor) -> CandidateLogps:
        assert self.reference is not None
        policy = (-self.scale * self.policy)[:, None, None]
        return CandidateLogps(
            policy=policy,
            mask=torch.ones(policy.shape, dtype=torch.bool),
            labels=labels[:, None],
            reference=(-self.scale * self.reference)[:, None, None],
        )


def margin(objective: Objective, batch: CandidateLogps) -> Tensor:
    rewards = objective(batch).rewards
    assert rewards is not None
    return rewards[:, 0] - rewards[:, 1]


def sides(errors: Errors) -> dict[str, Tensor]:
    chosen, rejected = errors.policy.chunk(2)
    got = {"model_err_w": chosen, "model_err_l": rejected, "raw_model_loss": errors.policy.mean()}
    if errors.reference is not None:
        first, second = errors.reference.chunk(2)
        got |= {"ref_err_w": first, "ref_err_l": second, "raw_ref_loss": errors.reference.mean()}
    return got


def check(case: dict[str, Any], got: dict[str, Tensor], tol: float = TOL, **skip: str) -> None:
    inputs = dict.fromkeys(("hp", "model_pred", "ref_pred", "target"), "input")
    compare(case, got, tol=tol, relative=True, skip=inputs | skip)


@pytest.mark.parametrize("case", GOLDEN["diffusion_dpo"]["cases"], ids=lambda c: c["hp"]["name"])
def test_diffusion_dpo(case: dict[str, Any]) -> None:
    errors, objective = Errors(case), presets.diffusion_dpo(case["hp"]["beta"])
    loss = objective(errors.pairs())
    strict = loss.metrics["rewards/accuracies"] - 0.5 * loss.metrics["rewards/ties"]
    got = sides(errors) | {
        "logit": margin(objective, errors.pairs()),
        "loss": loss.value,
        "implicit_acc": strict,  # a tie is wrong there
        "grad_model_pred": gradient(loss, errors.prediction)[0],
    }
    check(case, got)
    plain = presets.dpo(case["hp"]["beta"])(errors.pairs())
    assert plain.value.item() == loss.value.item()


def test_negative_preference_optimisation_is_the_swapped_pair() -> None:
    case = GOLDEN["diffusion_dpo"]["cases"][0]
    assert GOLDEN["npo_dpo"]["of"] == case["hp"]["name"]
    batch = Errors(case).pairs(swap=True).replace(labels=tensor([[1.0, 0.0]] * 2))
    objective = presets.diffusion_dpo(case["hp"]["beta"])
    loss = objective(batch)
    got = {
        "loss": loss.value,
        "logit": margin(objective, batch),
        "implicit_acc": loss.metrics["rewards/accuracies"],
    }
    compare(GOLDEN["npo_dpo"], got, tol=TOL, skip={"note": "text", "of": "text"})


@pytest.mark.parametrize(
    "case", GOLDEN["hf_lora_dpo"]["cases"], ids=lambda case: case["hp"]["loss_type"]
)
def test_diffusers_lora_script(case: dict[str, Any]) -> None:
    hyper, errors = case["hp"], Errors(case)
    objective = presets.diffusion_dpo(
        hyper["beta"], link=hyper["loss_type"], convention="diffusers"
    )
    loss = objective(errors.pairs())
    got = {
        "margin": margin(objective, errors.pairs()) / hyper["beta"],
        "loss": loss.value,
        "implicit_acc": loss.metrics["rewards/accuracies"],
        "grad_model_pred": gradient(loss, errors.prediction)[0],
    }
    check(case, got)


def test_diffusers_script_at_equal_policies() -> None:
    case = GOLDEN["hf_lora_dpo"]["cases"][0]
    equal = Errors(case | {"ref_pred": case["model_pred"]})
    loss = presets.diffusion_dpo(2.5, convention="diffusers")(equal.pairs())
    expected = GOLDEN["hf_lora_dpo"]["policy_equals_ref"]
    assert loss.value.item() == pytest.approx(expected["loss"], abs=TOL)
    assert 0.5 * loss.metrics["rewards/ties"].item() == expected["implicit_acc"]


@pytest.mark.parametrize("case", GOLDEN["smpo"]["loss_cases"], ids=lambda c: str(c["hp"]["beta"]))
def test_smpo(case: dict[str, Any]) -> None:
    hyper, errors = case["hp"], Errors(case)
    probability = hyper["p_win_first"]
    labels = tensor([[probability, 1.0 - probability]] * (len(errors.policy) // 2))
    objective = presets.smpo(hyper["beta"] * hyper["gamma"])
    loss = objective(errors.pairs(labels))
    got = sides(errors) | {
        "logit": (labels[:, 0] - labels[:, 1]) * margin(objective, errors.pairs(labels)),
        "loss": loss.value,
        "implicit_acc": loss.metrics["rewards/accuracies"],
        "grad_model_pred": gradient(loss, errors.prediction)[0],
    }
    check(case, got)


def test_smpo_labels_come_from_scores() -> None:
    """The released probability is a softmax of min-max scores; ours enter as labels."""
    span = GOLDEN["smpo"]["ps_max"] - GOLDEN["smpo"]["ps_min"]
    for case in GOLDEN["smpo"]["probs"]:
        gap = abs(case["ps_score_0"] - case["ps_score_1"]) / span
        chance = 1.0 / (1.0 + torch.exp(-tensor(gap)))
        assert chance.item() == pytest.approx(case["p_win"], abs=1e-9)
        assert 10.0 * (2.0 * chance.item() - 1.0) == pytest.approx(case["weight_code"], abs=1e-8)


@pytest.mark.parametrize("case", GOLDEN["mapo"]["cases"], ids=lambda c: str(c["hp"]["beta"]))
def test_mapo(case: dict[str, Any]) -> None:
    hyper, errors = case["hp"], Errors(case)
    objective = presets.mapo(hyper["beta"], hyper["snr_value"], float(hyper["T"]))
    loss = objective(errors.pairs())
    assert loss.rewards is not None
    score = loss.rewards / hyper["T"]
    got = sides(errors) | {
        "score_w": score[:, 0],
        "score_l": score[:, 1],
        "ratio_losses": -hyper["beta"] * objective.terms["preference"](errors.pairs()),
        "loss": loss.value,
        "grad_model_pred": gradient(loss, errors.prediction)[0],
    }
    check(case, got)


def test_diffusion_orpo() -> None:
    case = GOLDEN["diffusion_orpo"]
    errors = Errors(case)
    released = presets.diffusion_orpo(case["hp"]["beta"], compat="official")
    loss = released(errors.pairs())
    chosen, rejected = errors.policy.chunk(2)
    got = {
        "log_odds_as_released": chosen - rejected,
        "loss_as_released": loss.value,
        "grad_model_pred": gradient(loss, errors.prediction)[0],
    }
    check(case, got, source="text", warning="text")
    right = presets.diffusion_orpo(case["hp"]["beta"])
    (slope,) = torch.autograd.grad(right.terms["preference"](errors.pairs()).sum(), errors.policy)
    assert (slope[:2] > 0).all()  # descent lowers the chosen error
    assert (slope[2:] < 0).all()
    assert right(errors.pairs()).value.item() != pytest.approx(loss.value.item(), abs=1e-4)


@pytest.mark.parametrize(
    "case",
    GOLDEN["diffusion_kto"]["cases"],
    ids=lambda case: f"{case['hp']['halo']}-{case['hp']['kl_mode']}",
)
def test_diffusion_kto(case: dict[str, Any]) -> None:
    hyper, errors = case["hp"], Errors(case)
    labels = tensor(case["labels"])
    objective = presets.diffusion_kto(
        hyper["beta"],
        hyper["lambda_d"],
        hyper["lambda_u"],
        utility=hyper["halo"],
        baseline={"none": "batch", "sigmoid": "class_means"}[hyper["kl_mode"]],
    )
    loss = objective(errors.singles(labels))
    assert loss.rewards is not None
    assert loss.rows is not None
    gain = loss.rewards[:, 0] / hyper["beta"] - 2.0 * loss.metrics["kl"]  # ours is in -e/2
    weight = hyper["lambda_d"] * labels + hyper["lambda_u"] * (1.0 - labels)
    sign = 2.0 * labels - 1.0
    got = {
        "labels": labels,
        "kl": 2.0 * loss.metrics["kl"],
        "g_centred": gain,
        "h": 1.0 - loss.rows / weight,
        "loss": loss.value,
        "acc": (sign * gain > 0).double().mean(),
        "grad_model_pred": gradient(loss, errors.prediction)[0],
    }
    # The release adds 1e-6 to the number of rows of each group; the file's bar is 1e-6.
    check(case, got, tol=1e-6 if hyper["kl_mode"] == "sigmoid" else TOL)


SURROGATE = GOLDEN["f_divergence_surrogate"]


@pytest.mark.parametrize("case", SURROGATE["cases"], ids=lambda case: case["divergence"])
def test_divergence_on_errors(case: dict[str, Any]) -> None:
    errors = Errors(SURROGATE, scale=SURROGATE["kappa"])
    objective = presets.f_dpo(case["divergence"], case["beta"], alpha=case.get("alpha"))
    loss = objective(errors.pairs())
    assert loss.rewards is not None
    assert loss.rows is not None
    constant = {"forward_kl": 1.0, "alpha": 1.0 / case.get("alpha", 1.0)}
    dropped = case["beta"] * constant.get(case["divergence"], 0.0)
    got = {
        "loss": loss.value,
        "losses": loss.rows,
        "chosen_rewards": loss.rewards[:, 0] - dropped,
        "rejected_rewards": loss.rewards[:, 1] - dropped,
        "grad_model_pred": gradient(loss, errors.prediction)[0],
    }
    skip = dict.fromkeys(("divergence", "beta", "alpha"), "input")
    compare(case, got, tol=TOL, skip=skip)
