"""Data files with values, keys and bytes changed: they are read, or one sentence says where not."""

from __future__ import annotations

import csv
import gzip
import io
import json
from functools import partial
from typing import TYPE_CHECKING, Any

import pytest
from harness import changed, mutated, numbers, outcome, require_sentence, stream

from mmalign.config import DataConfig
from mmalign.core import Needs
from mmalign.data.sources import load_examples
from mmalign.data.validate import check_files

if TYPE_CHECKING:
    import random
    from pathlib import Path

ASK, GOOD, BAD = "Why does bread rise?", "Yeast makes gas.", "It is magic."
ASKED = [{"role": "user", "content": ASK}]
SAID = [{"role": "assistant", "content": GOOD}]
TALK = f"\n\nHuman: {ASK}\n\nAssistant: "
TOLD = {"from": "gpt", "value": GOOD}
OTHER = [{"role": "assistant", "content": BAD}]
PAIR = {"prompt": ASK, "chosen": GOOD, "rejected": BAD}
RECORDS: tuple[dict[str, Any], ...] = (
    PAIR,
    {**PAIR, "p_chosen": 0.8, "weight": 0.5, "id": "one", "split": "train", "meta": {"x": 1}},
    {**PAIR, "votes_chosen": 2, "votes_rejected": 1, "votes_tie": 0},
    {**PAIR, "spans_chosen": [[0, 5]], "spans_rejected": [[0, 2], [3, 5]], "chosen_cut": True},
    {**PAIR, "label_chosen": 0.7, "label_rejected": 0.2, "rationale": BAD, "online": [GOOD, BAD]},
    {"prompt_chosen": ASK, "prompt_rejected": "Why?", "chosen": GOOD, "rejected": BAD},
    {"prompt": ASK, "responses": [GOOD, BAD, "No."], "scores": [3, 1, 2], "cut": [False] * 3},
    {"prompt": ASK, "answers": [GOOD, BAD], "ranks": [1, 2]},
    {"prompt": ASK, "response": GOOD, "desirable": True},
    {"prompt": ASKED, "completion": SAID, "label": False},
    {"prompt": ASKED, "chosen": SAID, "rejected": OTHER, "system": "Be short."},
    {"chosen": [*ASKED, *SAID], "rejected": [*ASKED, *OTHER], "score_chosen": 8},
    {"chosen": f"{TALK}{GOOD}", "rejected": f"{TALK}{BAD}"},
    {"prompt": ASK, "response_a": GOOD, "response_b": BAD, "winner": "a"},
    {"prompt": ASK, "response_0": GOOD, "response_1": BAD, "better_response_id": 1},
    {"conversation_a": [*ASKED, *SAID], "conversation_b": [*ASKED, *OTHER], "winner": "tie"},
    {"instruction": ASK, "input": "", "chosen": GOOD, "rejected": BAD, "history": [["q", "a"]]},
    {"instruction": ASK, "output": GOOD, "kto_tag": True},
    {"conversations": [{"from": "human", "value": ASK}], "chosen": TOLD, "rejected": TOLD},
    {"messages": [*ASKED, *SAID], "rejected_response": BAD},
    {"query": ASK, "response": GOOD, "rejected_response": BAD},
    {"video": {"path": "clip.mp4", "start": 0, "end": 1.5}, **PAIR, "video_rejected": "other.mp4"},
    {"image": "a.png", **PAIR},
    {"prompt": "a cat", "image_chosen": "a.png", "image_rejected": "b.png", "p_chosen": 0.7},
    {"caption": "a cat", "jpg_0": "a.png", "jpg_1": "b.png", "label_0": 0.5, "has_label": True},
    {"prompt": "a cat", "images": ["a.png", "b.png"], "scores": [1, 2]},
    {"prompt": "a cat", "image": "a.png", "desirable": True},
    {"prompt": ASK},
)  # fmt: skip
KEYS = tuple(sorted({key for record in RECORDS for key in record}))
NEEDS = (
    Needs(rows="pair", candidates=2, reference=True),
    Needs(rows="unpaired", candidates=1),
    Needs(rows="list", candidates=2),
    Needs(rows="any", candidates=1),
)


def write(rng: random.Random, folder: Path) -> Path:
    """A data file that is nearly right."""
    base = rng.choice(RECORDS)
    records = [base, *(mutated(base, rng, KEYS) for _ in range(rng.choice([1, 1, 2, 4])))]
    ending = rng.choice(["jsonl"] * 6 + ["json", "csv", "tsv", "jsonl.gz", "parquet", "txt"])
    file = folder / f"rows.{ending}"
    for old in folder.glob("rows.*"):
        old.unlink()
    if ending == "parquet":
        _write_parquet(file, records)
    else:
        file.write_bytes(_as_bytes(ending, records, rng))
    if rng.random() < 0.35:
        file.write_bytes(changed(file.read_bytes(), rng))
    return file


def _as_bytes(ending: str, records: list[Any], rng: random.Random) -> bytes:
    lines = [json.dumps(record, ensure_ascii=rng.random() < 0.5) for record in records]
    if ending in ("csv", "tsv"):
        out = io.StringIO()
        table = csv.writer(out, delimiter="\t" if ending == "tsv" else ",")
        table.writerow(records[0])
        for record in records:
            values = list(record.values()) if isinstance(record, dict) else [record]
            table.writerow([v if isinstance(v, str) else json.dumps(v) for v in values])
        text = out.getvalue()
    elif ending == "json":
        text = json.dumps(rng.choice([records, {"data": records}, records[0], [records], 3]))
    else:
        text = "\n".join(lines) + rng.choice(["\n", "", "\r\n", "\0"])
    data = text.encode("utf-8", "surrogatepass")
    return gzip.compress(data) if ending.endswith("gz") else data


def _write_parquet(file: Path, records: list[Any]) -> None:
    import pyarrow
    from pyarrow import parquet

    try:
        table = pyarrow.Table.from_pylist([r for r in records if isinstance(r, dict)])
    except (pyarrow.ArrowException, ValueError, TypeError, OverflowError):
        texts = [{str(key): json.dumps(v) for key, v in records[0].items()}]
        table = pyarrow.Table.from_pylist(texts)
    parquet.write_table(table, file)


def check(few: int, folder: Path) -> None:
    for number in numbers(few):
        rng = stream("rows", number)
        file, needs = write(rng, folder), rng.choice(NEEDS)
        settings = {
            "ties": rng.choice(["drop", "half"]),
            "bad_rows": rng.choice(["stop", "drop"]),
            "eval_fraction": rng.choice([0.0, 0.3]),
        }
        outcome(partial(_checked, file), number)
        source = {"path": str(file), "layout": rng.choice([None, None, None, "pair", "messages"])}
        section = DataConfig.model_validate({"train": source, **settings})
        outcome(partial(load_examples, section, needs, seed=0), number)


def _checked(file: Path) -> None:
    for line in check_files([file]).text().splitlines():
        require_sentence(line or "-", file)


def test_a_few_changed_files(tmp_path: Path) -> None:
    check(60, tmp_path)


@pytest.mark.slow
def test_many_changed_files(tmp_path: Path) -> None:
    check(5000, tmp_path)
