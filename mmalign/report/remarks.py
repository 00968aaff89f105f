"""What in a run's numbers a reader should look at first."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

from mmalign.report.run import is_number

if TYPE_CHECKING:
    from mmalign.report.run import Run

_NATS_PER_NAT = 5.0
"""Fall of the rejected answers per gain of the chosen ones from which a run is suspect."""


@dataclass(frozen=True, slots=True)
class Remark:
    """A sentence about a run; a warning where something went wrong."""

    text: str
    is_warning: bool = True


def remarks(run: Run) -> list[Remark]:
    """What went wrong or may mislead; empty for a run without anything to explain."""
    checks = _PICTURE_CHECKS if run.has_pictures else _CHECKS
    found = [remark for check in checks if (remark := check(run)) is not None]
    return found + [Remark(problem) for problem in run.problems]


def _unfinished(run: Run) -> Remark | None:
    if run.is_finished:
        return None
    if not run.metrics:
        return Remark("The run stopped before its first log line.")
    return Remark(
        f"The run stopped at step {run.last_step:,}, before its end. "
        "Go on with `mmalign train CONFIG --resume`."
    )


def _not_finite(run: Run) -> Remark | None:
    bad = [r.get("step") for r in run.metrics if "loss" in r and not is_number(r["loss"])]
    return Remark(f"The loss was not finite at step {bad[0]}.") if bad else None


def _chosen_falls(run: Run) -> Remark | None:
    for good, bad in (("chosen", "rejected"), ("desirable", "undesirable")):
        gain, other = _last(run, f"drift/{good}"), _last(run, f"drift/{bad}")
        if gain is not None and gain < 0:
            beside = f" (the {bad} ones: {other:+.1f})" if other is not None else ""
            return Remark(
                f"The {good} answers became less likely than under the reference: held out they "
                f"lost {-gain:.1f} nats{beside}. Then a growing margin says little about better "
                "answers. A larger beta, a smaller learning rate or an NLL term on the "
                f"{good} answer holds them up."
            )
    return None


def _loss_rises(run: Run) -> Remark | None:
    _, values = run.series("loss", held_out=True)
    if len(values) < 2 or values[-1] <= values[0]:
        return None
    return Remark(
        f"The held-out loss rose from {values[0]:.3f} to {values[-1]:.3f}: what was learned does "
        "not carry over to new rows. Try a smaller learning rate, fewer steps or a larger beta."
    )


def _coin(run: Run) -> Remark | None:
    accuracy = _last(run, "reward_accuracy")
    interval = (run.evals[-1].get("intervals") or {}).get("reward_accuracy") if run.evals else None
    if accuracy is None or interval is None or not interval[0] <= 0.5 <= interval[1]:
        return None
    if run.evals[-1].get("step") == 0:  # nothing was trained yet
        return None
    return Remark(
        f"Held out, reward accuracy is {accuracy:.0%} ({interval[0]:.0%} to {interval[1]:.0%}), "
        "which a coin would reach: these rows show no effect of the training."
    )


def _preferred_explained_worse(run: Run) -> Remark | None:
    key, where = "errors/chosen_diff", "held out"
    value = _last(run, key)
    if value is None:  # no held-out rows: the mean of the last tenth of the log lines
        _, values = run.series(key)
        last = values[-max(1, len(values) // 10) :]
        value, where = (sum(last) / len(last) if last else None), "in training"
    if value is None or value <= 0:
        return None
    return Remark(
        "The model now explains the preferred pictures worse than the reference does: "
        f"{where}, its denoising error on them is {value:.2g} higher. Pictures lose quality soon "
        "after this, while implicit accuracy stays high. Fewer steps, a smaller learning rate or a "
        "larger beta prevent it."
    )


def _rejected_dominates(run: Run) -> Remark | None:
    chosen, rejected = _last(run, "drift/chosen"), _last(run, "drift/rejected")
    if chosen is None or rejected is None or chosen <= 0 or -rejected < _NATS_PER_NAT * chosen:
        return None
    return Remark(
        f"Held out, the rejected answers fell {-rejected / chosen:.1f} nats for every nat that the "
        "chosen ones gained. Runs that collapsed looked like this; read the completions."
    )


def _accuracies_disagree(run: Run) -> Remark | None:
    reward, ranking = _last(run, "reward_accuracy"), _last(run, "ranking_accuracy")
    if reward is None or ranking is None or reward - ranking < 0.15:
        return None
    return Remark(
        f"Reward accuracy is {reward:.0%}, ranking accuracy only {ranking:.0%}: in most pairs the "
        "gap moved the right way, in fewer it changed sign. The second tells what it prefers.",
        is_warning=False,
    )


def _accuracy_is_spent(run: Run) -> Remark | None:
    _, values = run.series("rewards/accuracies")
    last = values[-max(1, len(values) // 10) :]
    if len(values) < 5 or sum(last) < 0.999 * len(last):
        return None
    shown = "pictures" if run.has_pictures else "completions"
    return Remark(
        "Training reward accuracy is 100 %, so it can tell nothing more: good and ruined runs both "
        f"reach it. Judge by the {shown} and the held-out numbers.",
        is_warning=False,
    )


def _last(run: Run, key: str) -> float | None:
    _, values = run.series(key, held_out=True)
    return values[-1] if values else None


_CHECKS = (
    _unfinished,
    _not_finite,
    _loss_rises,
    _coin,
    _chosen_falls,
    _rejected_dominates,
    _accuracies_disagree,
    _accuracy_is_spent,
)

_PICTURE_CHECKS = (
    _unfinished,
    _not_finite,
    _preferred_explained_worse,
    _loss_rises,
    _coin,
    _accuracy_is_spent,
)
