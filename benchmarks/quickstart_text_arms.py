"""What part of the text demonstration does the work, and what ruins it.

Trains the demonstration's arms and two without the likelihood term, one seed each, and prints what
each did to the 24 held-out prompts. `--store` writes the table that the demonstration's report
shows.

    python benchmarks/quickstart_text_arms.py --output /tmp/arms [--seed 0] [--store]
"""

from __future__ import annotations

import argparse
import json
from pathlib import Path
from typing import Any

from mmalign import __version__
from mmalign.quickstart import chat_model, text

STORE = Path(text.__file__).with_name("text_arms.json")
SHOWN = "What is the greenhouse effect?"
ARMS: dict[str, tuple[dict[str, Any], dict[str, Any], int]] = {
    # name: objective, changes of `train`, tokens kept of a rejected answer
    "the demonstration": (text.PREFERENCE, {}, 40),
    "control: likelihood only": (text.CONTROL, {}, 40),
    "DPO only, same settings": ({"name": "dpo", "beta": 0.3}, {}, 40),
    "DPO only, beta 0.1, lr 2e-4, 30 steps": (
        {"name": "dpo", "beta": 0.1},
        {"lr": 2e-4, "num_steps": 30, "schedule": "constant"},
        60,
    ),
}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--output", type=Path, required=True, help="an empty or new folder")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--store", action="store_true", help=f"write {STORE.name}")
    options = parser.parse_args()

    model = chat_model.fetch()
    rows = [json.loads(line) for line in text.DATA.read_text(encoding="utf-8").splitlines()]
    keywords = {row["id"]: row["meta"]["keyword"] for row in rows}
    scored = text.config(model.path, text.PREFERENCE, options.output / "unused", options.seed)
    table: list[dict[str, Any]] = []
    for name, (objective, train, length) in ARMS.items():
        folder = options.output / str(len(table))
        plain = text.config(model.path, objective, folder, options.seed)
        config = plain.model_copy(
            update={
                "train": plain.train.model_copy(update=train),
                "data": plain.data.model_copy(update={"max_response_length": length}),
            }
        )
        _, answers = text.answers_of(config, keywords)
        numbers = text.numbers_of(answers, text.pair_metrics(scored, folder / "final"))
        shown = next(answer.text for answer in answers if answer.prompt == SHOWN)
        table.append({"arm": name, **numbers, "answer": shown})
        print(json.dumps(table[-1], indent=2), flush=True)
    if options.store:
        record = {
            "command": "python benchmarks/quickstart_text_arms.py --output DIR --store",
            "seed": options.seed,
            "mmalign": __version__,
            "model": model.source,
            "prompt": SHOWN,
            "arms": table,
        }
        STORE.write_text(json.dumps(record, indent=2) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
