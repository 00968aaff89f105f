"""PaMi-VDPO's selection: the divergence, the gate, the weights, and every number of the golden."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from goldens import gradient, load, log_softmax, tensor
from torch import Tensor

from mmalign.config import SelectionSpec
from mmalign.core import CandidateLogps, presets
from mmalign.core.numerics import full_precision
from mmalign.text.logps import Head
from mmalign.video import candidates
from mmalign.video.candidates import (
    Selection,
    aggregate,
    close_scores,
    far_scores,
    js_from_states,
    tau_at,
)

LN2 = math.log(2.0)
CASES = load("video")["pami_vdpo"]


@pytest.mark.parametrize("case", CASES, ids=[case["name"] for case in CASES])
def test_golden(case: dict[str, Any]) -> None:
    source, expected = case["inputs"], case["expected"]
    labels = torch.tensor(source["labels"])[:, 1:]
    mask, target = labels != -100, labels.clamp(min=0)
    base = tensor(source["policy_logits"]).requires_grad_()  # [B, S, V]
    clips = tensor(source["policy_logits_candidates"]).requires_grad_()  # [B, K, S, V]
    num = clips.shape[1]

    own = base[:, :-1][mask]  # [M, V]
    others = torch.stack([clips[:, k, :-1][mask] for k in range(num)])  # [K, M, V]
    far = far_scores(js_divergence(own.expand_as(others), others), mask.sum(1).tolist())
    chosen = aggregate(
        tensor(source["similarity"]),
        far,
        tau_close=case["tau_close"],
        mode=case["mil"],
        temperature=case["temperature"],
        noise_floor=case["noise_floor"],
    )
    assert not far.requires_grad
    assert (chosen.index is None) == (case["mil"] != "hard")
    if chosen.index is not None:
        assert chosen.index.tolist() == expected["selected"]
    assert chosen.kept.tolist() == expected["close_mask"]

    def logps(whole: Tensor, cut: Tensor) -> Tensor:  # -> [B, K + 1, L]
        every = log_softmax(torch.cat([whole[:, None], cut], 1))[..., :-1, :]
        index = target[:, None, :, None].expand(*every.shape[:-1], 1)
        return every.gather(-1, index).squeeze(-1)

    loss = presets.pami_vdpo(case["beta"])(
        CandidateLogps(
            policy=logps(base, clips),
            reference=logps(tensor(source["ref_logits"]), tensor(source["ref_logits_candidates"])),
            mask=mask[:, None].expand(-1, num + 1, -1),
            labels=torch.cat([torch.ones(len(mask), 1), chosen.weights], 1),
            row_weight=chosen.row_weight,
        )
    )
    grads = gradient(loss, base, clips)
    got = {
        "jsd": far,
        "weights": chosen.weights,
        "sample_weight": chosen.row_weight,
        "loss": loss.value,
        "grad_logits": grads[0],
        "grad_logits_candidates": grads[1],
    }
    for name, value in got.items():
        torch.testing.assert_close(value.detach(), tensor(expected[name]), rtol=1e-9, atol=1e-12)


def js_divergence(p: Tensor, q: Tensor) -> Tensor:
    """Of the distributions that logits give."""
    return candidates.js_divergence(*(full_precision(x).log_softmax(-1) for x in (p, q)))


def plain_js(p: Tensor, q: Tensor) -> Tensor:
    """The definition, in float64."""
    p, q = p.double().softmax(-1), q.double().softmax(-1)
    m = 0.5 * (p + q)
    kl = [torch.where(r > 0, r * (r / m).log(), 0.0).sum(-1) for r in (p, q)]
    return 0.5 * (kl[0] + kl[1])


@pytest.mark.parametrize("gap", [1e-3, 0.1, 1.0, 10.0, 100.0])
def test_divergence_is_the_definition_in_float32(gap: float) -> None:
    """Also where the distributions are nearly equal, where its terms would cancel."""
    p = torch.randn(40, 300)
    q = p + gap * torch.randn(40, 300)
    torch.testing.assert_close(js_divergence(p, q).double(), plain_js(p, q), rtol=2e-4, atol=1e-12)
    wide = js_divergence(p.double(), q.double())
    assert wide.dtype == torch.float64
    torch.testing.assert_close(wide, plain_js(p, q), rtol=1e-9, atol=1e-12)


def test_equal_clips_diverge_by_exactly_nothing() -> None:
    logits = 5 * torch.randn(9, 50)
    assert not js_divergence(logits, logits.clone()).any()
    states, head = torch.randn(9, 16), Head(torch.randn(50, 16), torch.randn(50))
    assert not js_from_states(states.expand(2, -1, -1), head).any()


def test_divergence_is_symmetric_bounded_and_blind_to_a_constant() -> None:
    p, q = 30 * torch.randn(2, 200, 7)
    value = js_divergence(p, q)
    assert (value >= 0).all()
    assert (value <= LN2).all()
    torch.testing.assert_close(value, js_divergence(q, p))
    torch.testing.assert_close(value, js_divergence(p + 3.0, q - 2.0), rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32, torch.float64])
def test_extreme_logits_stay_finite(dtype: torch.dtype) -> None:
    p = torch.tensor([[1e4, 0.0, -1e4], [0.0, 0.0, 0.0], [-1e4, 1e4, 0.0]], dtype=dtype)
    q = torch.tensor([[-1e4, 0.0, 1e4], [1e4, 0.0, 0.0], [-1e4, 1e4, 0.0]], dtype=dtype)
    value = js_divergence(p, q)
    assert value.dtype == (dtype if dtype == torch.float64 else torch.float32)
    # Disjoint; a point against a third on each of three: ln 2 - [4/3 ln 4/3 + ... ] by definition.
    torch.testing.assert_close(value.double(), plain_js(p, q), rtol=1e-5, atol=1e-12)
    assert value[0].item() == pytest.approx(LN2)
    assert value[2] == 0


def test_excluded_tokens_have_no_part() -> None:
    """Logits of -inf, on one side or on both, are probabilities of 0; by hand: [1/2, 1/2, 0, 0] and
    [1/2, 0, 1/2, 0] share half of their mass, so the divergence is ln 2 / 2."""
    inf = math.inf
    p = torch.tensor([[0.0, 0.0, -inf, -inf]])
    q = torch.tensor([[0.0, -inf, 0.0, -inf]])
    assert js_divergence(p, q).item() == pytest.approx(LN2 / 2)
    assert js_divergence(p, p).item() == 0
    assert js_divergence(torch.tensor([[math.nan, 0.0]]), torch.zeros(1, 2)).isnan().all()


@pytest.mark.parametrize("block_size", [1, 3, 64])
def test_from_states_in_blocks(block_size: int) -> None:
    own, clips = torch.randn(10, 8), torch.randn(3, 10, 8)
    capped = Head(torch.randn(21, 8), torch.randn(21), scale=0.5, softcap=3.0)
    for head in (capped, Head(torch.randn(21, 8))):
        whole = torch.stack([js_divergence(head.logits(own), head.logits(one)) for one in clips])
        got = js_from_states(torch.cat([own[None], clips]), head, block_size)
        torch.testing.assert_close(got, whole, rtol=1e-5, atol=1e-7)


def test_from_states_makes_no_logits_of_all_positions_and_no_gradient(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    sizes: list[int] = []
    logits = Head.logits

    def counted(self: Head, hidden: Tensor) -> Tensor:
        sizes.append(len(hidden))
        return logits(self, hidden)

    monkeypatch.setattr(Head, "logits", counted)
    head = Head(torch.randn(30, 8, requires_grad=True))
    value = js_from_states(torch.randn(3, 10, 8, requires_grad=True), head, block_size=4)
    assert not value.requires_grad
    assert sizes == [4, 4, 4, 4, 4, 4, 2, 2, 2]  # a block of the own clip, then of either other


def test_from_states_in_half_types_is_float32() -> None:
    states = torch.randn(2, 6, 8).bfloat16()
    head = Head(torch.randn(30, 8).bfloat16())
    (got,) = js_from_states(states, head)
    assert got.dtype == torch.float32
    wide = Head(head.weight.float())
    expected = js_divergence(*wide.logits(states.float()))
    torch.testing.assert_close(got, expected, rtol=0.1, atol=2e-2)


def test_far_scores_are_means_of_a_rows_own_positions() -> None:
    values = tensor([[1.0, 2.0, 3.0, 4.0], [0.0, 0.0, 6.0, 0.0]])
    got = far_scores(values, [1, 0, 3])
    assert got.tolist() == [[1.0, 0.0], [0.0, 0.0], [3.0, 2.0]]


def test_close_scores_are_cosines() -> None:
    own = tensor([[3.0, 4.0], [0.0, 2.0]])
    clips = tensor([[[6.0, 8.0], [4.0, -3.0]], [[0.0, -1.0], [1.0, 1.0]]])
    torch.testing.assert_close(
        close_scores(own, clips), tensor([[1.0, 0.0], [-1.0, math.sqrt(0.5)]])
    )
    assert close_scores(own.bfloat16(), clips.bfloat16()).dtype == torch.float32


CLOSE = tensor([[0.9, 0.6, 0.4], [0.1, 0.3, 0.2]])  # row 1: none passes 0.5, the second is closest
FAR = tensor([[0.1, 0.2, 0.6], [0.3, 0.04, 0.5]])


def test_modes_by_hand() -> None:
    hard = aggregate(CLOSE, FAR, tau_close=0.5)
    assert hard.kept.tolist() == [[True, True, False], [False, True, False]]
    assert hard.weights.tolist() == [[0.0, 1.0, 0.0], [0.0, 1.0, 0.0]]
    assert hard.row_weight.tolist() == [1.0, 1.0]
    mean = aggregate(CLOSE, FAR, tau_close=0.5, mode="mean")
    assert mean.weights.tolist() == [[0.5, 0.5, 0.0], [0.0, 1.0, 0.0]]
    soft = aggregate(CLOSE, FAR, tau_close=0.5, mode="soft", temperature=0.1)
    second = 1 / (1 + math.exp(-1.0))  # scores 0.1 and 0.2 at temperature 0.1
    torch.testing.assert_close(soft.weights, tensor([[1 - second, second, 0.0], [0.0, 1.0, 0.0]]))
    assert mean.index is None
    assert soft.index is None


def test_rows_whose_farthest_kept_clip_changes_little_count_less() -> None:
    quiet = aggregate(CLOSE, FAR, tau_close=0.5, noise_floor=0.16)
    assert quiet.row_weight.tolist() == [1.0, 0.25]  # the 0.5 of row 1 was not kept
    assert aggregate(CLOSE, 0 * FAR, tau_close=0.5, noise_floor=0.1).row_weight.tolist() == [0, 0]


def test_ties_go_to_the_first_and_a_gate_at_its_value_is_open() -> None:
    ties = aggregate(tensor([[0.5, 0.5, 0.2]]), tensor([[0.3, 0.3, 0.3]]), tau_close=0.5)
    assert ties.kept.tolist() == [[True, True, False]]
    assert ties.index is not None
    assert ties.index.tolist() == [0]
    closest = aggregate(tensor([[0.1, 0.4, 0.4]]), tensor([[0.3, 0.3, 0.6]]), tau_close=0.5)
    assert closest.kept.tolist() == [[False, True, False]]


@pytest.mark.parametrize("mode", ["hard", "soft", "mean"])
def test_permuting_clips_permutes_weights_only(mode: Any) -> None:
    close, far = torch.rand(20, 5).double(), LN2 * torch.rand(20, 5).double()
    order = torch.tensor([3, 0, 4, 1, 2])

    def chosen(*scores: Tensor) -> Selection:
        return aggregate(*scores, tau_close=0.6, mode=mode, noise_floor=0.5)

    first, second = chosen(close, far), chosen(close[:, order], far[:, order])
    torch.testing.assert_close(second.weights, first.weights[:, order])
    torch.testing.assert_close(second.row_weight, first.row_weight)
    assert torch.equal(second.kept, first.kept[:, order])
    torch.testing.assert_close(first.weights.sum(1), torch.ones(20).double())
    assert not first.weights[~first.kept].any()
    assert (first.row_weight <= 1).all()


def test_soft_weights_of_tiny_temperatures_are_hard() -> None:
    far = LN2 * torch.rand(6, 4)
    soft = aggregate(torch.ones(6, 4), far, tau_close=0.5, mode="soft", temperature=1e-6)
    assert torch.equal(soft.weights, aggregate(torch.ones(6, 4), far, tau_close=0.5).weights)


def test_the_gate_moves_from_start_to_end() -> None:
    spec = SelectionSpec(tau_close=0.5, tau_start=0.9)
    steps = [tau_at(spec, step, 5) for step in (0, 1, 2, 3, 4, 9)]
    assert steps == pytest.approx([0.9, 0.8, 0.7, 0.6, 0.5, 0.5])
    assert tau_at(spec, 0, 1) == 0.9
    assert tau_at(SelectionSpec(tau_close=0.4), 3, 5) == 0.4
