"""Video benchmarks: their question files, their metrics, and how sure the numbers are."""

from mmalign.benchmark.compare import Comparison, compare
from mmalign.benchmark.files import questions, read_files
from mmalign.benchmark.records import Prediction, Question, write_predictions
from mmalign.benchmark.registry import BENCHMARKS, find
from mmalign.benchmark.score import Score, score

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
