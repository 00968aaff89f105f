"""Divergences by name: what YAML may say, what is refused and why, and how to add one's own."""

from __future__ import annotations

import dataclasses
import difflib
from typing import Any, cast

import torch

from mmalign.core.divergence import (
    Alpha,
    ChiSquaredKL,
    ForwardKL,
    Hellinger,
    Jeffreys,
    JensenShannon,
    ReverseKL,
    SkewedJensenShannon,
    Transform,
)
from mmalign.errors import ConfigError

DIVERGENCES: dict[str, Transform] = {
    "reverse_kl": ReverseKL(),
    "forward_kl": ForwardKL(),
    "js": JensenShannon(),
    "alpha": Alpha(0.5),
    "hellinger": Hellinger(),
    "jeffreys": Jeffreys(),
    "chi2_kl": ChiSquaredKL(),
    "skewed_js": SkewedJensenShannon(0.5),
}
"""Name to transform; `register_divergence` adds to it, and every loss and test reads it."""

ALIASES: dict[str, str] = {
    "kl": "reverse_kl",
    "rkl": "reverse_kl",
    "fkl": "forward_kl",
    "jsd": "js",
    "js_divergence": "js",
    "jensen_shannon": "js",
    "alpha_divergence": "alpha",
    "chi_squared_kl": "chi2_kl",
    "chipo": "chi2_kl",
    "skewed_jensen_shannon": "skewed_js",
}

_FINITE_AT_ZERO = "f'(0) is finite, so the optimum may give a response probability zero"

INVALID: dict[str, str] = {
    "total_variation": f"f' is a step: it cannot be inverted, {_FINITE_AT_ZERO}, and its gradient "
    "is zero almost everywhere",
    "pearson": f"{_FINITE_AT_ZERO}; use chi2_kl, which adds the KL that makes it valid",
    "le_cam": _FINITE_AT_ZERO,
}
"""Generators that give no preference loss, with the reason."""

_INVALID_ALIASES: dict[str, str] = {
    "tv": "total_variation",
    "chi2": "pearson",
    "chi_squared": "pearson",
    "pearson_chi2": "pearson",
    "lecam": "le_cam",
}


def resolve_divergence(divergence: str | Transform, **parameters: float | None) -> Transform:
    """The transform that a preset's `divergence` keyword means.

    Args:
        divergence: A name of `DIVERGENCES`, an alias, or a transform object.
        parameters: Fields of the named divergence to change (`alpha`, `p`); None is left alone.

    Raises:
        ConfigError: An unknown name, an invalid generator, or a parameter it does not have.
    """
    given = {name: value for name, value in parameters.items() if value is not None}
    if isinstance(divergence, str):
        name = divergence.lower().replace("-", "_")
        name = ALIASES.get(name, name)
        invalid = _INVALID_ALIASES.get(name, name)
        if name not in DIVERGENCES and invalid in INVALID:
            raise ConfigError(f"objective.divergence is {divergence!r}: {INVALID[invalid]}")
        if name not in DIVERGENCES:
            near = difflib.get_close_matches(name, [*DIVERGENCES, *ALIASES], 1)
            hint = f"Did you mean {near[0]!r}? " if near else ""
            raise ConfigError(
                f"objective.divergence is {divergence!r}, which is not known. {hint}"
                f"Known: {', '.join(DIVERGENCES)}"
            )
        transform = DIVERGENCES[name]
    else:
        name, transform = type(divergence).__name__, divergence
    known = (
        {field.name for field in dataclasses.fields(transform)}
        if dataclasses.is_dataclass(transform)
        else set[str]()
    )
    for parameter in given:
        if parameter not in known:
            raise ConfigError(
                f"objective.{parameter} is given, but the divergence {name!r} has no such parameter"
            )
    if not given:
        return transform
    return cast("Transform", dataclasses.replace(cast("Any", transform), **given))


def register_divergence(name: str, transform: Transform) -> None:
    """Add a divergence of your own to `DIVERGENCES`, after probing that it gives a valid loss.

    Args:
        name: What configs will call it.
        transform: f'(u) as a function of log u, elementwise, with f'(1) = 0.

    Raises:
        ConfigError: The name is taken, or a probe failed; the message says which and at what value.
    """
    if name in DIVERGENCES or name in ALIASES:
        raise ConfigError(f"divergence {name!r} exists already; choose another name")
    problem = _probe(transform)
    if problem:
        raise ConfigError(f"divergence {name!r} is refused: {problem}")
    DIVERGENCES[name] = transform


def _probe(transform: Transform) -> str | None:
    """What makes a transform invalid, or None."""
    for dtype in (torch.float64, torch.float32):
        grid = torch.linspace(-200.0, 200.0, 4001, dtype=dtype, requires_grad=True)
        value = transform(grid)
        if value.shape != grid.shape:
            return f"it is not elementwise: {list(grid.shape)} became {list(value.shape)}"
        (slope,) = torch.autograd.grad(value.sum(), grid)
        for what, tensor in (("value", value.detach()), ("gradient", slope)):
            if not bool(tensor.isfinite().all()):
                where = grid.detach()[~tensor.isfinite()][0].item()
                return (
                    f"its {what} is not finite at log u = {where:g} in {dtype}; build exponentials "
                    "with mmalign.core.numerics.expm1_linear"
                )
    # The last grid is float32; monotonicity and the limits are judged in float64.
    grid = torch.linspace(-200.0, 200.0, 4001, dtype=torch.float64)
    step = transform(grid).diff()
    near_one = transform(torch.linspace(-5.0, 5.0, 101, dtype=torch.float64)).diff()
    if not bool((step >= 0.0).all()) or not bool((near_one > 0.0).all()):
        return "f' is not strictly increasing in u, so f is not strictly convex"
    at_one = transform(torch.zeros(1, dtype=torch.float64)).item()
    if abs(at_one) > 1e-9:
        return f"f'(1) is {at_one:g}; subtract that constant, so that equal policies score 0"
    depths = transform(torch.tensor([-1e6, -2e6], dtype=torch.float64))
    far, farther = depths[0].item(), depths[1].item()
    if not farther < far - 1e-6 * max(1.0, abs(far)):
        return f"{_FINITE_AT_ZERO} (f' stays at {far:g} as u goes to 0)"
    return None
