"""Preference alignment for text, image and video models, with one set of losses."""

from __future__ import annotations

from collections.abc import Callable
from typing import TypeVar

from mmalign import moved

__version__ = "0.1.0"

Function = TypeVar("Function", bound="Callable[..., object]")


def objective(function: Function) -> Function:
    """Mark a function that makes an `Objective`, so that configs elsewhere may name it.

    A config names a loss of one's own as `module:function`. Without the mark it can name those
    alone that lie beside it: a config from a stranger must not run whatever is installed.
    """
    function.__mmalign_objective__ = True  # type: ignore[attr-defined]
    return function


def rule(function: Function) -> Function:
    """Mark a function that judges responses, so that configs elsewhere may name it.

    As `objective`, for `judge: [{rule: module:function}]`.
    """
    function.__mmalign_rule__ = True  # type: ignore[attr-defined]
    return function


moved.install()
