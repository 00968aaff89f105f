"""TVBench: ten temporal tasks that one frame does not answer."""

from __future__ import annotations

from mmalign.benchmark.choice import BothCodes, TaskFiles


class TVBench(BothCodes, TaskFiles):
    """Accuracy per task; the average is over all questions."""

    name = "tvbench"
    title = "TVBench, 10 tasks"
    metric = "accuracy over all questions; macro and each task besides"
    source = "Cores et al. 2024, arXiv:2410.07752; pritamqu/RRPO, eval/tvbench"

    def clip(self, video: str, task: str) -> str:
        """Each task has a folder of its name."""
        return f"{task}/{video}"
