"""The shared core: it knows log-probabilities only; imports torch and errors, nothing else."""

from mmalign.core import links, presets, terms, weights
from mmalign.core.batchwide import Aot, AotUnpaired, Bco, Kto, KtoPair, RunningMean
from mmalign.core.divergence import (
    DIVERGENCES,
    Alpha,
    ChiSquaredKL,
    ForwardKL,
    Hellinger,
    Jeffreys,
    JensenShannon,
    LogOdds,
    MapoScore,
    ReverseKL,
    SkewedJensenShannon,
    Transform,
    register_divergence,
    resolve_divergence,
)
from mmalign.core.links import Link
from mmalign.core.objective import Objective
from mmalign.core.score import Score
from mmalign.core.terms import KlGap, KlPenalty, LogRatio, Nll, OnlineKl, Preference, Term, WeightL1
from mmalign.core.types import CandidateLogps, Loss, Needs
from mmalign.core.weights import Wpo, reweight

__all__ = [
    "DIVERGENCES",
    "Alpha",
    "Aot",
    "AotUnpaired",
    "Bco",
    "CandidateLogps",
    "ChiSquaredKL",
    "ForwardKL",
    "Hellinger",
    "Jeffreys",
    "JensenShannon",
    "KlGap",
    "KlPenalty",
    "Kto",
    "KtoPair",
    "Link",
    "LogOdds",
    "LogRatio",
    "Loss",
    "MapoScore",
    "Needs",
    "Nll",
    "Objective",
    "OnlineKl",
    "Preference",
    "ReverseKL",
    "RunningMean",
    "Score",
    "SkewedJensenShannon",
    "Term",
    "Transform",
    "WeightL1",
    "Wpo",
    "links",
    "presets",
    "register_divergence",
    "resolve_divergence",
    "reweight",
    "terms",
    "weights",
]
