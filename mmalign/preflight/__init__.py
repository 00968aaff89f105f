"""Checks of a run before step 1: impossible settings are refused, doubtful ones reported."""

from mmalign.preflight.doubts import Plan, doubts

__all__ = ["Plan", "doubts"]
