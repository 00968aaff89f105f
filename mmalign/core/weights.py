"""Row weights and soft labels computed from data, for the presets that read them."""

from __future__ import annotations

import math

import torch
from torch import Tensor

from mmalign.core.numerics import require


def semantic_weights(cosine: Tensor, alpha: float, normalize: bool = False) -> Tensor:  # [N] -> [N]
    """Sem-DPO's row weights exp(-alpha * (1 - cosine)); multiply a record's `weight` by them.

    Args:
        cosine: Similarity of the prompt's and the chosen response's embedding, in [-1, 1].
        alpha: At least 0; 0 gives weight 1 everywhere.
        normalize: Scale to mean 1, so that the learning rate keeps its meaning.

    Source: Sem-DPO, formula as quoted in public notes.
    """
    require(alpha >= 0.0, "alpha", alpha, "at least 0")
    weight = torch.exp(-alpha * (1.0 - cosine))
    return weight / weight.mean() if normalize else weight


def bald(probabilities: Tensor) -> Tensor:  # [T, N] -> [N]
    """Mutual information of T stochastic predictions of a binary label, in nats, in [0, log 2].

    B = H(mean over t of p_t) - mean over t of H(p_t); low means certain.

    Args:
        probabilities: P(first response wins) of each pass with dropout on.
    """
    spread = _binary_entropy(probabilities.mean(0)) - _binary_entropy(probabilities).mean(0)
    return spread.clamp(min=0.0)


def _binary_entropy(p: Tensor) -> Tensor:
    return -(torch.xlogy(p, p) + torch.xlogy(1.0 - p, 1.0 - p))


def uncertainty_labels(uncertainty: Tensor) -> Tensor:  # [N] -> [N, 2]
    """UPO's soft labels (1 - a, a) with a = B / (2 log 2), from 0 (certain) to 1/2 (no idea).

    Args:
        uncertainty: `bald` of each pair.

    Source: Uncertainty-Enhanced Preference Optimization (paper text).
    Departs: the printed a = 1 / (P + 1), P <= 1, is always at least 1/2: training would run
        backwards.
    """
    flip = (0.5 * uncertainty / math.log(2.0)).clamp(0.0, 0.5)
    return torch.stack([1.0 - flip, flip], dim=-1)


def uncertainty_sampling(uncertainty: Tensor, mu: float = 1.0) -> Tensor:  # [N] -> [N]
    """UPO's sampling probability of each pair, proportional to (1 - B)^mu.

    Args:
        uncertainty: `bald` of each pair.
        mu: Sharpness, at least 0; an exponent, since the printed factor would cancel.
    """
    require(mu >= 0.0, "mu", mu, "at least 0")
    weight = (1.0 - uncertainty) ** mu
    return weight / weight.sum()


def visit_labels(better: Tensor, worse: Tensor) -> Tensor:  # [N], [N] -> [N, 2]
    """MCTS-DPO's soft labels (1 - e, e), e = min(1 - 1 / (1 + worse / max(1, better)), 1/2).

    Args:
        better: Visit count of the better child.
        worse: Visit count of the worse child.

    Source: Xie et al. 2024, arXiv:2405.00451, released code.
    """
    ratio = worse / better.clamp(min=1)
    smoothing = (1.0 - 1.0 / (1.0 + ratio)).clamp(max=0.5)
    return torch.stack([1.0 - smoothing, smoothing], dim=-1)
