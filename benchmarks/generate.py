"""Several responses to one prompt beside transformers' `generate`: responses a second, in one run.

    python benchmarks/generate.py [--quick] [--rounds N] [--json FILE]

The Llama of `text_vs_trl.py` (58 million parameters, vocabulary 32,000, float32, 2 threads of a
CPU), a prompt of 512 tokens, 8 responses of 64 tokens: the most likely tokens (greedy), and drawn
ones (temperature 1).

Every arm is a process of its own; they take their turns, one call each. A call is all from the
prompt's text to the responses' text. Ours gives the log-probability of each response too. Ratios
are of each arm's fastest call, since what else runs on a machine only ever adds time; medians stand
beside. `one by one` is ours asked for one response at a time. After the table of greedy responses
stands whether all arms gave the same tokens.
"""

from __future__ import annotations

import argparse
import json
import tempfile
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

from text_vs_trl import MODEL, VOCABULARY, write_model, write_pairs
from turns import Arm, Turns, ratio_line, take_turns

if TYPE_CHECKING:
    from collections.abc import Iterator, Sequence

THREADS, PROMPT, NEW, NUM = 2, 512, 64, 8
TARGET = 3.0  # responses a second, of transformers'
ARMS = ("transformers", "mmalign", "mmalign, one by one")
TEMPERATURES = {"greedy": 0.0, "drawn": 1.0}


def prompt_of(folder: Path) -> str:
    return json.loads((folder / "pairs.jsonl").read_text(encoding="utf-8").splitlines()[0])[
        "prompt"
    ]


def run_transformers(folder: Path, temperature: float) -> None:
    import torch
    from transformers import AutoModelForCausalLM, AutoTokenizer, GenerationConfig

    torch.set_num_threads(THREADS)
    turns = Turns()
    tokenizer = AutoTokenizer.from_pretrained(folder / "model")
    model = AutoModelForCausalLM.from_pretrained(folder / "model", dtype=torch.float32).eval()
    settings = GenerationConfig(max_new_tokens=NEW, eos_token_id=2, pad_token_id=2)
    if temperature:
        settings.update(do_sample=True, temperature=temperature, top_k=0, num_return_sequences=NUM)
    text = prompt_of(folder)
    torch.manual_seed(0)
    while True:
        turns.begin()
        # It refuses greedy responses that would all be alike, so that these are rows of a batch.
        ids = tokenizer([text] * (1 if temperature else NUM), return_tensors="pt")
        with torch.inference_mode():
            found = model.generate(**ids, generation_config=settings)
        texts = tokenizer.batch_decode(found[:, ids["input_ids"].shape[1] :])
        turns.end()
        keep(folder, "transformers", texts)


def run_mmalign(folder: Path, name: str, temperature: float) -> None:
    import torch

    from mmalign import config as configs
    from mmalign.core import Needs
    from mmalign.text.adapter import TextAdapter

    torch.set_num_threads(THREADS)
    turns = Turns()
    config = configs.RunConfig.model_validate(
        {
            "model": {"path": str(folder / "model"), "dtype": "float32"},
            "data": {"train": str(folder / "pairs.jsonl")},
            "objective": {"name": "dpo"},
            "output": str(folder / "output"),
        }
    )
    adapter = TextAdapter.build(config, Needs()).eval()
    options = {"max_new_tokens": NEW, "temperature": temperature}
    text, call = prompt_of(folder), 0
    while True:
        turns.begin()
        seeds = [call * NUM + k for k in range(NUM)]
        if name == "mmalign":
            (made,) = adapter.candidates([text], NUM, seeds=[seeds], **options)
        else:
            made = [adapter.candidates([text], 1, seeds=[[s]], **options)[0][0] for s in seeds]
        turns.end()
        keep(folder, name, [response.response for response in made])
        call += 1


def keep(folder: Path, name: str, texts: Sequence[str]) -> None:
    (folder / f"{name}.json").write_text(json.dumps(texts), encoding="utf-8")


def measure(kind: str, rounds: int, arms: Sequence[str]) -> dict[str, dict[str, Any]]:
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        write_model(folder / "model", MODEL, "cpu")
        write_pairs(folder / "pairs.jsonl", [(PROMPT, NEW, NEW)], VOCABULARY)
        threads = {"OMP_NUM_THREADS": str(THREADS), "CUDA_VISIBLE_DEVICES": ""}
        started = [Arm(arm, [__file__, "--arm", kind, arm, name], threads) for arm in arms]
        found = take_turns(started, rounds, report=partial(report, kind))
        if kind == "greedy":
            said = [json.loads((folder / f"{arm}.json").read_text("utf-8")) for arm in arms]
            same = all(texts == said[0] for texts in said)
            found["mmalign"]["same_tokens"] = same
        return found


def report(kind: str, found: dict[str, dict[str, Any]]) -> Iterator[str]:
    """The table of one comparison."""
    yield f"\n{NUM} responses of {NEW} tokens to a prompt of {PROMPT}, {kind}"
    yield f"  {'':<24}{'s a call':>10}{'median':>10}{'responses/s':>13}{'MiB':>8}"
    for name, values in found.items():
        seconds, median = values["seconds"], values["median_seconds"]
        size = values["mebibytes"]
        yield f"  {name:<24}{seconds:>10.3f}{median:>10.3f}{NUM / seconds:>13.2f}{size:>8.0f}"
    theirs, ours = found["transformers"], found["mmalign"]
    what = "responses a second, of transformers'"
    yield ratio_line(what, theirs["seconds"] / ours["seconds"], TARGET, at_least=True)
    median = theirs["median_seconds"] / ours["median_seconds"]
    yield ratio_line("the same of the medians", median)
    if "same_tokens" in ours:
        yield f"  all arms gave the same tokens: {'yes' if ours['same_tokens'] else 'NO'}"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--quick", action="store_true", help="2 rounds of two arms")
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument("--json", type=Path, help="write every number here")
    parser.add_argument("--arm", nargs=3, help=argparse.SUPPRESS)  # a child: kind, name, folder
    options = parser.parse_args()
    if options.arm:
        kind, name, folder = options.arm
        if name == "transformers":
            run_transformers(Path(folder), TEMPERATURES[kind])
        else:
            run_mmalign(Path(folder), name, TEMPERATURES[kind])
        return
    results: dict[str, Any] = {}
    rounds, arms = (2, ARMS[:2]) if options.quick else (options.rounds, ARMS)
    for kind in TEMPERATURES:
        results[kind] = measure(kind, rounds, arms)
        print("\n".join(report(kind, results[kind])), flush=True)
    if options.json:
        options.json.write_text(json.dumps(results, indent=1) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
