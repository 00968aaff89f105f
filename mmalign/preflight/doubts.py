"""Settings far from all that was published, or that undo themselves: one function for each doubt.

None of them stops a run. Each is one sentence that says what was found, what was published and
by whom, and what to do; a run whose settings lie within reach of a paper hears nothing.
"""

from __future__ import annotations

from dataclasses import dataclass
from inspect import signature
from typing import TYPE_CHECKING, Any

from mmalign.core.presets import ALIASES, PRESETS, diffusion
from mmalign.models.adapter import adapter_class
from mmalign.preflight import published
from mmalign.preflight.bases import other_base

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator, Mapping, Sequence

    from mmalign.config import RunConfig
    from mmalign.core import Needs
    from mmalign.data.example import Example
    from mmalign.preflight.published import Range


FEW_STEPS = 100
"""So many steps are a trial, whatever is repeated in them."""


@dataclass(frozen=True, slots=True)
class Plan:
    """What a run is going to do, as far as doubts read it.

    Attributes:
        config: Of the run.
        needs: Of its objective.
        num_steps: Optimiser steps.
        rows_per_step: Rows of one step, over all processes.
        rows: What is trained on.
    """

    config: RunConfig
    needs: Needs
    num_steps: int
    rows_per_step: int
    rows: Sequence[Example]

    @property
    def kind(self) -> tuple[str, bool, bool]:
        """Modality, whether a LoRA is trained, whether single responses are imitated."""
        model = self.config.model
        imitates = self.needs.candidates <= 1 and self.needs.rows in ("any", "plain")
        return self.config.modality, bool(model.lora or model.adapter), imitates

    @property
    def losses(self) -> Iterator[tuple[str, str, Mapping[str, Any]]]:
        """Every preset of the objective: where it stands in the config, its name, its keywords."""
        objective = self.config.objective
        for name, value in (objective.mix or {}).items():
            keywords = value if isinstance(value, dict) else {}
            yield f"objective.mix.{name}", ALIASES.get(name, name), keywords
        if objective.name is not None:
            yield "objective", ALIASES.get(objective.name, objective.name), objective.keywords


def doubts(plan: Plan) -> list[str]:
    """What is in doubt about the settings of a run, a sentence each."""
    if not plan.config.train.check_settings:
        return []
    return [sentence for doubt in _DOUBTS for sentence in doubt(plan)]


def _learning_rate(plan: Plan) -> Iterator[str]:
    train = plan.config.train
    known = published.LEARNING_RATES[plan.kind]
    if train.optimizer == "sgd":  # its steps have the gradient's size
        return
    trained = "a LoRA" if plan.kind[1] else "all weights"
    if side := known.side(train.lr):
        yield _far("train.lr", train.lr, known, side, f"for {trained} of this modality")
        return
    a_row = published.RATES_A_ROW.get(plan.kind)
    rate = train.lr / plan.rows_per_step
    if a_row is not None and a_row.side(rate) == "above":
        many = "1 row" if plan.rows_per_step == 1 else f"{plan.rows_per_step:,} rows"
        yield (
            f"train.lr is {train.lr:g} at {many} a step, {rate:.3g} a row: "
            f"{rate / a_row.high:,.0f} times the highest published for {trained} of this "
            f"modality, {a_row}. Lower it, or raise train.accumulate; {_QUIET}"
        )


def _strength(plan: Plan) -> Iterator[str]:
    """beta and its like, under the names that the losses have for them."""
    unit = adapter_class(plan.config.modality).logp_unit(plan.config)
    if unit.factor is None:
        return
    for where, name, given in plan.losses:
        doubled = 2.0 if given.get("convention") == "diffusers" else 1.0
        for key, known in _constants(name, in_errors=unit.of == "errors").items():
            value = given.get(key, signature(PRESETS[name]).parameters[key].default)
            if side := known.side(value * unit.factor * doubled):
                also = f", times {unit.setting} = {unit.factor:g}" if unit.factor != 1.0 else ""
                yield _far(f"{where}.{key}", value, known, side, f"for {name}{also}")


def _constants(name: str, *, in_errors: bool) -> dict[str, Range]:
    """What was published of a loss's constants, in the unit of the log-probabilities."""
    if name not in PRESETS:
        return {}  # a loss of the user's own
    if in_errors == (PRESETS[name].__module__ == diffusion.__name__):
        others = published.OF_ERRORS if in_errors else published.OF_NATS
        known = published.STRENGTHS.get(name, others)
    elif in_errors:  # a loss of log-probabilities, whose beta is then per unit of error
        known = {} if name in published.STRENGTHS else published.OF_ERRORS
    else:
        known = published.OF_NATS
    return {key: known[key] for key in known.keys() & signature(PRESETS[name]).parameters.keys()}


def _warm_up(plan: Plan) -> Iterator[str]:
    given = plan.config.train.warmup
    steps = round(given if given >= 1 else given * plan.num_steps)
    if steps > plan.num_steps:
        yield (
            f"train.warmup is {steps:,} steps, but the run has {plan.num_steps:,}: the learning "
            f"rate ends at {plan.num_steps / steps:.3g} of train.lr and never reaches it. Give a "
            "share of the run, e.g. 0.1, or fewer steps"
        )
    elif published.WARM_UP.side(steps / plan.num_steps):
        yield (
            f"train.warmup takes {steps:,} of {plan.num_steps:,} steps, more than half of the run; "
            f"published shares are {published.WARM_UP}; {_QUIET}"
        )


def _adam(plan: Plan) -> Iterator[str]:
    train = plan.config.train
    beta1, beta2 = train.betas
    if beta1 > beta2:
        yield (
            f"train.betas is [{beta1:g}, {beta2:g}]: the first, of the mean gradient, is above the "
            "second, of its square, which is the wrong way round; the default is [0.9, 0.999]"
        )
        return
    for value, known in ((beta1, published.BETA1), (beta2, published.BETA2)):
        if side := known.side(value):
            yield _far("train.betas", value, known, side)
    if side := published.WEIGHT_DECAY.side(train.weight_decay):
        yield _far("train.weight_decay", train.weight_decay, published.WEIGHT_DECAY, side)


def _lora(plan: Plan) -> Iterator[str]:
    lora = plan.config.model.lora
    if lora is None:
        return
    if published.LORA_SCALE.side(lora.alpha / lora.rank) == "above":
        yield (
            f"model.lora.alpha is {lora.alpha / lora.rank:g} times its rank, by which the change "
            f"of the weights is multiplied; published are {published.LORA_SCALE}; {_QUIET}"
        )
    if lora.dropout and plan.needs.reference:
        yield (
            f"model.lora.dropout is {lora.dropout:g}: with it policy and reference differ while "
            "training, so log-ratios hold its noise, and a fresh adapter hides that before the "
            "first step; leave it at 0 unless you want it"
        )


def _reference(plan: Plan) -> Iterator[str]:
    reference = plan.config.reference
    if reference.kind == "ema" and reference.decay == 0.0 and reference.every == 1:
        yield (
            "reference.kind is ema with decay 0 at every step: the reference is the policy itself, "
            "so nothing holds it near its start. TR-DPO has decay 0.4 and every 512"
        )


def _adapter(plan: Plan) -> Iterator[str]:
    model = plan.config.model
    if base := other_base(model):
        yield (
            f"model.adapter {model.adapter} was trained on {base}, whose weights are not those of "
            f"model.path {model.path}: what it adds was learned for others. Give model.path: {base}"
        )


def _passes(plan: Plan) -> Iterator[str]:
    """How often every row is seen."""
    known = published.EPOCHS.get(plan.config.modality)
    if known is None or not plan.rows:
        return
    epochs = plan.num_steps * plan.rows_per_step / len(plan.rows)
    many = plan.num_steps > FEW_STEPS and known.side(epochs) == "above"
    if many:
        yield (
            f"{plan.num_steps:,} steps of {plan.rows_per_step:,} rows see each of the "
            f"{len(plan.rows):,} rows {epochs:,.0f} times; published are {known}. "
            f"Lower train.num_steps or num_epochs; {_QUIET}"
        )


def _sides(plan: Plan) -> Iterator[str]:
    if plan.config.data.swap and all(name != "diffusion_npo" for _, name, _ in plan.losses):
        yield (
            "data.swap is true: better and worse change places in every row, so the model learns "
            f"to prefer the worse; it is meant for negative models (diffusion_npo); {_QUIET}"
        )


def _ratings(plan: Plan) -> Iterator[str]:
    """Single responses of which one kind is far the more."""
    for where, name, given in plan.losses:
        known = published.DESIRABLE.get(name)
        if known is None:
            continue
        good = sum(row.weight for row in plan.rows if row.labels[0] > 0.5)
        bad = sum(row.weight for row in plan.rows if row.labels[0] <= 0.5)
        good *= given.get("desirable_weight", 1.0)
        bad *= given.get("undesirable_weight", 1.0)
        if not good or not bad or not known.side(good / bad):
            continue
        yield (
            f"desirable rows weigh {good / bad:.3g} times as much as undesirable ones; published "
            f"for {name} are {known}. Balance them by {where}.desirable_weight and "
            f"undesirable_weight; {_QUIET}"
        )


_DOUBTS: tuple[Callable[[Plan], Iterator[str]], ...] = (
    _learning_rate,
    _strength,
    _warm_up,
    _adam,
    _lora,
    _reference,
    _adapter,
    _passes,
    _sides,
    _ratings,
)
_QUIET = "train.check_settings: false if it is meant"


def _far(key: str, value: float, known: Range, side: str, of: str = "") -> str:
    """A value far from all that was published."""
    edge, do = ("highest", "Lower") if side == "above" else ("lowest", "Raise")
    return (
        f"{key} is {value:g}, far {side} the {edge} published value{f' {of}' if of else ''}: "
        f"{known}. {do} it; {_QUIET}"
    )
