"""Judges from their settings."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from mmalign.config.judges import JudgeSpec, check_names
from mmalign.errors import ConfigError
from mmalign.judging.base import Judge
from mmalign.judging.combined import Weighted, WorstOf


def build(specs: Sequence[JudgeSpec], folder: Path | None = None) -> Judge:
    """The judge of a list of settings: the only one, or the weighted sum of several.

    Args:
        specs: The `judge` section of a config.
        folder: Where the config lies: rules are looked for there first; None for a command line.
            Paths start from the current directory, as all paths of a config.

    Raises:
        ConfigError: A judge cannot be had: no such function, file or run.
    """
    try:
        check_names(specs)
    except ValueError as error:
        raise ConfigError(f"judge: {error}") from error
    judges = tuple(_one(spec, folder) for spec in specs)
    if len(specs) == 1 and specs[0].weight == 1.0:
        return judges[0]
    return Weighted(judges, tuple(spec.weight for spec in specs))


def _one(spec: JudgeSpec, folder: Path | None) -> Judge:
    if spec.rule is not None:
        from mmalign.judging.rule import Rule

        return Rule(spec.rule, folder, spec.title)
    if spec.file is not None:
        from mmalign.judging.file import Filed

        return Filed(spec.file, spec.title)
    if spec.implicit is not None:
        from mmalign.judging.implicit import Implicit

        return Implicit(spec.implicit, spec.title, spec.beta, spec.checkpoint)
    if spec.scorer is not None:
        from mmalign.judging.images import Scored

        return Scored(spec.scorer, spec.title)
    if spec.endpoint is not None:
        from mmalign.judging.endpoint import Endpoint, cache_of

        return Endpoint(spec.endpoint, spec.title, cache_of(spec.endpoint))
    if spec.worst_of is not None:
        return WorstOf(tuple(_one(one, folder) for one in spec.worst_of), spec.title)
    from mmalign.judging.answers import Right, Specific

    if spec.right is not None:
        return Right(spec.right, spec.title)
    assert spec.specific is not None, "JudgeSpec has one kind"
    return Specific(spec.specific, spec.title)
