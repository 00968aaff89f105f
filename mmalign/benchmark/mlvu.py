"""MLVU, the tasks with options: long videos."""

from __future__ import annotations

from mmalign.benchmark.choice import TaskFiles
from mmalign.benchmark.sources import Entry, Source


class MLVU(TaskFiles):
    """Mean over tasks of their accuracy (M-Avg)."""

    name = "mlvu"
    title = "MLVU, multiple choice"
    layout = "task.json: [{video, question, question_type, candidates, answer, prediction?}, ...]"
    metric = "unweighted mean of the tasks' accuracy; over all questions besides"
    headline = "macro"
    source = "Zhou et al. 2024, arXiv:2406.04264; pritamqu/RRPO, eval/mlvu"

    def task(self, entry: Entry, source: Source) -> str:
        """Named in each question; files are called 1_plotQA.json and so on."""
        return entry.maybe("question_type") or source.path.stem
