"""The shared core: it knows log-probabilities only; imports torch and errors, nothing else."""

from mmalign.core import links, listwise, presets, regularisers, several, terms, weights
from mmalign.core.batchwide import Aot, AotUnpaired, Bco, RunningMean
from mmalign.core.catalogue import DIVERGENCES, register_divergence, resolve_divergence
from mmalign.core.divergence import (
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
)
from mmalign.core.kahneman import Kahneman, KahnemanPair
from mmalign.core.links import Link
from mmalign.core.objective import Objective
from mmalign.core.regularisers import KlGap, KlPenalty, LogRatio, Nll, OnlineKl, WeightL1
from mmalign.core.reweight import Wpo, reweight
from mmalign.core.score import Score
from mmalign.core.terms import Preference, Term
from mmalign.core.types import CandidateLogps, Loss, Needs

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
    "Kahneman",
    "KahnemanPair",
    "KlGap",
    "KlPenalty",
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
    "listwise",
    "presets",
    "register_divergence",
    "regularisers",
    "resolve_divergence",
    "reweight",
    "several",
    "terms",
    "weights",
]
