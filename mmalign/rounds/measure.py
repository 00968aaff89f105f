"""What a round came to, on prompts that are never trained on: reward, KL to the base, win rates.

One response a prompt is drawn at temperature 1, each round with the same random numbers, and judged
in one row with those of the last round and of the base. The KL is computed at each position of
these responses, with the adapter's own distributions: those that training sees.
"""

from __future__ import annotations

import json
import math
import os
import shutil
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch

from mmalign.config import RunConfig
from mmalign.core import Needs
from mmalign.data.example import Example
from mmalign.data.fields import Problem
from mmalign.data.jobs import track, write_lines
from mmalign.data.parse import read_record
from mmalign.data.pictures import PictureRoot
from mmalign.errors import DataError
from mmalign.inference import device_of
from mmalign.models.adapter import build_adapter, tools_of
from mmalign.rounds.lines import Line, about_of, kind_of, named, read
from mmalign.rounds.weights import Weights, to_compare, to_measure, whole
from mmalign.safe import write_text
from mmalign.stats import bootstrap_interval, percentile_interval, resample_counts, win_rate

FOLDER = "held_out"
RESPONSES = f"{FOLDER}/responses.jsonl"
CANDIDATES = f"{FOLDER}/candidates.jsonl"
JUDGED = f"{FOLDER}/judged.jsonl"
ROWS = f"{FOLDER}/rows.jsonl"
FILE = "measured.json"

_OURS = ("responses", "images", "about")


def join(own: Path, others: Sequence[tuple[str, Path]], out: Path) -> None:
    """Write what `joined` gives."""
    write_lines(out, joined(own, others, out))


def joined(own: Path, others: Sequence[tuple[str, Path]], out: Path) -> list[Line]:
    """Several policies' responses to the same prompts as lines of candidates.

    Args:
        own: Candidates, whose columns are kept.
        others: Name for `about[k].from` and file of further responses, matched by id.
        out: The file that the lines are for; images come beside it.

    Raises:
        DataError: A prompt has no response in one of the files.
    """
    found = [(name, path, named(path)) for name, path in others]
    lines: list[Line] = []
    for key, line in named(own).items():
        kind, more = kind_of(line), dict(line)
        told = [{**about, "from": about.get("from", "policy")} for about in about_of(line)]
        said = _brought(line[kind], kind, own, out, "own")
        for name, path, rows in found:
            other = rows.get(key)
            if other is None:
                raise DataError(f"{path}: has no responses to {key}, which {own} has")
            said += _brought(other[kind], kind, path, out, name)
            told += [{**about, "from": name} for about in about_of(other)]
        lines.append({**more, kind: said, "about": told})
    return lines


def _brought(said: Sequence[str], kind: str, source: Path, out: Path, name: str) -> list[str]:
    """The responses as a file beside `out` names them; images get a second name there."""
    if kind != "images" or source.parent == out.parent:
        return list(said)
    root = PictureRoot(source.parent)
    paths: list[str] = []
    for item in said:
        file = root.find(item)
        if isinstance(file, Problem):  # whoever made the file: nothing else of the disk comes along
            raise DataError(f"{source}: images {file}")
        inside = os.path.relpath(os.path.join(str(root.folder), item), str(root.folder))
        if inside.startswith(os.pardir):  # by another name of the folder
            inside = file.path.name
        path = Path(f"{out.stem}_pictures") / name / inside
        target = out.parent / path
        target.parent.mkdir(parents=True, exist_ok=True)
        target.unlink(missing_ok=True)
        try:
            os.link(file.path, target)
        except OSError:  # another disk, or one without hard links
            shutil.copyfile(file.path, target)
        paths.append(path.as_posix())
    return paths


def examples_of(candidates: Path) -> Iterator[tuple[str, Example | None]]:
    """Each prompt with its first response as a row to score; None where the response is empty."""
    root = PictureRoot(candidates.parent)
    for line in read(candidates):
        kind = kind_of(line)
        record = {key: value for key, value in line.items() if key not in _OURS}
        record |= {"response" if kind == "responses" else "image": line[kind][0]}
        if kind == "responses" and about_of(line)[0].get("cut"):
            record["cut"] = True
        if kind == "responses" and not line[kind][0].strip():
            yield str(line["id"]), None
            continue
        example, problems = read_record(record, where=f"{candidates} {line['id']}", root=root)
        if example is None:
            raise DataError(f"{candidates}: {line['id']}: {'; '.join(map(str, problems))}")
        yield str(line["id"]), example


@torch.no_grad()
def prices(
    config: RunConfig, weights: Weights, candidates: Path, scratch: Path
) -> dict[str, tuple[float, int]]:
    """What the first response to each prompt costs, summed over its scored positions.

    Of tokens KL(pi, base) at each position of the policy's own response, whose mean over responses
    is the KL of the two; unlike log pi - log base it has no noise but that of the responses. Of
    images, which have no such sum, log pi - log base.

    Args:
        config: Of all rounds.
        weights: Of the policy.
        candidates: Its own responses.
        scratch: Folder for an adapter's whole weights meanwhile.

    Returns:
        The price and the number of positions, by id.
    """
    tools = tools_of(config.modality)
    of_tokens = tools.logp_unit(config).of == "nats"
    needs = Needs(kl=True) if of_tokens else Needs(reference=True)
    if of_tokens:  # the base is what is scored, as the KL of adapters is from their reference
        scored = to_compare(config, whole(config, weights, scratch))
    else:
        scored = to_measure(config, weights)
    scored = tools.resolve_config(scored)
    rows = [(name, example) for name, example in examples_of(candidates) if example is not None]
    device = device_of(scored)
    torch.manual_seed(config.train.seed)
    adapter = build_adapter(scored, needs).to(device).eval()
    adapter.setup([example for _, example in rows])
    size = config.train.eval_batch_size or config.train.batch_size
    found: dict[str, tuple[float, int]] = {}
    for start in track(
        range(0, len(rows), size), "scoring own responses", total=len(rows), size=size
    ):
        part = rows[start : start + size]
        logps = adapter(adapter.collate([example for _, example in part]).to(device), needs)
        price = logps.kl if of_tokens else logps.policy - logps.reference
        sums = price.double().where(logps.mask, 0.0)[:, 0].sum(-1).tolist()
        counts = logps.mask[:, 0].sum(-1).tolist()
        for (name, _), total, count in zip(part, sums, counts, strict=True):
            found[name] = (total, int(count))
    shutil.rmtree(scratch, ignore_errors=True)
    return found


def rows_of(judged: Path, priced: Mapping[str, tuple[float, int]]) -> list[Line]:
    """A line for each held-out prompt: what the rounds said, and how it was judged."""
    rows: list[Line] = []
    lines = read(judged)
    # Win rates over whoever stands in a row are no reward: rounds and base would share it out.
    pairwise = any(line.get("wins") is not None for line in lines)
    for line in lines:
        about, scores = about_of(line), line["scores"]
        names = [one.get("from") for one in about]
        at = {name: names.index(name) for name in ("policy", "previous", "base") if name in names}
        wins = line.get("wins") or [[None] * len(about)] * len(about)
        row: Line = {"id": line["id"], "prompt": line["prompt"], "kind": kind_of(line)}
        for name, k in at.items():
            row[name] = line[kind_of(line)][k]
            if not pairwise:
                row[f"{name}_reward"] = scores[k]
            elif name != "policy":  # who is preferred: own against theirs
                row[f"{name}_reward"], row[f"over_{name}"] = wins[k][0], wins[0][k]
        if pairwise:
            alone = 0.5 if line.get("wins") else None  # the base beside itself
            row["policy_reward"] = wins[0][at["base"]] if "base" in at else alone
        total, count = priced.get(str(line["id"]), (None, None))
        tokens, cut = about[0].get("tokens"), bool(about[0].get("cut"))
        rows.append(row | {"price": total, "positions": count, "tokens": tokens, "cut": cut})
    return rows


def summary(rows: Sequence[Line], unit: str) -> dict[str, Any]:
    """Means over held-out prompts with their 95 % intervals.

    Args:
        rows: What `rows_of` gave.
        unit: "nats" where prices are KLs of tokens, "errors" where they are of images.

    Raises:
        DataError: No response could be judged.
    """
    rewards = _column(rows, "policy_reward")
    if not len(rewards):
        raise DataError("no held-out response could be judged; see the reasons above")
    found: dict[str, Any] = {
        "prompts": len(rows),
        "lost": 1 - len(rewards) / len(rows),
        "cut": sum(row["cut"] for row in rows) / len(rows),
        "reward": _mean(rewards),
        "length": _mean(_column(rows, "tokens")),
    }
    priced = [row for row in rows if _is_number(row["price"])]
    if priced:
        totals = _column(priced, "price")
        found["kl" if unit == "nats" else "log_ratio"] = _mean(totals)
        if unit == "nats":
            found["kl_per_token"] = _share(totals, _column(priced, "positions"))
    for name in ("previous", "base"):
        mine = "policy_reward" if f"over_{name}" not in rows[0] else f"over_{name}"
        both = [r for r in rows if _is_number(r.get(mine)) and _is_number(r.get(f"{name}_reward"))]
        if both:
            told = win_rate(_column(both, mine), _column(both, f"{name}_reward"))
            found[f"over_{name}"] = {
                "wins": told.a,
                "losses": told.b,
                "ties": told.ties,
                "interval": list(told.interval),
                "difference": told.mean_difference,
                "difference_interval": list(told.difference_interval),
            }
    return found


def made(judged: Path, pairs: Path) -> dict[str, Any]:
    """What became of the prompts that a round drew for.

    Returns:
        `prompts`; `pairs`; shares of `ties`, rows whose judged responses are all equal, and of
        `lost`, rows with fewer than two that are judged; `reward`, the mean over all responses.
    """
    lines = read(judged)
    scores = [[s for s in line.get("scores") or () if _is_number(s)] for line in lines]
    all_scores = np.asarray([score for row in scores for score in row], dtype=np.float64)
    return {
        "prompts": len(lines),
        "pairs": len(read(pairs)),
        "ties": sum(len(row) > 1 and len(set(row)) == 1 for row in scores) / max(1, len(lines)),
        "lost": sum(len(row) < 2 for row in scores) / max(1, len(lines)),
        "reward": float(all_scores.mean()) if len(all_scores) else None,
    }


def write(found: Mapping[str, Any], path: Path) -> None:
    """Write `measured.json`."""
    write_text(path, json.dumps(found, indent=1, allow_nan=False) + "\n")


def _is_number(value: Any) -> bool:
    return isinstance(value, int | float) and math.isfinite(value)


def _column(rows: Sequence[Line], key: str) -> np.ndarray:
    return np.asarray([r[key] for r in rows if _is_number(r.get(key))], dtype=np.float64)


def _mean(values: np.ndarray) -> dict[str, Any] | None:
    if not len(values):
        return None
    return {"mean": float(values.mean()), "interval": list(bootstrap_interval(values))}


def _share(totals: np.ndarray, counts: np.ndarray) -> dict[str, Any]:
    """A sum over a sum, rows resampled together."""
    columns = np.stack([totals, counts], 1)
    drawn = np.concatenate([d @ columns for d in resample_counts(len(totals), 1000, 0)])
    interval = percentile_interval(drawn[:, 0] / np.maximum(drawn[:, 1], 1.0))
    return {"mean": float(totals.sum() / max(1.0, counts.sum())), "interval": list(interval)}
