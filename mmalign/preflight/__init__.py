"""What is doubtful about the settings of a run that may nevertheless be meant, before step 1."""

from mmalign.preflight.doubts import Plan, doubts

__all__ = ["Plan", "doubts"]
