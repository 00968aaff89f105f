"""A file of image pairs or lists to the same with scores and labels; `mmalign data score`."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from itertools import islice
from pathlib import Path
from typing import Any, Generic, Literal, TypeVar

from torch import Tensor

from mmalign.data import jobs
from mmalign.data.example import PREFERENCE, Picture, as_text, other_side
from mmalign.data.pictures import decode_all, num_pixels
from mmalign.data.records import PictureCopies, ProblemList
from mmalign.diffusion.cache_plan import ahead
from mmalign.diffusion.scorers import Scorer
from mmalign.diffusion.scorers.towers import CosineScorer
from mmalign.errors import ConfigError, DataError

MOST_HELD = 40_000_000
"""Pixels of a batch; the next one is decoded meanwhile."""

Key = TypeVar("Key")
Scoring = Callable[..., "Tensor"]  # (images, prompts) -> [N]


@dataclass(frozen=True, slots=True)
class Item(Generic[Key]):
    """Images that belong together: a row's candidates, or two models' answers to a prompt."""

    key: Key
    pictures: tuple[Picture, ...]
    prompts: tuple[str, ...]  # one an image


Scores = dict[str, list[float]]  # scorer to one score an image


def score_items(
    items: Iterable[Item[Key]], scorers: Mapping[str, Scoring], batch_size: int
) -> Iterator[list[tuple[Item[Key], Scores | DataError]]]:
    """The scores of each item, batch by batch; a DataError where one of its images is broken.

    Args:
        items: Read as they are needed.
        scorers: Name to scorer.
        batch_size: Items at one time.

    Raises:
        DataError: A scorer gave what is not a finite number.
    """

    def decode(part: list[Item[Key]]) -> tuple[list[Item[Key]], Mapping[Picture, Any]]:
        return part, decode_all((p for item in part for p in item.pictures), lambda image: image)

    for part, images in ahead(_parts(items, batch_size), decode, threads=1, depth=2):
        results: list[tuple[Item[Key], Scores | DataError]] = []
        for item in part:
            errors = [e for p in item.pictures if isinstance(e := images[p], DataError)]
            results.append((item, errors[0] if errors else {}))
        whole = [(item, own) for item, own in results if not isinstance(own, DataError)]
        pictures = [images[picture] for item, _ in whole for picture in item.pictures]
        prompts = [prompt for item, _ in whole for prompt in item.prompts]
        for name, scorer in scorers.items() if whole else ():
            scores = iter(scorer(pictures, prompts).tolist())
            for item, own in whole:
                own[name] = list(islice(scores, len(item.pictures)))
                if not all(map(math.isfinite, own[name])):
                    raise DataError(
                        f"scorer {name} gave {own[name]} for {item.pictures[0]}; in half precision "
                        "a network can overflow: score in float32"
                    )
        yield results


def _parts(items: Iterable[Item[Key]], batch_size: int) -> Iterator[list[Item[Key]]]:
    """Up to `batch_size` items, fewer where their images are large: all are held at once."""
    part: list[Item[Key]] = []
    held = 0
    for item in items:
        pixels = sum(map(num_pixels, item.pictures))
        if part and (len(part) == batch_size or held + pixels > MOST_HELD):
            yield part
            part, held = [], 0
        part.append(item)
        held += pixels
    if part:
        yield part


PUBLISHED_RANGE = (0.11543526500463486, 0.28201571106910706)
"""Least and greatest PickScore cosine in Pick-a-Pic v2, of SmPO's released code."""

Smooth = Literal["published", "data"] | tuple[float, float]


def smoothed(chosen: float, rejected: float, low: float, high: float) -> float:
    """SmPO's probability that `chosen` is the better one.

    p = sigmoid((s_chosen - s_rejected) / (high - low))

    the softmax of the two scores after both were scaled from [low, high] to [0, 1].

    Args:
        chosen: Score of the one.
        rejected: Score of the other.
        low: Least score of the data set.
        high: Greatest.

    Source: Lu et al. 2025, SmPO-Diffusion, released code.
    """
    z = (chosen - rejected) / (high - low)
    return 1.0 / (1.0 + math.exp(-z)) if z >= 0 else math.exp(z) / (1.0 + math.exp(z))


def parse_smooth(text: str, scorer: str) -> Smooth:
    """What `--smooth` says: `published`, `data` or MIN,MAX.

    Raises:
        ConfigError: Something else, an empty range, or the constants of another scorer.
    """
    if text == "data":
        return "data"
    if text == "published":
        if scorer != "pickscore":
            raise ConfigError(
                f"--smooth published: the published range is that of pickscore, and labels come "
                f"from {scorer}; give MIN,MAX, or data for the range of these scores"
            )
        return "published"
    low, _, high = text.partition(",")
    try:
        limits = (float(low), float(high))
    except ValueError:
        raise ConfigError(
            f"--smooth {text}: must be published, data, or MIN,MAX, e.g. 0.115,0.282"
        ) from None
    if not (all(map(math.isfinite, limits)) and limits[0] < limits[1]):
        raise ConfigError(f"--smooth {text}: MIN must be less than MAX")
    return limits


def score_range(smooth: Smooth | None, scores: Sequence[float]) -> tuple[float, float] | None:
    """The range [low, high] to smooth over; None without smoothing.

    Raises:
        DataError: The range of the data is wanted, and all of it has one score.
    """
    if smooth == "published":
        return PUBLISHED_RANGE
    if smooth != "data":
        return smooth
    low, high = min(scores), max(scores)
    if low == high:
        raise DataError(f"--smooth data: all images have the score {low:g}; give MIN,MAX")
    return low, high


@dataclass(frozen=True, slots=True)
class Labelled:
    """A record with its scores, and what became of its label."""

    record: dict[str, Any]
    swapped: bool = False
    tied: bool = False


def label_pair(
    record: Mapping[str, Any],
    scores: Mapping[str, Sequence[float]],
    *,
    relabel: bool,
    limits: tuple[float, float] | None,
) -> Labelled:
    """A pair with the scores of its two images.

    `score_chosen` and `score_rejected` are those of the first scorer, which also labels; all go to
    `meta.scores`. A label that is replaced goes to `meta.human`.

    Args:
        record: A canonical pair.
        scores: Scorer name to (chosen, rejected).
        relabel: The higher score wins, whatever the label was; equal scores are a tie.
        limits: Range to smooth over: `p_chosen` replaces the label. None: it stays.

    Departs: the released selectors make the first (SmPO: the second) image of equal scores the
        winner; here they are a tie. Without `relabel`, a label that the scores contradict gets a
        `p_chosen` below 1/2.
    """
    row, own = dict(record), {name: list(values) for name, values in scores.items()}
    first = next(iter(own))
    swapped = relabel and own[first][1] > own[first][0]
    tied = own[first][0] == own[first][1]
    human: dict[str, Any] = {}
    if relabel or limits is not None:
        human = {key: row.pop(key) for key in PREFERENCE if key in row}
    if swapped:
        order = {key: place for place, key in enumerate(row)}
        pairs = ((other_side(key, row), value) for key, value in row.items())
        row = dict(sorted(pairs, key=lambda item: order.get(item[0], len(order))))
        own = {name: values[::-1] for name, values in own.items()}
    row["score_chosen"], row["score_rejected"] = own[first]
    if limits is not None:
        row["p_chosen"] = smoothed(own[first][0], own[first][1], *limits)
    elif relabel and tied:
        row["tie"] = True
    meta: dict[str, Any] = {**(row.get("meta") or {}), "scores": own}
    if human or relabel:
        meta["human"] = {"swapped": swapped, **human}
    return Labelled({**row, "meta": meta}, swapped, tied)


def label_list(
    record: Mapping[str, Any], scores: Mapping[str, Sequence[float]], *, relabel: bool
) -> Labelled:
    """A ranked list with the scores of its images, in `meta.scores`.

    With `relabel` those of the first scorer become its `scores`, and what was there goes to
    `meta.human`; equal ones stay equal.
    """
    row, own = dict(record), {name: list(values) for name, values in scores.items()}
    meta: dict[str, Any] = {**(row.get("meta") or {}), "scores": own}
    first = own[next(iter(own))]
    if relabel:
        meta["human"] = {"scores": row.get("scores")}
        row["scores"] = first
    return Labelled({**row, "meta": meta}, False, len(set(first)) == 1)


@dataclass(slots=True)
class Scored:
    """What `score_file` did."""

    out: Path
    num_written: int = 0
    num_pairs: int = 0
    swapped: int = 0
    tied: int = 0
    resumed: int = 0
    left_out: list[str] = field(default_factory=list[str])

    def text(self) -> str:
        """For a terminal."""
        lines = [f"{self.out}: {self.num_written} rows scored"]
        if self.resumed:
            lines[0] += f", of which {self.resumed} had been before"
        if self.swapped or self.tied:
            lines.append(f"of {self.num_pairs} pairs {self.swapped} swapped, {self.tied} tied")
        if self.left_out:
            shown = "; ".join(jobs.first_few(self.left_out))
            lines.append(f"{len(self.left_out)} rows left out: {shown}")
        return "\n".join(lines)


def score_file(
    source: jobs.Source,
    out: Path,
    names: Sequence[str],
    load: Callable[[], Mapping[str, Scorer]],
    *,
    relabel: bool = False,
    smooth: Smooth | None = None,
    settings: Mapping[str, Any] | None = None,
    batch_size: int = 16,
    progress: jobs.OnProgress = jobs.no_progress,
) -> Scored:
    """Write pairs or lists of images with their scores, in mmalign's own layout.

    Scores go to OUT.partial as they come, so that the same call after an interruption goes on; the
    labels are made from them at the end. PickScore's are raw cosines, about 0.2, as SmPO's
    constants and the published selectors have them. An image is scored for the row's prompt, or
    its own caption where the row has none. Rows with an image that cannot be decoded are left out.

    Args:
        source: The rows.
        out: The JSONL file to write; it appears whole or not at all.
        names: Of the scorers; the first labels.
        load: Gives the scorers by name; called when there is something to score and all rows have
            been looked at.
        relabel: The higher score wins; see `label_pair`.
        smooth: Range for the probability that the chosen one is better; None for none.
        settings: What scores depend on besides, so that others are not mixed with these.
        batch_size: Rows at one time.
        progress: Told of every batch how many rows it had, and how many there are in all.

    Raises:
        DataError: The file is there, rows have problems or no images, or none can be used.
    """
    jobs.require_new(out)
    total = _check(source, smooth is not None)
    asked = {**source.facts(), "scorers": list(names), **(settings or {})}
    with jobs.resumable(out, asked) as journal:
        result = Scored(out, resumed=len(journal.done))
        progress(result.resumed, total)
        if result.resumed < total:
            raw = {n: s.cosine if isinstance(s, CosineScorer) else s for n, s in load().items()}
            for part in score_items(_items(source, journal), raw, batch_size):
                lines: dict[str, dict[str, Any]] = {
                    item.key: {"broken": str(found)}
                    if isinstance(found, DataError)
                    else {"scores": found}
                    for item, found in part
                }
                journal.add(lines)
                progress(len(part), total)
        _write(source, journal, relabel, smooth, result)
    return result


def _check(source: jobs.Source, pairs_only: bool) -> int:
    """How many rows there are; all problems are told before anything is scored."""
    problems = ProblemList()
    total = 0
    for record in source.records():
        problems.add(record, *record.problems)
        row = record.example
        total += 1
        if row is None:
            continue
        are_pictures = all(isinstance(c.response, Picture) for c in row.candidates)
        if row.kind not in ("pair", "list") or not are_pictures:
            raise DataError(
                f"{record.place}: is not a pair or list of images; `mmalign data score` compares "
                "images of one prompt"
            )
        if pairs_only and row.kind == "list":
            raise DataError(f"{record.place}: --smooth makes labels of pairs, and this is a list")
    if problems.groups:
        raise problems.error(source.path)
    if not total:
        raise DataError(f"{source.path}: holds no records")
    return total


def _items(source: jobs.Source, journal: jobs.Journal) -> Iterator[Item[str]]:
    """The rows that are still to be scored."""
    for record in source.records():
        row = record.example
        if row is not None and record.id not in journal.done:
            pictures = [c.response for c in row.candidates if isinstance(c.response, Picture)]
            prompts = [as_text(row.prompt or c.prompt or "") for c in row.candidates]
            yield Item(record.id, tuple(pictures), tuple(prompts))


def _write(
    source: jobs.Source, journal: jobs.Journal, relabel: bool, smooth: Smooth | None, result: Scored
) -> None:
    """Labels from the journal's scores; the file replaces nothing until it is whole."""
    found = {key: line["scores"] for key, line in journal.done.items() if "scores" in line}
    result.left_out = [f"{key}: {error}" for key, error in journal.broken.items()]
    if not found:
        raise DataError(f"{source.path}: no row can be scored. {'; '.join(result.left_out[:2])}")
    limits = score_range(smooth, [s for own in found.values() for s in next(iter(own.values()))])
    copies = PictureCopies(result.out, source.root())

    def labelled() -> Iterator[dict[str, Any]]:
        for record in source.records():
            if record.example is None or record.id not in found:
                continue
            value = {**record.value, "id": record.id, **copies.columns(record.example)}
            own = found[record.id]
            if record.example.kind == "pair":
                row = label_pair(value, own, relabel=relabel, limits=limits)
                result.num_pairs += 1
                result.swapped += row.swapped
                result.tied += row.tied
            else:
                row = label_list(value, own, relabel=relabel)
            result.num_written += 1
            yield row.record

    jobs.write_lines(result.out, labelled())
