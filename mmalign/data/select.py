"""What of the rows is trained on: pairs made by rewards, and the shape an objective asks for.

Letters: K responses of a prompt, M objectives, N rows or samples, U users, G groups.
"""

from __future__ import annotations

import logging
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import Any, Literal, Protocol

import numpy as np
from numpy.typing import ArrayLike, NDArray

from mmalign.data.example import Candidate, Example
from mmalign.errors import DataError

Floats = NDArray[np.float64]


def _floats(values: ArrayLike) -> Floats:
    return np.asarray(values, dtype=np.float64)


def win_rate(preference: ArrayLike) -> Floats:
    """Self-play reward: how often a response beats the others, mean over j != i of P(i beats j).

    Args:
        preference: [K, K], entry (i, j) the probability that i is preferred to j; nan where nobody
            compared them, which does not count. The diagonal is not read. Cycles are allowed.

    Returns:
        [K], in [0, 1]; nan for a response that was compared with none.

    Source: Swamy et al. 2024, arXiv:2401.04056 (minimaximalist self-play).
    """
    p = _floats(preference)
    if p.ndim != 2 or p.shape[0] != p.shape[1] or len(p) < 2:
        raise DataError(f"preference has shape {list(p.shape)}; it must be [K, K] with K >= 2")
    known = ~np.isnan(p) & ~np.eye(len(p), dtype=bool)
    count = known.sum(1)
    total = np.where(known, p, 0.0).sum(1)
    return np.divide(total, count, out=np.full(len(p), np.nan), where=count > 0)


def win_probabilities(rewards: ArrayLike) -> Floats:
    """What rewards say of pairs under Bradley-Terry: sigmoid(r_i - r_j); [K] -> [K, K]."""
    r = _floats(rewards)
    return np.exp(-np.logaddexp(0.0, -np.subtract.outer(r, r)))


def leave_one_out(rewards: ArrayLike) -> Floats:
    """Each reward less the mean of the others; [K] -> [K]."""
    r = _floats(rewards)
    return r - (r.sum() - r) / (len(r) - 1)


def direction(degrees: ArrayLike) -> Floats:
    """Unit vectors in a plane of two objectives: [...] degrees from the first axis -> [..., 2].

    A condition in a prompt carries them as whole numbers, round(100 * v).

    Source: Wang et al. 2024, arXiv:2402.18571 (directional preference alignment).
    """
    radians = np.deg2rad(_floats(degrees))
    return np.stack([np.cos(radians), np.sin(radians)], axis=-1)


def project(rewards: ArrayLike, towards: ArrayLike) -> Floats:
    """Rewards of several objectives along a direction: [K, M], [M] -> [K]."""
    return _floats(rewards) @ _floats(towards)


def tool_reward(calls: ArrayLike, fewest: ArrayLike | None = None, budget: float = 4.0) -> Floats:
    """How sparingly tools were called, 0 to 1; times correctness, it is the reward.

    With the fewest calls n of a correct answer in the group: 1 if m = n = 0, cos(m pi / (2 m + c))
    if only n = 0, else sin(f pi / (2 n)) with f = 2 n m / (m + n). Without: cos(m pi / (2 m + c)).

    Args:
        calls: [K] calls m used.
        fewest: [K] n; None where there is no group to compare with.
        budget: Smoothing constant c, in calls.

    Source: Wang et al. 2025 (OTC, optimal tool calls), as quoted in public notes.
    """
    m = _floats(calls)
    alone = np.cos(m * np.pi / (2.0 * m + budget))
    if fewest is None:
        return alone
    n = _floats(fewest)
    grouped = np.sin(m / np.maximum(m + n, 1.0) * np.pi)
    return np.where(n == 0, alone, grouped)


def assign_users(margins: ArrayLike) -> tuple[NDArray[np.intp], Floats]:
    """The E step of MaxMin: each user goes to the reward model that explains their choices best.

    Args:
        margins: [U, G, N] reward of chosen less rejected under each group's model.

    Returns:
        [U] group of each user, and [U, G] log-likelihoods sum over n of log sigmoid(margin).

    Source: Chakraborty et al. 2024, arXiv:2402.08925 (MaxMin-RLHF).
    """
    loglik = -np.logaddexp(0.0, -_floats(margins)).sum(-1)
    return loglik.argmax(1), loglik


def worst_group(rewards: ArrayLike) -> int:
    """The group whose mean reward on the current samples is lowest; [G, N]. Source: MaxMin-RLHF."""
    return int(_floats(rewards).mean(1).argmin())


def precision_reward(quality: ArrayLike, low: float = 0.5, high: float = 0.75) -> Floats:
    """Matched boxes' quality squashed: 0 below `low`, 1 above `high`, itself between. [N] -> [N].

    Source: Zhan et al. 2025, arXiv:2503.18013 (Vision-R1), released code; (0.5, 0.75) in stage 1,
        (0.75, 0.9) in stage 2.
    """
    q = _floats(quality)
    return np.where(q < low, 0.0, np.where(q > high, 1.0, q))


def recall_hits(quality: ArrayLike, threshold: float = 0.5) -> Floats:
    """1 for a box matched well enough, else 0; [N] -> [N]. Source: as `precision_reward`."""
    hits: NDArray[Any] = _floats(quality) >= threshold
    return hits.astype(np.float64)


Pair = tuple[int, int]
"""(chosen, rejected), two indices into the K responses of a prompt: equal texts stay apart.
Responses with equal rewards never form a pair."""


def best_worst(rewards: Sequence[float]) -> Pair:
    """The first of the highest and the first of the lowest rewards; refuses equal rewards."""
    best, worst = max(rewards), min(rewards)
    if best == worst:
        raise DataError(f"{len(rewards)} responses all have the reward {best:g}; none is better")
    return rewards.index(best), rewards.index(worst)


def best_against_worst(rewards: Sequence[float], may_win: Sequence[bool]) -> list[Pair]:
    """The best against the worst, the second best against the second worst, and so on.

    Args:
        rewards: Length K, any unit.
        may_win: Length K; False for a response that is never chosen.
    """
    indices = range(len(rewards))
    best = sorted((i for i in indices if may_win[i]), key=lambda i: -rewards[i])
    worst = sorted(indices, key=lambda i: rewards[i])
    return wider_than(list(zip(best, worst, strict=False)), rewards, 0.0)


def all_pairs(rewards: Sequence[float], margin: float = 0.0) -> list[Pair]:
    """Every pair whose rewards differ by more than `margin`, in reward units."""
    indices = range(len(rewards))
    return [(i, j) for i in indices for j in indices if rewards[i] - rewards[j] > margin]


def wider_than(pairs: Sequence[Pair], rewards: Sequence[float], margin: float) -> list[Pair]:
    """The pairs whose rewards differ by more than `margin`, in reward units."""
    return [(i, j) for i, j in pairs if rewards[i] - rewards[j] > margin]


def first_round(rewards: Sequence[float], order: Sequence[int] | None = None) -> list[Pair]:
    """Neighbours in `order` as disjoint pairs: at most K // 2 of them."""
    order = range(len(rewards)) if order is None else order
    return wider_than(_matches(rewards, order), rewards, 0.0)


def tournament(rewards: Sequence[float], order: Sequence[int] | None = None) -> list[Pair]:
    """A knock-out: neighbours in `order` meet, winners meet again; K - 1 pairs less the draws.

    Args:
        rewards: Length K, any unit.
        order: The first round's seating; the given order when left out. Shuffle it to draw lots.

    Source: Liu et al. 2023, arXiv:2309.06657 (RSO).
    """
    standing = list(range(len(rewards)) if order is None else order)
    pairs: list[Pair] = []
    while len(standing) > 1:
        matches = _matches(rewards, standing)
        pairs += matches
        standing = [winner for winner, _ in matches] + standing[2 * len(matches) :]
    return wider_than(pairs, rewards, 0.0)


def _matches(rewards: Sequence[float], order: Sequence[int]) -> list[Pair]:
    """Neighbours in `order`, the better one first."""
    neighbours = zip(order[::2], order[1::2], strict=False)
    return [(i, j) if rewards[i] >= rewards[j] else (j, i) for i, j in neighbours]


def rejection_rounds(
    rewards: ArrayLike, uniforms: ArrayLike, *, beta: float = 0.5
) -> list[list[int]]:
    """Rounds of statistical rejection sampling: which responses each round accepts.

    accept i  if  u_i < exp((r_i - r_max) / beta),  r_max over the responses that are left

    Each round accepts at least the best response that is left, and accepted ones leave after it.

    Args:
        rewards: [K] any unit.
        uniforms: [rounds, K] draws from [0, 1).
        beta: Temperature, in units of the reward. Large keeps all, small keeps the best.

    Source: Liu et al. 2023, arXiv:2309.06657, algorithm 1 (RSO).
    """
    r, u = np.asarray(rewards, dtype=float), np.asarray(uniforms, dtype=float)
    if not beta > 0:
        raise DataError(f"beta is {beta}; it must be above 0, in units of the reward")
    if not np.isfinite(r).all():
        raise DataError("rejection sampling needs finite rewards")
    left = np.arange(len(r))
    rounds: list[list[int]] = []
    for draws in u:
        if not len(left):
            break
        accepted = draws[left] < np.exp((r[left] - r[left].max()) / beta)
        rounds.append(left[accepted].tolist())
        left = left[~accepted]
    return rounds


def rejection_sample(
    rewards: ArrayLike, size: int, rng: np.random.Generator, *, beta: float = 0.5
) -> list[int]:
    """The first `size` responses that `rejection_rounds` accepts.

    Departs: more responses than there are is an error; the published loop would not end.
    """
    r: NDArray[Any] = np.asarray(rewards, dtype=float)
    if not 0 < size <= len(r):
        raise DataError(f"cannot keep {size} of {len(r)} responses; size must be 1 to {len(r)}")
    rounds = rejection_rounds(r, rng.random((len(r), len(r))), beta=beta)
    return [index for accepted in rounds for index in accepted][:size]


log = logging.getLogger("mmalign.data")

Ties = Literal["drop", "half", "soft"]
ListPairs = Literal["best_worst", "all"]


class Needs(Protocol):
    """The part of an objective's needs that concerns data."""

    @property
    def rows(self) -> str: ...  # noqa: D102
    @property
    def candidates(self) -> int: ...  # noqa: D102
    @property
    def roles(self) -> tuple[str, ...]: ...  # noqa: D102
    @property
    def labels(self) -> bool: ...  # noqa: D102


def fit(
    examples: Sequence[Example],
    needs: Needs,
    *,
    ties: Ties = "drop",
    swap: bool = False,
    list_pairs: ListPairs = "best_worst",
) -> list[Example]:
    """The examples as rows of the kind `needs` asks for.

    Args:
        examples: Rows of any kinds.
        needs: The objective's `rows`, `candidates` and `roles`.
        ties: What becomes of pairs whose labels are equal: `drop`; `half`, both orders with half
            the weight; `soft`, one row with labels (1/2, 1/2). A list of equal scores is dropped.
        swap: Exchange better and worse: chosen and rejected, desirable or not, the sign of scores.
        list_pairs: How a ranked list becomes pairs.

    Raises:
        DataError: when a row cannot be of that kind, lacks a role, or K differs between rows.
    """
    rows = _settle_ties(examples, ties)
    if swap:
        rows = [_swapped(row) for row in rows]
    target = _target(rows, needs)
    reshape: dict[str, Callable[[Example], list[Example]]] = {
        "pair": lambda row: _to_pairs(row, list_pairs),
        "unpaired": _to_unpaired,
        "list": _to_list,
        "plain": _to_plain,
    }
    fitted = [_with_roles(new, needs.roles) for row in rows for new in reshape[target](row)]
    if target != "pair" and ties == "soft" and any(row.is_tie for row in rows):
        what = "data.ties: soft gives labels (1/2, 1/2)"
        raise DataError(f"{what}, which {target} rows cannot carry")
    dropped = len(rows) - len(fitted)
    if target == "plain" and dropped:
        log.warning("%d undesirable responses are left out: nothing here learns from them", dropped)
    _check_one_k(fitted, needs)
    return fitted


def is_used(row: Example, needs: Needs, ties: Ties) -> bool:
    """Whether `fit` makes at least one row of it."""
    if row.is_tie and (ties == "drop" or row.kind != "pair"):
        return False
    single = needs.rows == "plain" or (needs.rows == "any" and needs.candidates <= 1)
    return not (single and row.kind == "unpaired" and row.labels[0] <= 0)


def reads_labels(rows: Sequence[Example], needs: Needs) -> bool:
    """Whether the objective reads the values of labels, once the rows are of its kind."""
    return needs.labels and _target(rows, needs) in ("pair", "list")


def check_trainable(rows: Sequence[Example], needs: Needs, names: str) -> None:
    """Refuse fitted rows that an objective can learn nothing from.

    Args:
        rows: What would be trained on.
        needs: The objective's `rows`.
        names: The files that the rows come from.

    Raises:
        DataError: The weight of every row is 0, or all single responses have one rating.
    """
    if not any(row.weight for row in rows):
        raise DataError(
            f"{names}: the weight of all {len(rows)} rows is 0, so nothing would be learned; give "
            "weights above 0, or none"
        )
    ratings = {row.labels[0] > 0.5 for row in rows if row.kind == "unpaired"}
    if needs.rows == "unpaired" and len(ratings) == 1:
        given, missing = ("", "un") if ratings == {True} else ("un", "")
        raise DataError(
            f"{names}: all {len(rows)} responses are {given}desirable, and the objective learns "
            f"from the difference to {missing}desirable ones: add some of those too"
            + (", or use sft, which learns from good ones alone" if not given else "")
        )


def _settle_ties(examples: Sequence[Example], ties: Ties) -> list[Example]:
    result: list[Example] = []
    dropped = 0
    for row in examples:
        if not row.is_tie or (ties == "soft" and row.kind == "pair"):
            result.append(row)
        elif ties == "half" and row.kind == "pair":
            decided = replace(row, labels=(1.0, 0.0, *row.labels[2:]), weight=row.weight / 2)
            result += [_named(decided, 0), _named(_swapped(decided), 1)]
        else:
            dropped += 1
    if dropped:
        log.warning("%d of %d rows are ties and are left out", dropped, len(examples))
    return result


def _named(row: Example, part: int) -> Example:
    return replace(row, id=f"{row.id}#{part}")


def _swapped(row: Example) -> Example:
    if row.kind == "pair":
        first, second, *extra = row.candidates
        # A corrupted clip is shown with the better response, whichever that is.
        extra = [
            replace(second, media=c.media, role=c.role) if c.role == "corrupted" else c
            for c in extra
        ]
        return replace(row, candidates=(second, first, *extra))
    if row.kind == "plain":
        what = "has one unrated response, so data.swap has nothing to swap"
        raise DataError(f"row {row.id!r} {what}")
    shift = 1.0 if row.kind == "unpaired" else 0.0
    n = row.num_rated
    return replace(row, labels=(*(shift - label for label in row.labels[:n]), *row.labels[n:]))


def _target(rows: Sequence[Example], needs: Needs) -> str:
    if needs.rows != "any":
        return needs.rows
    if needs.candidates <= 1:
        return "plain"
    return "list" if all(row.kind == "list" for row in rows) else "pair"


def _refuse(row: Example, target: str, reason: str) -> DataError:
    return DataError(f"row {row.id!r}: the objective needs {target} rows, but {reason}")


def _to_pairs(row: Example, list_pairs: ListPairs) -> list[Example]:
    if row.kind == "pair":
        return [row]
    if row.kind != "list":
        loss = "plain text, such as sft"
        if row.kind == "unpaired":
            loss = "single responses, such as kto (diffusion_kto for images)"
        reason = "this one has a single response; give chosen and rejected, or use a loss for"
        raise _refuse(row, "pair", f"{reason} {loss}")
    scores = row.labels[: row.num_rated]
    chosen_rejected = [best_worst(scores)] if list_pairs == "best_worst" else all_pairs(scores)
    extra, extra_labels = row.candidates[len(scores) :], row.labels[len(scores) :]
    shape: dict[str, Any] = {"labels": (1.0, 0.0, *extra_labels), "kind": "pair"}
    pairs = [
        replace(row, candidates=(row.candidates[i], row.candidates[j], *extra), **shape)
        for i, j in chosen_rejected
    ]
    return pairs if len(pairs) == 1 else [_named(pair, i) for i, pair in enumerate(pairs)]


def _to_unpaired(row: Example) -> list[Example]:
    if row.kind == "unpaired":
        return [row]
    if row.kind == "plain":
        raise _refuse(row, "unpaired", "this response is not rated; add desirable: true or false")
    pair = _to_pairs(row, "best_worst")[0]
    rated = zip(pair.candidates[:2], pair.labels[:2], strict=True)
    better = max(pair.labels[:2])
    return [
        _named(_single(row, candidate, "unpaired", float(label == better)), i)
        for i, (candidate, label) in enumerate(rated)
    ]


def _single(
    row: Example, candidate: Candidate, kind: Literal["unpaired", "plain"], label: float
) -> Example:
    """One rated response, and itself under the record's own corrupted clip where there is one."""
    own = [c for c in row.candidates if c.role == "corrupted" and c.response == candidate.response]
    labels = (label, *[0.0] * len(own))
    return replace(row, candidates=(candidate, *own), labels=labels, kind=kind)


def _to_list(row: Example) -> list[Example]:
    if row.kind not in ("pair", "list"):
        raise _refuse(row, "list", "this one has a single response; give responses and scores")
    return [replace(row, kind="list")]


def _to_plain(row: Example) -> list[Example]:
    """The best response alone; none when the only one is undesirable."""
    if row.kind == "plain":
        return [row]
    scores = row.labels[: row.num_rated]
    if row.kind == "unpaired" and scores[0] <= 0:
        return []
    return [_single(row, row.candidates[scores.index(max(scores))], "plain", 1.0)]


MADE = frozenset(
    {"mismatched", "augmented", "corrupted", "rejected_corrupted"}
    | {f"corrupted_{level}" for level in ("video", "clip", "frame")}
)
"""Roles whose candidates an adapter makes for rows that do not bring them."""


def _with_roles(row: Example, roles: tuple[str, ...]) -> Example:
    """Only the rated candidates and those of `roles`, in order; adapters make those of `MADE`."""
    keep = list(range(row.num_rated))
    places = {role: [i for i, c in enumerate(row.candidates) if c.role == role] for role in roles}
    left = {role: iter(there) for role, there in places.items()}
    for role in roles:
        found = next(left[role], None)
        if found is not None:
            keep.append(found)
        elif role not in MADE:
            raise DataError(
                f"row {row.id!r}: the objective needs {roles.count(role)} {role} response(s) a "
                f"row, in the field {role!r}, and this row has {len(places[role])}"
            )
    if keep == list(range(len(row.candidates))):
        return row
    candidates = tuple(row.candidates[i] for i in keep)
    return replace(row, candidates=candidates, labels=tuple(row.labels[i] for i in keep))


def _check_one_k(rows: Sequence[Example], needs: Needs) -> None:
    sizes = Counter(len(row.candidates) for row in rows)
    if len(sizes) > 1:
        counts = ", ".join(f"{n} rows with {k}" for k, n in sorted(sizes.items()))
        raise DataError(
            f"all rows of a run must have the same number of responses, but there are {counts}; "
            "cut the lists to one length, or use a pair loss"
        )
    brought = {c.role for row in rows[:1] for c in row.candidates}
    made = sum(role in MADE and role not in brought for role in needs.roles)
    for k in sizes:
        if k + made < needs.candidates:
            raise DataError(
                f"the objective needs at least {needs.candidates} candidates a row, but the rows "
                f"have {k + made}"
            )
