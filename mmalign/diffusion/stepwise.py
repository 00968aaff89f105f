"""SPO's arithmetic: log-densities of single steps of a sampler, and pairs among their results.

Only the arithmetic: sampling with the model while it trains, and a preference model that judges
noisy images, are not part of this package. The loss is `mmalign.core.presets.spo`.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

from mmalign.core.numerics import full_precision
from mmalign.diffusion.process import NoiseProcess, ddim_std


def ddim_step_stats(
    eps: Tensor, x_t: Tensor, t: Tensor, process: NoiseProcess, num_steps: int, eta: float = 1.0
) -> tuple[Tensor, Tensor]:
    """Mean and standard deviation of the next image of a stochastic DDIM step.

    p = max(t - floor(T / num_steps), 0); spread = eta * `ddim_std`(p, t);
    mean = alpha_p x0 + sqrt(sigma_p^2 - spread^2) eps, x0 = (x_t - sigma_t eps) / alpha_t.

    Args:
        eps: [N, ...] predicted noise, after guidance.
        x_t: [N, ...] images at t.
        t: [N] timesteps, not pure noise.
        process: A noise table.
        num_steps: Steps of the sampler.
        eta: 0 is deterministic and has no density; 1 is the ancestral sampler.

    Returns:
        [N, ...] means and [N, 1, ...] standard deviations.

    Source: Song et al. 2021, arXiv:2010.02502; Liang et al. 2024, arXiv:2406.04314, released code.
    """
    eps, x_t = full_precision(eps), full_precision(x_t)
    previous = (t - process.num_timesteps // num_steps).clamp(min=0)
    alpha, sigma = process.level(t, x_t)
    alpha_p, sigma_p = process.level(previous, x_t)
    spread = eta * ddim_std(previous, t, x_t, process)
    direction = (sigma_p**2 - spread**2).clamp(min=0.0).sqrt()
    return alpha_p * ((x_t - sigma * eps) / alpha) + direction * eps, spread


def gaussian_logp(x: Tensor, mean: Tensor, spread: Tensor) -> Tensor:  # [N]
    """Log-density of independent normal numbers, **averaged** over the elements of an image.

    Args:
        x: [N, ...] images that were drawn; no gradient flows into them.
        mean: [N, ...].
        spread: [N, 1, ...] standard deviation, above 0.
    """
    x, mean, spread = full_precision(x.detach()), full_precision(mean), full_precision(spread)
    density = -((x - mean) ** 2) / (2.0 * spread**2) - spread.log() - 0.5 * math.log(2.0 * math.pi)
    return density.flatten(1).mean(1)


def best_and_worst(scores: Tensor, threshold: float) -> tuple[Tensor, Tensor]:
    """Which of several next images make a pair.

    A pair counts where softmax(best, worst) has a gap above `threshold`: tanh((best - worst) / 2).

    Args:
        scores: [M, N] of M candidates for each of N images.
        threshold: In [0, 1]; 0.3 for SD 1.5, 0.4 for SDXL.

    Returns:
        [2, N] positions of the best and the worst candidate; [N] bool, pairs that count.
    """
    scores = full_precision(scores)
    best, worst = scores.max(0), scores.min(0)
    gap = torch.tanh(0.5 * (best.values - worst.values))
    return torch.stack([best.indices, worst.indices]), gap > threshold
