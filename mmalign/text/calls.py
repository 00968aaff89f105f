"""Calls into classes of models that are not ours: their mode, and what they raise as a sentence."""

from __future__ import annotations

from contextlib import contextmanager
from typing import TYPE_CHECKING

import torch

from mmalign.errors import ConfigError, MmalignError

if TYPE_CHECKING:
    from collections.abc import Iterator

    from torch import nn

FAULTS = (
    ArithmeticError,
    AssertionError,
    AttributeError,
    LookupError,
    RuntimeError,
    TypeError,
    ValueError,
)


@contextmanager
def refusing(model: nn.Module, what: str) -> Iterator[None]:
    """Turn a fault in a model's own code into a ConfigError that names the class and `what`."""
    try:
        yield
    except (MmalignError, torch.OutOfMemoryError):
        raise
    except FAULTS as error:
        raise ConfigError(
            f"model.path: {type(model).__name__} cannot be trained here: {what} raises "
            f"{describe(error)}"
        ) from error


def describe(error: Exception) -> str:
    """Type and first line of an error."""
    lines = str(error).strip().splitlines()
    return f"{type(error).__name__}: {lines[0][:200]}" if lines else type(error).__name__


@contextmanager
def in_mode(model: nn.Module, *, training: bool) -> Iterator[None]:
    """One mode for all modules; each module's own mode afterwards."""
    modes = [(module, module.training) for module in model.modules()]
    try:
        model.train(training)
        yield
    finally:
        for module, mode in modes:
            module.training = mode
