"""Objective: a sum of terms, checked when it is built, evaluated to a loss with metrics."""

from __future__ import annotations

from typing import TYPE_CHECKING

from torch import Tensor, nn

from mmalign.core.divergence import is_pointwise
from mmalign.core.terms import Preference, Term, Wpo
from mmalign.core.types import CandidateLogps, Loss, Needs
from mmalign.errors import ConfigError

if TYPE_CHECKING:
    from collections.abc import Mapping


class Objective(nn.Module):
    """A weighted sum of terms: the loss of one method, or of a mix.

    A module, so that a running state (BCO's shift) is saved and moved with it; it has no
    parameters.

    Args:
        terms: The summands; each brings its own coefficient.
        needs: What the objective asks for beyond its terms (roles of extra candidates).

    Raises:
        ConfigError: A term scores single responses under a divergence that does not define them.
        NeedsError: Terms that need different kinds of rows or extra candidates.
    """

    def __init__(self, *terms: Term, needs: Needs | None = None) -> None:
        super().__init__()
        if not terms:
            raise ConfigError("an objective needs at least one term")
        names: list[str] = []
        for term in terms:
            _refuse_undefined(term)
            again = sum(other.name == term.name for other in terms[: len(names)])
            names.append(f"{term.name}_{again + 1}" if again else term.name)
        self._setup(dict(zip(names, terms, strict=True)), [t.coef for t in terms], needs or Needs())

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
        return cls._of(terms, coefs, needs)

    @classmethod
    def _of(cls, terms: dict[str, Term], coefs: list[float], needs: Needs) -> Objective:
        objective = cls.__new__(cls)
        nn.Module.__init__(objective)
        objective._setup(terms, coefs, needs)
        return objective

    def _setup(self, terms: dict[str, Term], coefs: list[float], needs: Needs) -> None:
        self.terms = terms
        self.coefs = tuple(coefs)
        states = {n.replace("/", "_"): t.state for n, t in terms.items() if t.state is not None}
        self.states = nn.ModuleDict(states)
        for term in terms.values():
            needs = needs | term.needs
        self.needs = needs

    def modified(self, ld_alpha: float | None = None, wpo: Wpo | None = None) -> Objective:
        """The same objective under the modifiers LD-DPO and WPO, applied to its preference terms.

        Raises:
            ConfigError: No term reads a pair, or one that does has no such modified form.
        """
        terms = {name: term.modified(ld_alpha, wpo) for name, term in self.terms.items()}
        if all(terms[name] is term for name, term in self.terms.items()):
            raise ConfigError("ld_alpha and wpo act on pairs, but this objective does not read any")
        return self._of(terms, list(self.coefs), self.needs)

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


def _mean(rows: Tensor, row_weight: Tensor | None) -> Tensor:  # [B] -> []
    return rows.mean() if row_weight is None else (rows * row_weight.to(rows.dtype)).mean()


def _refuse_undefined(term: Term) -> None:
    if term.alone is None or is_pointwise(term.alone.transform):
        return
    what = type(term.link if isinstance(term, Preference) else term).__name__
    raise ConfigError(
        f"{what} looks at one response alone, which is not defined under "
        f"{type(term.alone.transform).__name__}: the reward is f'(u) plus an unknown constant of "
        "the prompt, and only a difference between responses of one row cancels it. Use "
        "reverse_kl, or a loss on margins"
    )
