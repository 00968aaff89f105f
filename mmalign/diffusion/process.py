"""Noise processes.

How a clean image becomes a noisy one, what is predicted, and which timesteps are drawn.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping
from typing import Any, Literal

import torch
from torch import Tensor

from mmalign.config import TimestepSpec
from mmalign.core.numerics import full_precision
from mmalign.errors import ConfigError

BETA_SCHEDULES = ("linear", "scaled_linear", "squaredcos_cap_v2")


def betas(scheduler_config: Mapping[str, Any]) -> Tensor:  # [T] float32
    """The variances added at each step, as diffusers computes them, in float32 as in training.

    Args:
        scheduler_config: Contents of `scheduler_config.json`; what is missing has the value that
            diffusers gives it.

    Raises:
        ConfigError: A schedule that no supported model was trained with.
    """
    from diffusers.schedulers.scheduling_ddpm import DDPMScheduler

    kind = scheduler_config.get("beta_schedule", "linear")
    if scheduler_config.get("trained_betas") is None and kind not in BETA_SCHEDULES:
        raise ConfigError(
            f"the model's scheduler has beta_schedule {kind!r}; known are "
            f"{', '.join(BETA_SCHEDULES)} and a list in trained_betas"
        )
    names = ("num_train_timesteps", "beta_start", "beta_end", "beta_schedule", "trained_betas")
    own = {name: scheduler_config[name] for name in names if name in scheduler_config}
    return DDPMScheduler(**own).betas


def zero_terminal(table: Tensor) -> Tensor:  # [T] -> [T]
    """The table rescaled so that it ends in pure noise and begins where it began.

    s <- (s - s_last) * s_first / (s_first - s_last), s the square root of the table.

    Source: Lin et al. 2023, arXiv:2305.08891, algorithm 1.
    Departs: diffusers goes back to betas from here and rounds on the way, by up to 8e-7.
    """
    root = table.sqrt()
    first, last = root[0], root[-1]
    return ((root - last) * first / (first - last)) ** 2


Prediction = Literal["epsilon", "v_prediction", "sample", "flow"]
Weighting = Literal["constant", "epsilon", "sample", "min_snr"]
Size = tuple[int, int]  # height and width of latents


class NoiseProcess(ABC):
    """A forward process, x_t = alpha_t x0 + sigma_t noise, and one kind of prediction.

    Numbers are computed in float32, in float64 where an image is float64, never in half precision.

    Attributes:
        prediction: What the network returns: "epsilon" the noise, "sample" the clean image,
            "v_prediction" alpha noise - sigma x0, "flow" noise - x0.
        num_timesteps: Levels of the schedule the network was trained on.
        ends_in_noise: A table whose last entry keeps nothing of the image.
    """

    prediction: Prediction
    num_timesteps: int
    ends_in_noise: bool = False

    def at(self, size: Size) -> NoiseProcess:
        """The process of latents of one size, where its levels depend on that."""
        return self

    @abstractmethod
    def timestep(self, u: Tensor) -> Tensor:  # [N] -> [N]
        """The timestep at a quantile of the schedule: 0 is the least noise, 1 (excluded) the most.

        Args:
            u: [N] in [0, 1), any float type.
        """

    @abstractmethod
    def timestep_input(self, t: Tensor) -> Tensor:  # [N] -> [N]
        """The number that the network is given for `t`."""

    @abstractmethod
    def grid(self, num_steps: int) -> list[float]:
        """Levels of a sampler's walk through the schedule, rising, in units of `t`.

        num_steps + 1 numbers; the first may lie below the schedule.

        Raises:
            ConfigError: More steps than the schedule has levels.
        """

    @abstractmethod
    def level(self, t: Tensor, like: Tensor) -> tuple[Tensor, Tensor]:
        """alpha_t and sigma_t, shaped [N, 1, ...] for `like`; below the schedule: its first level.

        Args:
            t: [N] timesteps, on any device.
            like: [N, ...]; gives device and number of axes, and float64 where it is float64.
        """

    def add_noise(self, x0: Tensor, noise: Tensor, t: Tensor) -> Tensor:  # [N, ...]
        """x_t = alpha_t x0 + sigma_t noise."""
        alpha, sigma = self.level(t, x0)
        return alpha * full_precision(x0) + sigma * full_precision(noise)

    def target(self, x0: Tensor, noise: Tensor, t: Tensor) -> Tensor:  # [N, ...]
        """What a perfect network returns for the x_t of `x0` and `noise`."""
        x0, noise = full_precision(x0), full_precision(noise)
        if self.prediction == "epsilon":
            return noise
        if self.prediction == "sample":
            return x0
        if self.prediction == "flow":
            return noise - x0
        alpha, sigma = self.level(t, x0)
        return alpha * noise - sigma * x0

    def x0_from(self, pred: Tensor, x_t: Tensor, t: Tensor) -> Tensor:  # [N, ...]
        """The clean image that a prediction implies.

        Raises:
            ConfigError: The noise table ends in pure noise and the network predicts noise: there
                the clean image does not follow from it.
        """
        alpha, sigma = self.level(t, x_t)
        pred, x_t = full_precision(pred), full_precision(x_t)
        if self.prediction == "sample":
            return pred
        if self.prediction == "v_prediction":
            return alpha * x_t - sigma * pred
        if self.prediction == "flow":
            return x_t - sigma * pred
        self._has_signal("the clean image cannot be estimated from predicted noise")
        return (x_t - sigma * pred) / alpha

    def eps_from(self, pred: Tensor, x_t: Tensor, t: Tensor) -> Tensor:  # [N, ...]
        """The noise that a prediction implies."""
        alpha, sigma = self.level(t, x_t)
        pred, x_t = full_precision(pred), full_precision(x_t)
        if self.prediction == "epsilon":
            return pred
        if self.prediction == "v_prediction":
            return alpha * pred + sigma * x_t
        if self.prediction == "flow":
            return x_t + alpha * pred
        return (x_t - alpha * pred) / sigma

    def prediction_from(self, eps: Tensor, x_t: Tensor, t: Tensor) -> Tensor:  # [N, ...]
        """The prediction that implies a noise: `eps_from` undone; `t` is not pure noise."""
        alpha, sigma = self.level(t, x_t)
        eps, x_t = full_precision(eps), full_precision(x_t)
        if self.prediction == "epsilon":
            return eps
        if self.prediction == "v_prediction":
            return (eps - sigma * x_t) / alpha
        if self.prediction == "flow":
            return (eps - x_t) / alpha
        return (x_t - sigma * eps) / alpha

    def error_weight(self, t: Tensor, kind: Weighting, gamma: float = 5.0) -> Tensor:  # [N]
        """Factor of the squared error of the raw prediction, at each timestep.

        "epsilon" makes it the error of the implied noise, "sample" the error of the implied clean
        image; "min_snr" is the latter times min(alpha^2 / sigma^2, gamma).

        Args:
            t: [N] timesteps.
            kind: Which weight.
            gamma: min_snr: the largest signal-to-noise ratio that counts.

        Raises:
            ConfigError: "sample" with predicted noise on a table that ends in pure noise.

        Source: Hang et al. 2023, arXiv:2303.09556 (min_snr); the others are changes of variable.
        """
        alpha, sigma = self.level(t, torch.empty(len(t), device=t.device))
        if kind == "constant":
            return torch.ones_like(alpha)
        if kind == "epsilon":
            return {
                "epsilon": torch.ones_like(alpha),
                "v_prediction": alpha**2,
                "flow": alpha**2,
                "sample": (alpha / sigma) ** 2,
            }[self.prediction]
        if kind == "min_snr":
            ratio = (alpha / sigma) ** 2
            if self.prediction == "epsilon":  # in this order also where the ratio is 0
                return (gamma / ratio).clamp(max=1.0)
            of_sample = 1.0 if self.prediction == "sample" else sigma**2
            return of_sample * ratio.clamp(max=gamma)
        if self.prediction == "sample":
            return torch.ones_like(alpha)
        if self.prediction != "epsilon":
            return sigma**2
        self._has_signal("timesteps.weighting: sample has no value")
        return (sigma / alpha) ** 2

    def _stride(self, num_steps: int) -> int:
        if not 1 <= num_steps <= self.num_timesteps:
            raise ConfigError(
                f"num_steps is {num_steps}; the schedule has {self.num_timesteps} levels, so it "
                f"must be 1 to {self.num_timesteps}"
            )
        return self.num_timesteps // num_steps

    def _has_signal(self, consequence: str) -> None:
        if self.ends_in_noise:
            raise ConfigError(
                f"{consequence}: the noise table ends in pure noise (zero terminal SNR) and the "
                "model predicts noise. Use a model of v_prediction, or zero_terminal_snr: false"
            )


class VPSchedule(NoiseProcess):
    """Variance-preserving process (DDPM): alpha_t^2 = alphas_cumprod[t], sigma_t^2 = 1 - that.

    Args:
        alphas_cumprod: [T] float32, falling; 0 at the end is allowed (zero terminal SNR).
        prediction: "epsilon", "v_prediction" or "sample".
    """

    def __init__(self, alphas_cumprod: Tensor, prediction: Prediction = "epsilon") -> None:
        if prediction == "flow":
            raise ConfigError("a table of alphas_cumprod has no flow prediction")
        self.prediction = prediction
        self.table = full_precision(alphas_cumprod.detach()).cpu()
        self.num_timesteps = len(self.table)
        self.ends_in_noise = bool(self.table[-1] <= 0.0)
        self._moved: dict[torch.device, Tensor] = {}

    def timestep(self, u: Tensor) -> Tensor:  # [N] -> [N] int64
        """floor(T u), an index of the table."""
        index = (u.double() * self.num_timesteps).floor().long()
        return index.clamp(0, self.num_timesteps - 1)

    def timestep_input(self, t: Tensor) -> Tensor:  # [N] -> [N]
        """The index itself."""
        return t

    def grid(self, num_steps: int) -> list[float]:
        """1 - S, 1, 1 + S, ..., with S = floor(T / num_steps), as diffusers 0.20 spaces them."""
        stride = self._stride(num_steps)
        return [1 - stride + i * stride for i in range(num_steps + 1)]

    def level(self, t: Tensor, like: Tensor) -> tuple[Tensor, Tensor]:
        """Square roots of the table at `t` and of its complement; t < 0 reads entry 0."""
        if like.device not in self._moved:
            self._moved[like.device] = self.table.to(like.device)
        index = t.to(like.device).long().clamp(min=0)
        share = self._moved[like.device][index]
        share = share.double() if like.dtype == torch.float64 else share
        share = share.view(-1, *(1,) * (like.dim() - 1))
        return share.sqrt(), (1.0 - share).sqrt()


class RectifiedFlow(NoiseProcess):
    """Straight paths: x_sigma = (1 - sigma) x0 + sigma noise, velocity noise - x0; t is sigma.

    Args:
        num_timesteps: Levels of the schedule; the network is given num_timesteps * sigma.
        shift: s moves level u to s u / (1 + (s - 1) u): more noise for s > 1 (3 for SD3).
        shift_at: s for latents of a size, where it depends on that; `at` gives the process.
    """

    prediction: Prediction = "flow"

    def __init__(
        self,
        num_timesteps: int = 1000,
        shift: float = 1.0,
        shift_at: Callable[[Size], float] | None = None,
    ) -> None:
        self.num_timesteps = num_timesteps
        self.shift, self._shift_at = shift, shift_at
        self._by_size: dict[Size, RectifiedFlow] = {}

    def at(self, size: Size) -> NoiseProcess:
        """The flow with the shift of this size; the same object each time."""
        if self._shift_at is None:
            return self
        if size not in self._by_size:
            self._by_size[size] = RectifiedFlow(self.num_timesteps, self._shift_at(size))
        return self._by_size[size]

    def timestep(self, u: Tensor) -> Tensor:  # [N] -> [N] float32
        """The shifted level (floor(T u) + 1) / T: the levels of the scheduler, never 0."""
        index = (u.double() * self.num_timesteps).floor().clamp(0, self.num_timesteps - 1)
        return self._shifted((index + 1.0) / self.num_timesteps).float()

    def timestep_input(self, t: Tensor) -> Tensor:  # [N] -> [N]
        """num_timesteps * sigma."""
        return t * self.num_timesteps

    def grid(self, num_steps: int) -> list[float]:
        """Shifted levels 0, 1/n, ..., 1; the walk begins at the clean image itself."""
        self._stride(num_steps)
        levels = torch.arange(num_steps + 1, dtype=torch.float64) / num_steps
        return self._shifted(levels).tolist()

    def level(self, t: Tensor, like: Tensor) -> tuple[Tensor, Tensor]:
        """1 - sigma and sigma."""
        wide = torch.float64 if like.dtype == torch.float64 else torch.float32
        sigma = t.to(device=like.device, dtype=wide).clamp(min=0.0)
        sigma = sigma.view(-1, *(1,) * (like.dim() - 1))
        return 1.0 - sigma, sigma

    def _shifted(self, u: Tensor) -> Tensor:
        return self.shift * u / (1.0 + (self.shift - 1.0) * u)


def process_from(
    scheduler_config: Mapping[str, Any],
    prediction: str = "auto",
    zero_terminal_snr: bool = False,
    shift_at: Callable[[Size], float] | None = None,
) -> NoiseProcess:
    """The noise process that a model's scheduler describes.

    Args:
        scheduler_config: Contents of `scheduler_config.json`.
        prediction: `diffusion.prediction`; other than "auto" it must agree with the scheduler, or
            fill in what that leaves out.
        zero_terminal_snr: Rescale the table so that it ends in pure noise.
        shift_at: A flow's shift for latents of a size, read with `use_dynamic_shifting` alone;
            None: the family has none.

    Raises:
        ConfigError: A prediction that contradicts the scheduler, or a schedule that is not known.
    """
    name = str(scheduler_config.get("_class_name", ""))
    said = scheduler_config.get("prediction_type")
    _refuse_others(name, scheduler_config)
    is_flow = (
        "FlowMatch" in name
        or said == "flow_prediction"
        or bool(scheduler_config.get("use_flow_sigmas"))
    )
    if is_flow:
        if prediction not in ("auto", "flow"):
            raise ConfigError(
                f"diffusion.prediction is {prediction!r}, but the model's scheduler is one of flow "
                "matching; use auto or flow"
            )
        if zero_terminal_snr:
            raise ConfigError(
                "diffusion.zero_terminal_snr is true, but a flow always ends in pure noise; remove "
                "it"
            )
        return _flow(scheduler_config, shift_at)
    if said not in (None, "epsilon", "v_prediction", "sample"):
        raise ConfigError(
            f"the model's scheduler {name or 'without a name'} has prediction_type {said!r}; known "
            "are noise tables (epsilon, v_prediction, sample) and flow matching"
        )
    if prediction == "flow" or prediction not in ("auto", said or prediction):
        raise ConfigError(
            f"diffusion.prediction is {prediction!r}, but the model's scheduler says "
            f"{said or 'a noise table'!r}. Training on another target would undo what the model "
            "has learned; use auto, or correct scheduler/scheduler_config.json"
        )
    table = torch.cumprod(1.0 - betas(scheduler_config), dim=0)
    if zero_terminal_snr or scheduler_config.get("rescale_betas_zero_snr"):
        table = zero_terminal(table)
    kind: Any = (said or "epsilon") if prediction == "auto" else prediction
    return VPSchedule(table, kind)


_OTHER_LEVELS = ("EDM", "CosineDPM", "Karras", "ScoreSde", "CMStochastic", "IPNDM", "Wuerstchen")
"""Parts of the names of schedulers whose levels are no table of alphas_cumprod and no flow."""

_SHIFTED = "CogVideoX"  # its schedulers divide the ratio of signal to noise, by 3 unless told


def _refuse_others(name: str, config: Mapping[str, Any]) -> None:
    """Refuse levels that the table of betas, or the flow's shift, does not say."""
    who = f"the model's scheduler {name or 'without a name'}"
    known = "known are noise tables (DDPM, DDIM, Euler, ...) and flow matching with a fixed shift"
    if any(part in name for part in _OTHER_LEVELS) or config.get("sigma_data") is not None:
        kind = "EDM" if "EDM" in name or config.get("sigma_data") is not None else name
        raise ConfigError(
            f"{who} is of another noise process ({kind}): its levels are no table of betas and no "
            f"flow; {known}"
        )
    snr = config.get("snr_shift_scale", 3.0 if _SHIFTED in name else 1.0)
    values = {
        "timestep_type": (config.get("timestep_type", "discrete"), "discrete"),
        "snr_shift_scale": (snr, 1.0),
        "shift_terminal": (config.get("shift_terminal") or None, None),
        "invert_sigmas": (bool(config.get("invert_sigmas")), False),
    }
    for key, (found, plain) in values.items():
        if found is not None and found != plain:
            raise ConfigError(
                f"{who} has {key} {found!r}, which changes its noise levels and is not built; "
                f"{known}"
            )


def _flow(config: Mapping[str, Any], shift_at: Callable[[Size], float] | None) -> RectifiedFlow:
    num = int(config.get("num_train_timesteps", 1000))
    if not config.get("use_dynamic_shifting"):
        return RectifiedFlow(num, float(config.get("flow_shift", config.get("shift", 1.0))))
    if shift_at is None:
        raise ConfigError(
            "the model's scheduler shifts its levels by the size of the image "
            "(use_dynamic_shifting), which is not built for its family; a fixed shift is"
        )
    return RectifiedFlow(num, shift_at=shift_at)


def ddim_step(
    x: Tensor, eps: Tensor, source: Tensor, goal: Tensor, process: NoiseProcess
) -> Tensor:  # [N, ...]
    """One deterministic step of the sampler, in either direction, each image at its own level.

    x_b = alpha_b x0 + sigma_b eps with x0 = (x_a - sigma_a eps) / alpha_a; in a flow the same as
    x_a + (sigma_b - sigma_a) (eps - x0).

    Args:
        x: [N, ...] images at level a.
        eps: [N, ...] the noise seen in them.
        source: [N] levels a; not pure noise.
        goal: [N] levels b.
        process: The noise process.
    """
    (alpha, sigma), (alpha_goal, sigma_goal) = process.level(source, x), process.level(goal, x)
    return alpha_goal * ((x - sigma * eps) / alpha) + sigma_goal * eps


def renoise(
    x: Tensor, noise: Tensor, source: Tensor, goal: Tensor, process: NoiseProcess
) -> Tensor:  # [N, ...]
    """Images at level a taken to level b, which has more noise, with fresh noise.

    x_b = alpha_b (x_a / alpha_a + sqrt(rho_b^2 - rho_a^2) noise), rho = sigma / alpha.

    Args:
        x: [N, ...] images at level a.
        noise: [N, ...] standard normal.
        source: [N] levels a; not pure noise.
        goal: [N] levels b, not below a.
        process: The noise process.
    """
    alpha, _ = process.level(source, x)
    alpha_goal, _ = process.level(goal, x)
    return alpha_goal * (x / alpha) + _added_variance(source, goal, x, process).sqrt() * noise


def ddim_std(lower: Tensor, upper: Tensor, like: Tensor, process: NoiseProcess) -> Tensor:
    """Standard deviation of the sampler's step from `upper` to `lower` at eta = 1, [N, 1, ...].

    (sigma_l / sigma_u) sqrt(sigma_u^2 - (alpha_u / alpha_l)^2 sigma_l^2)
    """
    _, sigma = process.level(lower, like)
    _, sigma_up = process.level(upper, like)
    return (sigma / sigma_up) * _added_variance(lower, upper, like, process).sqrt()


def _added_variance(source: Tensor, goal: Tensor, like: Tensor, process: NoiseProcess) -> Tensor:
    alpha, sigma = process.level(source, like)
    alpha_goal, sigma_goal = process.level(goal, like)
    return (sigma_goal**2 - (alpha_goal * sigma / alpha) ** 2).clamp(min=0.0)


REFINER_SHARE = 0.2
"""SDXL's refiner was trained on the 200 cleanest of 1000 levels."""

TURBO_LEVELS = 4
"""SDXL Turbo was distilled at the last level of each quarter: 249, 499, 749, 999."""


def draw_timesteps(spec: TimestepSpec, process: NoiseProcess, u: Tensor) -> Tensor:  # [N] -> [N]
    """Timesteps from uniform numbers; equally spaced numbers give a stratified set.

    uniform: quantile low + (high - low) u of the schedule. refiner: u / 5. turbo: the last level
    of quarter floor(4 u). logit_normal: sigmoid(mean + std * z), z the normal quantile of u; a
    positive mean draws more noise.

    Args:
        spec: Kind and its settings.
        process: Turns quantiles of the schedule into its timesteps.
        u: [N] in [0, 1), float64.

    Source: DiffusionDPO's released script (refiner, turbo); Esser et al. 2024, arXiv:2403.03206
        (logit_normal).
    Departs: turbo's level follows the quantile instead of the remainder of a whole number; the
        distribution is the same and sets stay stratified.
    """
    u = u.double()
    if spec.kind == "refiner":
        u = REFINER_SHARE * u
    elif spec.kind == "turbo":
        end_of_quarter = ((TURBO_LEVELS * u).floor() + 1.0) / TURBO_LEVELS
        u = end_of_quarter - 0.5 / process.num_timesteps  # the middle of its last level
    elif spec.kind == "logit_normal":
        u = torch.sigmoid(spec.mean + spec.std * torch.special.ndtri(u))
    else:
        u = spec.low + (spec.high - spec.low) * u
    return process.timestep(u)
