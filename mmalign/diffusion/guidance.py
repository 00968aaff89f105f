"""Guidance by two predictions, of one model or of two."""

from __future__ import annotations

from torch import Tensor

from mmalign.core.numerics import full_precision


def guided(
    eps_pos: Tensor, eps_neg: Tensor, guidance: float, rescale: float = 0.0
) -> Tensor:  # [N, ...]
    """The prediction moved away from a negative one.

    e = eps_neg + guidance (eps_pos - eps_neg), then
    rescale * e std(eps_pos) / std(e) + (1 - rescale) * e, std over the elements of each picture.

    Linear in the predictions, so that raw outputs of any one kind may be given. Diffusion-NPO
    takes `eps_neg` from a second model: the one trained on exchanged pairs.

    Args:
        eps_pos: [N, ...] with the prompt.
        eps_neg: [N, ...] without it, or with a negative prompt, or of a negative model.
        guidance: 1 is `eps_pos` alone.
        rescale: Share of the spread that is put back, in [0, 1].

    Source: Ho & Salimans 2022, arXiv:2207.12598; rescale Lin et al. 2023, arXiv:2305.08891;
        Diffusion-NPO's released pipelines.
    """
    eps_pos, eps_neg = full_precision(eps_pos), full_precision(eps_neg)
    mixed = eps_neg + guidance * (eps_pos - eps_neg)
    if rescale == 0.0:
        return mixed
    axes = tuple(range(1, mixed.dim()))
    spread = eps_pos.std(axes, keepdim=True) / mixed.std(axes, keepdim=True)
    return rescale * (mixed * spread) + (1.0 - rescale) * mixed
