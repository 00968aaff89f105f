"""Presets by name: the table, checks of keywords, and mixes of several.

The only module of the core that knows the config: its errors name `objective.KEY` where those of
other modules name an argument.
"""

from __future__ import annotations

import difflib
import inspect
from collections.abc import Callable, Generator, Mapping
from contextlib import contextmanager
from pathlib import Path
from types import UnionType
from typing import (
    Any,
    Literal,
    Protocol,
    Union,
    Unpack,
    cast,
    get_args,
    get_origin,
    get_type_hints,
)

from mmalign.core.divergence import Transform
from mmalign.core.objective import Objective
from mmalign.core.presets import diffusion, pairwise, pointwise, reference_free, regularised, video
from mmalign.core.presets.own import imported, is_own
from mmalign.core.weights import Wpo, reweight
from mmalign.errors import ArgumentError, ConfigError

MODIFIERS = ("ld_alpha", "wpo")
"""Keywords of any pair loss beside its own: they reweight it."""


@contextmanager
def _as_a_config_says() -> Generator[None]:
    """Put the section before the name of an argument."""
    try:
        yield
    except ArgumentError as error:
        raise ConfigError(f"objective.{error.args[0]}") from error


_LARGEST = 1e12  # beyond, products of it overflow 32 bits


def required_keywords(function: Callable[..., Objective]) -> list[str]:
    """The keywords without a default; a preset has none, a user's own function may."""
    variadic = (inspect.Parameter.VAR_POSITIONAL, inspect.Parameter.VAR_KEYWORD)
    return [
        key
        for key, one in inspect.signature(function).parameters.items()
        if one.default is one.empty and one.kind not in variadic
    ]


def annotations_of(function: Callable[..., Objective]) -> tuple[dict[str, Any], bool]:
    """Keywords with their annotations, and whether any others are taken too."""
    try:
        signature = inspect.signature(function, eval_str=True)
    except NameError:  # a user's annotations that exist for type checkers only
        signature = inspect.signature(function)
    known: dict[str, Any] = {}
    takes_any = False
    for key, one in signature.parameters.items():
        if one.kind is one.VAR_KEYWORD and get_origin(one.annotation) is Unpack:
            known |= get_type_hints(get_args(one.annotation)[0])
        elif one.kind is one.VAR_KEYWORD:
            takes_any = True
        elif one.kind is not one.VAR_POSITIONAL:
            known[key] = one.annotation
    return known, takes_any


def check_keywords(
    name: str, function: Callable[..., Objective], keywords: Mapping[str, Any]
) -> None:
    """Raise ArgumentError for a keyword a preset does not know, of a wrong type, or missing."""
    known, takes_any = annotations_of(function)
    for key, value in keywords.items():
        if key in known:
            check_type(key, value, known[key])
            if key == "divergence" and isinstance(value, dict):
                for field, one in cast("dict[str, Any]", value).items():
                    kind = str | Transform if field == "name" else float | None
                    check_type(f"{key}.{field}", one, kind)
        elif takes_any:
            continue
        elif key == "divergence":
            raise ArgumentError(
                f"divergence is given, but {name!r} is defined for its own score only: losses on "
                "single responses need reverse KL. Use f_dpo, or another loss on margins"
            )
        elif key == "compat":
            raise ArgumentError(
                f"compat is given, but released codes of {name!r} agree with ours; leave it out"
            )
        else:
            near = difflib.get_close_matches(key, known, 1)
            hint = f"Did you mean {near[0]!r}? " if near else ""
            raise ArgumentError(
                f"{key} is not a keyword of {name!r}. {hint}Its keywords: "
                f"{', '.join(known) or 'none'}; on any pair loss also {', '.join(MODIFIERS)}"
            )
    for key in required_keywords(function):
        if key not in keywords:
            raise ArgumentError(f"{key} is missing; {name!r} has no default for it")


def check_type(key: str, value: object, annotation: Any) -> None:
    """Raise ArgumentError unless a value from YAML fits the annotation of a preset's keyword."""
    if not _fits(value, annotation):
        raise ArgumentError(f"{key} is {value!r}; it must be {_describe(annotation)}")
    if isinstance(value, int | float) and not -_LARGEST <= value <= _LARGEST:
        raise ArgumentError(
            f"{key} is {value!r}; it must be between {-_LARGEST:g} and {_LARGEST:g}"
        )


def _fits(value: object, annotation: Any) -> bool:
    arguments = get_args(annotation)
    if get_origin(annotation) is Literal:
        return value in arguments
    if get_origin(annotation) in (Union, UnionType):
        return any(_fits(value, one) for one in arguments)
    annotation = get_origin(annotation) or annotation  # dict[str, Any] is checked as a dict
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
    if get_origin(annotation) in (Union, UnionType):
        return " or ".join(_describe(one) for one in arguments)
    annotation = get_origin(annotation) or annotation
    names = {
        float: "a number", int: "a whole number", bool: "true or false", str: "a name",
        dict: "a section of keys",
    }  # fmt: skip
    if annotation is None or annotation is type(None):
        return "null"
    return names.get(annotation, f"a {getattr(annotation, '__name__', annotation)}")


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
    """The part of a configuration that `from_config` reads."""

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
        """The folder of the config; None for one made in memory."""
        ...


def preset(name: str, folder: Path | None = None) -> Callable[..., Objective]:
    """The function of a preset, an alias, or a user's `package.module:function`.

    Args:
        name: What a config says.
        folder: Of the config, where a user's module is looked for first.

    Raises:
        ConfigError: Nothing goes by that name; the nearest one is suggested.
    """
    with _as_a_config_says():
        if is_own(name):
            return imported(name, folder)
        known = ALIASES.get(name, name)
        if known not in PRESETS:
            near = difflib.get_close_matches(name, [*PRESETS, *ALIASES], 1)
            hint = f"Did you mean {near[0]!r}?" if near else f"Known: {', '.join(PRESETS)}"
            raise ArgumentError(f"name is {name!r}, which is not a preset. {hint}")
        return PRESETS[known]


def build(name: str, folder: Path | None = None, /, **keywords: Any) -> Objective:
    """An objective from a preset's name and its keyword arguments.

    Args:
        name: A preset, an alias, or `package.module:function`.
        folder: Of the config, where a user's module is looked for first.
        keywords: The preset's own; on any pair loss also `ld_alpha`, LD-DPO's weight in [0, 1] of
            the tokens beyond the length of the shorter response (1 changes nothing), and `wpo`,
            WPO's weight of a pair: true, or {"clamp_max": number or null}.

    Raises:
        ConfigError: An unknown name or keyword, a wrong type or range, or a modifier that the
            method does not define.
    """
    modifiers = {key: keywords.pop(key) for key in MODIFIERS if key in keywords}
    function = preset(name, folder)
    with _as_a_config_says():
        check_keywords(name, function, keywords)
        return _modified(function(**keywords), **modifiers)


def build_mix(
    mix: Mapping[str, float | Mapping[str, Any]], folder: Path | None = None, **modifiers: Any
) -> Objective:
    """A weighted sum of presets, e.g. {"dpo": 1.0, "sft": {"weight": 0.1, "reduce": "mean"}}.

    Args:
        mix: Preset to weight, or to keyword arguments with a `weight` (1 if left out).
        folder: Of the config, where a user's module is looked for first.
        modifiers: `ld_alpha` and `wpo` as in `build`, on every part that reads pairs.

    Raises:
        ConfigError: An empty mix, a bad weight, or what `build` refuses.
        NeedsError: Parts that need different kinds of rows or extra candidates.
    """
    with _as_a_config_says():
        if not mix:
            raise ArgumentError("mix is empty; give presets with weights, e.g. {dpo: 1, sft: 0.1}")
        unknown = sorted(modifiers.keys() - set(MODIFIERS))
        if unknown:
            raise ArgumentError(
                f"{unknown[0]} is given beside `mix`; keywords of a preset belong to its entry in "
                f"the mix. Beside it stand only {' and '.join(MODIFIERS)}"
            )
        parts: dict[str, tuple[float, Objective]] = {}
        for name, value in mix.items():
            check_type(f"mix.{name}", value, float | dict)
            keywords: dict[str, Any] = {}
            keywords.update({"weight": value} if isinstance(value, float | int) else value)
            weight = keywords.pop("weight", 1.0)
            check_type(f"mix.{name}.weight", weight, float)
            parts[name] = (float(weight), build(name, folder, **keywords))
        mixed = Objective.mix(parts)
        modifiers = {k: v for k, v in modifiers.items() if v is not None and v is not False}
        if modifiers and mixed.needs.rows not in ("pair", "plain"):
            raise ArgumentError(
                f"ld_alpha and wpo act on pairs, but no part of the mix ({', '.join(mix)}) reads "
                "any; leave them out"
            )
        return _modified(mixed, **modifiers)


def from_config(config: ObjectiveConfigLike) -> Objective:
    """The objective that a configuration's `objective` section describes.

    Raises:
        ConfigError: As `build` and `build_mix`, or neither a name nor a mix.
        NeedsError: As `build_mix`.
    """
    if config.mix is not None:
        return build_mix(config.mix, config.folder, **config.keywords)
    if config.name is None:
        raise ConfigError("objective has neither `name` nor `mix`; give one of them")
    return build(config.name, config.folder, **config.keywords)


def _modified(
    objective: Objective, ld_alpha: float | None = None, wpo: bool | Mapping[str, Any] = False
) -> Objective:
    check_type("ld_alpha", ld_alpha, float | None)
    if isinstance(wpo, bool):
        return reweight(objective, ld_alpha, Wpo() if wpo else None)
    check_type("wpo", wpo, dict)
    if unknown := sorted(wpo.keys() - {"clamp_max"}):
        raise ArgumentError(f"wpo has unknown keys {unknown}; it knows clamp_max")
    check_type("wpo.clamp_max", wpo.get("clamp_max"), float | None)
    return reweight(objective, ld_alpha, Wpo(**wpo))
