"""Intervals, the paired bootstrap, and the format all benchmarks share."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from runs import VIDEOHALLUCER, scored, write

from mmalign.bench import (
    BENCHMARKS,
    Prediction,
    compare,
    find,
    read_files,
    score,
    write_predictions,
)
from mmalign.bench.base import Sheet
from mmalign.errors import DataError
from mmalign.stats import bootstrap_interval, percentile_interval


def rows(right: str, *, videos: int = 0) -> list[Prediction]:
    """One row a character; 1 is a right answer. With `videos`, that many rows share a video."""
    return [
        Prediction(
            f"q{i:03}", "tvbench", "t", "A" if hit == "1" else "B", "A", ("x", "y"),
            meta={"video": f"v{i // videos:03}"} if videos else {},
        )
        for i, hit in enumerate(right)
    ]  # fmt: skip


def test_an_interval_of_a_mean_is_that_of_evaluate() -> None:
    hits = "1101001110"
    found = score(find("tvbench"), rows(hits), num_resamples=1000, seed=3)
    values = np.asarray([float(hit) for hit in hits])
    assert found.intervals["accuracy"] == pytest.approx(bootstrap_interval(values, seed=3))


def test_questions_of_one_video_are_drawn_together() -> None:
    """Ten videos whose ten questions are all right or all wrong are ten draws, not a hundred."""
    hits = "".join(str(i % 2) * 10 for i in range(10))
    together = score(find("tvbench"), rows(hits, videos=10)).intervals["accuracy"]
    alone = score(find("tvbench"), rows(hits)).intervals["accuracy"]
    values = np.asarray([float(i % 2) for i in range(10)])
    assert together == pytest.approx(bootstrap_interval(values))
    assert alone[1] - alone[0] < 0.5 * (together[1] - together[0])


def test_the_order_of_a_file_does_not_matter() -> None:
    given = rows("110100111")
    backwards = score(find("tvbench"), given[::-1])
    assert score(find("tvbench"), given).intervals == backwards.intervals


def test_resamples_are_sums_of_units() -> None:
    sheet = Sheet()
    for unit, value in zip("abc", (1, 10, 100), strict=True):
        sheet.add(unit, x=value, n=1)
    found = sheet.resampled(num_resamples=130, seed=1)
    rng = np.random.default_rng(1)
    drawn = [np.array([1, 10, 100])[rng.integers(0, 3, 3)].sum() for _ in range(130)]
    assert found["x"].tolist() == drawn
    assert set(found["n"]) == {3}


def test_resamples_without_a_value_do_not_count() -> None:
    assert percentile_interval(np.asarray([1.0, np.nan, 1.0])) == (1.0, 1.0)
    assert np.isnan(percentile_interval(np.asarray([np.nan]))).all()


def test_runs_are_compared_pair_by_pair() -> None:
    """B gains questions 3 and 4 and loses none: the difference is 2/6, never below 0.

    It is 0 where neither is drawn, with probability (4/6)^6 = 8.8 %.
    """
    a, b = rows("110000"), rows("111100")
    found = compare(find("tvbench"), a, b, num_resamples=2000)
    part = found.differences["accuracy"]
    assert (part.a, part.b) == (pytest.approx(2 / 6), pytest.approx(4 / 6))
    assert part.difference == pytest.approx(2 / 6)
    assert part.below_0 == 0
    assert part.above_0 == pytest.approx(1 - (4 / 6) ** 6, abs=0.02)
    assert found.changed == (2, 0)
    gain = np.asarray([0, 0, 1, 1, 0, 0], dtype=np.float64)
    assert part.interval == pytest.approx(bootstrap_interval(gain, num_resamples=2000))


def test_a_run_against_itself_differs_nowhere() -> None:
    found = compare(find("tvbench"), rows("1100"), rows("1100"))
    assert all(part.interval == (0, 0) for part in found.differences.values())
    assert all(part.above_0 == part.below_0 == 0 for part in found.differences.values())


def test_runs_with_other_questions_are_refused() -> None:
    a, b = rows("1100"), rows("11000")
    with pytest.raises(DataError, match=r"1 ids are only in B: 'q004'.*--questions"):
        compare(find("tvbench"), a, b)
    with pytest.raises(DataError, match=r"1 ids are only in A: 'q004'"):
        compare(find("tvbench"), b, a)
    other = [replace(a[0], answer="B"), *a[1:]]
    with pytest.raises(DataError, match=r"differ in what is right for 1 ids: 'q000'"):
        compare(find("tvbench"), a, other)


def test_a_converted_file_scores_the_same(tmp_path: Path) -> None:
    kind = find("videohallucer")
    native = write(tmp_path / "raw.json", VIDEOHALLUCER)
    common = tmp_path / "out" / "common.jsonl"
    write_predictions(common, read_files(kind, [native]))
    assert scored("videohallucer", common) == scored("videohallucer", native)


def test_questions_without_an_answer_in_a_common_file_are_missing(tmp_path: Path) -> None:
    kind = find("videohallucer")
    native = write(tmp_path / "raw.json", VIDEOHALLUCER)
    common = tmp_path / "common.jsonl"
    write_predictions(common, read_files(kind, [native])[:6])  # without the pair of temporal
    found = scored("videohallucer", common, questions=native)
    assert found.counts["missing"] == 2
    assert found.metrics["accuracy/temporal"] == 0
    assert "accuracy/temporal" not in scored("videohallucer", common).metrics


def test_names_are_unique_and_every_benchmark_says_what_it_reads() -> None:
    assert len(BENCHMARKS) == 16
    for name, kind in BENCHMARKS.items():
        for said in ("title", "layout", "metric", "strict", "legacy", "source", "suffix"):
            assert isinstance(getattr(kind, said), str), (name, said)
        assert kind.unit in ("pair", "video")
