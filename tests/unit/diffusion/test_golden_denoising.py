"""Golden cases around the loss: noise, targets and captions of Diffusion-DPO, DCPO, Flow-DPO."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from goldens import compare, tensor
from nets import GOLDEN, Given, Net, halves, pair_results, rows, table

from mmalign.core import presets
from mmalign.diffusion.estimators import ForwardNoise
from mmalign.diffusion.process import RectifiedFlow

CASES = GOLDEN["diffusion_dpo_e2e"]["cases"]
INPUTS = (
    *("name", "prediction_type", "beta", "net", "policy_ab", "ref_ab", "latents", "noise_w"),
    *("timesteps", "cond_w", "cond_l", "noise_offset", "offset_draw_w"),
)


def both(first: Any, second: Any = None) -> torch.Tensor:
    """Numbers of the chosen half, and of the rejected one or the same again, row by row."""
    return rows([*first, *(first if second is None else second)])


def forward_case(case: dict[str, Any], objective: Any) -> dict[str, torch.Tensor]:
    process = table(case["prediction_type"])
    numbers = {"noise": both(case["noise_w"])}
    if "offset_draw_w" in case:
        numbers["offset"] = both(case["offset_draw_w"])
    t = rows(case["timesteps"]).long()
    estimator = ForwardNoise(case.get("noise_offset", 0.0))
    point = estimator(rows(case["latents"]), t, Given(numbers), process)
    separate = None if isinstance(case["cond_l"], str) else case["cond_l"]
    condition = both(case["cond_w"], separate)
    policy, reference = Net(case["policy_ab"], condition), Net(case["ref_ab"], condition)
    got = pair_results(objective, point, process, policy, reference)
    return got | {"noisy_latents": halves(point.x_t), "target": halves(point.target)}


@pytest.mark.parametrize("case", CASES, ids=lambda case: case["name"])
def test_diffusion_dpo_from_latents(case: dict[str, Any]) -> None:
    skip = dict.fromkeys(INPUTS, "input")
    got = forward_case(case, presets.diffusion_dpo(case["beta"]))
    if isinstance(case["target"], str):
        assert case["target"] == "noise_w repeated"
        stored = halves(both(case["noise_w"]))
        assert torch.equal(got["target"], stored)
        skip["target"] = "compared above"
    compare(case, got, skip=skip)


def test_dual_captions() -> None:
    (case,) = GOLDEN["dcpo"]["cases"]
    got = forward_case(case, presets.dcpo(case["beta"]))
    compare(case, got, skip=dict.fromkeys((*INPUTS, "target"), "input"))
    shared = forward_case(case | {"cond_l": "same as cond_w"}, presets.dcpo(case["beta"]))
    assert (shared["logit"] - got["logit"]).abs().min() > 1e-3


def test_flow_dpo() -> None:
    case = GOLDEN["flow_dpo"]
    process = RectifiedFlow()
    sigma = rows(case["sigma"])
    point = ForwardNoise()(
        rows(case["x0"]), sigma, Given({"noise": both(case["noise_w"])}), process
    )
    condition = both(case["cond"])
    policy, reference = Net(case["policy_ab"], condition), Net(case["ref_ab"], condition)
    objective = presets.flow_dpo(case["hp"]["beta"])
    got = pair_results(objective, point, process, policy, reference)
    got |= {"x_t": halves(point.x_t), "net_timestep": halves(process.timestep_input(sigma))}
    inputs = ("source", "hp", "net", "policy_ab", "ref_ab", "x0", "noise_w", "sigma", "cond")
    compare(case, got, skip=dict.fromkeys((*inputs, "note"), "input"))


def test_exchanged_pairs_negate_the_logit_and_give_the_npo_loss() -> None:
    case = CASES[0]
    got = forward_case(case, presets.diffusion_npo(case["beta"]))
    order = {"latents": [case["latents"][i] for i in (2, 3, 0, 1)]}
    swapped = forward_case(case | order, presets.diffusion_npo(case["beta"]))
    assert torch.equal(swapped["logit"], -got["logit"])
    expected = torch.nn.functional.softplus(tensor(case["logit"])).mean()
    assert swapped["loss"].item() == pytest.approx(expected.item(), abs=1e-9)


def test_input_perturbation_as_released_misses_the_rejected_target() -> None:
    """Drawn before the pair's noise is made equal: the second half is noised with another draw."""
    case = CASES[0]
    process, t = table(), torch.tensor(case["timesteps"])
    latents, first = tensor(case["latents"]), tensor(case["noise_w"])
    drawn = torch.cat([first, torch.randn_like(first)])  # all noise, before the copy
    perturbed = drawn + 0.1 * torch.randn_like(drawn)
    target = torch.cat([first, first])
    alpha, sigma = process.level(t, latents)
    seen = (process.add_noise(latents, perturbed, t) - alpha * latents) / sigma
    miss = (seen - target).square().flatten(1).mean(1)
    assert miss[:2].max() < 0.1 < miss[2:].min()
    assert not hasattr(ForwardNoise(), "input_perturbation")
