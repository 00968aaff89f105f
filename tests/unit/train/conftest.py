"""Every test here trains the toy adapter, under the name of a modality that configs know."""

from __future__ import annotations

import pytest
from toy_adapter import TOY, TOY_TOOLS

from mmalign.models.adapter import ADAPTERS, TOOLS


@pytest.fixture(autouse=True)
def _toy(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(ADAPTERS, "text", TOY)
    monkeypatch.setitem(TOOLS, "text", TOY_TOOLS)
