"""Keywords of a preset against its signature: names, types and missing ones."""

from __future__ import annotations

import difflib
import inspect
import re
from typing import TYPE_CHECKING, Any, Literal, get_args, get_origin

from mmalign.errors import ConfigError

if TYPE_CHECKING:
    from collections.abc import Callable, Mapping

    from mmalign.core.objective import Objective

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
