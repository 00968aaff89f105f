"""How alike two descriptions of a place are, without weights."""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Callable
from importlib import import_module
from typing import Any, cast

from mmalign.benchmark.parsers import plain
from mmalign.errors import ConfigError

Similarity = Callable[[str, str], float]
"""Two texts to a number up to 1, as a cosine of embeddings is."""

FILLERS = frozenset(("a", "an", "the", "of", "in", "on", "at", "with", "and", "to"))


def word_cosine(a: str, b: str) -> float:
    """Cosine of two counts of words, fillers left out: no embedding, so no synonyms.

    "a dark kitchen" and "the kitchen" give 1 / sqrt(2); "sofa" and "couch" give 0.
    """
    counts = [Counter(word for word in plain(t).split() if word not in FILLERS) for t in (a, b)]
    product = sum(count * counts[1][word] for word, count in counts[0].items())
    norms = [math.sqrt(sum(count**2 for count in part.values())) for part in counts]
    return product / (norms[0] * norms[1]) if all(norms) else 0.0


def named_similarity(path: str) -> Similarity:
    """The function that `my_package.module:function` names.

    Raises:
        ConfigError: There is none.
    """
    module, _, name = path.partition(":")
    try:
        found: Any = getattr(import_module(module), name)
    except (ImportError, AttributeError, ValueError) as error:
        raise ConfigError(
            f"--similarity {path}: write it as my_package.module:function, of two texts ({error})"
        ) from error
    if not callable(found):
        raise ConfigError(f"--similarity {path}: is no function")
    return cast("Similarity", found)
