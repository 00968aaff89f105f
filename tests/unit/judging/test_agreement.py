"""A judge beside human labels: accuracy, its interval, and kappa."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
from judged_rows import judged, write

from mmalign.judging.agreement import agreement, cohens_kappa
from mmalign.judging.base import read_judged


def test_ties_of_the_judge_count_half_and_human_ties_for_kappa_alone(tmp_path: Path) -> None:
    rows = [
        judged("a", [2, 1], human=[1, 0]),
        judged("b", [1, 2], human=[1, 0]),
        judged("c", [1, 1], human=[1, 0]),
        judged("d", [2, 1], human=[1, 1]),
        judged("e", [2, None], human=[1, 0]),
        judged("f", [2, 1]),
        judged("g", [3, 2, 1], human=[2, 3, None]),
    ]
    found = agreement(read_judged(write(tmp_path / "j.jsonl", rows)))
    assert found is not None
    assert found.accuracy == pytest.approx(1.5 / 4)
    assert (found.num_pairs, found.num_rows) == (5, 4)
    assert (found.judge_ties, found.human_ties) == (0.2, 0.2)
    # Signs (human, judge): (1, 1), (1, -1), (1, 0), (0, 1), (-1, 1).
    assert found.kappa == pytest.approx((1 / 5 - (9 + 1 + 1) / 25) / (1 - 11 / 25))
    assert agreement(read_judged(write(tmp_path / "n.jsonl", rows[5:6]))) is None


def test_wins_say_whom_the_judge_prefers(tmp_path: Path) -> None:
    row = judged("a", [0.5, 0.5], human=[0, 1], wins=[[0.5, 0.2], [0.8, 0.5]])
    found = agreement(read_judged(write(tmp_path / "j.jsonl", [row])))
    assert found is not None
    assert found.accuracy == 1.0


def test_the_interval_covers_the_truth_about_as_often_as_it_says(tmp_path: Path) -> None:
    """Rows of three responses, whose pairs go together: the judge is right on a row or wrong."""
    rng = np.random.default_rng(0)
    covered = 0
    for trial in range(20):
        right = rng.random(60) < 0.7
        rows = [judged(str(k), [1, 2, 3] if r else [3, 2, 1], human=[1, 2, 3])
                for k, r in enumerate(right)]  # fmt: skip
        found = agreement(read_judged(write(tmp_path / "j.jsonl", rows)), seed=trial)
        assert found is not None
        covered += found.interval[0] <= 0.7 <= found.interval[1]
    assert covered >= 17


def test_kappa_by_hand() -> None:
    """The table (20, 5; 10, 15): agreement 0.7, chance 0.5."""
    first = np.repeat([1, 1, -1, -1], [20, 5, 10, 15])
    second = np.repeat([1, -1, 1, -1], [20, 5, 10, 15])
    assert cohens_kappa(first, second) == pytest.approx(0.4)
    assert np.isnan(cohens_kappa(np.ones(3), np.ones(3)))
