"""Losses on several inputs: by hand, at equal policies, under modifiers, in mixes, as logged."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from torch import Tensor

from mmalign.core import CandidateLogps, KlGap, Objective, Preference, Score, presets
from mmalign.core.links import Logistic, Pami
from mmalign.errors import ConfigError, NeedsError

LOG2 = math.log(2.0)


def nll(margin: float) -> float:
    return math.log1p(math.exp(-margin))


def tensor(value: Any) -> Tensor:
    return torch.tensor(value, dtype=torch.float64)


def one_row(*log_ratios: float, labels: tuple[float, ...] | None = None) -> CandidateLogps:
    """Two positions a candidate: the whole log-ratio on the first, which is a span; KL 0.1 k."""
    k = len(log_ratios)
    ratio = tensor([[[value, 0.0] for value in log_ratios]])
    reference = torch.full_like(ratio, -2.0)
    return CandidateLogps(
        policy=(reference + ratio).requires_grad_(),
        reference=reference,
        mask=torch.ones(ratio.shape, dtype=torch.bool),
        labels=tensor([labels or (1.0, *[0.0] * (k - 1))]),
        kl=tensor([[[0.1 * i, 0.0] for i in range(1, k + 1)]]),
    )


def spans(c: CandidateLogps, *marked: tuple[int, int]) -> CandidateLogps:
    return c.replace(weight=tensor([list(marked)]))


# Values by hand


def test_bag_by_hand() -> None:
    c = one_row(0.4, -1.0, 0.9, labels=(1.0, 0.25, 0.75))
    loss = presets.pami_vdpo(beta=0.5)(c)
    expected = 0.25 * nll(0.5 * 1.4) + 0.75 * nll(0.5 * -0.5)
    assert loss.value.item() == pytest.approx(expected, rel=1e-12)
    (grad,) = torch.autograd.grad(loss.value, c.policy)
    assert grad[0, 1, 0].item() == pytest.approx(0.25 * 0.5 / (1 + math.exp(0.7)), rel=1e-12)


def test_bag_of_one_clip_is_vdpo() -> None:
    c = one_row(0.4, -1.0, labels=(1.0, 1.0))
    first, second = presets.pami_vdpo(0.5)(c), presets.vdpo(0.5)(c)
    assert torch.equal(first.value, second.value)
    grads = [torch.autograd.grad(loss.value, c.policy)[0] for loss in (first, second)]
    assert torch.equal(*grads)


def test_a_clip_without_weight_has_no_gradient() -> None:
    c = one_row(0.4, -1.0, 0.9, labels=(1.0, 1.0, 0.0))
    (grad,) = torch.autograd.grad(presets.pami_vdpo()(c).value, c.policy)
    assert grad[0, 2].abs().max() == 0.0
    assert grad[0, 1].abs().max() > 0.0


def test_chip_by_hand() -> None:
    c = spans(one_row(0.4, -1.0, 0.2), (1, 0), (0, 0), (1, 0))
    loss = presets.chip(beta=0.5, lam=2.0, gamma=0.3, gain=4.0)(c)
    terms = {
        "loss/preference": nll(0.5 * 1.4),
        "loss/preference_2": nll(0.5 * 0.2),
        "loss/preference_3": 2.0 * nll(0.5 * (4 * 0.4 + 1.0)),
        "loss/kl_gap": 0.3 * 0.5 * (0.2 - 0.1),
    }
    for name, value in terms.items():
        assert loss.metrics[name].item() == pytest.approx(value, rel=1e-12), name
    assert loss.value.item() == pytest.approx(sum(terms.values()), rel=1e-12)


def test_vista_dpo_by_hand() -> None:
    loss = presets.vista_dpo(beta=0.5)(one_row(0.4, -1.0, 0.6, 0.1, -0.3, 2.0))
    expected = (
        nll(0.5 * (0.4 + 0.7 * 1.0 - 0.3 * 0.6))
        + 0.8 * nll(0.5 * 0.3)
        + 0.6 * nll(0.5 * 0.7)
        + 0.4 * nll(0.5 * -1.6)
        + 0.1 * nll(0.5 * (1.4 - 0.5 * (0.2 - 0.1)))
    )
    assert loss.value.item() == pytest.approx(expected, rel=1e-12)


def test_every_visual_input_of_vista_dpo_learns() -> None:
    """In the release the corrupted inputs and the irrelevant answer are detached: no gradient."""
    c = one_row(0.4, -1.0, 0.6, 0.1, -0.3, 2.0)
    (grad,) = torch.autograd.grad(presets.vista_dpo()(c).value, c.policy)
    assert (grad[0, 1:].sum(-1) > 0.0).all()
    assert grad[0, 0].sum() < 0.0


def test_vista_dpo_is_unchanged_by_a_common_shift_of_reference_and_policy() -> None:
    """Both shares scale the reference too; the release left them out there."""
    c = one_row(0.4, -1.0, 0.6, 0.1, -0.3, 2.0)
    assert c.reference is not None
    easier = tensor([[[0.0], [0.0], [-3.0], [0.0], [0.0], [0.0]]])
    moved = c.replace(policy=c.policy + easier, reference=c.reference + easier)
    torch.testing.assert_close(presets.vista_dpo()(moved).value, presets.vista_dpo()(c).value)


# Invariants

VISUAL = {
    "vdpo": ("preference",),
    "pami_vdpo": ("preference",),
    "mdpo": ("preference", "preference_2", "preference_3"),
    "vdpo_symmetric": ("preference", "preference_2"),
    "povid": ("preference",),
    "chip": ("preference", "preference_2", "preference_3"),
    "vista_dpo": tuple(f"preference{n}" for n in ("", "_2", "_3", "_4", "_5")),
}


@pytest.mark.parametrize("name", VISUAL)
def test_each_term_is_log_2_at_equal_policies(name: str) -> None:
    objective = presets.build(name)
    columns = objective.needs.candidates
    c = one_row(*[0.0] * columns, labels=(1.0,) * columns if name == "pami_vdpo" else None)
    c = spans(c, *[(1, 0)] * columns).replace(kl=torch.zeros_like(c.policy))
    loss = objective(c)
    for label in VISUAL[name]:
        value = objective.terms[label](c).item()
        assert value == pytest.approx(LOG2, rel=1e-12), label
    rest = set(objective.terms) - set(VISUAL[name])
    assert all(objective.terms[label](c).item() == 0.0 for label in rest)
    assert loss.metrics["rewards/margins"].item() == 0.0
    (grad,) = torch.autograd.grad(loss.value, c.policy)
    assert grad[0, 0].sum() < 0.0
    assert (grad[0, 1:].sum(-1) >= 0.0).all() or name == "vdpo_symmetric"


def test_the_wrong_input_negates_the_margin() -> None:
    c = one_row(0.4, -1.0, labels=(1.0, 1.0))
    swapped = c.columns((1, 0))
    for name in ("vdpo", "pami_vdpo"):
        values = [presets.build(name)(x).metrics["rewards/margins"] for x in (c, swapped)]
        assert values[0].item() == pytest.approx(0.1 * 1.4)
        torch.testing.assert_close(values[0], -values[1])


def test_kl_gap_holds_the_rejected_response_only() -> None:
    c = one_row(0.4, -1.0)
    kl = tensor([[[0.1, 0.2], [0.5, 0.3]]]).requires_grad_()
    mask = torch.tensor([[[True, True], [True, False]]])
    loss = Objective(KlGap(2.0))(c.replace(kl=kl, mask=mask))
    assert loss.value.item() == pytest.approx(2.0 * (0.5 - 0.3))
    (grad,) = torch.autograd.grad(loss.value, kl)
    assert grad.tolist() == [[[0.0, 0.0], [2.0, 0.0]]]


# Position weights: spans count more, or not at all


def test_gain_counts_spans_more_and_one_ignores_them() -> None:
    c = spans(one_row(0.4, -1.0), (1, 0), (0, 1))
    bare = c.replace(weight=None)
    link = Logistic()

    def value(given: CandidateLogps, **keywords: Any) -> float:
        return Objective(Preference(Score(0.5, **keywords), link))(given).value.item()

    assert value(c, span_weight=1.0) == value(bare) == value(bare, span_weight=7.0)
    assert value(c, span_weight=0.0) == pytest.approx(nll(0.5 * 1.0))
    assert value(c, span_weight=3.0) == pytest.approx(nll(0.5 * (3 * 0.4 + 1.0)))
    assert value(c) == pytest.approx(nll(0.5 * 0.4))
    short = c.replace(mask=torch.tensor([[[True, True], [True, False]]]))
    assert value(short, span_weight=3.0, ld_alpha=0.5) == pytest.approx(nll(0.5 * (3 * 0.4 + 1.0)))
    with pytest.raises(ConfigError, match=r"span_weight is -1.0; it must be at least 0"):
        Score(0.5, span_weight=-1.0)


def test_chip_asks_only_for_what_its_terms_read() -> None:
    assert presets.chip().needs.weight
    assert presets.chip().needs.kl
    assert not presets.chip(lam=0.0).needs.weight
    assert not presets.chip(gamma=0.0).needs.kl
    with pytest.raises(NeedsError, match=r"CandidateLogps.weight"):
        presets.chip()(one_row(0.4, -1.0, 0.2))


def test_chip_without_its_own_terms_is_mdpo_without_its_anchor() -> None:
    c = one_row(0.4, -1.0, 0.2)
    bare = presets.mdpo(0.5)
    expected = bare.terms["preference"](c) + bare.terms["preference_2"](c)
    ours = presets.chip(0.5, lam=0.0, gamma=0.0)(spans(c, (1, 0), (1, 1), (0, 1)))
    torch.testing.assert_close(ours.rows, expected.detach())


# What is logged


def test_a_bag_logs_the_weighted_mean_of_its_clips() -> None:
    c = one_row(0.4, -1.0, 0.9, labels=(1.0, 0.5, 0.5))
    metrics = presets.pami_vdpo(0.5)(c).metrics
    assert metrics["rewards/chosen"].item() == pytest.approx(0.5 * 0.4)
    assert metrics["rewards/rejected"].item() == pytest.approx(0.5 * -0.05)
    assert metrics["rewards/margins"].item() == pytest.approx(0.5 * 0.45)
    assert metrics["rewards/accuracies"].item() == 1.0
    assert metrics["logps/rejected"].item() == pytest.approx(-4.0 - 0.05)
    hard = c.replace(labels=tensor([[1.0, 0.0, 1.0]]))
    metrics = presets.pami_vdpo(0.5)(hard).metrics
    assert metrics["rewards/rejected"].item() == pytest.approx(0.5 * 0.9)
    assert metrics["rewards/accuracies"].item() == 0.0
    none = presets.pami_vdpo(0.5)(c.replace(labels=tensor([[1.0, 0.0, 0.0]])))
    assert none.value.item() == 0.0
    assert all(value.isfinite() for value in none.metrics.values())


def test_a_contrast_logs_the_margin_that_its_loss_has() -> None:
    metrics = presets.povid(0.5, 0.25)(one_row(0.4, -1.0, 0.6)).metrics
    assert metrics["rewards/margins"].item() == pytest.approx(0.5 * 0.4 - 0.25 * (-1.0 + 0.6))
    assert metrics["logps/rejected"].item() == pytest.approx((-5.0 - 3.4) / 2)
    metrics = presets.vista_dpo(0.5)(one_row(0.4, -1.0, 0.6, 0.0, 0.0, 0.0)).metrics
    margin = 0.5 * (0.4 + 0.7 * 1.0 - 0.3 * 0.6)
    assert metrics["rewards/margins"].item() == pytest.approx(margin)


# Modifiers and mixes


@pytest.mark.parametrize("name", ["vdpo", "mdpo", "vdpo_symmetric", "chip"])
def test_wpo_weighs_pairs_of_inputs_too(name: str) -> None:
    columns = presets.build(name).needs.candidates
    c = one_row(0.4, -1.0, 0.2, -0.3).columns(tuple(range(columns)))
    c = spans(c, *[(1, 0)] * columns).replace(log_sum_p2=torch.full_like(c.policy, -0.5))
    plain, weighed = presets.build(name), presets.build(name, wpo=True)
    assert weighed.needs.log_sum_p2
    assert weighed.needs.roles == plain.needs.roles
    assert weighed.needs.rows == plain.needs.rows
    assert weighed(c).metrics["wpo_weight"] < 1.0
    assert weighed(c).value < plain(c).value


@pytest.mark.parametrize(
    ("name", "keywords", "message"),
    [
        ("pami_vdpo", {"wpo": True}, "defined for pairs of responses, which Pami does not read"),
        ("povid", {"wpo": True}, "which Povid does not read"),
        ("vista_dpo", {"ld_alpha": 0.5}, "which Povid does not read"),
        ("vdpo", {"ld_alpha": 0.5}, "ld_alpha compares the lengths of two responses"),
        ("chip", {"lam": -1.0}, r"objective.lam is -1.0; it must be at least 0"),
        ("chip", {"gain": -2.0}, r"objective.gain is -2.0"),
        ("chip", {"gamma": math.inf}, r"objective.gamma is inf"),
        ("vista_dpo", {"relevant": 1.0}, r"objective.relevant is 1.0; it must be in \(0, 1\)"),
        ("vista_dpo", {"clip": -0.6}, r"objective.clip is -0.6"),
    ],
)
def test_what_is_not_defined_is_refused(name: str, keywords: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        presets.build(name, **keywords)


def test_ld_alpha_reaches_the_pair_of_responses() -> None:
    c = one_row(0.4, -1.0, 0.2)
    ratio = tensor([[[0.4, 0.3], [-1.0, 0.0], [0.2, 0.0]]])
    assert c.reference is not None
    mask = torch.tensor([[[True, True], [True, False], [True, True]]])
    c = c.replace(policy=c.reference + ratio, mask=mask)
    tail = presets.build("mdpo", ld_alpha=0.0)(c).metrics["loss/preference"]
    assert tail.item() == pytest.approx(nll(0.1 * 1.4))


@pytest.mark.parametrize(
    "mix",
    [
        {"mdpo": 1.0, "sft": 0.5},
        {"dpo": 0.5, "chip": 1.0},
        {"vdpo": 1.0, "sft": {"weight": 0.1, "reduce": "mean"}},
        {"pami_vdpo": 1.0, "sft": 0.5},
        {"vista_dpo": 1.0, "ipo": 0.1},
    ],
    ids=lambda mix: "+".join(mix),
)
def test_a_mix_is_the_weighted_sum_and_keeps_the_roles(mix: dict[str, Any]) -> None:
    mixed = presets.build_mix(mix)
    columns = mixed.needs.candidates
    c = spans(one_row(0.4, -1.0, 0.2, 0.6, -0.3, 0.1), *[(1, 1)] * 6).columns(tuple(range(columns)))
    expected = tensor(0.0)
    roles: set[tuple[str, ...]] = set()
    for name, value in mix.items():
        keywords = dict(value) if isinstance(value, dict) else {"weight": value}
        weight = keywords.pop("weight")
        part = presets.build(name, **keywords)
        roles.add(part.needs.roles)
        expected = expected + weight * part(c).value
    torch.testing.assert_close(mixed(c).value, expected)
    assert mixed.needs.roles == next(one for one in roles if one)


def test_mixes_that_cannot_share_candidates_are_refused() -> None:
    with pytest.raises(NeedsError, match="different kinds of rows"):
        presets.build_mix({"dpo": 1.0, "vdpo": 1.0})
    with pytest.raises(NeedsError, match="different extra candidates"):
        presets.build_mix({"vdpo": 1.0, "pami_vdpo": 1.0})


def test_a_mix_passes_modifiers_on_or_refuses_them() -> None:
    c = one_row(0.4, -1.0)
    c = c.replace(log_sum_p2=torch.full_like(c.policy, -0.5))
    mixed = presets.build_mix({"vdpo": 1.0, "sft": 0.5}, wpo=True)
    expected = presets.build("vdpo", wpo=True)(c).value + 0.5 * presets.sft()(c).value
    torch.testing.assert_close(mixed(c).value, expected)
    with pytest.raises(ConfigError, match=r"no part of the mix \(sft, kto\) reads any"):
        presets.build_mix({"sft": 1.0, "kto": 1.0}, ld_alpha=0.5)


def test_hound_dpo_is_dpo_by_another_name() -> None:
    assert presets.preset("hound_dpo") is presets.dpo


def test_a_bag_never_reads_the_first_label() -> None:
    score = tensor([[0.3, -0.2, 0.4]])
    first, second = (Pami()(score, tensor([[p, 0.5, 0.5]])) for p in (1.0, 0.2))
    assert torch.equal(first, second)
