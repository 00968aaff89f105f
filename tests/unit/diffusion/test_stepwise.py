"""SPO: densities of a sampler's steps and the clipped loss, against the release."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from goldens import compare, tensor
from nets import GOLDEN, table

from mmalign.core import CandidateLogps, presets
from mmalign.diffusion.stepwise import best_and_worst, ddim_step_stats, gaussian_logp
from mmalign.errors import ConfigError

SPO = GOLDEN["spo"]
HYPER = SPO["hp"]


def densities(eps: torch.Tensor) -> dict[str, torch.Tensor]:
    """Of both next images, [N] each."""
    x_t, t = tensor(SPO["x_t"]), torch.tensor(SPO["timesteps"])
    mean, spread = ddim_step_stats(eps, x_t, t, table(), HYPER["num_steps"], HYPER["eta"])
    return {side: gaussian_logp(tensor(SPO[f"x_prev_{side}"]), mean, spread) for side in "wl"}


def batch(policy: dict[str, Any], reference: dict[str, Any]) -> CandidateLogps:
    columns = torch.stack([policy["w"], policy["l"]], 1).unsqueeze(-1)
    return CandidateLogps(
        policy=columns,
        mask=torch.ones_like(columns, dtype=torch.bool),
        labels=torch.tensor([1.0, 0.0]).expand(len(columns), 2),
        reference=torch.stack([reference["w"], reference["l"]], 1).unsqueeze(-1),
    )


def test_spo() -> None:
    eps = tensor(SPO["eps_policy"]).requires_grad_()
    policy, reference = densities(eps), densities(tensor(SPO["eps_ref"]))
    loss = presets.spo(HYPER["beta"], HYPER["eps"])(batch(policy, reference))
    (slope,) = torch.autograd.grad(loss.value, eps)
    got = {"loss": loss.value, "grad_eps_policy": slope}
    low, high = 1.0 - HYPER["eps"], 1.0 + HYPER["eps"]
    for side in "wl":
        got[f"logp_policy_{side}"] = policy[side]
        got[f"logp_ref_{side}"] = reference[side]
        got[f"ratio_{side}"] = (policy[side] - reference[side]).exp().clamp(low, high)
    compare(SPO, got, skip={k: "input" for k in SPO if k not in got})


def test_pairs_of_a_step() -> None:
    case = SPO["compare"]
    index, valid = best_and_worst(tensor(case["scores"]), HYPER["threshold"])
    assert index.tolist() == case["best_worst_index"]
    assert valid.tolist() == case["valid"]
    close = torch.tensor([[1.0, 1.0], [1.5, 1.7]])  # tanh(.25) = .245, tanh(.35) = .336
    assert best_and_worst(close, 0.3)[1].tolist() == [False, True]


def test_a_deterministic_step_is_the_samplers() -> None:
    from mmalign.diffusion.process import ddim_step

    process, t = table(), torch.tensor([801, 401, 51])
    eps, x = torch.randn(2, 3, 4, 2, 2, dtype=torch.float64)
    mean, spread = ddim_step_stats(eps, x, t, process, 20, eta=0.0)
    torch.testing.assert_close(mean, ddim_step(x, eps, t, t - 50, process))
    assert not spread.any()


def test_the_whole_step_keeps_the_variance_of_the_process() -> None:
    """mean and spread of x_{t-1} given x0 add up to the process at t-1, when eps is the noise."""
    process, t = table(), torch.tensor([401])
    x0, noise = torch.zeros(1, 1, 1, 1).double(), torch.ones(1, 1, 1, 1).double()
    x_t = process.add_noise(x0, noise, t)
    mean, spread = ddim_step_stats(noise, x_t, t, process, 20)
    _, sigma = process.level(t - 50, x0)
    torch.testing.assert_close(mean**2 + spread**2, sigma**2)


@pytest.mark.parametrize("eps", [0.0, 1.0])
def test_bad_clip(eps: float) -> None:
    with pytest.raises(ConfigError, match=r"eps is .*in \(0, 1\)"):
        presets.spo(eps=eps)
