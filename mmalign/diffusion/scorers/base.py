"""What a scorer is, and the arithmetic that all of them share."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Protocol

import torch
import torch.nn.functional as F
from torch import nn

from mmalign.errors import DataError

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence

    from PIL.Image import Image
    from torch import Tensor


class Scorer(Protocol):
    """How good N pictures are for their N prompts; more is better."""

    name: str

    def __call__(self, pictures: Sequence[Image], prompts: Sequence[str]) -> Tensor:
        """Scores [N], float32 on the CPU, as the published model gives them."""
        ...


@dataclass(frozen=True, slots=True)
class CosineScorer:
    """A scorer with a tower for pictures and one for prompts.

    score = scale * cos(picture, prompt)

    Attributes:
        name: What the scorer is called.
        embed_pictures: N RGB pictures to [N, D], of any length.
        embed_prompts: N texts to [N, D], of any length.
        scale: exp(logit_scale) of PickScore; 1 for CLIP and HPS.
    """

    name: str
    embed_pictures: Callable[[Sequence[Image]], Tensor]
    embed_prompts: Callable[[Sequence[str]], Tensor]
    scale: float = 1.0

    def __call__(self, pictures: Sequence[Image], prompts: Sequence[str]) -> Tensor:
        """The published score [N], float32 on the CPU."""
        return self.scale * self.cosine(pictures, prompts)

    @torch.no_grad()
    def cosine(self, pictures: Sequence[Image], prompts: Sequence[str]) -> Tensor:
        """The cosine without the scale [N], which SmPO's label is made from."""
        require_pairs(pictures, prompts)
        texts, index = distinct(prompts)
        picture = unit(self.embed_pictures(pictures))  # [N, D]
        text = unit(self.embed_prompts(texts)).to(picture.device)[index]  # [N, D]
        return (picture * text).sum(-1).cpu()


def unit(features: Tensor) -> Tensor:
    """Features [N, D] of length 1, in float32: a half-precision norm costs the third digit."""
    return F.normalize(features.float(), dim=-1)


def distinct(prompts: Sequence[str]) -> tuple[list[str], list[int]]:
    """The different prompts and where each of the N is among them; pairs share theirs."""
    place = {prompt: i for i, prompt in enumerate(dict.fromkeys(prompts))}
    return list(place), [place[prompt] for prompt in prompts]


def require_pairs(pictures: Sequence[Image], prompts: Sequence[str]) -> None:
    """Refuse an empty batch, and pictures without a prompt each.

    Raises:
        DataError: with the two numbers.
    """
    if not pictures or len(pictures) != len(prompts):
        raise DataError(
            f"a scorer was given {len(pictures)} pictures and {len(prompts)} prompts; it needs as "
            "many prompts as pictures, and at least one"
        )


def linear_head(width: int = 768) -> nn.Module:
    """width-1024-128-64-16-1 without activations, as the aesthetic predictor and ImageReward have.

    Five matrices in a row amount to one; they are kept apart because the released files hold them
    so. Where the releases have dropout, which does nothing when scoring, is the identity: it keeps
    their parameter names, `layers.0` to `layers.7`.
    """
    head = nn.Module()
    head.layers = nn.Sequential(
        nn.Linear(width, 1024),
        nn.Identity(),
        nn.Linear(1024, 128),
        nn.Identity(),
        nn.Linear(128, 64),
        nn.Identity(),
        nn.Linear(64, 16),
        nn.Linear(16, 1),
    )
    return head
