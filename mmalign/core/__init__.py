"""The shared core: it knows only log-probabilities. Imports torch, the standard library and errors."""

from mmalign.core.types import CandidateLogps, Loss, Needs

__all__ = ["CandidateLogps", "Loss", "Needs"]
