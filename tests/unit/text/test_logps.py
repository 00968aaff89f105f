"""Blocks with a closed-form gradient equal log-softmax over whole logits."""

from __future__ import annotations

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

from mmalign.text import logps
from mmalign.text.logps import Head, response_logps

M, D, V = 7, 5, 11
VARIANTS = [(1.0, None), (1.7, None), (0.5, 3.0)]


def naive(hidden, weight, bias, targets, scale=1.0, softcap=None):
    logits = (hidden @ weight.T + (0 if bias is None else bias)) * scale
    if softcap is not None:
        logits = softcap * torch.tanh(logits / softcap)
    everything = logits.log_softmax(-1)
    return everything, everything.gather(-1, targets[:, None]).squeeze(-1)


def inputs(frozen: bool = False):
    def draw(*shape: int) -> torch.Tensor:
        return torch.randn(*shape, dtype=torch.float64)

    policy = [
        draw(M, D).requires_grad_(),
        *(draw(*s).requires_grad_(not frozen) for s in [(V, D), (V,)]),
    ]
    return policy, [draw(M, D), draw(V, D), draw(V)], torch.randint(V, (M,))


@pytest.fixture(params=["recomputed", "first_kept", "all_kept"])
def block_size(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> int:
    """A number of positions under which the backward pass has none, some or all of the logits."""
    monkeypatch.setattr(logps, "CPU_BLOCK_ELEMENTS", 0)
    monkeypatch.setattr(logps, "CPU_BLOCK_ROWS", 2)
    return {"recomputed": 2, "first_kept": 6, "all_kept": 20}[request.param]


@pytest.mark.parametrize("frozen", [False, True], ids=["trained_head", "frozen_head"])
@pytest.mark.parametrize(("scale", "softcap"), VARIANTS)
def test_values_and_gradients_equal_whole_logits(scale, softcap, frozen, block_size) -> None:
    (hidden, weight, bias), (ref_hidden, ref_weight, ref_bias), targets = inputs(frozen)
    stats = response_logps(
        hidden, Head(weight, bias, scale, softcap), targets,
        ref_hidden=ref_hidden, ref_head=Head(ref_weight, ref_bias, scale, softcap),
        kl=True, log_sum_p2=True, block_size=block_size,
    )  # fmt: skip
    log_p, policy = naive(hidden, weight, bias, targets, scale, softcap)
    log_ref, reference = naive(ref_hidden, ref_weight, ref_bias, targets, scale, softcap)
    kl = (log_ref.exp() * (log_ref - log_p)).sum(-1)
    for got, expected in [
        (stats.policy, policy),
        (stats.reference, reference),
        (stats.kl, kl),
        (stats.log_sum_p2, (2 * log_p).logsumexp(-1)),
    ]:
        torch.testing.assert_close(got, expected, rtol=1e-12, atol=1e-12)

    g1, g2 = torch.randn(2, M, dtype=torch.float64)
    g1[2] = g2[2] = g1[4] = 0.0  # a dead row, and one that only the KL reaches
    trained = [t for t in (hidden, weight, bias) if t.requires_grad]
    expected = torch.autograd.grad((policy * g1 + kl * g2).sum(), trained)
    loss = (stats.policy * g1 + stats.kl * g2).sum()
    for _ in range(2):  # what was kept is used up by the first
        got = torch.autograd.grad(loss, trained, retain_graph=True)
        for a, b in zip(got, expected, strict=True):
            torch.testing.assert_close(a, b, rtol=1e-11, atol=1e-12)
    assert stats.reference.requires_grad is False
    assert stats.log_sum_p2.requires_grad is False


@pytest.mark.parametrize("kl", [False, True])
def test_gradcheck(kl: bool, block_size: int) -> None:
    policy, (ref_hidden, ref_weight, ref_bias), targets = inputs()

    def score(hidden, weight, bias):
        stats = response_logps(
            hidden, Head(weight, bias), targets, ref_hidden=ref_hidden,
            ref_head=Head(ref_weight, ref_bias), kl=kl, block_size=block_size,
        )  # fmt: skip
        return (stats.policy, stats.kl) if kl else stats.policy

    assert torch.autograd.gradcheck(score, policy, nondet_tol=1e-12)


def test_equal_policies_have_exactly_zero_kl_and_gradient() -> None:
    (hidden, weight, bias), _, targets = inputs()
    stats = response_logps(hidden, Head(weight, bias), targets, ref_hidden=hidden, kl=True)
    assert stats.kl.abs().max() == 0
    (gradient,) = torch.autograd.grad(stats.kl.sum(), hidden)
    assert gradient.abs().max() < 1e-15


def test_a_token_the_reference_excludes_adds_nothing_to_the_kl() -> None:
    (hidden, weight, bias), (ref_hidden, ref_weight, ref_bias), targets = inputs()
    excluded = ref_bias.clone()
    excluded[3] = -torch.inf
    targets = targets.where(targets != 3, 4)
    both = bias.detach().clone()
    both[3] = -torch.inf
    for policy_bias in (bias, both):
        stats = response_logps(
            hidden, Head(weight, policy_bias), targets,
            ref_hidden=ref_hidden, ref_head=Head(ref_weight, excluded), kl=True,
        )  # fmt: skip
        keep = torch.arange(V) != 3
        log_ref = naive(ref_hidden, ref_weight[keep], ref_bias[keep], targets.clamp(max=0))[0]
        log_p = naive(hidden, weight, policy_bias, targets)[0][:, keep]
        expected = (log_ref.exp() * (log_ref - log_p)).sum(-1)
        torch.testing.assert_close(stats.kl, expected, rtol=1e-12, atol=1e-12)
        (gradient,) = torch.autograd.grad(stats.kl.sum() + stats.policy.sum(), hidden)
        assert gradient.isfinite().all()


def test_bfloat16_states_are_reduced_in_float32() -> None:
    hidden = (4 * torch.randn(64, 16)).bfloat16().requires_grad_()
    weight = torch.randn(1000, 16).bfloat16().requires_grad_()
    targets = torch.randint(1000, (64,))
    policy = response_logps(hidden, Head(weight), targets, block_size=10).policy
    assert policy.dtype == torch.float32
    exact = (hidden @ weight.T).detach().double().log_softmax(-1).gather(-1, targets[:, None])
    torch.testing.assert_close(policy.double(), exact.squeeze(-1), rtol=1e-6, atol=1e-5)
    policy.sum().backward()
    assert hidden.grad.dtype == weight.grad.dtype == torch.bfloat16


class _Largest(TorchDispatchMode):
    """Remembers the largest tensor that any operation returned."""

    numel = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        out = func(*args, **(kwargs or {}))
        for tensor in out if isinstance(out, (tuple, list)) else (out,):
            if isinstance(tensor, torch.Tensor):
                self.numel = max(self.numel, tensor.numel())
        return out


@pytest.mark.parametrize("frozen", [False, True])
def test_logits_exist_for_one_block_only(frozen: bool) -> None:
    rows, vocabulary, block = 96, 501, 8
    hidden = torch.randn(rows, 4, requires_grad=True)
    weight = torch.randn(vocabulary, 4, requires_grad=not frozen)
    with _Largest() as largest:
        stats = response_logps(
            hidden, Head(weight), torch.randint(vocabulary, (rows,)), ref_hidden=hidden,
            kl=True, log_sum_p2=True, block_size=block,
        )  # fmt: skip
        (stats.policy + stats.kl).sum().backward()
    assert largest.numel == block * vocabulary


def test_no_scored_token_is_no_problem() -> None:
    hidden, weight = torch.zeros(0, D, requires_grad=True), torch.randn(V, D, requires_grad=True)
    policy = response_logps(hidden, Head(weight), torch.zeros(0, dtype=torch.long)).policy
    policy.sum().backward()
    assert policy.shape == (0,)
    assert weight.grad.abs().sum() == 0


@pytest.mark.parametrize("kl", [False, True])
def test_rows_without_a_gradient_cost_nothing_on_a_cpu_and_change_nothing(
    kl: bool, block_size: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    (hidden, weight, bias), (ref_hidden, *_), targets = inputs()
    upstream = torch.tensor([0.0, 1.0, 0.0, 0.0, 0.0, 2.0, -1.0], dtype=torch.float64)
    found = []
    for answer in (True, False):
        monkeypatch.setattr(logps, "on_cpu", lambda _, answer=answer: answer)
        stats = response_logps(
            hidden, Head(weight, bias), targets, ref_hidden=ref_hidden, kl=kl, block_size=block_size
        )
        total = (upstream * (stats.policy if stats.kl is None else stats.policy + stats.kl)).sum()
        found.append(torch.autograd.grad(total, [hidden, weight, bias]))
    for left_out, all_rows in zip(*found, strict=True):
        torch.testing.assert_close(left_out, all_rows, rtol=1e-12, atol=1e-12)
    assert (found[1][0][upstream == 0] == 0).all()
