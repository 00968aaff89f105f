"""Objective: a sum of terms, checked when it is built, evaluated to a loss with metrics."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Literal

from torch import Tensor, nn

from mmalign.core.divergence import is_pointwise
from mmalign.core.terms import Preference, Term
from mmalign.core.types import CandidateLogps, Loss, Needs
from mmalign.errors import ConfigError

Unit = Literal["nat", "error"]


class Objective(nn.Module):
    """A weighted sum of terms: the loss of one method, or of a mix.

    A module, so that a running state (BCO's shift) is saved and moved with it; it has no
    parameters.

    Args:
        terms: The summands; each brings its own coefficient.
        needs: What the objective asks for beyond its terms (roles of extra candidates).
        names: Of the terms, for metrics; their own, numbered where they repeat, if left out.
        coefs: Weights of the terms in place of their own.
        unit: Of the log-probabilities that its constants are made for: nats of tokens, or "error",
            where they are -1/2 times the mean squared error of a denoiser.

    Raises:
        ConfigError: A term scores single responses under a divergence that does not define them.
        NeedsError: Terms that need different kinds of rows or extra candidates.
    """

    def __init__(
        self,
        *terms: Term,
        needs: Needs | None = None,
        names: Sequence[str] | None = None,
        coefs: Sequence[float] | None = None,
        unit: Unit = "nat",
    ) -> None:
        super().__init__()
        if not terms:
            raise ConfigError("an objective needs at least one term")
        for term in terms:
            _refuse_undefined(term)
        self.terms = dict(zip(names or _numbered(terms), terms, strict=True))
        self.coefs = tuple(coefs or [term.coef for term in terms])
        states = {
            name.replace("/", "_"): part
            for name, term in self.terms.items()
            for part in vars(term).values()
            if isinstance(part, nn.Module)
        }
        self.states = nn.ModuleDict(states)
        self.unit: Unit = unit
        self.needs = needs or Needs()
        for term in terms:
            self.needs = self.needs | term.needs

    @classmethod
    def mix(cls, parts: Mapping[str, tuple[float, Objective]]) -> Objective:
        """The weighted sum of whole objectives, e.g. {"dpo": (1.0, dpo()), "sft": (0.1, sft())}."""
        terms: dict[str, Term] = {}
        coefs: list[float] = []
        needs = Needs()
        for name, (weight, objective) in parts.items():
            for label, term in objective.terms.items():
                terms[name if len(objective.terms) == 1 else f"{name}/{label}"] = term
            coefs += [weight * coef for coef in objective.coefs]
            needs = needs | objective.needs
        in_errors = any(objective.unit == "error" for _, objective in parts.values())
        unit: Unit = "error" if in_errors else "nat"
        return cls(*terms.values(), needs=needs, names=tuple(terms), coefs=coefs, unit=unit)

    def forward(self, c: CandidateLogps) -> Loss:
        """The loss of a batch.

        Raises:
            NeedsError: The candidates lack something the objective needs.
        """
        c.check(self.needs)
        rows: Tensor | None = None
        metrics: dict[str, Tensor] = {}
        rewards: Tensor | None = None
        for (name, term), coef in zip(self.terms.items(), self.coefs, strict=True):
            part = coef * term(c)  # [B]
            rows = part if rows is None else rows + part
            metrics[f"loss/{name}"] = _mean(part.detach(), c.row_weight)
            for key, value in term.report(c).items():
                metrics.setdefault(key, value)
            rewards = term.rewards(c) if rewards is None else rewards
        assert rows is not None, "an objective has at least one term"
        value = _mean(rows, c.row_weight)
        return Loss(value, {"loss": value.detach(), **metrics}, rows.detach(), rewards)

    def __call__(self, c: CandidateLogps) -> Loss:
        """Typed `forward`."""
        return super().__call__(c)

    def extra_repr(self) -> str:
        """Terms with their coefficients."""
        return "\n".join(
            f"{c:g} * {t}" for c, t in zip(self.coefs, self.terms.values(), strict=True)
        )


def _numbered(terms: Sequence[Term]) -> list[str]:
    names: list[str] = []
    for index, term in enumerate(terms):
        again = sum(other.name == term.name for other in terms[:index])
        names.append(f"{term.name}_{again + 1}" if again else term.name)
    return names


def _mean(rows: Tensor, row_weight: Tensor | None) -> Tensor:  # [B] -> []
    return rows.mean() if row_weight is None else (rows * row_weight.to(rows.dtype)).mean()


def _refuse_undefined(term: Term) -> None:
    score = term.pointwise_score
    if score is None or is_pointwise(score.transform):
        return
    what = type(term.link if isinstance(term, Preference) else term).__name__
    raise ConfigError(
        f"{what} looks at one response alone, which is not defined under "
        f"{type(score.transform).__name__}: the reward is f'(u) plus an unknown constant of "
        "the prompt, and only a difference between responses of one row cancels it. Use "
        "reverse_kl, or a loss on margins"
    )
