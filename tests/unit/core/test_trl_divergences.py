"""Losses on margins under TRL's alpha divergence, and AlphaPO's bend of either sign.

The numbers were made by TRL 1.16's DPOTrainer on five pairs of sequence log-probabilities, beta
0.1, label_smoothing 0.1: each pair's loss and its gradient by the two policy log-probabilities.
"""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from goldens import columns, sequences

from mmalign.core import presets
from mmalign.core.divergence import PowerScore
from mmalign.errors import ConfigError

POLICY_CHOSEN = [-190.434021, -237.801865, -139.565796, -190.434021, -237.801865]
POLICY_REJECTED = [-142.634933, -139.565796, -142.634933, -139.565796, -142.634933]
REF_CHOSEN = [-184.955139, -246.595581, -138.775192, -184.955139, -246.595581]
REF_REJECTED = [-149.745117, -138.775192, -149.745117, -138.775192, -149.745117]

TRL: dict[tuple[str, float], tuple[list[float], list[float], list[float]]] = {
    ("hinge", 0.3): (
        [7.6137996, 0.7518466, 1.2474716, 7.3663278, 0.9993182],
        [-4.6303487, -0.0002122, -0.1739195, -4.6303487, -0.0002122],
        [0.00068938, 0.17391953, 0.00068938, 0.17391953, 0.00068938],
    ),
    ("hinge", 1.5): (
        [7.9852862, 0.0, 7.8635116, 1.1217741, 0.0],
        [-0.0064606, 0.0, -0.0673477, -0.0064606, 0.0],
        [3.4991035, 0.0, 3.4991035, 0.0673477, 0.0],
    ),
    ("exo", 0.3): (
        [2.2894382, 0.3828474, 0.6536709, 2.2861774, 0.5104513],
        [-0.0545931, -0.0001018, -0.1046841, -0.0679068, -0.0001165],
        [8.12801e-06, 0.08345402, 0.00041495, 0.00255063, 0.00037856],
    ),
    ("exo", 1.5): (
        [2.2931702, 0.1053590, 2.2920794, 0.5794846, 0.1045804],
        [-5.48e-05, 1.15e-05, -0.0006365, -0.0037317, 0.0055461],
        [0.02967897, 0.0, 0.03306957, 0.03890041, -0.0023901],
    ),
    ("rdpo", 0.3): (
        [7.4418650, 0.5457291, 0.8554527, 7.1638355, 0.6927211],
        [-5.2029381, -0.0001195, -0.1194052, -5.2011986, -0.0001326],
        [0.00077463, 0.09796505, 0.0004733, 0.19536111, 0.00043075],
    ),
    ("rdpo", 1.5): (
        [7.8593717, -2.0130470, 7.7224951, 0.7711084, -1.1550114],
        [-0.0072623, -1.0149429, -0.0756958, -0.0042343, -1.0157295],
        [3.9332566, 0.0084185, 3.9328380, 0.0441401, 0.4377273],
    ),
    ("discopop", 0.3): (
        [6.6151404, 0.7788274, 0.8277298, 6.3680449, 0.8471072],
        [-4.6241446, -0.0001591, -0.0874551, -4.6224055, 0.0001657],
        [0.00068846, 0.13040589, 0.00034665, 0.17362118, -0.00053855],
    ),
    ("discopop", 1.5): (
        [6.9862113, 1.0138e-07, 6.8645563, 0.7859650, 9.69935e-05],
        [-0.0064547, -8.0e-07, -0.0672774, -0.0001648, -0.0007875],
        [3.4958684, 0.0, 3.4954500, 0.0017174, 0.0003394],
    ),
}


def pairs() -> Any:
    return sequences(columns(POLICY_CHOSEN, POLICY_REJECTED), columns(REF_CHOSEN, REF_REJECTED))


@pytest.mark.parametrize(("name", "coefficient"), TRL)
def test_trl_coefficients_below_and_above_one(name: str, coefficient: float) -> None:
    flip: dict[str, Any] = {"flip": 0.1} if name in ("exo", "rdpo") else {}
    objective = presets.build(
        name, beta=0.1, divergence="alpha", alpha=coefficient, compat="trl-1.16", **flip
    )
    batch = pairs()
    loss = objective(batch)
    loss.value.backward()
    rows, chosen, rejected = TRL[name, coefficient]
    assert loss.rows is not None
    assert loss.rows.tolist() == pytest.approx(rows, rel=2e-5, abs=1e-7)
    slope = batch.policy.grad[..., 0] * len(rows)  # the loss is a mean over rows
    assert slope[:, 0].tolist() == pytest.approx(chosen, rel=2e-4, abs=2e-7)
    assert slope[:, 1].tolist() == pytest.approx(rejected, rel=2e-4, abs=2e-7)


def test_without_compat_alpha_is_the_papers() -> None:
    ours = presets.build("hinge", beta=0.1, divergence="alpha", alpha=0.7)(pairs()).value
    theirs = presets.build("hinge", beta=0.1, divergence="alpha", alpha=0.3, compat="trl-1.16")(
        pairs()
    ).value
    assert ours.item() == pytest.approx(theirs.item(), rel=1e-12)
    with pytest.raises(ConfigError, match=r"alpha is -0.5.*compat: trl-1.16"):
        presets.build("hinge", divergence="alpha", alpha=-0.5)
    with pytest.raises(ConfigError, match="'js' has no such parameter"):
        presets.build("hinge", divergence="js", alpha=1.5, compat="trl-1.16")


def test_the_released_targets_of_exo_stay_apart_from_trl() -> None:
    released = presets.build("exo", beta=0.1, flip=0.1, compat="official")(pairs()).value
    assert released.item() != pytest.approx(presets.exo(0.1, 0.1)(pairs()).value.item(), rel=0.01)


@pytest.mark.parametrize("alpha", [-0.15, -0.5, -1.0, -3.0, 0.25])
def test_alphapo_by_hand(alpha: float) -> None:
    """Mean log-probabilities -0.5 and -2 a token: p = e^a, reward (1 - p^-alpha) / alpha."""
    policy = torch.tensor([[[-0.25, -0.75], [-1.0, -3.0]]], dtype=torch.float64)
    batch = sequences(policy)
    loss = presets.build("alphapo", beta=2.0, gamma=0.3, alpha=alpha)(batch).value
    loss.backward()
    bent = [(1 - math.exp(a) ** -alpha) / alpha for a in (-0.5, -2.0)]
    margin = 2.0 * (bent[0] - bent[1]) - 0.3
    assert loss.item() == pytest.approx(math.log1p(math.exp(-margin)), rel=1e-12)
    outer = -1 / (1 + math.exp(margin))
    slope = [2.0 * outer * math.exp(-alpha * a) / 2 for a in (-0.5, -2.0)]  # 2 tokens a response
    assert batch.policy.grad is not None
    expected = [[slope[0]] * 2, [-slope[1]] * 2]
    torch.testing.assert_close(batch.policy.grad[0], torch.tensor(expected, dtype=torch.float64))


@pytest.mark.parametrize("alpha", [1e-13, -1e-13, 1e-9, -1e-9, 1e-5, -1e-5])
def test_the_bend_is_exact_near_zero(alpha: float) -> None:
    """x - alpha x^2 / 2 + ..., also in float32, where (1 - p^-alpha) / alpha has no digit left."""
    x = torch.linspace(-60.0, 20.0, 33, requires_grad=True)
    value = PowerScore(alpha)(x)
    series = x.detach().double() * (1 - alpha * x.detach().double() / 2)
    torch.testing.assert_close(value.detach().double(), series, rtol=1e-6, atol=1e-6)
    (slope,) = torch.autograd.grad(value.sum(), x)
    torch.testing.assert_close(slope, torch.exp(-alpha * x.detach()), rtol=1e-6, atol=0.0)


def test_a_negative_bend_ends_at_its_floor_and_never_in_nan() -> None:
    """TRL's power of exp(a) is 0^-alpha below -104: 0 here too, but with a nan gradient there."""
    x = torch.tensor([-500.0, -200.0, 0.0], requires_grad=True)
    value = PowerScore(-0.5)(x)
    value.sum().backward()
    assert value.tolist() == pytest.approx([-2.0, -2.0, 0.0])
    assert x.grad is not None
    assert bool(x.grad.isfinite().all())
    assert x.grad[2].item() == 1.0
    with pytest.raises(ConfigError, match="alpha is inf; it must be finite"):
        PowerScore(math.inf)
