"""One DPO step on pairs of real lengths beside TRL's DPOTrainer, in one run.

    python benchmarks/text_real_lengths.py PAIRS.jsonl ... [--only WORDS] [--json FILE]

`PAIRS.jsonl` has `prompt`, `chosen` and `rejected` as strings; docs/benchmarks.md says of which
files the numbers there are. A Llama of 58 million parameters and random weights, a byte-level BPE
of 8,000 tokens trained on the files, 8 pairs a step, 2 CPU threads. Each arm is a process of its
own; arms take their steps in turn over the same rows, each in an order of its own. Means are over
the same number of steps, after one that does not count. A step is everything from the batch to the
updated weights.

Comparisons are all weights or a LoRA of rank 16 on all linear layers; float32, or bfloat16 products
(autocast, TRL's default); a live reference or one scored beforehand. TRL runs with its defaults but
for the precision said, with gradient checkpointing (its default) and without; its padding-free path
is switched off in 1.16. Memory is the largest resident size during a step, less that of the process
after its imports.

`--memory STEPS` instead runs our trainer alone over that many steps of ever new lengths and prints
its resident size along the way.
"""

from __future__ import annotations

import argparse
import itertools
import json
import tempfile
import time
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

from text_arms import THREADS, run_mmalign, run_trl
from text_vs_trl import MODEL
from turns import Arm, ratio_line, say, take_turns

if TYPE_CHECKING:
    from collections.abc import Iterator, Sequence

PAIRS = 8
VOCABULARY = 8_000
TOKENS = 1024  # train.tokens_per_batch of the arm that has it
SPEED = {("full", "float32"): 5.5, ("full", "bfloat16"): 6.0, "lora": 6.0}
MEMORY = 0.25
EVERY = 15.0  # seconds between two lines of `--memory` that say how far it is


def arms_of(weights: str, precision: str, reference: str) -> dict[str, tuple[str, dict[str, Any]]]:
    """Arm to program and options."""
    given = {"live": reference == "live", "lora": weights == "lora", "pairs": PAIRS}
    theirs = {**given, "bf16": precision == "bfloat16"}
    ours = {**given, "mixed_precision": "bf16" if precision == "bfloat16" else "no"}
    return {
        "trl": ("trl", {**theirs, "checkpointing": True}),
        "trl, no checkpointing": ("trl", {**theirs, "checkpointing": False}),
        "mmalign": ("mmalign", ours),
        "mmalign, bounded tokens": ("mmalign", {**ours, "tokens_per_batch": TOKENS}),
    }


COMPARISONS = tuple(
    itertools.product(("full", "lora"), ("float32", "bfloat16"), ("live", "cached"))
)


def write_model(folder: Path, texts: Sequence[str]) -> None:
    """A Llama of random weights, and a tokenizer of the texts."""
    import torch
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
    from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

    backend = Tokenizer(models.BPE())
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    backend.decoder = decoders.ByteLevel()
    names = {"unk_token": "<unk>", "bos_token": "<s>", "eos_token": "</s>", "pad_token": "</s>"}
    special = list(dict.fromkeys(names.values()))
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(
        vocab_size=VOCABULARY,
        special_tokens=special,
        initial_alphabet=alphabet,
        show_progress=False,
    )
    backend.train_from_iterator(texts, trainer)
    PreTrainedTokenizerFast(tokenizer_object=backend, **names).save_pretrained(folder)
    ids = {f"{name}_token_id": special.index(names[f"{name}_token"]) for name in ("bos", "eos")}
    torch.manual_seed(0)
    LlamaForCausalLM(LlamaConfig(**MODEL, **ids)).save_pretrained(folder)


def read_pairs(file: Path) -> list[dict[str, str]]:
    """The pairs of a file, without its other columns; ends where a row lacks one."""
    pairs: list[dict[str, str]] = []
    with file.open(encoding="utf-8") as lines:  # a text may hold what splitlines() splits at
        for number, line in enumerate(lines, 1):
            row = json.loads(line)
            pair = {key: row.get(key) for key in ("prompt", "chosen", "rejected")}
            if lacking := [key for key, text in pair.items() if not isinstance(text, str)]:
                raise SystemExit(
                    f"{file}, line {number}: has no {', '.join(lacking)} as a string; give each "
                    "row prompt, chosen and rejected, each a string"
                )
            pairs.append(pair)
    return pairs


def write_pairs(folder: Path, pairs: Sequence[dict[str, str]]) -> None:
    """The pairs of one comparison; each arm sees all, so that their means are of the same rows."""
    text = "".join(json.dumps(row) + "\n" for row in pairs)
    (folder / "pairs.jsonl").write_text(text, encoding="utf-8")


def rows(found: dict[str, dict[str, Any]]) -> Iterator[str]:
    """A line an arm."""
    yield f"  {'':<26}{'mean s':>9}{'median':>9}{'CPU s':>9}{'pairs/s':>9}{'MiB':>8}"
    for name, values in found.items():
        mean, median = values["mean_seconds"], values["median_seconds"]
        worked, size = values["mean_cpu_seconds"], values["mebibytes"]
        yield (
            f"  {name:<26}{mean:>9.2f}{median:>9.2f}{worked:>9.2f}{PAIRS / mean:>9.2f}{size:>8.0f}"
        )


def report(
    title: str, comparison: Sequence[str], found: dict[str, dict[str, Any]]
) -> Iterator[str]:
    """The table of one comparison, its ratios, and whether they reach their targets."""
    weights, precision, _ = comparison
    yield f"\n{title}: {', '.join(comparison)}"
    yield from rows(found)
    theirs = [values for name, values in found.items() if name.startswith("trl")]
    faster = min(theirs, key=lambda arm: arm["mean_seconds"])
    smaller = min(arm["mebibytes"] for arm in theirs)
    target = SPEED["lora"] if weights == "lora" else SPEED[weights, precision]
    for name, ours in found.items():
        if name.startswith("mmalign"):
            yield f"  {name}:"
            speed = faster["mean_seconds"] / ours["mean_seconds"]
            yield ratio_line("  pairs a second, of TRL's faster", speed, target, at_least=True)
            worked = faster["mean_cpu_seconds"] / ours["mean_cpu_seconds"]
            yield ratio_line("  the same of CPU seconds", worked)
            yield ratio_line("  memory, of TRL's smaller", ours["mebibytes"] / smaller, MEMORY)


def watch_memory(folder: Path, pairs: Sequence[dict[str, str]], steps: int) -> None:
    """Our trainer over ever new lengths: its largest resident size, tenth by tenth."""
    write_pairs(folder, pairs)
    arm = start("mmalign, bounded tokens", COMPARISONS[0], folder)
    tenth, sizes, shown = max(1, steps // 10), [], 0
    began = said = time.perf_counter()
    for step in range(1, steps + 1):
        sizes.append(arm.step()[1])
        now = time.perf_counter()
        if step % tenth == 0 or step == steps:
            most = max(sizes[shown:])
            print(f"  step {step}: at most {most:.0f} MiB since the last line", flush=True)
            shown, said = step, now
        elif now - said > EVERY:
            left = (now - began) / step * (steps - step)
            say(f"  step {step} of {steps}: {sizes[-1]:.0f} MiB, {left / 60:.0f} minutes left")
            said = now
    arm.close()


def start(arm: str, comparison: Sequence[str], folder: Path) -> Arm:
    """The process of an arm."""
    threads = {"OMP_NUM_THREADS": str(THREADS), "CUDA_VISIBLE_DEVICES": ""}
    return Arm(arm, [__file__, "--arm", arm, *comparison, str(folder)], threads)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("files", nargs="*", type=Path, help="JSONL of prompt, chosen, rejected")
    parser.add_argument("--rounds", type=int, default=8, help="steps of every arm")
    parser.add_argument("--only", default="", help="comparisons whose name has all these words")
    parser.add_argument("--memory", type=int, help="steps of our trainer alone")
    parser.add_argument("--json", type=Path, help="write every number here")
    # a child: name, comparison, folder
    parser.add_argument("--arm", nargs=5, help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.arm:
        name, *comparison, folder = options.arm
        program, keywords = arms_of(*comparison)[name]
        {"trl": run_trl, "mmalign": run_mmalign}[program](Path(folder), "cpu", **keywords)
        return
    if not options.files:
        parser.error("which pairs? docs/benchmarks.md names the files of its numbers")
    wanted = [c for c in COMPARISONS if set(options.only.split()) <= set(c)]
    results: dict[str, Any] = {}
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        every = {file.stem: read_pairs(file) for file in options.files}
        say("writing a model and a tokenizer")
        texts = [text for pairs in every.values() for row in pairs for text in row.values()]
        write_model(folder / "model", texts)
        for title, pairs in every.items():
            if options.memory:
                print(f"{title}: {options.memory} steps", flush=True)
                watch_memory(folder, pairs, options.memory)
                continue
            write_pairs(folder, pairs[: PAIRS * (options.rounds + 1)])
            for comparison in wanted:
                say(f"{title}: {', '.join(comparison)}")
                arms = [start(arm, comparison, folder) for arm in arms_of(*comparison)]
                table = partial(report, title, comparison)
                found = take_turns(arms, options.rounds, uncounted=1, report=table)
                results.setdefault(title, {})[" ".join(comparison)] = found
                print("\n".join(table(found)), flush=True)
    if options.json:
        options.json.write_text(json.dumps(results, indent=1) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
