"""Position weights against independent values, and where the released code breaks."""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

import pytest
import torch
from tiny import make_model
from torch import Tensor

from mmalign.core import CandidateLogps, presets
from mmalign.text.masks import (
    LearnedMask,
    activation_mask,
    raw_step_weights,
    record_activations,
    span_weights,
    step_weights,
)

GOLDEN = Path(__file__).resolve().parents[2] / "golden"


def golden_text() -> dict[str, Any]:
    return json.loads((GOLDEN / "text.json").read_text(encoding="utf-8"))


def case(name: str) -> dict[str, Any]:
    return next(item for item in golden_text()["cases"] if item["id"] == name)


def wide(values: Any) -> Tensor:
    return torch.tensor(values, dtype=torch.float64)


@pytest.fixture
def hidden() -> Tensor:  # [J + 1, N, T, D]
    return wide(golden_text()["inputs"]["hidden"]["ref_hidden_states"])


@pytest.fixture
def response() -> Tensor:  # [N, T - 1] bool
    return torch.tensor(golden_text()["inputs"]["tok"]["labels"])[:, 1:] != -100


# SparsePO's head


def test_head_equals_the_released_one_in_value_and_gradient(hidden: Tensor) -> None:
    golden = case("sparsepo/mask_head")
    params, expected = golden["hyper"]["params"], golden["expected"]
    mask = LearnedMask(3, 5, eps=golden["hyper"]["layer_norm_eps"]).double()
    (head,) = mask.heads
    head.load_state_dict(
        {
            "weight": torch.cat([wide(params[f"w_per_layer.{j}.w.weight"]) for j in range(3)]),
            "bias": torch.cat([wide(params[f"w_per_layer.{j}.w.bias"]) for j in range(3)]),
            "mixer": wide(params["mixer.weight"])[0],
            "norm.weight": wide(params["layer_norm.weight"]),
            "norm.bias": wide(params["layer_norm.bias"]),
        }
    )
    reward, kl = mask(hidden[1:, :, :-1])
    assert reward is kl
    close = {"rtol": 0.0, "atol": golden["tol"]}
    torch.testing.assert_close(reward, wide(expected["mask"]), **close)
    factors = torch.arange(1, reward.numel() + 1, dtype=torch.float64).view_as(reward)
    (reward * factors / reward.numel()).sum().backward()
    torch.testing.assert_close(head.mixer.grad, wide(expected["grad_mixer_weight"])[0], **close)
    torch.testing.assert_close(
        head.norm.weight.grad, wide(expected["grad_layer_norm_weight"]), **close
    )
    torch.testing.assert_close(head.weight.grad[:1], wide(expected["grad_w0_weight"]), **close)


def test_fresh_head_is_near_one_and_every_part_learns() -> None:
    mask = LearnedMask(4, 64)
    reward, _ = mask(torch.randn(4, 50, 64) * 7 + 3)
    assert (reward - 1).abs().max() < 0.5
    reward.sum().backward()
    assert all(p.grad is not None and p.grad.abs().sum() > 0 for p in mask.parameters())


def test_independent_heads_and_options_that_are_off() -> None:
    states = torch.randn(2, 3, 4, 8)
    reward, kl = LearnedMask(2, 8, common=False)(states)
    assert not torch.equal(reward, kl)
    reward, kl = LearnedMask(2, 8, on_kl=False)(states)
    assert (kl == 1).all()
    assert reward.requires_grad
    assert not kl.requires_grad
    reward, kl = LearnedMask(2, 8, on_reward=False, common=False)(states)
    assert (reward == 1).all()
    assert kl.requires_grad


def test_head_stays_in_float32_under_autocast_and_bfloat16_states() -> None:
    mask = LearnedMask(2, 8)
    states = torch.randn(2, 5, 8)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        reward, _ = mask(states)
    assert reward.dtype == torch.float32
    torch.testing.assert_close(reward, mask(states)[0], rtol=0, atol=0)
    assert mask(states.bfloat16())[0].dtype == torch.float32


# MaPO


@pytest.mark.parametrize("name", ["float64stats", "official_fp16stats"])
def test_activation_mask_equals_the_released_one(
    name: str, hidden: Tensor, response: Tensor
) -> None:
    golden = case(f"mapo/mask/{name}")
    means = hidden[:, :, :-1].mean(-1)
    mask = activation_mask({"resid": list(means)}, response)
    expected = wide(golden["expected"]["mask"])
    torch.testing.assert_close(mask, expected, rtol=0.0, atol=golden["tol"])


def test_activation_mask_averages_within_a_type_first(response: Tensor) -> None:
    a, b, c = (torch.randn(response.shape, dtype=torch.float64) for _ in range(3))
    single = [activation_mask({"x": [item]}, response) for item in (a, b, c)]
    both = activation_mask({"attn": [a, b], "mlp": [c]}, response)
    torch.testing.assert_close(both, ((single[0] + single[1]) / 2 + single[2]) / 2)


def test_activation_mask_of_one_token_or_equal_activations_is_one() -> None:
    means = torch.tensor([[3.0, 5.0, 7.0], [2.0, 2.0, 9.0], [1.0, 2.0, 3.0]])
    response = torch.tensor([[False, True, False], [True, True, False], [False, False, False]])
    mask = activation_mask({"resid": [means]}, response)
    assert mask.tolist() == [[0.0, 1.0, 0.0], [1.0, 1.0, 0.0], [0.0, 0.0, 0.0]]


def test_mapo_loss_joins_the_mask_to_the_objective(hidden: Tensor, response: Tensor) -> None:
    golden = case("mapo/loss")
    tok = golden_text()["inputs"]["tok"]
    targets = torch.tensor(tok["input_ids"])[:, 1:, None]
    policy_logits = wide(tok["policy_logits"]).requires_grad_()
    policy_all = policy_logits[:, :-1].log_softmax(-1)
    reference_all = wide(tok["ref_logits"])[:, :-1].log_softmax(-1)
    kl = (reference_all.exp() * (reference_all - policy_all)).sum(-1)
    mask = activation_mask({"resid": list(hidden[:, :, :-1].mean(-1))}, response)

    def paired(values: Tensor) -> Tensor:  # [2B, L] -> [B, K, L]
        return torch.stack(values.chunk(2), 1)

    loss = presets.build("sparse_po", beta=golden["hyper"]["beta"])(
        CandidateLogps(
            policy=paired(policy_all.gather(-1, targets)[..., 0]),
            reference=paired(reference_all.gather(-1, targets)[..., 0]),
            kl=paired(kl),
            mask=paired(response),
            weight=paired(mask),
            kl_weight=paired(mask),
            labels=wide([[1.0, 0.0]] * 3),
        )
    )
    expected = golden["expected"]
    close = {"rtol": 0.0, "atol": golden["tol"]}
    torch.testing.assert_close(loss.value, wide(expected["loss"]), **close)
    loss.value.backward()
    torch.testing.assert_close(policy_logits.grad, wide(expected["grad_policy_logits"]), **close)


@pytest.mark.parametrize(("kind", "attention"), [("llama", 4), ("qwen3", 4), ("gpt2", 2)])
def test_activations_are_recorded_at_every_kind_of_point(kind: str, attention: int) -> None:
    model = make_model(kind)
    ids = torch.randint(0, 320, (3, 6))
    with record_activations(model) as means, torch.no_grad():
        states = model(ids, output_hidden_states=True).hidden_states
    assert {name: len(group) for name, group in means.items()} == {
        "attn": 2 * attention,  # queries, keys, values (fused in GPT-2) and the heads' output
        "mlp": 2,
        "resid": 4,  # embeddings, two layers, the final norm
    }
    assert all(item.shape == (3, 6) for group in means.values() for item in group)
    torch.testing.assert_close(means["resid"][1], states[1].mean(-1))
    torch.testing.assert_close(means["resid"][-1], states[-1].mean(-1))
    before = len(means["resid"])
    model(ids)
    assert len(means["resid"]) == before  # hooks are gone


# Spans, steps


def test_span_weights_stay_inside_the_response() -> None:
    spans = torch.tensor([[[True, True, False, True]]])
    response = torch.tensor([[[True, True, True, False]]])
    assert span_weights(spans, response).tolist() == [[[1.0, 1.0, 0.0, 0.0]]]


@pytest.fixture
def tree() -> dict[str, Any]:
    cases = json.loads((GOLDEN / "seed_losses.json").read_text(encoding="utf-8"))["cases"]
    return next(c for c in cases if c["variant"] == "official_code_as_is" and c["method"] == "tpo")


def test_step_weights_equal_the_released_ones(tree: dict[str, Any]) -> None:
    """The step weights and response scores of the released code are right; its list loss is not."""
    given = {name: wide(value) for name, value in tree["inputs"].items()}
    index = given["step_index"].long()
    raw, _ = raw_step_weights(given["hidden"], index, given["labels"])
    expected = wide(tree["outputs"]["step_weights"])
    torch.testing.assert_close(raw[..., 1:], expected[..., 1:], rtol=0.0, atol=1e-9)
    weight = step_weights(given["hidden"], index, given["labels"])
    log_ratio = given["policy_token_logps"] - given["ref_token_logps"]
    scores = wide(tree["outputs"]["response_scores"])
    torch.testing.assert_close((weight * log_ratio).sum(-1), scores, rtol=0.0, atol=1e-9)
    assert (weight[index == 0] == 0).all()


def test_step_weights_by_hand() -> None:
    """Best response: steps (1, 0) and (0, 1). The other: step 1 the same, step 2 opposite."""
    hidden = torch.tensor(
        [[[[1.0, 0], [1, 0], [0, 1], [9, 9]], [[2.0, 0], [0, -3], [0, -3], [0, -3]]]]
    )
    index = torch.tensor([[[1, 1, 2, 0], [1, 2, 2, 2]]])
    labels = torch.tensor([[0.9, 0.1]])
    weight = step_weights(hidden, index, labels)
    expected = [[[0.25, 0.25, 0.5, 0.0], [1.0, 0.0, 0.0, 0.0]]]  # w = (2, 2) and (2, 0)
    torch.testing.assert_close(weight, torch.tensor(expected))
    hidden[0, 1] = torch.tensor([[-2.0, 0], [0, -3], [0, -3], [0, -3]])
    weight = step_weights(hidden, index, labels)
    sixth = 1 / 6
    expected = [[[0.25, 0.25, 0.5, 0.0], [0.5, sixth, sixth, sixth]]]  # w = (2, 2); (0, 0): alike
    torch.testing.assert_close(weight, torch.tensor(expected))


def test_step_that_the_best_response_lacks_weighs_one() -> None:
    hidden = torch.randn(1, 2, 3, 4)
    index = torch.tensor([[[1, 1, 0], [1, 2, 2]]])
    raw, count = raw_step_weights(hidden, index, torch.tensor([[1.0, 0.0]]))
    assert raw[0, 1, 2].item() == pytest.approx(1.0)
    assert count[0].tolist() == [[1.0, 2.0, 0.0], [0.0, 1.0, 2.0]]


def test_response_without_steps_weighs_nothing_and_is_finite() -> None:
    weight = step_weights(torch.zeros(1, 2, 2, 3), torch.zeros(1, 2, 2).long(), torch.ones(1, 2))
    assert (weight == 0).all()
    assert math.isfinite(weight.sum().item())
