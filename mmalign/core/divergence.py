"""Divergences as transforms of a log-ratio: f'(u) with f'(1) = 0, written in log u; and by name."""

from __future__ import annotations

import dataclasses
import difflib
import math
from dataclasses import dataclass
from typing import Any, ClassVar, Protocol, TypedDict, Unpack, cast, runtime_checkable

import torch
import torch.nn.functional as F
from torch import Tensor

from mmalign.core.numerics import expm1_linear, log1mexp, require
from mmalign.errors import ArgumentError, ConfigError

# A transform turns the log-ratio of one response into its score. Valid are the convex f whose f' is
# strictly increasing and unbounded below at u = 0: then the optimum of the regularized problem
# keeps every response possible, and reward = beta * f'(policy / reference) + c(prompt). The unknown
# c cancels between candidates of one row only, so losses that look at a single response need
# reverse KL.

LIMIT = 30.0
"""Exponents beyond this follow the tangent line; `limit=None` on a transform switches that off."""


@runtime_checkable
class Transform(Protocol):
    """Log-ratio to score, elementwise; finite for |log_u| <= 200 in float32."""

    def __call__(self, log_u: Tensor) -> Tensor: ...


def is_pointwise(transform: Transform) -> bool:
    """True if the score of a single response is defined: no unknown constant has to cancel."""
    return bool(getattr(transform, "pointwise", False))


@dataclass(frozen=True, slots=True)
class ReverseKL:
    """Reverse KL, f(u) = u log u: f'(u) = log u. The divergence of DPO."""

    pointwise: ClassVar[bool] = True

    def __call__(self, log_u: Tensor) -> Tensor:
        return log_u


@dataclass(frozen=True, slots=True)
class ForwardKL:
    """Forward KL, f(u) = -log u: f'(u) = 1 - 1/u.

    Grows without bound for responses the policy has become less likely to give, so rejected
    responses dominate the gradient; prefer a small beta.

    Source: Wang et al. 2023, arXiv:2309.16240.
    Departs: 1/u = exp(-log u) follows its tangent line above exp(limit). Clamping, as in public
        code, gives the worst pairs a zero gradient.
    """

    limit: float | None = LIMIT

    def __call__(self, log_u: Tensor) -> Tensor:
        return -expm1_linear(-log_u, self.limit)


@dataclass(frozen=True, slots=True)
class JensenShannon:
    """Jensen-Shannon (twice the usual half-half definition): f'(u) = log(2u / (1 + u)).

    Bounded above by log 2: once a response is likely enough, it is pushed no further.

    Source: Wang et al. 2023, arXiv:2309.16240.
    Departs: log 2 is not rounded to ten digits.
    """

    def __call__(self, log_u: Tensor) -> Tensor:
        return math.log(2.0) + F.logsigmoid(log_u)


@dataclass(frozen=True, slots=True)
class SkewedJensenShannon:
    """Skewed Jensen-Shannon: f'(u) = p log(u / (1 - p + p u)); p = 1/2 is half of JensenShannon."""

    p: float = 0.5

    def __post_init__(self) -> None:
        require(
            0.0 < self.p < 1.0, "p", self.p, "in (0, 1), the share of the policy in the mixture"
        )

    def __call__(self, log_u: Tensor) -> Tensor:
        logit = math.log(self.p) - math.log1p(-self.p)
        return self.p * (F.logsigmoid(log_u + logit) - math.log(self.p))


@dataclass(frozen=True, slots=True)
class PowerScore:
    """(1 - u^-alpha) / alpha for an alpha of either sign, log u at 0: AlphaPO's bent reward.

    Increasing for every alpha. A positive one is f' of the alpha divergence. A negative one has the
    floor -1 / |alpha| as u goes to 0, so it is the f' of no divergence that keeps every response
    possible; AlphaPO's paper and TRL train with it all the same.

    Args:
        alpha: The bend.
        limit: Exponent beyond which the tangent line takes over; None for never.
    """

    alpha: float = 0.5
    limit: float | None = LIMIT

    def __post_init__(self) -> None:
        require(math.isfinite(self.alpha), "alpha", self.alpha, "finite")

    @property
    def pointwise(self) -> bool:
        """Only the reverse KL limit scores a response alone."""
        return self._is_reverse_kl

    @property
    def _is_reverse_kl(self) -> bool:
        # Below, alpha * log_u^2 / 2 is under rounding; above, expm1 is exact.
        return abs(self.alpha) < 1e-12

    def __call__(self, log_u: Tensor) -> Tensor:
        if self._is_reverse_kl:
            return log_u
        return -expm1_linear(-self.alpha * log_u, self.limit) / self.alpha


@dataclass(frozen=True, slots=True)
class Alpha(PowerScore):
    """Alpha divergence: f'(u) = (1 - u^-alpha) / alpha; 0 is reverse KL, 1 forward KL.

    Args:
        alpha: The parameter of the f-DPO paper, at least 0. TRL's coefficient is 1 - alpha.
        limit: Exponent beyond which the tangent line takes over; None for never.

    Source: Wang et al. 2023, arXiv:2309.16240. All alpha > 0 are valid, not only (0, 1).
    Departs: the constant 1/alpha is kept, so equal policies score 0; computed with expm1.
    """

    def __post_init__(self) -> None:
        require(
            0.0 <= self.alpha < math.inf,
            "alpha",
            self.alpha,
            "at least 0: with a negative alpha f'(0) is finite, so the optimum may give a response "
            "probability zero and the reward is no longer f'(policy / reference). TRL trains such "
            "ones as f_alpha_divergence_coef = 1 - alpha; compat: trl-1.16 does the same",
        )

    @staticmethod
    def from_trl(coefficient: float, limit: float | None = LIMIT) -> PowerScore:
        """The transform of TRL's `f_alpha_divergence_coef`, any number: alpha = 1 - coefficient.

        Above 1 that is no divergence any more (alpha < 0), but a score that TRL trains with.
        """
        alpha = 1.0 - coefficient
        return Alpha(alpha, limit) if alpha >= 0.0 else PowerScore(alpha, limit)


@dataclass(frozen=True, slots=True)
class Hellinger:
    """Squared Hellinger, f(u) = (sqrt u - 1)^2: f'(u) = 1 - u^(-1/2), half of Alpha(1/2)."""

    limit: float | None = LIMIT

    def __call__(self, log_u: Tensor) -> Tensor:
        return -expm1_linear(-0.5 * log_u, self.limit)


@dataclass(frozen=True, slots=True)
class Jeffreys:
    """Jeffreys, f(u) = (u - 1) log u: f'(u) = log u + 1 - 1/u."""

    limit: float | None = LIMIT

    def __call__(self, log_u: Tensor) -> Tensor:
        return log_u - expm1_linear(-log_u, self.limit)


@dataclass(frozen=True, slots=True)
class ChiSquaredKL:
    """Chi-squared plus KL, the mixture of chi-PO: f'(u) = u - 1 + log u.

    Source: Huang et al. 2024, arXiv:2407.13399.
    Departs: the paper's link u + log u is 1 at equal policies; the constant cancels
        and is dropped.
    """

    limit: float | None = LIMIT

    def __call__(self, log_u: Tensor) -> Tensor:
        return expm1_linear(log_u, self.limit) + log_u


class _LogOdds(torch.autograd.Function):
    """log(p / (1 - p)) of log p, its tangent line above -1e-6; exact slope 1 / (1 - p)."""

    EDGE = -1e-6

    @staticmethod
    def forward(ctx: Any, log_p: Tensor) -> Tensor:
        inside = log_p.clamp(max=_LogOdds.EDGE)
        ctx.save_for_backward(inside)
        slope = -1.0 / math.expm1(_LogOdds.EDGE)
        return inside - log1mexp(inside) + slope * (log_p - inside)

    @staticmethod
    def backward(ctx: Any, *grad_outputs: Tensor) -> Tensor:
        (inside,) = ctx.saved_tensors
        return -grad_outputs[0] / torch.expm1(inside)


@dataclass(frozen=True, slots=True)
class LogOdds:
    """Log-odds of a probability, log_u - log(1 - exp(log_u)) for log_u < 0: ORPO and ASFT.

    Not a divergence: it reads the mean log-probability of a response, without a reference.
    Above -1e-6 it follows its tangent line, so a certain response stays finite.
    """

    pointwise: ClassVar[bool] = True

    def __call__(self, log_u: Tensor) -> Tensor:
        return _LogOdds.apply(log_u)  # pyright: ignore


@dataclass(frozen=True, slots=True)
class MapoScore:
    """MaPO's score of a denoising error e, read from log_u = -e/2: s e / (exp(s e) - 1).

    Not a divergence. Decreasing in the error, 1 at e = 0, where it is 1 - s e / 2 + (s e)^2 / 12.

    Source: Hong et al. 2024, arXiv:2406.06424, released code.
    Departs: a series below |s e| = 1/2; the released form is 0/0 at e = 0.
    """

    s: float = 0.5
    pointwise: ClassVar[bool] = True

    def __post_init__(self) -> None:
        require(0.0 < self.s < math.inf, "s", self.s, "above 0")

    def __call__(self, log_u: Tensor) -> Tensor:
        x = -2.0 * self.s * log_u
        small = x.abs() < 0.5
        near = torch.where(small, x, 0.0)
        square = near * near
        series = (
            1.0
            - near / 2.0
            + square
            / 12.0
            * (
                1.0
                - square
                / 60.0
                * (1.0 - square / 42.0 * (1.0 - square / 40.0 * (1.0 - square / 39.6)))
            )
        )
        far = torch.where(small, 1.0, x)
        size = far.abs()  # x / expm1(x) = size / expm1(size), plus size where x is negative
        closed = size * torch.exp(-size) / -torch.expm1(-size) + F.relu(-far)
        return torch.where(small, series, closed)


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


class DivergenceFields(TypedDict, total=False):
    """Fields of a divergence beside its name: the older spelling of {name: alpha, alpha: 0.3}."""

    alpha: float | None
    p: float | None


Divergence = str | dict[str, Any] | Transform
"""A name of `DIVERGENCES` or an alias, {name: ..., alpha: ...} with its fields, or a transform."""


def resolve_divergence(
    divergence: Divergence, compat: str | None = None, **fields: Unpack[DivergenceFields]
) -> Transform:
    """The transform that a preset's `divergence` means.

    Args:
        divergence: A name, a name with fields, or a transform object.
        compat: "trl-1.16" reads alpha as TRL's f_alpha_divergence_coef, which is 1 - alpha.
        fields: Of the divergence, to change; None is left alone.

    Raises:
        ArgumentError: An unknown name, an invalid generator, or a field it does not have.
    """
    given: dict[str, Any] = {**fields}
    if isinstance(divergence, dict):
        if "name" not in divergence:
            raise ArgumentError("divergence has no name; write e.g. {name: alpha, alpha: 0.3}")
        given = {**divergence, **fields}
        divergence = cast("str | Transform", given.pop("name"))
    given = {field: value for field, value in given.items() if value is not None}
    if isinstance(divergence, str):
        name, transform = _named(divergence)
    else:
        name, transform = type(divergence).__name__, divergence
    known = (
        {field.name for field in dataclasses.fields(transform)}
        if dataclasses.is_dataclass(transform)
        else set[str]()
    )
    for field in given:
        if field not in known:
            raise ArgumentError(
                f"{field} is given, but the divergence {name!r} has no such parameter"
            )
    if compat == "trl-1.16" and "alpha" in given:
        if isinstance(transform, Alpha):
            return Alpha.from_trl(given["alpha"], transform.limit)
        given["alpha"] = 1.0 - given["alpha"]
    if not given:
        return transform
    return cast("Transform", dataclasses.replace(cast("Any", transform), **given))


def _named(divergence: str) -> tuple[str, Transform]:
    """The key of `DIVERGENCES` for a name or alias, and its transform."""
    name = divergence.lower().replace("-", "_")
    name = ALIASES.get(name, name)
    if name in DIVERGENCES:
        return name, DIVERGENCES[name]
    invalid = _INVALID_ALIASES.get(name, name)
    if invalid in INVALID:
        raise ArgumentError(f"divergence is {divergence!r}: {INVALID[invalid]}")
    near = difflib.get_close_matches(name, [*DIVERGENCES, *ALIASES], 1)
    hint = f"Did you mean {near[0]!r}? " if near else ""
    raise ArgumentError(
        f"divergence is {divergence!r}, which is not known. {hint}Known: {', '.join(DIVERGENCES)}"
    )


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
    """The reason why a transform is invalid, or None."""
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
