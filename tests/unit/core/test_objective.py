"""Objective: metrics, weights, edge rows, needs, and the terms that watch the batch."""

from __future__ import annotations

import math
from dataclasses import replace

import pytest
import torch
from goldens import sequences
from torch import Tensor, tensor

from mmalign.core import (
    Bco,
    CandidateLogps,
    ForwardKL,
    Nll,
    Objective,
    Preference,
    RunningMean,
    Score,
    WeightL1,
    presets,
    terms,
)
from mmalign.core.links import Logistic
from mmalign.core.presets import PRESETS
from mmalign.errors import ConfigError, NeedsError


def one_row() -> CandidateLogps:
    """Log-ratios: chosen +0.4, rejected -1.0, so m is 1.4. KL: chosen 0.3, rejected 0.8."""
    return CandidateLogps(
        policy=tensor([[[-1.0, -2.0], [-1.5, -2.5]]]),
        reference=tensor([[[-1.2, -2.2], [-1.0, -2.0]]]),
        kl=tensor([[[0.1, 0.2], [0.3, 0.5]]]),
        weight=torch.ones(1, 2, 2),
        mask=torch.ones(1, 2, 2, dtype=torch.bool),
        labels=tensor([[1.0, 0.0]]),
    )


BY_HAND: dict[str, tuple[Objective, float]] = {
    "dpo": (presets.dpo(0.5), math.log1p(math.exp(-0.5 * 1.4))),  # 0.4031860
    "tdpo2": (
        presets.tdpo2(0.5, 0.5),
        math.log1p(math.exp(-0.5 * (1.4 + 0.5 * (0.3 - 0.8)))),  # 0.44642
    ),
    "rrpo": (presets.rrpo(0.5, 0.1), math.log1p(math.exp(-0.5 * 1.4)) + 0.1 * 0.3),  # 0.4331860
    "forward_kl": (
        presets.f_dpo(ForwardKL(), 0.5),
        math.log1p(math.exp(-0.5 * (math.exp(1.0) - math.exp(-0.4)))),  # 0.3068686
    ),
    "sft": (presets.sft("sum"), 3.0),
    "simpo": (presets.simpo(2.0, 0.5), math.log1p(math.exp(-(2.0 * 0.5 - 0.5)))),
}


@pytest.mark.parametrize("name", BY_HAND)
def test_value_by_hand(name: str) -> None:
    objective, expected = BY_HAND[name]
    torch.testing.assert_close(objective(one_row()).value.item(), expected, rtol=1e-6, atol=0.0)


def test_tdpo2_sends_no_gradient_through_the_chosen_kl() -> None:
    c = one_row()
    assert c.kl is not None
    kl = c.kl.clone().requires_grad_()
    presets.tdpo2()(c.replace(kl=kl)).value.backward()
    assert kl.grad is not None
    assert kl.grad[:, 0].abs().sum() == 0
    assert kl.grad[:, 1].abs().sum() > 0


def pairs(*margins: float) -> CandidateLogps:
    policy = torch.stack([tensor(margins), torch.zeros(len(margins))], 1).unsqueeze(-1)
    return sequences(policy, torch.zeros_like(policy))


def test_metrics_have_trls_names_and_ties_count_half() -> None:
    metrics = presets.dpo(0.5)(pairs(2.0, 0.0, -4.0, 6.0)).metrics
    assert metrics["rewards/accuracies"].item() == 0.625
    assert metrics["rewards/ties"].item() == 0.25
    assert metrics["rewards/margins"].item() == pytest.approx(0.5)
    assert metrics["rewards/chosen"].item() == pytest.approx(0.5)
    assert metrics["rewards/rejected"].item() == 0.0
    assert metrics["logps/chosen"].item() == pytest.approx(1.0)
    assert "log_ratio/chosen" not in metrics
    assert not any(value.requires_grad for value in metrics.values())


def test_other_divergences_log_the_log_ratio_beside_the_reward() -> None:
    metrics = presets.f_dpo("js", 0.5)(pairs(2.0, 1.0)).metrics
    assert metrics["log_ratio/chosen"].item() == pytest.approx(0.5 * 1.5)  # what TRL calls a reward
    expected = 0.5 * sum(math.log(2.0) - math.log1p(math.exp(-x)) for x in (2.0, 1.0)) / 2.0
    assert metrics["rewards/chosen"].item() == pytest.approx(expected, rel=1e-6)


def test_a_reference_free_score_has_no_log_ratio_to_log() -> None:
    assert "log_ratio/chosen" not in presets.simpo()(pairs(2.0, 1.0)).metrics
    assert "log_ratio/chosen" in presets.sigmoid_norm()(pairs(2.0, 1.0)).metrics


def test_sequential_kl_is_reported() -> None:
    metrics = presets.tdpo1()(one_row()).metrics
    assert metrics["kl"].item() == pytest.approx((0.3 + 0.8) / 2.0)


def test_rewards_of_a_list_compare_best_and_worst_label() -> None:
    score = tensor([[1.0, 5.0, 3.0], [2.0, 2.0, 7.0]]).unsqueeze(-1)
    labels = tensor([[0.0, 2.0, 1.0], [1.0, 0.0, 0.0]])  # best, worst: 1, 0 and 0, 2
    c = sequences(score, torch.zeros_like(score), labels=labels)
    metrics = presets.plackett_luce(1.0)(c).metrics
    assert metrics["rewards/chosen"].item() == pytest.approx((5.0 + 2.0) / 2.0)
    assert metrics["rewards/rejected"].item() == pytest.approx((1.0 + 7.0) / 2.0)
    assert metrics["rewards/accuracies"].item() == 0.5


def test_tied_soft_labels_keep_the_order_of_the_pair() -> None:
    c = pairs(3.0).replace(labels=tensor([[0.5, 0.5]]))
    metrics = presets.soft_dpo(1.0)(c).metrics
    assert metrics["rewards/margins"].item() == pytest.approx(3.0)


def test_unpaired_metrics_are_group_means() -> None:
    policy = tensor([1.0, 2.0, 6.0])[:, None, None].requires_grad_()
    c = sequences(policy, torch.zeros(3, 1, 1), labels=tensor([[1.0], [0.0], [1.0]]))
    metrics = presets.apo_zero_unpaired(1.0)(c).metrics
    assert metrics["rewards/chosen"].item() == pytest.approx(3.5)
    assert metrics["rewards/rejected"].item() == pytest.approx(2.0)
    assert metrics["rewards/margins"].item() == pytest.approx(1.5)
    good = c.columns((0,)).replace(labels=torch.ones(3, 1))
    assert "rewards/rejected" not in presets.apo_zero_unpaired(1.0)(good).metrics


def test_unpaired_metrics_are_nan_for_no_rows_where_asking_would_wait(monkeypatch) -> None:
    policy = tensor([1.0, 2.0, 6.0])[:, None, None]
    c = sequences(policy, torch.zeros(3, 1, 1), labels=tensor([[1.0], [0.0], [1.0]]))
    good = c.replace(labels=torch.ones(3, 1))
    expected = presets.apo_zero_unpaired(1.0)(c).metrics
    monkeypatch.setattr(terms, "on_cpu", lambda _: False)
    torch.testing.assert_close(presets.apo_zero_unpaired(1.0)(c).metrics, expected)
    metrics = presets.apo_zero_unpaired(1.0)(good).metrics
    assert metrics["rewards/rejected"].isnan()
    assert metrics["rewards/margins"].isnan()
    assert metrics["rewards/chosen"].item() == pytest.approx(3.0)


def test_row_weights_scale_rows_and_not_their_record() -> None:
    c = pairs(2.0, -1.0)
    plain = presets.dpo()(c)
    weighted = presets.dpo()(c.replace(row_weight=tensor([0.5, 2.0])))
    assert plain.rows is not None
    assert weighted.rows is not None
    assert torch.equal(plain.rows, weighted.rows)
    torch.testing.assert_close(weighted.value.detach(), (plain.rows * tensor([0.5, 2.0])).mean())


def rich(rows: int = 3, candidates: int = 6, length: int = 5) -> CandidateLogps:
    shape = (rows, candidates, length)
    return CandidateLogps(
        policy=(-2.0 * torch.rand(shape)).requires_grad_(),
        reference=-2.0 * torch.rand(shape),
        mask=torch.ones(shape, dtype=torch.bool),
        labels=torch.eye(candidates)[0].repeat(rows, 1),
        kl=torch.rand(shape),
        weight=torch.rand(shape),
        log_sum_p2=-torch.rand(shape) - 1.0,
        prompt=-torch.rand(shape),
        prompt_mask=torch.ones(shape, dtype=torch.bool),
    )


@pytest.mark.parametrize("name", PRESETS)
@pytest.mark.parametrize("case", ["chosen empty", "all empty", "one row", "tied labels", "certain"])
def test_awkward_rows_stay_finite(name: str, case: str) -> None:
    """Empty sides, one row, K > 2, ties and certain tokens: value and gradient."""
    c = rich(rows=1 if case == "one row" else 3)
    if case == "chosen empty":
        c.mask[0, 0] = False
    elif case == "all empty":
        c.mask[:] = False
    elif case == "tied labels":
        c = c.replace(labels=torch.full_like(c.labels, 0.5))
    elif case == "certain":
        c = c.replace(policy=torch.zeros_like(c.policy).requires_grad_())
    loss = presets.build(name)(c)
    (grad,) = torch.autograd.grad(loss.value, c.policy, allow_unused=case == "all empty")
    assert loss.value.isfinite()
    assert grad is None or grad.isfinite().all()
    assert all(value.isfinite() for value in loss.metrics.values())
    assert loss.rows is not None
    assert loss.rows.shape == c.labels.shape[:1]


@pytest.mark.parametrize("name", [n for n in PRESETS if PRESETS[n]().needs.reference])
def test_the_reference_never_gets_a_gradient(name: str) -> None:
    """Even if an adapter hands one over with a graph behind it."""
    c = rich()
    assert c.reference is not None
    reference = c.reference.requires_grad_()
    value = presets.build(name)(c).value
    assert torch.autograd.grad(value, reference, allow_unused=True) == (None,)


@pytest.mark.parametrize("name", PRESETS)
def test_extreme_log_ratios_stay_finite_in_float32(name: str) -> None:
    c = rich(length=1)
    sides = tensor(
        [
            [-200.0, 200.0, -90.0, 90.0, 200.0, -200.0],
            [200.0, -200.0, 0.0, 1.0, -200.0, 200.0],
            [0.0, 0.0, 3.0, -3.0, 90.0, -90.0],
        ]
    )
    policy = sides.unsqueeze(-1).requires_grad_()
    if not presets.build(name).needs.reference:
        policy = (-sides.abs()).unsqueeze(-1).requires_grad_()  # log-probabilities
    c = c.replace(policy=policy, reference=torch.zeros_like(policy))
    loss = presets.build(name)(c)
    (grad,) = torch.autograd.grad(loss.value, policy)
    assert loss.value.isfinite()
    assert grad.isfinite().all()


@pytest.mark.parametrize("field", ["reference", "kl", "weight"])
def test_a_missing_field_is_named(field: str) -> None:
    with pytest.raises(NeedsError, match=rf"CandidateLogps.{field}"):
        presets.sparse_po()(one_row().replace(**{field: None}))


def test_too_few_candidates_and_wrong_shapes_are_named() -> None:
    with pytest.raises(NeedsError, match="at least 3 candidates"):
        presets.vpo()(one_row())
    c = one_row()
    with pytest.raises(NeedsError, match="labels"):
        presets.dpo()(c.replace(labels=tensor([1.0])))
    with pytest.raises(NeedsError, match="mask"):
        presets.dpo()(c.replace(mask=c.mask.float()))
    with pytest.raises(NeedsError, match="2 betas"):
        Score((0.1, 0.2))(sequences(torch.zeros(1, 3, 1), torch.zeros(1, 3, 1)))


def test_an_objective_needs_a_term() -> None:
    with pytest.raises(ConfigError, match="at least one term"):
        Objective()


def test_terms_of_one_kind_are_numbered() -> None:
    term = Preference(Score(), Logistic())
    assert list(Objective(term, term, Nll(), term).terms) == [
        "preference", "preference_2", "nll", "preference_3",
    ]  # fmt: skip


def test_half_precision_is_summed_in_float32() -> None:
    length = 1024
    policy = torch.full((1, 2, length), -0.7109375, dtype=torch.bfloat16)
    c = sequences(policy, torch.zeros(1, 2, length, dtype=torch.bfloat16))
    total = presets.sft("sum")(c)
    assert total.value.dtype == torch.float32
    assert total.value.item() == pytest.approx(0.7109375 * length, rel=1e-6)
    assert presets.dpo()(c).value.dtype == torch.float32


def test_batch_token_nll_is_the_mean_over_all_tokens() -> None:
    mask = tensor([[[True, True, True]], [[True, False, False]]])
    policy = tensor([[[-1.0, -2.0, -3.0]], [[-8.0, 9.0, 9.0]]])
    c = CandidateLogps(policy=policy, mask=mask, labels=torch.ones(2, 1))
    assert presets.sft("batch_token")(c).value.item() == pytest.approx(14.0 / 4.0)
    assert presets.sft("mean")(c).value.item() == pytest.approx((2.0 + 8.0) / 2.0)
    assert presets.sft("sum")(c).value.item() == pytest.approx(14.0 / 2.0)
    # The step has other micro-batches too: a row has 5 tokens of response, 3 of prompt on average.
    counted = c.replace(step_positions=tensor([[[5.0, 3.0]]] * 2))
    assert presets.sft("batch_token")(counted).value.item() == pytest.approx(14.0 / 5.0 / 2.0)
    assert presets.sft("mean")(counted).value.item() == pytest.approx((2.0 + 8.0) / 2.0)
    asked = counted.replace(
        policy=policy.repeat(1, 2, 1), mask=mask.repeat(1, 2, 1), labels=torch.ones(2, 2),
        prompt=tensor([[[-4.0]] * 2] * 2), step_positions=tensor([[[5.0, 3.0]] * 2] * 2),
    )  # fmt: skip
    nll = presets.orpo(lam=0.0, compat="trl-1.16")(asked)
    assert nll.metrics["loss/nll"].item() == pytest.approx((14.0 + 2 * 4.0) / (5.0 + 3.0) / 2.0)


def test_a_common_mask_costs_its_sparsity_once() -> None:
    c = rich(2, 2)
    assert c.weight is not None
    apart = WeightL1(0.1, 0.1)(c.replace(kl_weight=c.weight.clone()))
    common = WeightL1(0.1, 0.1)(c.replace(kl_weight=c.weight))
    torch.testing.assert_close(common, 0.5 * apart)
    torch.testing.assert_close(common, 0.1 * c.weight.sum((1, 2)))
    dead = WeightL1(0.1, 0.0).report(c.replace(weight=torch.zeros_like(c.weight)))
    assert dead["sparsity/reward"].item() == 1.0


def test_online_kl_gradient_is_that_of_the_expectation() -> None:
    """Exact over a two-response policy: the surrogate's mean gradient equals KL's, not zero."""
    logit = tensor(0.7, dtype=torch.float64, requires_grad=True)
    reference = tensor([-1.2, -0.35], dtype=torch.float64)

    def log_p() -> Tensor:
        return torch.stack([logit, -logit]).log_softmax(0)

    exact = (log_p().exp() * (log_p() - reference)).sum()
    (expected,) = torch.autograd.grad(exact, logit)
    term = presets.hypo(samples=2).terms["online_kl"]
    total = torch.zeros((), dtype=torch.float64)
    for first in (0, 1):
        for second in (0, 1):
            pick = [first, second]
            policy = torch.cat([torch.zeros(2).double(), log_p()[pick]])[None, :, None]
            ref = torch.cat([torch.zeros(2).double(), reference[pick]])[None, :, None]
            c = CandidateLogps(
                policy=policy,
                reference=ref,
                mask=torch.ones(policy.shape, dtype=torch.bool),
                labels=torch.zeros(1, 4).double(),
            )
            chance = log_p()[pick].sum().exp().detach()
            (grad,) = torch.autograd.grad(term(c).sum(), logit)
            total += chance * grad
    assert total.item() == pytest.approx(expected.item(), rel=1e-10)
    assert abs(expected.item()) > 0.1


def test_bco_shift_moves_in_training_only_and_is_saved() -> None:
    objective = presets.bco(1.0)
    c = pairs(1.0, 3.0)
    first = objective(c).metrics["delta"].item()
    assert first == pytest.approx(1.0)  # rewards 1, 3, 0, 0
    objective.eval()
    assert objective(pairs(9.0)).metrics["delta"].item() == first
    assert objective(pairs(9.0)).value.item() == objective(pairs(9.0)).value.item()
    objective.train()
    objective(pairs(9.0))
    copy = presets.bco(1.0)
    copy.load_state_dict(objective.state_dict())
    assert copy(c).value.item() == objective(c).value.item()
    state = copy.state_dict()["states.bco.mean"]
    assert state.dtype == torch.float64


def test_bco_shift_before_anything_was_seen_is_zero() -> None:
    objective = presets.bco(1.0).eval()
    c = pairs(2.0, 0.5)
    assert objective(c).value.item() == presets.bco(1.0, shift="none")(c).value.item()
    assert RunningMean()(torch.ones(4)).item() == 1.0


def test_bco_soft_labels_interpolate() -> None:
    term = Bco(Score(1.0))
    c = pairs(2.0)
    hard, flipped = term(c), term(c.replace(labels=tensor([[0.0, 1.0]])))
    soft = term(c.replace(labels=tensor([[0.3, 0.7]])))
    torch.testing.assert_close(soft, 0.3 * hard + 0.7 * flipped)


def test_kto_baseline_is_clamped_and_detached() -> None:
    policy = torch.zeros(4, 2, 1)
    policy[:, 1] = -3.0
    c = sequences(policy, torch.zeros(4, 2, 1), labels=tensor([[1.0, 0.0]] * 4))
    loss = presets.kto(0.5)(c)
    assert loss.metrics["kl"].item() == 0.0
    assert loss.value.item() == pytest.approx(0.5)


@pytest.mark.parametrize("baseline", ["batch", "class_means", "mismatched", "zero"])
@pytest.mark.parametrize(
    ("utility", "rising"),
    [("sigmoid", True), ("loss_averse", True), ("risk_seeking_1", True), ("risk_seeking_3", True)],
)
def test_diffusion_kto_raises_desirable_rows(baseline: str, utility: str, rising: bool) -> None:
    policy = (0.01 * torch.randn(6, 2, 1)).requires_grad_()
    labels = tensor([[1.0, 0.0]] * 6)
    c = sequences(policy, torch.zeros(6, 2, 1), labels=labels)
    objective = presets.build("diffusion_kto", beta=1.0, utility=utility, baseline=baseline)
    (grad,) = torch.autograd.grad(objective(c).value, c.policy)
    assert bool((grad[:, 0] < 0).all()) is rising
    assert grad[:, 1].abs().max() == 0.0


def test_aot_is_a_sort_and_follows_its_rows() -> None:
    c = rich(6, 2, 1).replace(weight=None)
    loss = presets.aot(1.0)(c)
    assert loss.rows is not None
    assert c.reference is not None
    margin = (c.policy[:, 0] - c.policy[:, 1]).squeeze(-1)
    reference = (c.reference[:, 0] - c.reference[:, 1]).squeeze(-1)
    best = margin.argmax()
    expected = -torch.nn.functional.logsigmoid(margin.max() - reference.max())
    torch.testing.assert_close(loss.rows[best], expected.detach())
    shuffled = c.columns((0, 1)).replace(reference=c.reference[torch.randperm(6)])
    torch.testing.assert_close(presets.aot(1.0)(shuffled).value, loss.value)


def test_score_with_another_reward_kl_reports_it() -> None:
    score = Score(0.5, kl_coef=0.5, reward_kl=1.0)
    c = one_row()
    torch.testing.assert_close(score.rewards(c), tensor([[0.35, -0.1]]))
    torch.testing.assert_close(score(c), tensor([[0.275, -0.3]]))
    plain = replace(score, reward_kl=None)
    torch.testing.assert_close(plain.rewards(c), score(c))
