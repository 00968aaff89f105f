"""The random streams of one process, to be saved, restored and set aside."""

from __future__ import annotations

import random
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any, cast

import numpy as np
import torch

if TYPE_CHECKING:
    from collections.abc import Iterator, Mapping


def rng_state() -> dict[str, Any]:
    """State of the Python, NumPy, CPU and current GPU generators, in plain types and tensors."""
    numpy = cast("tuple[str, np.ndarray, int, int, float]", np.random.get_state(legacy=True))
    name, keys, position, has_gauss, cached = numpy
    state: dict[str, Any] = {
        "python": random.getstate(),
        "numpy": (name, keys.tolist(), position, has_gauss, cached),
        "torch": torch.get_rng_state(),
    }
    if torch.cuda.is_available():
        state["cuda"] = torch.cuda.get_rng_state()
    return state


def set_rng_state(state: Mapping[str, Any]) -> None:
    """Put all generators where `rng_state` found them."""
    random.setstate(state["python"])
    np.random.set_state(state["numpy"])
    torch.set_rng_state(state["torch"])
    if "cuda" in state and torch.cuda.is_available():
        torch.cuda.set_rng_state(state["cuda"])


@contextmanager
def own_random_stream(seed: int) -> Iterator[None]:
    """Everything inside draws from `seed`; outside nothing has happened.

    Evaluation and sampling run in it: they use the same noise every time, and how often they run
    does not change the training.
    """
    before = rng_state()
    random.seed(seed)
    np.random.seed(seed % 2**32)
    torch.manual_seed(seed)  # of every device
    try:
        yield
    finally:
        set_rng_state(before)
