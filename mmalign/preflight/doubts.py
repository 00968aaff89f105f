"""Settings far from all that was published, or that undo themselves: one function for each doubt.

None of them stops a run. Each is one sentence that says what was found, what was published and by
whom, and what to do; settings close to a paper's give none.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from inspect import signature
from pathlib import Path
from typing import TYPE_CHECKING, Any

from mmalign.core.presets import ALIASES, PRESETS
from mmalign.data.example import Example
from mmalign.errors import MmalignError
from mmalign.models.adapter import tools_of
from mmalign.models.files import ADAPTER_CONFIG, read_json, weight_files

if TYPE_CHECKING:
    from mmalign.config import ModelConfig, RunConfig
    from mmalign.core import Needs

_HEAD = 1 << 20  # bytes of a file that are compared, beside its size


def other_base(model: ModelConfig) -> str:
    """The model that an adapter says it was trained on, where that is another; else "".

    Two folders of this machine are other models where their weights differ; two hub names where
    the names do. Of a folder and a hub name nothing is known.
    """
    if model.adapter is None:
        return ""
    file = Path(model.adapter) / ADAPTER_CONFIG
    try:
        if not file.is_file():
            return ""
        base = read_json(file).get("base_model_name_or_path")
        if not isinstance(base, str) or not base or base == model.path:
            return ""
        if Path(base).is_dir() and Path(model.path).is_dir():
            return base if _heads(Path(base)) != _heads(Path(model.path)) else ""
    except (MmalignError, OSError):  # what cannot be read is refused where it is loaded
        return ""
    on_hub = not Path(base).exists() and not Path(model.path).exists()
    return base if on_hub and base.lower() != model.path.lower() else ""


def _heads(folder: Path) -> list[tuple[int, bytes]]:
    """Size and beginning of each file of weights."""
    heads: list[tuple[int, bytes]] = []
    for path in weight_files(folder):
        with path.open("rb") as stream:
            heads.append((path.stat().st_size, stream.read(_HEAD)))
    return heads


# Where the names were read: alignment-handbook (Zephyr, SmolLM2, Zephyr-ORPO), open-instruct (Tulu
# 3, OLMo 3), NeMo-Aligner's guide, TRL's examples and paper index (DPO, ORPO, RSO, EXO, AlphaPO,
# rDPO), HALOs (KTO, cDPO), abacusai/smaug issue 2, and the training scripts of SimPO, QLoRA,
# InternVL, LLaVA, LLaVA-Hound, Qwen-VL, RLAIF-V, POVID, RRPO, ms-swift, MaPO, Diffusion-KTO and
# diffusers. Nemotron-4 is from a summary of its report.


@dataclass(frozen=True, slots=True)
class Range:
    """From the lowest to the highest published value.

    A setting is in doubt beyond `slack` times its ends: models, data and batches differ, and a
    careful choice may well lie a little outside of what others chose.
    """

    low: float
    high: float
    source: str
    slack: float = 10.0

    def side(self, value: float) -> str:
        """ "above", "below", or "" where the value is in no doubt."""
        if value > self.high * self.slack * (1 + 1e-9):
            return "above"
        return "below" if value < self.low / self.slack * (1 - 1e-9) else ""

    def __str__(self) -> str:
        ends = f"{self.low:g}" if self.low == self.high else f"{self.low:g} to {self.high:g}"
        return f"{ends} ({self.source})"


_PREFERENCES = "Nemotron-4, OLMo 3, Tulu 3, Zephyr, SimPO, ORPO; TRL's 0.001 is of GPT-2"
_VIDEO_SUPERVISED = "Qwen-VL, LLaVA; supervised; 0.001 is of LLaVA's projector alone"
_DIFFUSION_LORA = "Diffusion-DPO in diffusers, Diffusion-NPO, SPO, Flow-DPO"

LEARNING_RATES: dict[tuple[str, bool, bool], Range] = {
    ("text", False, False): Range(3e-8, 1e-5, _PREFERENCES),
    ("text", True, False): Range(5e-7, 1e-3, "Zephyr, LLaMA-Factory, TRL; LoRA", slack=3.0),
    ("text", False, True): Range(1e-7, 1e-3, "FSPO, Tulu 3, SmolLM2; supervised", slack=3.0),
    ("text", True, True): Range(1e-4, 2e-4, "QLoRA, Zephyr; supervised", slack=20.0),
    ("video", False, False): Range(2e-7, 1e-5, "InternVL-MPO, LLaVA-Hound, ms-swift"),
    ("video", True, False): Range(1e-7, 1e-4, "POVID, ADPO, RRPO, ms-swift; LoRA", slack=3.0),
    ("video", False, True): Range(2e-7, 1e-3, _VIDEO_SUPERVISED, slack=3.0),
    ("video", True, True): Range(2e-5, 2e-4, "Qwen-VL, LLaVA; supervised, LoRA", slack=20.0),
    ("diffusion", False, False): Range(8.2e-9, 2.05e-5, "Diffusion-DPO, Diffusion-KTO, SmPO, MaPO"),
    ("diffusion", True, False): Range(5e-6, 5e-4, _DIFFUSION_LORA),
    ("diffusion", False, True): Range(1e-7, 1e-4, "Self-NPO, diffusers' text_to_image"),
    ("diffusion", True, True): Range(
        1e-4, 5e-4, "diffusers' text_to_image_lora, dreambooth_lora", slack=30.0
    ),
}
"""Modality, whether a LoRA is trained, whether single responses are imitated: of AdamW."""

RATES_A_ROW: dict[tuple[str, bool, bool], Range] = {
    ("diffusion", False, False): Range(
        4e-12, 6.25e-7, "Diffusion-DPO's --scale_lr, MaPO on one device", slack=1.5
    ),
}
"""Learning rate over the rows of a step, where releases scale it so."""

_NATS = Range(3e-4, 5.0, "Nemotron-4, Zephyr, DPO, SmolLM2, NeMo-Aligner", slack=2.0)
_ERRORS = Range(500.0, 5000.0, "DCPO, Diffusion-DPO", slack=5.0)

STRENGTHS: dict[str, dict[str, Range]] = {
    "ipo": {"tau": _NATS},
    "cdpo": {"beta": _NATS, "flip": Range(0.0, 0.2, "cDPO in HALOs", slack=2.4)},
    "rso": {"gamma": Range(0.05, 0.05, "RSO", slack=100.0)},
    "sigmoid_norm": {"beta": Range(5.0, 5.0, "Tulu 3")},
    "simpo": {
        "beta": Range(2.0, 10.0, "SimPO", slack=5.0),
        "gamma": Range(0.0, 5.0, "SimPO", slack=2.0),
    },
    "alphapo": {"beta": Range(2.0, 10.0, "SimPO, AlphaPO", slack=5.0)},
    "exo": {"beta": Range(0.1, 1.0, "EXO", slack=5.0)},
    "asft": {"beta": Range(1.0, 1.0, "ASFT in turbo-alignment", slack=100.0)},
    "orpo": {"lam": Range(0.05, 0.1, "Zephyr-ORPO, ORPO", slack=100.0)},
    "dpop": {"beta": _NATS, "penalty": Range(5.0, 500.0, "Smaug")},
    "sppo": {"beta": Range(1e-3, 1e-3, "SPPO", slack=20.0)},
    "gpo": {"beta": Range(1e-3, 2e-3, "GPO", slack=20.0)},
    "inpo_nash": {"eta": Range(7.5e-3, 7.5e-3, "INPO", slack=20.0)},
    "flex_dpo": {"beta_chosen": _NATS, "beta_rejected": _NATS},
    "povid": {"beta": _NATS, "beta_rejected": _NATS},
    "rrpo": {"beta": _NATS, "alpha": Range(0.01, 0.1, "RRPO")},
    "tdpo2": {"beta": _NATS, "alpha": Range(0.5, 0.5, "TDPO", slack=50.0)},
    "smpo": {"beta": Range(20000.0, 50000.0, "SmPO, with its constant 10", slack=5.0)},
    "inpo": {"beta": Range(2000.0, 5000.0, "InPO", slack=5.0)},
    "diffusion_npo": {"beta": Range(1000.0, 2000.0, "Diffusion-NPO", slack=5.0)},
    "flow_dpo": {"beta": Range(100.0, 100.0, "Flow-DPO in flow_grpo", slack=25.0)},
    "diffusion_kto": {"beta": Range(1000.0, 1000.0, "Diffusion-KTO", slack=25.0)},
    "mapo": {"beta": Range(0.1, 0.1, "MaPO")},
    "diffusion_orpo": {"beta": Range(0.1, 0.1, "diffusers")},
}
"""Constants of losses, by preset and keyword."""

OF_NATS: dict[str, Range] = {"beta": _NATS}
"""Constants of every other loss on log-probabilities of tokens."""

OF_ERRORS: dict[str, Range] = {"beta": _ERRORS}
"""Constants of every other loss on errors of an image, which are per unit of mean error."""

EPOCHS = {
    "text": Range(1.0, 5.0, "Zephyr, SmolLM2, ORPO"),
    "video": Range(1.0, 10.0, "RRPO, LLaVA-Hound, RLAIF-V", slack=5.0),
}
"""Passes over the rows, by modality; small sets of images are often seen a hundred times."""
WARM_UP = Range(0.0, 0.5, "InPO and SmPO; most papers have 0 to 0.25", slack=1.0)
"""Share of a run."""

BETA1 = Range(0.0, 0.95, "Adam's 0.9, RMSprop's 0", slack=1.0)
BETA2 = Range(0.9, 0.9999, "0.95 of Qwen-VL to Adam's 0.999", slack=1.0)
WEIGHT_DECAY = Range(0.0, 0.1, "Qwen-VL; 0.01 in Diffusion-DPO", slack=5.0)
LORA_SCALE = Range(0.25, 4.0, "QLoRA, RRPO, ms-swift", slack=4.0)
"""alpha over rank."""

DESIRABLE: dict[str, Range] = {
    "kto": Range(1.0, 4 / 3, "KTO", slack=4.0),
    "apo_zero_unpaired": Range(1.0, 4 / 3, "KTO", slack=4.0),
    "diffusion_kto": Range(1.0, 4.0, "KTO, Diffusion-KTO", slack=4.0),
}
"""Weights of desirable over those of undesirable rows."""


FEW_STEPS = 100
"""Up to this many steps a run is a trial, and repeated rows are not reported."""


@dataclass(frozen=True, slots=True)
class Plan:
    """The parts of a run that the checks read.

    Attributes:
        config: Of the run.
        needs: Of its objective.
        num_steps: Optimizer steps.
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
    """Doubtful settings of a run, a sentence each."""
    if not plan.config.train.check_settings:
        return []
    return [sentence for doubt in _DOUBTS for sentence in doubt(plan)]


def _learning_rate(plan: Plan) -> Iterator[str]:
    train = plan.config.train
    known = LEARNING_RATES[plan.kind]
    if train.optimizer == "sgd":  # its steps have the gradient's size
        return
    trained = "a LoRA" if plan.kind[1] else "all weights"
    if side := known.side(train.lr):
        yield _far("train.lr", train.lr, known, side, f"for {trained} of this modality")
        return
    a_row = RATES_A_ROW.get(plan.kind)
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
    unit = tools_of(plan.config.modality).logp_unit(plan.config)
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
    """Published ranges of a loss's constants, in the unit of the log-probabilities."""
    if name not in PRESETS:
        return {}  # a user's own loss
    if in_errors == (PRESETS[name]().unit == "error"):
        others = OF_ERRORS if in_errors else OF_NATS
        known = STRENGTHS.get(name, others)
    elif in_errors:  # a loss of log-probabilities, whose beta is then per unit of error
        known = {} if name in STRENGTHS else OF_ERRORS
    else:
        known = OF_NATS
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
    elif WARM_UP.side(steps / plan.num_steps):
        yield (
            f"train.warmup takes {steps:,} of {plan.num_steps:,} steps, more than half of the run; "
            f"published shares are {WARM_UP}; {_QUIET}"
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
    for value, known in ((beta1, BETA1), (beta2, BETA2)):
        if side := known.side(value):
            yield _far("train.betas", value, known, side)
    if side := WEIGHT_DECAY.side(train.weight_decay):
        yield _far("train.weight_decay", train.weight_decay, WEIGHT_DECAY, side)


def _lora(plan: Plan) -> Iterator[str]:
    lora = plan.config.model.lora
    if lora is None:
        return
    if LORA_SCALE.side(lora.alpha / lora.rank) == "above":
        yield (
            f"model.lora.alpha is {lora.alpha / lora.rank:g} times its rank, by which the change "
            f"of the weights is multiplied; published are {LORA_SCALE}; {_QUIET}"
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
    """The number of epochs."""
    known = EPOCHS.get(plan.config.modality)
    if known is None or not plan.rows:
        return
    epochs = plan.num_steps * plan.rows_per_step / len(plan.rows)
    if plan.num_steps > FEW_STEPS and known.side(epochs) == "above":
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
        known = DESIRABLE.get(name)
        if known is None:
            continue
        good = sum(row.weight for row in plan.rows if row.labels[0] > 0.5)
        bad = sum(row.weight for row in plan.rows if row.labels[0] <= 0.5)
        good *= given.get("desirable_weight", 1.0)
        bad *= given.get("undesirable_weight", 1.0)
        if good and bad and known.side(good / bad):
            yield (
                f"desirable rows weigh {good / bad:.3g} times as much as undesirable ones; "
                f"published for {name} are {known}. Balance them by {where}.desirable_weight and "
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
