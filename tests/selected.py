"""Which of many alike cases the default run takes; the others are `runs` or `slow`."""

from __future__ import annotations

from collections.abc import Collection, Iterable
from pathlib import Path
from typing import Any

import pytest


def some_configs(paths: Iterable[Path], slow: Collection[str] = ()) -> list[Any]:
    """Every sixteenth config by default; those in `slow` have a twin that is tried as well."""
    return [
        pytest.param(
            path,
            id=path.stem,
            marks=pytest.mark.slow if path.stem in slow else [pytest.mark.runs] * (number % 16 > 0),
        )
        for number, path in enumerate(paths)
    ]
