"""Golden cases of SmPO's and InPO's inversions, under both released grids."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from goldens import compare, tensor
from nets import GOLDEN, Given, Net, halves, pair_results, rows, table

from mmalign.core import presets
from mmalign.diffusion.estimators import DDIMInversion, Networks, ReNoise

CASES = GOLDEN["inversion"]["cases"]
INPUTS = (
    *("method", "semantics", "num_inversion_steps", "t", "eta", "net", "policy_ab", "ref_ab"),
    *("beta", "latents", "cond", "p_win", "draws", "note"),
)
WORKING = [case for case in CASES if "raises" not in case]
(BROKEN,) = [case for case in CASES if "raises" in case]


def name(case: dict[str, Any]) -> str:
    return "-".join(str(case[key]) for key in ("method", "semantics", "num_inversion_steps", "t"))


RELEASED = {"legacy": "diffusers_0_20", "modern": "diffusers"}


def estimator(case: dict[str, Any], inversion: str = "") -> DDIMInversion:
    kind: Any = inversion or RELEASED[case["semantics"]]
    if case["method"] == "smpo":
        return ReNoise(case["num_inversion_steps"], kind)
    return DDIMInversion(case["num_inversion_steps"], kind, case["eta"])


def given(case: dict[str, Any]) -> Given:
    numbers = {f"eta {i}": rows(draw) for i, draw in enumerate(case.get("draws", []))}
    return Given(numbers or {"none": rows(case["latents"])})


def conditions(case: dict[str, Any]) -> torch.Tensor:
    return rows([*case["cond"], *case["cond"]])


@pytest.mark.parametrize("case", WORKING, ids=name)
def test_inversion(case: dict[str, Any]) -> None:
    process, x0 = table(), rows(case["latents"])
    t = torch.full((len(x0),), case["t"])
    policy = Net(case["policy_ab"], conditions(case))
    reference = Net(case["ref_ab"], conditions(case))
    point = estimator(case)(x0, t, given(case), process, Networks(policy))
    calls = [call[0] for call in policy.called]
    labels = None
    if case["method"] == "smpo":
        labels = tensor([[case["p_win"], 1.0 - case["p_win"]]] * 2)
        objective = presets.smpo(10.0 * case["beta"])
    else:
        objective = presets.inpo(case["beta"])
    got = pair_results(objective, point, process, policy, reference, labels)
    got["x_t"], got["target_noise"] = halves(point.x_t), halves(point.target)
    got["net_calls_t"] = tensor([*calls, case["t"]])
    grid = process.grid(case["num_inversion_steps"])
    got["grid"] = tensor(grid[:-1] if case["semantics"] == "legacy" else grid[1:])
    twice = 2 if case["method"] == "smpo" else 1
    got["visited"] = tensor(calls[::twice])
    compare(case, got, skip=dict.fromkeys(INPUTS, "input"))


def test_the_recorded_index_error_is_none_here() -> None:
    """As released, the noise after the move to 901 reads entry 1001 of 1000."""
    process = table()
    assert BROKEN["raises"].startswith("IndexError")
    with pytest.raises(IndexError):
        process.table[901 + 1000 // BROKEN["num_inversion_steps"]]
    x0 = rows(BROKEN["latents"])
    t = torch.full((len(x0),), BROKEN["t"])
    noise = {f"eta {i}": torch.randn_like(x0) for i in range(10)}
    net = Net(BROKEN["policy_ab"], conditions(BROKEN))
    point = estimator(BROKEN)(x0, t, Given(noise), process, Networks(net))
    assert torch.isfinite(point.x_t).all()
    assert [call[0] for call in net.called] == BROKEN["grid"]
    # Where the release does not fail, the last entry is never read: same result as before.
    below = {f"eta {i}": noise[f"eta {i}"] for i in range(9)}
    t = torch.full((len(x0),), 850)
    assert torch.isfinite(estimator(BROKEN)(x0, t, Given(below), process, Networks(net)).x_t).all()


@pytest.mark.parametrize("case", WORKING, ids=name)
def test_landing_differs_from_the_release_and_lands(case: dict[str, Any]) -> None:
    process, x0 = table(), rows(case["latents"])
    t = torch.full((len(x0),), case["t"])
    net = Net(case["policy_ab"], conditions(case))
    point = estimator(case, "exact")(x0, t, Given(_enough(case)), process, Networks(net))
    assert all(0 <= call[0] < max(case["t"], 1) for call in net.called)
    if case["t"] > 0:
        assert (halves(point.x_t) - tensor(case["x_t"])).abs().max() > 1e-6


def _enough(case: dict[str, Any]) -> dict[str, torch.Tensor]:
    return {f"eta {i}": torch.randn_like(rows(case["latents"])) for i in range(12)}
