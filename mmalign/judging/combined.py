"""Several judges as one: a weighted sum of rewards, or the judge that is least content."""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from mmalign.data.select import worst_group
from mmalign.judging.base import NAN, Drawn, Judge, Verdict


def comparing(judge: Judge) -> str | None:
    """The name of a member of a combination that compares responses, and says nothing of one."""
    for member in getattr(judge, "judges", ()):
        if getattr(member, "compares", False):
            return str(member.name)
        if (within := comparing(member)) is not None:
            return within
    return None


def _asked(judges: Sequence[Judge], rows: Sequence[Drawn]) -> list[Verdict]:
    """What each judge says, with the rewards of all in `by` and none decided."""
    said = [judge(rows) for judge in judges]
    joined: list[Verdict] = []
    for verdicts in zip(*said, strict=True):
        by = {judge.name: one.rewards for judge, one in zip(judges, verdicts, strict=True)}
        notes = (
            f"{judge.name}: {one.note}"
            for judge, one in zip(judges, verdicts, strict=True)
            if one.note
        )
        counts: Counter[str] = Counter()
        for one in verdicts:
            counts.update(one.counts)
        size = len(verdicts[0].rewards)
        joined.append(Verdict([NAN] * size, None, "; ".join(notes), by, dict(counts)))
    return joined


def _decided(verdict: Verdict, rewards: Sequence[float]) -> Verdict:
    note = verdict.note if all(map(math.isnan, rewards)) else ""
    return Verdict(list(rewards), None, note, verdict.by, verdict.counts)


@dataclass(frozen=True)
class Weighted:
    """The sum of the judges' rewards, each times its weight.

    A response that one of them does not judge is not judged. Win probabilities of a member are not
    summed: those of the sum follow from its rewards.

    Attributes:
        judges: The members.
        weights: One a member, in units of the sum over its own reward.
        name: Of the sum.
    """

    judges: tuple[Judge, ...]
    weights: tuple[float, ...]
    name: str = "sum"

    def facts(self) -> dict[str, Any]:
        """Those of the members, and the weights."""
        return {"sum": [judge.facts() for judge in self.judges], "weights": list(self.weights)}

    def __call__(self, rows: Sequence[Drawn]) -> list[Verdict]:
        """A verdict a row, with the rewards of every member in `by`."""
        weights = np.asarray(self.weights)
        return [
            _decided(one, (weights @ np.asarray(list(one.by.values()), dtype=float)).tolist())
            for one in _asked(self.judges, rows)
        ]


@dataclass(frozen=True)
class WorstOf:
    """The rewards of the judge whose mean reward over all rows is lowest.

    Attributes:
        judges: Two or more, whose rewards are in one unit.
        name: Of the result.

    Source: Chakraborty et al. 2024, arXiv:2402.08925 (MaxMin-RLHF): each round improves the group
        of users that is worst off.
    """

    judges: tuple[Judge, ...]
    name: str = "worst_of"

    def facts(self) -> dict[str, Any]:
        """Those of the members."""
        return {"worst_of": [judge.facts() for judge in self.judges]}

    def __call__(self, rows: Sequence[Drawn]) -> list[Verdict]:
        """Settled over these rows; `settle` does it for those of a whole file."""
        return self.settle(_asked(self.judges, rows))

    def settle(self, verdicts: Sequence[Verdict]) -> list[Verdict]:
        """The rewards of the worst-off judge, of responses that all judges have judged."""
        worst = self.chosen(verdicts)
        settled: list[Verdict] = []
        for one in verdicts:
            every = np.asarray(list(one.by.values()), dtype=float)
            own = np.asarray(one.by[worst], dtype=float)
            settled.append(_decided(one, np.where(np.isnan(every).any(0), NAN, own).tolist()))
        return settled

    def chosen(self, verdicts: Sequence[Verdict]) -> str:
        """The judge whose mean reward is lowest, of responses that all judges have judged."""
        names = [judge.name for judge in self.judges]
        every = [np.asarray([one.by[name] for name in names], dtype=float) for one in verdicts]
        whole = np.concatenate([np.empty((len(names), 0)), *every], axis=1)  # [G, N]
        whole = whole[:, ~np.isnan(whole).any(0)]
        return names[worst_group(whole) if whole.shape[1] else 0]
