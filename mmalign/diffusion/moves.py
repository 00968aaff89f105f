"""Steps between noise levels: the sampler's, forwards and backwards, and more noise.

Levels are timesteps of the noise process, one a picture; alpha and sigma are those of a level.
"""

from __future__ import annotations

from torch import Tensor

from mmalign.diffusion.process import NoiseProcess


def ddim_move(
    x: Tensor, eps: Tensor, source: Tensor, goal: Tensor, process: NoiseProcess
) -> Tensor:  # [N, ...]
    """One deterministic step of the sampler, in either direction.

    x_b = alpha_b x0 + sigma_b eps with x0 = (x_a - sigma_a eps) / alpha_a; in a flow the same as
    x_a + (sigma_b - sigma_a) (eps - x0).

    Args:
        x: [N, ...] pictures at level a.
        eps: [N, ...] the noise seen in them.
        source: [N] levels a; not pure noise.
        goal: [N] levels b.
        process: The noise process.
    """
    (alpha, sigma), (alpha_goal, sigma_goal) = process.level(source, x), process.level(goal, x)
    return alpha_goal * ((x - sigma * eps) / alpha) + sigma_goal * eps


def noisier(
    x: Tensor, noise: Tensor, source: Tensor, goal: Tensor, process: NoiseProcess
) -> Tensor:  # [N, ...]
    """Pictures at level a taken to a noisier level b with fresh noise.

    x_b = alpha_b (x_a / alpha_a + sqrt(rho_b^2 - rho_a^2) noise), rho = sigma / alpha.

    Args:
        x: [N, ...] pictures at level a.
        noise: [N, ...] standard normal.
        source: [N] levels a; not pure noise.
        goal: [N] levels b, not below a.
        process: The noise process.
    """
    alpha, _ = process.level(source, x)
    alpha_goal, _ = process.level(goal, x)
    return alpha_goal * (x / alpha) + _added_variance(source, goal, x, process).sqrt() * noise


def ddim_spread(lower: Tensor, upper: Tensor, like: Tensor, process: NoiseProcess) -> Tensor:
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
