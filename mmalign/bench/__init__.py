"""Video benchmarks: their question files, their metrics, and how sure the numbers are."""

from mmalign.bench.base import Prediction, Question, write_predictions
from mmalign.bench.registry import BENCHMARKS, find, questions, read_files
from mmalign.bench.score import Comparison, Score, compare, score

__all__ = [
    "BENCHMARKS",
    "Comparison",
    "Prediction",
    "Question",
    "Score",
    "compare",
    "find",
    "questions",
    "read_files",
    "score",
    "write_predictions",
]
