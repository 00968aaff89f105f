"""The toy adapter, on request, under the name of a modality that configs know."""

from __future__ import annotations

import pytest
from toy_adapter import TOY, TOY_TOOLS

from mmalign.models.adapter import ADAPTERS, TOOLS


@pytest.fixture
def toy(monkeypatch: pytest.MonkeyPatch) -> None:
    """Let `modality: text` mean the toy adapter."""
    monkeypatch.setitem(ADAPTERS, "text", TOY)
    monkeypatch.setitem(TOOLS, "text", TOY_TOOLS)
