"""Scorers of images: to label pairs, to smooth labels, and to compare two models.

    name            model                                       score
    clip            ViT-H-14, laion2B                           cosine
    pickscore       CLIP-H tuned on Pick-a-Pic                  exp(logit_scale) * cosine, about 20
    hps-v2, v2.1    ViT-H-14 tuned on HPD                       cosine
    aesthetic       OpenAI ViT-L/14 and a linear head           about 1 to 10; reads no prompt
    image-reward    BLIP large and a linear head                about -2 to 2

Importing this loads torch only; `load_scorer` loads what a scorer needs.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from pathlib import Path

import torch

from mmalign.diffusion.scorers import image_reward, towers
from mmalign.diffusion.scorers.towers import CosineScorer, Scorer
from mmalign.errors import ConfigError

__all__ = ["SCORERS", "CosineScorer", "Scorer", "load_scorer", "parse_scorer"]


SCORERS: dict[str, Callable[[Path | None, torch.device, torch.dtype], Scorer]] = {
    "clip": towers.clip,
    "pickscore": towers.pickscore,
    "hps-v2": partial(towers.hps, "v2"),
    "hps-v2.1": partial(towers.hps, "v2.1"),
    "aesthetic": towers.aesthetic,
    "image-reward": image_reward.image_reward,
}
"""Name to a function of (path, device, dtype); add one's own to use it by name."""


def load_scorer(
    name: str,
    path: str | Path | None = None,
    device: str | torch.device | None = None,
    dtype: torch.dtype = torch.float32,
) -> Scorer:
    """A scorer with its weights.

    Args:
        name: One of `SCORERS`.
        path: A local folder with its files under their released names, or its main file; None for
            the hub.
        device: By default the accelerator where there is one.
        dtype: Of the networks; scores are float32 whatever it is.

    Raises:
        ConfigError: There is no such scorer.
        CheckpointError: Its weights are unavailable, or are those of another model.
    """
    if name not in SCORERS:
        raise ConfigError(f"there is no scorer {name!r}; it must be one of {', '.join(SCORERS)}")
    if device is None:
        device = "cuda" if torch.cuda.is_available() else "cpu"
    local = None if path is None else Path(path).expanduser()
    return SCORERS[name](local, torch.device(device), dtype)


def parse_scorer(text: str) -> tuple[str, str | None]:
    """NAME or NAME=PATH of a command line as (name, path).

    Raises:
        ConfigError: There is no such scorer.
    """
    name, _, path = text.partition("=")
    if name not in SCORERS:
        raise ConfigError(f"--scorer {text}: there is no scorer {name!r}; {', '.join(SCORERS)}")
    return name, path or None
