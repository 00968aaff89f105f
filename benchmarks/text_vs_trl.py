"""One DPO step beside TRL's DPOTrainer: pairs per second and peak memory, in one run.

    python benchmarks/text_vs_trl.py [--device cpu|cuda] [--quick] [--rounds N] [--json FILE]

On a CPU: a Llama of 58 million parameters, vocabulary 32,000, float32, full fine-tuning, 2 threads,
2 pairs a step. On a GPU, the default where there is one: `gpu_arms.py` says what.

Every arm is a process of its own that holds its model and waits; the arms of a comparison take
their steps in turn, one at a time, so that whatever else the machine does meets all alike; on a GPU
each takes all of its steps in a row, since its memory holds the work of one. A step is everything
from the batch to the updated weights; ours includes tokenization, TRL's does not (it tokenizes
beforehand). Ratios are of each arm's fastest step, since what else runs on a machine only ever adds
time; medians stand beside. Peak memory is the largest resident size during a step, less that of the
process after its imports; on a GPU what PyTorch had allocated at most.

TRL runs with its own defaults, but on a CPU in float32 (its default is bfloat16), and in the arms
named so without gradient checkpointing (its default is on). Ratios are against TRL's faster
setting. `bare` is the model's own forward and backward over the fewest tokens, without optimizer,
loss or attention mask, and with the reference's forward where there is a live one. `no oneDNN`
leaves our float32 products to MKL, as TRL's and the bare model's are.
"""

from __future__ import annotations

import argparse
import gc
import json
import random
import tempfile
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

import gpu_arms
from text_arms import PAIRS, THREADS, run_bare, run_mmalign, run_trl
from turns import Arm, device_of, one_by_one, ratio_line, take_turns

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator

VOCABULARY = 32_000
SHAPES = {"long prompt": (512, 64), "long answers": (32, 256)}
ARMS: dict[str, dict[str, tuple[str, dict[str, Any]]]] = {
    # kind of reference -> arm -> (program, options)
    "live": {
        "trl": ("trl", {"checkpointing": True}),
        "trl, no checkpointing": ("trl", {"checkpointing": False}),
        "mmalign": ("mmalign", {}),
        "mmalign tdpo2": ("mmalign", {"objective": "tdpo2"}),
        "mmalign, no oneDNN": ("mmalign", {"onednn": False}),
        "bare": ("bare", {"live": True}),
    },
    "cached": {
        "trl": ("trl", {"live": False, "checkpointing": True}),
        "trl, no checkpointing": ("trl", {"live": False, "checkpointing": False}),
        "mmalign": ("mmalign", {"live": False}),
        "bare": ("bare", {"live": False}),
    },
}
TARGETS = {"long prompt": (3.5, 0.6), "long answers": (1.7, None)}  # speed, memory
MODEL: dict[str, Any] = {
    "vocab_size": VOCABULARY,
    "hidden_size": 512,
    "intermediate_size": 1376,
    "num_hidden_layers": 8,
    "num_attention_heads": 8,
    "max_position_embeddings": 1024,
}


def write_model(folder: Path, settings: dict[str, Any], device: str) -> None:
    """A Llama of random weights, and a tokenizer of whole words."""
    import torch
    from tokenizers import Tokenizer, models, pre_tokenizers
    from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

    words = [f"w{i}" for i in range(3, settings["vocab_size"])]
    vocabulary = {word: i for i, word in enumerate(["<unk>", "<s>", "</s>", *words])}
    backend = Tokenizer(models.WordLevel(vocabulary, unk_token="<unk>"))
    backend.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    names = {"unk_token": "<unk>", "bos_token": "<s>", "eos_token": "</s>", "pad_token": "</s>"}
    PreTrainedTokenizerFast(tokenizer_object=backend, **names).save_pretrained(folder)
    torch.manual_seed(0)
    config = LlamaConfig(**settings, bos_token_id=1, eos_token_id=2, pad_token_id=2)
    with torch.device(device):
        model = LlamaForCausalLM(config)
    model.save_pretrained(folder)


def write_pairs(file: Path, sizes: list[tuple[int, int, int]], vocabulary: int) -> None:
    """Pairs of random words: tokens of prompt, chosen and rejected of each."""
    draw = random.Random(0)

    def text(length: int) -> str:
        return " ".join(f"w{draw.randrange(3, vocabulary)}" for _ in range(length))

    with file.open("w", encoding="utf-8") as stream:
        for prompt, *answers in sizes:  # an answer's last token is the end token
            chosen, rejected = (" " + text(answer - 1) for answer in answers)
            row = {"prompt": text(prompt), "chosen": chosen, "rejected": rejected}
            stream.write(json.dumps(row) + "\n")


def measure(shape: str, kind: str, rounds: int) -> dict[str, dict[str, Any]]:
    """Steps of all arms of one comparison in turn, on a CPU."""
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        write_model(folder / "model", MODEL, "cpu")
        prompt, answer = SHAPES[shape]
        write_pairs(folder / "pairs.jsonl", [(prompt, answer, answer)] * 16, VOCABULARY)
        (folder / "shape.json").write_text(json.dumps(SHAPES[shape]), encoding="utf-8")
        threads = {"OMP_NUM_THREADS": str(THREADS), "CUDA_VISIBLE_DEVICES": ""}
        command = [__file__, "--arm", "cpu", kind]
        arms = [Arm(arm, [*command, arm, name], threads) for arm in ARMS[kind]]
        return take_turns(arms, rounds, report=partial(report, shape, kind))


def measure_on_gpu(folder: Path, kind: str, shape: str, rounds: int) -> dict[str, dict[str, Any]]:
    """The same on a GPU; the model is in `folder / "model"`."""
    sizes = gpu_arms.lengths(shape, random.Random(0))
    write_pairs(folder / "pairs.jsonl", sizes, gpu_arms.VOCABULARY)
    environment = {"OMP_NUM_THREADS": str(THREADS)}
    command = [__file__, "--arm", "cuda", kind]
    arms = [Arm(arm, [*command, arm, str(folder)], environment) for arm in gpu_arms.ARMS[kind]]
    return one_by_one(arms, rounds)


def rows(found: dict[str, dict[str, Any]], pairs: int) -> Iterator[str]:
    """A line an arm."""
    yield f"  {'':<24}{'s a step':>10}{'median':>10}{'pairs/s':>10}{'MiB':>8}"
    for name, values in found.items():
        seconds, median = values["seconds"], values["median_seconds"]
        rate, size = pairs / seconds, values["mebibytes"]
        yield f"  {name:<24}{seconds:>10.3f}{median:>10.3f}{rate:>10.2f}{size:>8.0f}"


def report(shape: str, kind: str, found: dict[str, dict[str, Any]]) -> Iterator[str]:
    """The table of one comparison, its ratios, and whether they reach their targets."""
    prompt, answer = SHAPES[shape]
    yield f"\n{shape}: prompt {prompt}, answers {answer} tokens; {kind} reference"
    yield from rows(found, PAIRS)
    theirs = [found["trl"], found["trl, no checkpointing"]]
    ours, bare = found["mmalign"], found["bare"]
    faster = min(theirs, key=lambda arm: arm["seconds"])
    smaller = min(arm["mebibytes"] for arm in theirs)
    speed, size = TARGETS[shape]
    yield ratio_line(
        "pairs a second, of TRL's faster", faster["seconds"] / ours["seconds"], speed, at_least=True
    )
    yield ratio_line("peak memory, of TRL's faster", ours["mebibytes"] / faster["mebibytes"], size)
    yield ratio_line("peak memory, of TRL's smaller", ours["mebibytes"] / smaller)
    yield ratio_line("seconds, of the bare model's", ours["seconds"] / bare["seconds"])
    if kind == "live":
        tdpo2, slow = found["mmalign tdpo2"], found["mmalign, no oneDNN"]
        yield ratio_line("pairs a second without oneDNN", faster["seconds"] / slow["seconds"])
        yield ratio_line("tdpo2: seconds, of our dpo's", tdpo2["seconds"] / ours["seconds"], 1.35)
        yield ratio_line("tdpo2: peak memory", tdpo2["mebibytes"] / ours["mebibytes"], 1.15)


def report_on_gpu(shape: str, kind: str, found: dict[str, dict[str, Any]]) -> Iterator[str]:
    """The table of one comparison, and every arm of ours against TRL's fastest and smallest."""
    yield f"\n{shape}, {kind}, {gpu_arms.PAIRS} pairs a step"
    yield from rows(found, gpu_arms.PAIRS)
    theirs = [values for name, values in found.items() if name.startswith("trl")]
    if not theirs:
        return
    faster = min(theirs, key=lambda arm: arm["median_seconds"])
    smaller = min(arm["mebibytes"] for arm in theirs)
    for name, ours in found.items():
        if not name.startswith("trl"):
            yield f"  {name}:"
            speed = faster["median_seconds"] / ours["median_seconds"]
            yield ratio_line("  pairs a second, of TRL's fastest", speed)
            yield ratio_line("  memory, of TRL's fastest", ours["mebibytes"] / faster["mebibytes"])
            yield ratio_line("  memory, of TRL's smallest", ours["mebibytes"] / smaller)


def compare_on_cpu(rounds: int, *, quick: bool) -> dict[str, Any]:
    results: dict[str, Any] = {}
    for shape in list(SHAPES)[:1] if quick else SHAPES:
        for kind in ARMS:
            found = measure(shape, kind, 2 if quick else rounds)
            results.setdefault(shape, {})[kind] = found
            print("\n".join(report(shape, kind, found)), flush=True)
    return results


def compare_on_gpu(rounds: int, *, quick: bool) -> dict[str, Any]:
    results: dict[str, Any] = {}
    with tempfile.TemporaryDirectory() as name:
        write_model(Path(name) / "model", gpu_arms.MODEL, "cuda")
        release_gpu()
        for kind, shape in gpu_arms.COMPARISONS[:1] if quick else gpu_arms.COMPARISONS:
            found = measure_on_gpu(Path(name), kind, shape, 2 if quick else rounds)
            results.setdefault(shape, {})[kind] = found
            print("\n".join(report_on_gpu(shape, kind, found)), flush=True)
    return results


def release_gpu() -> None:
    import torch

    gc.collect()
    torch.cuda.empty_cache()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--device", choices=("auto", "cpu", "cuda"), default="auto")
    parser.add_argument("--quick", action="store_true", help="2 rounds of the first comparison")
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument("--json", type=Path, help="write every number here")
    # a child: device, kind, name, folder
    parser.add_argument("--arm", nargs=4, help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.arm:
        device, kind, name, folder = options.arm
        program, keywords = (ARMS if device == "cpu" else gpu_arms.ARMS)[kind][name]
        programs: dict[str, Callable[..., None]] = {
            "trl": run_trl,
            "mmalign": run_mmalign,
            "bare": run_bare,
        }
        programs[program](Path(folder), device, **keywords)
        return
    compare = compare_on_gpu if device_of(options.device) == "cuda" else compare_on_cpu
    results = compare(options.rounds, quick=options.quick)
    if options.json:
        options.json.write_text(json.dumps(results, indent=1) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
