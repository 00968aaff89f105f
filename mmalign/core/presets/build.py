"""Presets by name: the table, checks of keywords, and mixes of several."""

from __future__ import annotations

import difflib
import inspect
import re
from typing import TYPE_CHECKING, Any, Literal, Protocol, get_args, get_origin

from mmalign.core.objective import Objective
from mmalign.core.presets import diffusion, pairwise, pointwise, reference_free, regularised, video
from mmalign.core.presets.own import imported, is_own
from mmalign.core.reweight import Wpo, reweight
from mmalign.errors import ConfigError

if TYPE_CHECKING:
    from collections.abc import Callable, Mapping
    from pathlib import Path


# Keywords of a preset against its signature: names, types and missing ones.

_LARGEST = 1e12  # beyond, products of it overflow 32 bits
_NUMBER = re.compile(r"[-+]?\d+(\.\d*)?[eE][-+]?\d+")


def check_keywords(
    name: str, function: Callable[..., Objective], keywords: Mapping[str, Any]
) -> None:
    """Raise ConfigError for a keyword the preset does not know, of a wrong type, or missing."""
    try:
        signature = inspect.signature(function, eval_str=True)
    except NameError:  # a user's annotations that exist for type checkers only
        signature = inspect.signature(function)
    variadic = (inspect.Parameter.VAR_POSITIONAL, inspect.Parameter.VAR_KEYWORD)
    free = any(one.kind is inspect.Parameter.VAR_KEYWORD for one in signature.parameters.values())
    known = [key for key, one in signature.parameters.items() if one.kind not in variadic]
    for key, value in keywords.items():
        if key in known:
            check_type(key, value, signature.parameters[key].annotation)
        elif free:
            continue
        elif key == "divergence":
            raise ConfigError(
                f"objective.divergence is given, but {name!r} is defined for its own score only: "
                "losses on single responses need reverse KL. Use f_dpo, or another loss on margins"
            )
        elif key == "compat":
            raise ConfigError(
                f"objective.compat is given, but released codes of {name!r} agree with ours; "
                "leave it out"
            )
        else:
            near = difflib.get_close_matches(key, known, 1)
            hint = f"Did you mean {near[0]!r}? " if near else ""
            raise ConfigError(
                f"objective.{key} is not a keyword of {name!r}. {hint}"
                f"Its keywords: {', '.join(known) or 'none'}; on any pair loss also ld_alpha, wpo"
            )
    for key in known:
        if signature.parameters[key].default is inspect.Parameter.empty and key not in keywords:
            raise ConfigError(f"objective.{key} is missing; {name!r} has no default for it")


def check_type(key: str, value: object, annotation: Any) -> None:
    """Raise ConfigError unless a value from YAML fits the annotation of a preset's keyword."""
    if not _fits(value, annotation):
        text = isinstance(value, str) and _NUMBER.fullmatch(value)
        hint = " (YAML reads a number such as 1e-6 as text; write 1.0e-6)" if text else ""
        raise ConfigError(f"objective.{key} is {value!r}; it must be {_describe(annotation)}{hint}")
    if isinstance(value, int | float) and not -_LARGEST <= value <= _LARGEST:
        raise ConfigError(
            f"objective.{key} is {value!r}; it must be between {-_LARGEST:g} and {_LARGEST:g}"
        )


def _fits(value: object, annotation: Any) -> bool:
    arguments = get_args(annotation)
    if get_origin(annotation) is Literal:
        return value in arguments
    if arguments:
        return any(_fits(value, one) for one in arguments)
    if annotation is None or annotation is type(None):
        return value is None
    if annotation is float:
        return isinstance(value, float | int) and not isinstance(value, bool)
    if annotation is int:
        return isinstance(value, int) and not isinstance(value, bool)
    if annotation in (str, bool):
        return isinstance(value, annotation)
    if annotation is inspect.Parameter.empty or not isinstance(annotation, type):
        return True  # a user's function without annotations
    return isinstance(value, annotation)


def _describe(annotation: Any) -> str:
    arguments = get_args(annotation)
    if get_origin(annotation) is Literal:
        return " or ".join(repr(one) for one in arguments)
    if arguments:
        return " or ".join(_describe(one) for one in arguments)
    names = {float: "a number", int: "a whole number", bool: "true or false", str: "a name"}
    if annotation is None or annotation is type(None):
        return "null"
    return names.get(annotation, f"a {getattr(annotation, '__name__', annotation)}")


# Presets by name, mixes, and a user's own functions.

_FAMILIES = (pairwise, pointwise, reference_free, regularised, diffusion, video)

PRESETS: dict[str, Callable[..., Objective]] = {
    name: getattr(family, name)
    for family in _FAMILIES
    for name in family.__all__
    if name != "spo"  # its pairs are made while a model trains, by a loop that is not built
}
"""Every method: name to the function that builds it, as the families' `__all__` name them."""

ALIASES: dict[str, str] = {
    "sigmoid": "dpo",
    "robust": "rdpo",
    "slic": "hinge",
    "exo_pair": "exo",
    "nca_pair": "nca",
    "bco_pair": "bco",
    "sppo_hard": "sppo",
    "egpo": "online_ipo",
    "chipo": "chi_po",
    "hound_dpo": "dpo",
}
"""Other names of the same methods, TRL's among them."""


class ObjectiveConfigLike(Protocol):
    """What `from_config` reads of a configuration."""

    @property
    def name(self) -> str | None:
        """A preset, or `package.module:function`."""
        ...

    @property
    def mix(self) -> Mapping[str, float | dict[str, Any]] | None:
        """Presets to weights, or to keywords with a `weight`."""
        ...

    @property
    def keywords(self) -> dict[str, Any]:
        """Keyword arguments of the preset."""
        ...

    @property
    def folder(self) -> Path | None:
        """Where the config lies; None where it was made in memory."""
        ...


def preset(name: str, folder: Path | None = None) -> Callable[..., Objective]:
    """The function of a preset, an alias, or a user's `package.module:function`.

    Args:
        name: What a config says.
        folder: Of the config, where a user's module is looked for first.

    Raises:
        ConfigError: Nothing goes by that name; the nearest one is suggested.
    """
    if is_own(name):
        return imported(name, folder)
    known = ALIASES.get(name, name)
    if known not in PRESETS:
        near = difflib.get_close_matches(name, [*PRESETS, *ALIASES], 1)
        hint = f"Did you mean {near[0]!r}?" if near else f"Known: {', '.join(PRESETS)}"
        raise ConfigError(f"objective.name is {name!r}, which is not a preset. {hint}")
    return PRESETS[known]


def build(
    name: str,
    *,
    ld_alpha: float | None = None,
    wpo: bool | Mapping[str, Any] = False,
    **keywords: Any,
) -> Objective:
    """An objective from a preset's name and its keyword arguments.

    Args:
        name: A preset, an alias, or `package.module:function`.
        ld_alpha: LD-DPO on any pair loss: weight in [0, 1] of the tokens beyond the length of the
            shorter response; 1 changes nothing.
        wpo: WPO's weight on any pair loss: true, or {"clamp_max": number or null}.
        keywords: The preset's own.

    Raises:
        ConfigError: An unknown name or keyword, a wrong type or range, or a modifier that the
            method does not define.
    """
    return _build(name, None, ld_alpha, wpo, keywords)


def _build(
    name: str,
    folder: Path | None,
    ld_alpha: float | None,
    wpo: bool | Mapping[str, Any],
    keywords: Mapping[str, Any],
) -> Objective:
    function = preset(name, folder)
    check_keywords(name, function, keywords)
    objective = function(**keywords)
    weight = _wpo(wpo)
    if ld_alpha is None and weight is None:
        return objective
    if ld_alpha is not None:
        check_type("ld_alpha", ld_alpha, float)
    return reweight(objective, ld_alpha, weight)


def build_mix(
    mix: Mapping[str, float | Mapping[str, Any]],
    *,
    ld_alpha: float | None = None,
    wpo: bool | Mapping[str, Any] = False,
    folder: Path | None = None,
) -> Objective:
    """A weighted sum of presets, e.g. {"dpo": 1.0, "sft": {"weight": 0.1, "reduce": "mean"}}.

    Args:
        mix: Preset to weight, or to keyword arguments with a `weight` (1 if left out).
        ld_alpha: As in `build`, on every part that reads pairs.
        wpo: As in `build`, on every part that reads pairs.
        folder: Of the config, where a user's module is looked for first.

    Raises:
        ConfigError: An empty mix, a bad weight, or what `build` refuses.
        NeedsError: Parts that need different kinds of rows or extra candidates.
    """
    if not mix:
        raise ConfigError(
            "objective.mix is empty; give presets with weights, e.g. {dpo: 1, sft: 0.1}"
        )
    modifies = ld_alpha is not None or wpo is not False
    takers: list[str] = []
    parts: dict[str, tuple[float, Objective]] = {}
    for name, value in mix.items():
        check_type(f"mix.{name}", value, float | dict)
        keywords: dict[str, Any] = {}
        keywords.update({"weight": value} if isinstance(value, float | int) else value)
        weight = keywords.pop("weight", 1.0)
        check_type(f"mix.{name}.weight", weight, float)
        ld, weighs = keywords.pop("ld_alpha", None), keywords.pop("wpo", False)
        objective = _build(name, folder, ld, weighs, keywords)
        if modifies and objective.needs.rows in ("pair", "plain"):
            objective = reweight(objective, ld_alpha, _wpo(wpo))
            takers.append(name)
        parts[name] = (float(weight), objective)
    if modifies and not takers:
        raise ConfigError(
            f"objective.ld_alpha and objective.wpo act on pairs, but no part of the mix "
            f"({', '.join(mix)}) reads any; leave them out"
        )
    return Objective.mix(parts)


def from_config(config: ObjectiveConfigLike) -> Objective:
    """The objective that a configuration's `objective` section describes."""
    if config.mix is not None:
        unknown = sorted(set(config.keywords) - {"ld_alpha", "wpo"})
        if unknown:
            raise ConfigError(
                f"objective.{unknown[0]} is given beside `mix`; keywords of a preset belong to its "
                "entry in the mix. Beside it stand only ld_alpha and wpo"
            )
        return build_mix(config.mix, folder=config.folder, **config.keywords)
    if config.name is None:
        raise ConfigError("objective has neither `name` nor `mix`; give one of them")
    keywords = dict(config.keywords)
    ld_alpha, wpo = keywords.pop("ld_alpha", None), keywords.pop("wpo", False)
    return _build(config.name, config.folder, ld_alpha, wpo, keywords)


def _wpo(value: bool | Mapping[str, Any]) -> Wpo | None:
    if value is False:
        return None
    if value is True:
        return Wpo()
    check_type("wpo", value, dict)
    unknown = set(value) - {"clamp_max"}
    if unknown:
        raise ConfigError(f"objective.wpo has unknown keys {sorted(unknown)}; it knows clamp_max")
    clamp_max = value.get("clamp_max", 1.0)
    check_type("wpo.clamp_max", clamp_max, float | None)
    return Wpo(clamp_max)
