"""Noise processes: tables as schedulers make them, conversions between predictions, refusals."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from diffusers import DDIMScheduler, FlowMatchEulerDiscreteScheduler
from goldens import compare, tensor
from nets import GOLDEN, table

from mmalign.config import TimestepSpec
from mmalign.diffusion.process import (
    NoiseProcess,
    RectifiedFlow,
    VPSchedule,
    betas,
    draw_timesteps,
    process_from,
    zero_terminal,
)
from mmalign.errors import ConfigError

SCHEDULE = GOLDEN["schedule"]
PROCESSES: list[Any] = [
    *(table(kind) for kind in ("epsilon", "v_prediction", "sample")),
    RectifiedFlow(),
    RectifiedFlow(shift=3.0),
]
NAMES = ["epsilon", "v", "sample", "flow", "flow shifted"]


def timesteps(process: NoiseProcess, number: int = 7) -> torch.Tensor:
    u = (torch.arange(number, dtype=torch.float64) + 0.5) / number
    return process.timestep(u)


def test_table_of_sd() -> None:
    process = process_from(SCHEDULE["config"])
    assert isinstance(process, VPSchedule)
    assert process.prediction == "epsilon"
    assert process.table.dtype == torch.float32
    expected = torch.tensor(SCHEDULE["alphas_cumprod_float32"], dtype=torch.float32)
    assert torch.equal(process.table, expected)


def test_zero_terminal_snr_of_the_release() -> None:
    golden = SCHEDULE["zero_terminal_snr"]
    rescaled = zero_terminal(torch.cumprod(1.0 - betas(SCHEDULE["config"]).double(), dim=0))
    compare(
        {"alphas_cumprod": golden["alphas_cumprod"]},
        {"alphas_cumprod": rescaled[golden["timesteps"]]},
    )
    process = process_from(SCHEDULE["config"], zero_terminal_snr=True)
    assert isinstance(process, VPSchedule)
    assert process.ends_in_noise
    assert process.table[0] == table().table[0]
    torch.testing.assert_close(process.table.double(), rescaled, rtol=0, atol=1e-6)


def test_turbo_timesteps_of_the_release() -> None:
    """t -> 250 * (t mod 4) + 249; ours are the same four levels, by quantile."""
    golden = SCHEDULE["turbo_timesteps"]
    u = (tensor(golden["raw"]) % 4 + 0.5) / 4
    assert draw_timesteps(TimestepSpec(kind="turbo"), table(), u).tolist() == golden["mapped"]


@pytest.mark.parametrize("rescale", [False, True])
@pytest.mark.parametrize("kind", ["linear", "scaled_linear", "squaredcos_cap_v2"])
def test_tables_equal_diffusers(kind: str, rescale: bool) -> None:
    scheduler = DDIMScheduler(beta_schedule=kind, rescale_betas_zero_snr=rescale)
    process = process_from(scheduler.config)
    assert isinstance(process, VPSchedule)
    tol = 1e-6 if rescale else 0.0
    torch.testing.assert_close(process.table, scheduler.alphas_cumprod, rtol=0, atol=tol)


def test_trained_betas() -> None:
    listed = [0.1, 0.2, 0.3]
    process = process_from({"trained_betas": listed})
    assert isinstance(process, VPSchedule)
    torch.testing.assert_close(process.table, torch.tensor([0.9, 0.72, 0.504]))


def test_levels_of_a_flow_are_its_schedulers() -> None:
    scheduler = FlowMatchEulerDiscreteScheduler(num_train_timesteps=1000, shift=3.0)
    process = process_from({"_class_name": "FlowMatchEulerDiscreteScheduler", **scheduler.config})
    assert isinstance(process, RectifiedFlow)
    u = torch.arange(1000, dtype=torch.float64) / 1000
    t = process.timestep(u)
    torch.testing.assert_close(t.flip(0), scheduler.sigmas[:1000].float(), rtol=1e-6, atol=0)
    torch.testing.assert_close(process.timestep_input(t).flip(0), scheduler.timesteps.float())


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
@pytest.mark.parametrize("process", PROCESSES, ids=NAMES)
def test_a_perfect_prediction_gives_picture_and_noise_back(
    process: NoiseProcess, dtype: torch.dtype
) -> None:
    t = timesteps(process)
    x0, noise = torch.randn(2, len(t), 4, 3, 3, dtype=dtype)
    x_t, target = process.add_noise(x0, noise, t), process.target(x0, noise, t)
    assert x_t.dtype == target.dtype == dtype
    tol = {"rtol": 1e-9, "atol": 1e-9} if dtype == torch.float64 else {"rtol": 1e-4, "atol": 2e-4}
    torch.testing.assert_close(process.x0_from(target, x_t, t), x0, **tol)
    torch.testing.assert_close(process.eps_from(target, x_t, t), noise, **tol)


@pytest.mark.parametrize("process", PROCESSES, ids=NAMES)
def test_weights_turn_one_error_into_another(process: NoiseProcess) -> None:
    t = timesteps(process)
    x0, noise, prediction = torch.randn(3, len(t), 4, 3, 3, dtype=torch.float64)
    x_t = process.add_noise(x0, noise, t)

    def error(first: torch.Tensor, second: torch.Tensor) -> torch.Tensor:
        return (first - second).square().flatten(1).mean(1)

    raw = error(prediction, process.target(x0, noise, t))
    of_noise = error(process.eps_from(prediction, x_t, t), noise)
    of_x0 = error(process.x0_from(prediction, x_t, t), x0)
    alpha, sigma = (level.flatten() for level in process.level(t, x0))
    close: Any = {"rtol": 1e-5, "atol": 0}  # weights are float32
    weights = {k: process.error_weight(t, k).double() for k in ("epsilon", "sample", "min_snr")}
    torch.testing.assert_close(weights["epsilon"] * raw, of_noise, **close)
    torch.testing.assert_close(weights["sample"] * raw, of_x0, **close)
    snr = ((alpha / sigma) ** 2).clamp(max=5.0)
    torch.testing.assert_close(weights["min_snr"] * raw, snr * of_x0, **close)
    assert torch.equal(process.error_weight(t, "constant"), torch.ones(len(t)))


@pytest.mark.parametrize("process", PROCESSES, ids=NAMES)
def test_half_precision_is_computed_in_float32(process: NoiseProcess) -> None:
    t = timesteps(process)
    x0, noise = torch.randn(2, len(t), 4, 3, 3).bfloat16()
    x_t = process.add_noise(x0, noise, t)
    assert x_t.dtype == torch.float32
    exact = process.add_noise(x0.double(), noise.double(), t)
    torch.testing.assert_close(x_t.double(), exact, rtol=1e-5, atol=1e-6)


def test_a_half_precision_table_would_move_the_first_level_by_15_percent() -> None:
    """As SmPO and InPO are released; ours stays float32 whatever the images are."""
    process, t = table(), torch.tensor([0])
    _, sigma = process.level(t, torch.zeros(1, 4, 2, 2).half())
    released = 1.0 - process.table[0].half().float()
    assert released / sigma.flatten()[0] ** 2 == pytest.approx(1.15, abs=0.01)


def test_levels_below_the_schedule_are_the_first() -> None:
    process, like = table(), torch.zeros(2, 1)
    alpha, _ = process.level(torch.tensor([-99, 0]), like)
    assert alpha[0] == alpha[1]


def test_pure_noise() -> None:
    t = torch.tensor([999])
    x0, noise = torch.randn(2, 1, 4, 2, 2)
    for kind in ("epsilon", "v_prediction", "sample"):
        process = VPSchedule(zero_terminal(table().table), kind)
        assert torch.equal(process.add_noise(x0, noise, t), noise)
        assert torch.isfinite(process.error_weight(t, "min_snr")).all()
    process = VPSchedule(zero_terminal(table().table), "epsilon")
    with pytest.raises(ConfigError, match=r"ends in pure noise.*v_prediction"):
        process.x0_from(noise, noise, t)
    with pytest.raises(ConfigError, match="weighting: sample has no value"):
        process.error_weight(t, "sample")


SD = SCHEDULE["config"]
FLOW = {"_class_name": "FlowMatchEulerDiscreteScheduler", "shift": 3.0}


@pytest.mark.parametrize(
    ("config", "options", "message"),
    [
        (SD, {"prediction": "v_prediction"}, r"is 'v_prediction', but .* says 'epsilon'"),
        (SD, {"prediction": "flow"}, r"is 'flow', but the model's scheduler says 'epsilon'"),
        (SD | {"prediction_type": "score"}, {}, r"has prediction_type 'score'; known are"),
        (SD | {"_class_name": "EDMEulerScheduler"}, {}, r"EDMEulerScheduler is of another noise"),
        (SD | {"sigma_data": 0.5, "_class_name": "Mine"}, {}, r"process \(EDM\): its levels"),
        (SD | {"timestep_type": "continuous"}, {}, r"has timestep_type 'continuous'"),
        (SD | {"snr_shift_scale": 3.0}, {}, r"has snr_shift_scale 3\.0"),
        (SD | {"_class_name": "CogVideoXDPMScheduler"}, {}, r"has snr_shift_scale 3\.0"),
        (FLOW | {"shift_terminal": 0.02}, {}, r"has shift_terminal 0\.02"),
        (FLOW | {"invert_sigmas": True}, {}, r"has invert_sigmas True"),
        (SD | {"beta_schedule": "sigmoid"}, {}, r"beta_schedule 'sigmoid'; known are"),
        (FLOW, {"prediction": "epsilon"}, r"is 'epsilon', but .* one of flow\s*matching"),
        (FLOW, {"zero_terminal_snr": True}, r"zero_terminal_snr is true, but a flow"),
        (FLOW | {"use_dynamic_shifting": True}, {}, r"use_dynamic_shifting.*not built"),
    ],
)
def test_refusals(config: Any, options: Any, message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        process_from(config, **options)


def test_a_prediction_fills_in_what_the_scheduler_leaves_out() -> None:
    silent = {k: v for k, v in SD.items() if k != "prediction_type"}
    assert process_from(silent).prediction == "epsilon"
    assert process_from(silent, "v_prediction").prediction == "v_prediction"
    assert process_from(FLOW, "flow").prediction == "flow"
    plain = {"timestep_type": "discrete", "snr_shift_scale": 1.0}
    assert torch.equal(process_from(SD | plain).table, process_from(SD).table)  # pyright: ignore
    still = {"shift_terminal": None, "invert_sigmas": False}
    assert process_from(FLOW | still).grid(4) == process_from(FLOW).grid(4)


@pytest.mark.parametrize("num_steps", [0, 1001])
def test_grids_have_at_most_the_schedules_levels(num_steps: int) -> None:
    for process in (table(), RectifiedFlow()):
        with pytest.raises(ConfigError, match=f"num_steps is {num_steps}; the schedule has 1000"):
            process.grid(num_steps)
