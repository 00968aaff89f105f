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

from functools import partial
from importlib import import_module
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from mmalign.diffusion.scorers.towers import CosineScorer, Scorer
from mmalign.errors import ConfigError

if TYPE_CHECKING:
    from collections.abc import Callable

__all__ = ["SCORERS", "CosineScorer", "Scorer", "load_scorer", "parse_scorer"]


def _in_module(module: str, function: str, *arguments: Any) -> Callable[..., Scorer]:
    def build(path: Path | None, device: torch.device, dtype: torch.dtype) -> Scorer:
        found = getattr(import_module(f"mmalign.diffusion.scorers.{module}"), function)
        return partial(found, *arguments)(path, device, dtype)

    return build


SCORERS: dict[str, Callable[..., Scorer]] = {
    "clip": _in_module("towers", "clip"),
    "pickscore": _in_module("towers", "pickscore"),
    "hps-v2": _in_module("towers", "hps", "v2"),
    "hps-v2.1": _in_module("towers", "hps", "v2.1"),
    "aesthetic": _in_module("towers", "aesthetic"),
    "image-reward": _in_module("image_reward", "image_reward"),
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
