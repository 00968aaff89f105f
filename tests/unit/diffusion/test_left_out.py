"""What is left out of images is told to whoever reads the run later."""

from __future__ import annotations

import logging
from pathlib import Path

import pytest
from picture_runs import configured, write_data

from mmalign.models.adapter import survey_rows
from mmalign.preflight.check import check_config as check


def test_rows_that_are_left_out_are_heard_once(
    sd15_dir: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    """In the words of the terminal; env.json, the card and the report are written from them."""
    data = write_data(tmp_path, "pairs")["pairs"]
    (data.parent / "2-chosen.png").write_bytes(b"no picture")
    config = configured(tmp_path / "c", sd15_dir, data)
    with caplog.at_level(logging.WARNING):
        found = survey_rows(config, check(config).needs)
    assert [row.id for row in found.train] == ["row-0", "row-1", "row-3"]
    told = [*found.logged, *found.notes]
    left_out = [note for note in told if "cannot be decoded are left out: row-2: " in note]
    assert len(left_out) == 1
    assert left_out[0] in caplog.text
