"""Properties of transforms and objectives on random inputs with fixed seeds."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from mmalign.core import (
    DIVERGENCES,
    Alpha,
    CandidateLogps,
    Objective,
    Preference,
    Score,
    SkewedJensenShannon,
    Transform,
    presets,
)
from mmalign.core.links import LambdaRank, Logistic, PlackettLuce
from mmalign.core.presets import PRESETS

TRANSFORMS: dict[str, Transform] = DIVERGENCES | {
    "alpha_0.01": Alpha(0.01),
    "alpha_0.99": Alpha(0.99),
    "alpha_3": Alpha(3.0),
    "skewed_js_0.1": SkewedJensenShannon(0.1),
}
transforms = pytest.mark.parametrize("transform", TRANSFORMS.values(), ids=TRANSFORMS)
everything = pytest.mark.parametrize("name", PRESETS)

COUPLED = {"kto", "kto_pair", "diffusion_kto", "aot", "aot_unpaired", "bco", "mpo"}
"""Rows of a batch meet: a baseline, a sort, or a running mean."""

TOKEN_MEAN = {"sft", "mpo"}
"""Losses averaged over the tokens of the batch."""


# Transforms


@transforms
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
def test_transform_survives_extreme_ratios(transform: Transform, dtype: torch.dtype) -> None:
    log_u = torch.linspace(-200, 200, 401, dtype=dtype, requires_grad=True)
    value = transform(log_u)
    (grad,) = torch.autograd.grad(value.sum(), log_u)
    assert value.isfinite().all()
    assert grad.isfinite().all()
    assert (value.diff() >= 0).all()
    assert (grad >= 0).all()
    assert (grad[log_u <= 0] > 0).all()  # a response that lost likelihood always feels it


@transforms
def test_transform_is_zero_at_equal_policies(transform: Transform) -> None:
    for dtype in (torch.float32, torch.float64):
        assert abs(transform(torch.zeros((), dtype=dtype)).item()) < 1e-7
    assert abs(transform(torch.zeros((), dtype=torch.float64)).item()) < 1e-15


@transforms
def test_transform_is_the_derivative_of_its_integral(transform: Transform) -> None:
    """f(u) = integral from 1 of f'(v) dv, by quadrature in u; autograd of f gives f' back."""
    nodes, weights = (torch.from_numpy(x) for x in np.polynomial.legendre.leggauss(60))
    nodes, weights = 0.5 * (nodes + 1.0), 0.5 * weights
    u = torch.linspace(0.3, 3.0, 28, dtype=torch.float64, requires_grad=True)
    points = 1.0 + (u[:, None] - 1.0) * nodes
    integral = (u - 1.0) * (transform(points.log()) * weights).sum(1)
    (slope,) = torch.autograd.grad(integral.sum(), u)
    torch.testing.assert_close(slope, transform(u.detach().log()), rtol=1e-8, atol=1e-10)


GENERATORS: dict[str, Callable[[Tensor], Tensor]] = {
    "reverse_kl": lambda u: u * u.log(),
    "forward_kl": lambda u: -u.log(),
    "js": lambda u: u * u.log() - (u + 1) * ((u + 1) / 2).log(),
    "alpha": lambda u: (u**0.5 - 0.5 * u - 0.5) / -0.25,
    "hellinger": lambda u: (u.sqrt() - 1) ** 2,
    "jeffreys": lambda u: (u - 1) * u.log(),
    "chi2_kl": lambda u: (u - 1) ** 2 / 2 + u * u.log(),
    "skewed_js": lambda u: 0.5 * u * u.log() - (0.5 + 0.5 * u) * (0.5 + 0.5 * u).log(),
}


def test_every_named_divergence_has_its_generator_here() -> None:
    assert set(GENERATORS) == set(DIVERGENCES)


@pytest.mark.parametrize("name", GENERATORS)
def test_transform_is_the_derivative_of_its_generator(name: str) -> None:
    u = torch.logspace(-2, 2, 41, dtype=torch.float64, requires_grad=True)
    one = torch.ones((), dtype=torch.float64, requires_grad=True)
    (slope,) = torch.autograd.grad(GENERATORS[name](u).sum(), u)
    (at_one,) = torch.autograd.grad(GENERATORS[name](one), one)
    expected = slope - at_one
    ours = DIVERGENCES[name](u.detach().log())
    torch.testing.assert_close(ours, expected, rtol=1e-10, atol=1e-12)


@settings(derandomize=True, max_examples=60, deadline=None)
@given(
    alpha=st.floats(0.0, 4.0),
    low=st.floats(-200.0, 200.0),
    gap=st.floats(0.0, 50.0),
)
def test_alpha_is_monotone_for_every_alpha(alpha: float, low: float, gap: float) -> None:
    pair = torch.tensor([low, low + gap], dtype=torch.float64)
    value = Alpha(alpha)(pair)
    assert value.isfinite().all()
    assert value[1] >= value[0]


# Objectives


def batch(rows: int = 4, candidates: int = 6, length: int = 5, seed: int = 0) -> CandidateLogps:
    generator = torch.Generator().manual_seed(seed)
    shape = (rows, candidates, length)

    def draw() -> Tensor:
        return 2.0 * torch.rand(shape, generator=generator, dtype=torch.float64)

    lengths = torch.randint(1, length + 1, shape[:2], generator=generator)
    labels = torch.zeros(shape[:2], dtype=torch.float64)
    labels[:, 0] = 1.0
    if candidates > 2:
        labels[:, 2:] = torch.rand((rows, candidates - 2), generator=generator).double() * 0.4
    labels[rows // 2 :, 0] = torch.where(labels[rows // 2 :, 0] > 0, 0.9, 0.0).double()
    return CandidateLogps(
        policy=(-draw()).requires_grad_(),
        reference=-draw(),
        mask=torch.arange(length) < lengths.unsqueeze(-1),
        labels=labels,
        kl=draw(),
        weight=draw(),
        kl_weight=draw(),
        log_sum_p2=-draw() - 0.5,
        prompt=-draw(),
        prompt_mask=torch.ones(shape, dtype=torch.bool),
        row_weight=torch.rand(rows, generator=generator).double() + 0.5,
    )


def rows_of(c: CandidateLogps, index: Any) -> CandidateLogps:
    return CandidateLogps(**{name: value[index] for name, value in c.tensors()})


def value_and_gradient(objective: Objective, c: CandidateLogps) -> tuple[Tensor, Tensor]:
    loss = objective(c)
    return loss.value.detach(), torch.autograd.grad(loss.value, c.policy)[0]


@everything
def test_padding_changes_nothing(name: str) -> None:
    c = batch()
    value, grad = value_and_gradient(presets.build(name), c)
    padded: dict[str, Tensor] = {}
    for field, tensor in c.tensors():
        if tensor.dim() < 3:
            padded[field] = tensor
        else:
            fill = False if tensor.dtype == torch.bool else 1e4  # garbage where the mask is False
            extra = torch.full((*tensor.shape[:2], 3), fill, dtype=tensor.dtype)
            padded[field] = torch.cat([tensor, extra], 2)
    policy = padded["policy"].detach().requires_grad_()
    wider = CandidateLogps(**(padded | {"policy": policy}))
    again, wide = value_and_gradient(presets.build(name), wider)
    torch.testing.assert_close(again, value)
    torch.testing.assert_close(wide[..., :5], grad)
    assert wide[..., 5:].abs().max() == 0.0


@everything
def test_row_order_changes_nothing(name: str) -> None:
    order = torch.tensor([2, 0, 3, 1])
    c = batch()
    value, grad = value_and_gradient(presets.build(name), c)
    shuffled = rows_of(c, order)
    loss = presets.build(name)(shuffled)
    torch.testing.assert_close(loss.value.detach(), value)
    torch.testing.assert_close(torch.autograd.grad(loss.value, c.policy)[0], grad)


@pytest.mark.parametrize("name", [n for n in PRESETS if n not in COUPLED | TOKEN_MEAN])
def test_a_batch_is_the_mean_of_its_rows(name: str) -> None:
    c = batch(2)
    whole = presets.build(name)(c)
    alone = [presets.build(name)(rows_of(c, slice(i, i + 1))).value for i in (0, 1)]
    torch.testing.assert_close(whole.value, (alone[0] + alone[1]) / 2)


@pytest.mark.parametrize("name", ["kto", "aot", "bco"])
def test_batchwide_losses_are_not_the_mean_of_their_rows(name: str) -> None:
    """Otherwise the exception above would hide a term that ignores its batch."""
    c = batch(8)
    c = c.replace(reference=c.policy.detach() - torch.rand(c.policy.shape).double())
    c = c.replace(policy=c.policy.detach() + torch.rand(c.policy.shape).double())
    whole = presets.build(name)(c).value
    alone = [presets.build(name)(rows_of(c, slice(i, i + 1))).value for i in range(8)]
    assert not torch.allclose(whole, torch.stack(alone).mean(), rtol=1e-6)


LOGISTIC = [
    n
    for n, build in PRESETS.items()
    if all(isinstance(t, Preference) and isinstance(t.link, Logistic) and not t.link.target_margin
           and type(t) is Preference for t in build().terms.values())
    and build().needs.reference and len(build().terms) == 1
]  # fmt: skip


def test_the_list_of_logistic_presets_is_not_empty() -> None:
    assert {"dpo", "f_dpo", "tdpo1", "tdpo2", "diffusion_dpo", "vdpo"} <= set(LOGISTIC)


def at_start(c: CandidateLogps) -> CandidateLogps:
    """Policy equal to the reference, so KL zero, and no row weights."""
    return c.replace(
        policy=c.reference.clone().requires_grad_() if c.reference is not None else c.policy,
        kl=torch.zeros_like(c.policy),
        row_weight=None,
    )


@pytest.mark.parametrize("name", [n for n in LOGISTIC if n != "dpo_gamma"])
def test_equal_policies_give_log_2_and_zero_margins(name: str) -> None:
    c = at_start(batch())
    loss = presets.build(name)(c)
    torch.testing.assert_close(loss.value.item(), math.log(2.0), rtol=1e-12, atol=0.0)
    assert abs(loss.metrics["rewards/margins"].item()) < 1e-15
    assert loss.metrics["rewards/accuracies"].item() == 0.5


@pytest.mark.parametrize(
    ("name", "keywords", "expected"),
    [
        ("hinge", {}, 1.0),
        ("ipo", {"tau": 0.1}, 1.0 / (4 * 0.1**2)),
        ("apo_zero", {}, 1.0),
        ("apo_down", {}, 1.0),
        ("nca", {}, 2.0 * math.log(2.0)),
        ("bco", {}, 2.0 * math.log(2.0)),
        ("rdpo", {"flip": 0.3}, math.log(2.0)),
        ("cdpo", {"flip": 0.3}, math.log(2.0)),
    ],
)
def test_start_values_of_other_losses(name: str, keywords: dict[str, Any], expected: float) -> None:
    loss = presets.build(name, **keywords)(at_start(batch()))
    assert loss.value.item() == pytest.approx(expected, rel=1e-12)


@pytest.mark.parametrize("name", LOGISTIC)
def test_swapping_the_pair_negates_the_margin(name: str) -> None:
    c = batch(candidates=2)
    swapped = c.columns((1, 0)).replace(labels=c.labels)
    objective = presets.build(name)
    if name == "flex_dpo":
        objective = presets.flex_dpo(0.1, 0.1)
    margins = [objective(x).metrics["rewards/margins"] for x in (c, swapped)]
    torch.testing.assert_close(margins[0], -margins[1])
    assert margins[0].abs() > 1e-6


@pytest.mark.parametrize("name", [n for n in PRESETS if PRESETS[n]().needs.rows == "pair"
                                  and n not in COUPLED | {"discopop", "apo_down"}])  # fmt: skip
def test_raising_the_chosen_response_lowers_the_loss(name: str) -> None:
    """From equal policies, where every pair loss must teach; a wrong sign shows at once."""
    c = at_start(batch())
    _, grad = value_and_gradient(presets.build(name), c.replace(weight=torch.ones_like(c.policy)))
    assert (grad[:, 0].sum(-1) < 0).all()


# Identities between presets

IDENTITIES: dict[str, tuple[Objective, Objective]] = {
    "rdpo(0) = dpo": (presets.rdpo(0.3, flip=0.0), presets.dpo(0.3)),
    "cdpo(0) = dpo": (presets.cdpo(0.3, flip=0.0), presets.dpo(0.3)),
    "f_dpo(reverse_kl) = dpo": (presets.f_dpo("reverse_kl", 0.3), presets.dpo(0.3)),
    "f_dpo(alpha -> 0) = dpo": (presets.f_dpo(Alpha(1e-13), 0.3), presets.dpo(0.3)),
    "f_dpo(alpha 1) = f_dpo(forward_kl)": (
        presets.f_dpo("alpha", 0.3, alpha=1.0),
        presets.f_dpo("forward_kl", 0.3),
    ),
    "hellinger = alpha 1/2, half beta": (
        presets.f_dpo("hellinger", 0.3),
        presets.f_dpo("alpha", 0.15, alpha=0.5),
    ),
    "skewed_js(1/2) = js, half beta": (
        presets.f_dpo("skewed_js", 0.3, p=0.5),
        presets.f_dpo("js", 0.15),
    ),
    "chi_po(no bound) = f_dpo(chi2_kl)": (presets.chi_po(0.3), presets.f_dpo("chi2_kl", 0.3)),
    "inpo_nash = ipo(sum)": (presets.inpo_nash(0.3), presets.ipo(0.3, reduce="sum")),
    "dpo_gamma(1) = dpo": (presets.dpo_gamma(0.3, 1.0), presets.dpo(0.3)),
    "flex(b, b) = dpo": (presets.flex_dpo(0.3, 0.3), presets.dpo(0.3)),
    "dpop(0) = dpo": (presets.dpop(0.3, 0.0), presets.dpo(0.3)),
    "tdpo2(0) = dpo": (presets.tdpo2(0.3, 0.0), presets.dpo(0.3)),
    "rpo(0) = dpo": (presets.rpo(0.3, 0.0), presets.dpo(0.3)),
    "adpo(0) = dpo": (presets.adpo(0.3), presets.dpo(0.3)),
    "alphapo(0) = simpo": (presets.alphapo(2.0, 0.5, alpha=0.0), presets.simpo(2.0, 0.5)),
    "rso = hinge": (presets.rso(0.3), presets.hinge(0.3)),
    "cpo(0) = dpo_gamma(0)": (presets.cpo(0.3, 0.0), presets.dpo_gamma(0.3, 0.0)),
    "bco(none) = mpo's part": (
        presets.bco(0.3, shift="none"),
        presets.mpo(0.3, 0.0, 1.0, 0.0, compat="trl-1.16"),
    ),
    "smpo(hard labels) = dpo": (presets.smpo(0.3), presets.dpo(0.3)),
    "soft_dpo(hard labels) = dpo": (presets.soft_dpo(0.3), presets.dpo(0.3)),
    "diffusion_dpo = dpo": (presets.diffusion_dpo(0.3), presets.dpo(0.3)),
    "diffusers' convention is twice beta": (
        presets.diffusion_dpo(0.15, convention="diffusers"),
        presets.dpo(0.3),
    ),
    "plackett_luce(K = 2) = dpo": (presets.plackett_luce(0.3), presets.dpo(0.3)),
}


@pytest.mark.parametrize("pair", IDENTITIES.values(), ids=IDENTITIES)
def test_identity(pair: tuple[Objective, Objective]) -> None:
    c = batch(6, candidates=2, seed=5).replace(weight=None, kl_weight=None)
    hard = torch.tensor([[1.0, 0.0]] * 6, dtype=torch.float64)
    c = c.replace(labels=hard)
    first, second = (value_and_gradient(objective, c) for objective in pair)
    torch.testing.assert_close(first[0], second[0], rtol=1e-10, atol=1e-12)
    torch.testing.assert_close(first[1], second[1], rtol=1e-10, atol=1e-12)


def test_rrpo_with_full_spans_and_no_kl_is_dpo() -> None:
    c = batch(candidates=2)
    full = c.replace(weight=torch.ones_like(c.policy))
    first = value_and_gradient(presets.rrpo(0.3, 0.0), full)
    second = value_and_gradient(presets.dpo(0.3), c.replace(weight=None))
    assert torch.equal(first[0], second[0])
    assert torch.equal(first[1], second[1])


def test_sparse_po_with_masks_of_one_is_tdpo1() -> None:
    c = batch(candidates=2)
    ones = torch.ones_like(c.policy)
    first = value_and_gradient(presets.sparse_po(0.3), c.replace(weight=ones, kl_weight=ones))
    second = value_and_gradient(presets.tdpo1(0.3), c.replace(weight=None, kl_weight=None))
    assert torch.equal(first[0], second[0])
    assert torch.equal(first[1], second[1])


def test_vpo_offline_on_the_chosen_response_is_rpo_up_to_a_constant() -> None:
    c = batch(candidates=2)
    plain = c.replace(weight=None, kl_weight=None)
    three = plain.columns((0, 1, 0)).replace(policy=plain.policy[:, [0, 1, 0]])
    vpo = presets.vpo(0.3, 0.2, "offline")(three)
    rpo = presets.rpo(0.3, 0.2)(plain)
    grads = [torch.autograd.grad(loss.value, plain.policy)[0] for loss in (vpo, rpo)]
    torch.testing.assert_close(grads[0], grads[1])


def test_robust_loss_is_unbiased_under_flips() -> None:
    """(1 - e) loss(pair) + e loss(swapped pair) is the clean loss, for every row."""
    c, flip = batch(candidates=2), 0.2
    swapped = c.columns((1, 0)).replace(labels=c.labels)
    robust = presets.rdpo(0.3, flip)
    first, second, clean = robust(c).rows, robust(swapped).rows, presets.dpo(0.3)(c).rows
    assert first is not None
    assert second is not None
    torch.testing.assert_close((1 - flip) * first + flip * second, clean)
    assert (
        robust(
            c.replace(
                policy=c.policy * 0.0
                + torch.tensor(
                    [
                        [
                            [40.0],
                            [0.0],
                        ]
                    ]
                )
            )
        ).value
        < 0
    )


def test_margin_links_ignore_an_added_constant_and_the_others_do_not() -> None:
    """margin_only is what it says: a constant on both scores changes no pair loss."""
    for name, build in PRESETS.items():
        for term in build().terms.values():
            if isinstance(term, Preference):
                score = torch.randn(5, max(term.link.candidates, 3), dtype=torch.float64)
                labels = torch.rand(score.shape, dtype=torch.float64)
                moved = term.link(score + 1.7, labels)
                same = torch.allclose(moved, term.link(score, labels))
                assert same == term.link.margin_only, name


def test_list_losses_do_not_depend_on_the_order_of_candidates() -> None:
    generator = torch.Generator().manual_seed(1)
    score = torch.randn(4, 5, generator=generator, dtype=torch.float64)
    labels = torch.randint(0, 3, (4, 5), generator=generator).double()  # with ties
    order = torch.randperm(5, generator=generator)
    for link in (PlackettLuce(), LambdaRank()):
        torch.testing.assert_close(link(score, labels), link(score[:, order], labels[:, order]))


def test_length_norm_of_the_score_differs_under_a_divergence_only() -> None:
    c = batch(candidates=2).replace(weight=None, kl_weight=None)
    for name, same in (("reverse_kl", True), ("js", False)):
        values = [
            presets.sigmoid_norm(2.0, name, length_norm=norm)(c).value
            for norm in ("log_ratio", "score")
        ]
        assert torch.allclose(*values, rtol=1e-9) is same


def test_score_gradient_is_the_table_of_the_divergences() -> None:
    """dL/dl_chosen = -beta sigmoid(-z) score'(l), by autograd through the whole objective."""
    c = batch(candidates=2, length=1).replace(weight=None, row_weight=None)
    for transform in TRANSFORMS.values():
        score = Score(0.3, transform)
        z = score(c)[:, 0] - score(c)[:, 1]
        log_ratio = (c.policy - c.reference)[..., 0].detach().requires_grad_()  # type: ignore[operator]
        (slope,) = torch.autograd.grad(transform(log_ratio).sum(), log_ratio)
        expected = -0.3 * torch.sigmoid(-z) * slope[:, 0] / len(z)
        _, grad = value_and_gradient(presets.f_dpo(transform, 0.3), c)
        torch.testing.assert_close(grad[:, 0, 0], expected.detach())
