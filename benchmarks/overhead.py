"""What a training step adds to the bare model's forward and backward over the same tokens.

    python benchmarks/overhead.py [--quick] [--rounds N] [--threads N] [--json FILE]

On a CPU, 2 threads unless told otherwise, float32, full fine-tuning with DPO: the story model of
the quickstart (260 thousand parameters), 8 pairs a step, and the Llama of 58 million parameters of
`text_vs_trl.py`, 2 pairs a step. A step of ours is everything from the rows to the updated weights:
tokens, layout, reference, loss, both passes, clipping, AdamW. `bare` is the same model as
transformers loads it, forward and backward over the tokens that our step feeds, cross-entropy of
those that it scores, and with the reference's forward where there is a live one; no optimizer, loss
or layout. Its tokens stand in one row, as ours do, and attend to all before them; `bare, a row a
pair` lays each pair into a row of its own, which is the least that the model can do with them.

The arms take their steps in turn, each in a process of its own. Ratios are of each arm's fastest
step; medians stand beside.
"""

from __future__ import annotations

import argparse
import json
import random
import tempfile
from collections.abc import Iterator
from functools import partial
from pathlib import Path
from typing import Any

from text_arms import THREADS
from text_vs_trl import MODEL, write_model, write_pairs
from turns import Arm, Turns, ratio_line, take_turns

from mmalign.quickstart.text import STORIES

MODELS = {"story model": (8, 1.5), "58M Llama": (2, 1.05)}  # pairs a step, most times the bare one
KINDS = ("live", "cached")
ARMS = ("mmalign", "bare", "bare, a row a pair")
WORDS = ("Once upon a time", "there was a", "little", "girl", "the big", "red ball", "happy dog")


def write_data(folder: Path, name: str) -> None:
    """Model and pairs: short stories of several lengths, or prompts of 512 and responses of 64."""
    pairs = MODELS[name][0]
    if name == "story model":
        draw = random.Random(0)
        with (folder / "pairs.jsonl").open("w", encoding="utf-8") as stream:
            for _ in range(8 * pairs):
                texts = (" ".join(draw.choices(WORDS, k=k)) for k in (3, 12, 12))
                prompt, chosen, rejected = texts
                row = {"prompt": prompt, "chosen": " " + chosen, "rejected": " " + rejected}
                stream.write(json.dumps(row) + "\n")
        return
    write_model(folder / "model", MODEL, "cpu")
    write_pairs(folder / "pairs.jsonl", [(512, 64, 64)] * 8 * pairs, MODEL["vocab_size"])


def run_arm(name: str, kind: str, arm: str, folder: Path) -> None:
    """Steps of one arm, whenever the parent says so."""
    from mmalign import config as configs
    from mmalign.inference import write_cache
    from mmalign.preflight.check import check_config
    from mmalign.train.backward import backward_joint
    from mmalign.train.run import build_run

    turns = Turns()
    path = STORIES if name == "story model" else folder / "model"
    settings: dict[str, Any] = {
        "model": {"path": str(path)},
        "data": {"train": str(folder / "pairs.jsonl")},
        "objective": {"name": "dpo"},
        "train": {"batch_size": MODELS[name][0], "num_steps": 100_000},
        "output": str(folder / f"{kind}-{arm}"),
    }
    if kind == "cached":
        write_cache(configs.RunConfig.model_validate(settings))
        settings["reference"] = {"kind": "cached"}
    config = configs.RunConfig.model_validate(settings)
    run = build_run(config, check_config(config))
    if arm == "mmalign":
        turns.train(run, backward_joint)
    batches = run.batches()
    fed = [run.adapter._arrange(next(batches)) for _ in range(4)]  # the first tries the model out
    run_bare(turns, path, [(r.input_ids, r.states, r.targets) for r in fed], kind, arm)


def run_bare(turns: Turns, path: Path, fed: list[Any], kind: str, arm: str) -> None:
    """The model's own passes over laid-out rows [1, T], whose states [M] predict targets [M]."""
    import torch
    from transformers import AutoModelForCausalLM

    load = partial(AutoModelForCausalLM.from_pretrained, path, dtype=torch.float32)
    model, reference = load().train(), load().eval().requires_grad_(False)

    def forward(part: Any, ids: torch.Tensor, states: torch.Tensor, targets: torch.Tensor) -> Any:
        if arm != "bare":
            ids = ids[:, : ids.shape[1] // pairs * pairs].view(pairs, -1)
        hidden = part.model(input_ids=ids, use_cache=False).last_hidden_state.flatten(0, 1)
        logits = part.lm_head(hidden[states.clamp(max=len(hidden) - 1)])
        return torch.nn.functional.cross_entropy(logits, targets)

    pairs, step = MODELS["story model" if path == STORIES else "58M Llama"][0], 0
    while True:
        turns.begin()
        given, step = fed[step % len(fed)], step + 1
        if kind == "live":
            with torch.no_grad():
                forward(reference, *given)
        forward(model, *given).backward()
        turns.end()
        model.zero_grad(set_to_none=True)


def report(name: str, kind: str, found: dict[str, dict[str, Any]]) -> Iterator[str]:
    """The table of one comparison, and whether its ratio reaches the target."""
    pairs, most = MODELS[name]
    yield f"\n{name}, {pairs} pairs a step, {kind} reference"
    yield f"  {'':<24}{'ms a step':>10}{'median':>10}{'CPU ms':>10}"
    for arm, values in found.items():
        times = (1e3 * values[f] for f in ("seconds", "median_seconds", "cpu_seconds"))
        yield f"  {arm:<24}" + "".join(f"{value:>10.1f}" for value in times)
    ours, *bare = (found[arm]["seconds"] for arm in ARMS)
    yield ratio_line("seconds, of the bare model's", ours / bare[0], most)
    yield ratio_line("of its with a row a pair", ours / bare[1])


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--quick", action="store_true", help="the story model alone")
    parser.add_argument("--rounds", type=int, default=30)
    parser.add_argument("--threads", type=int, default=THREADS)
    parser.add_argument("--json", type=Path, help="write every number here")
    # a child: model, kind, arm, folder
    parser.add_argument("--arm", nargs=4, help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.arm:
        name, kind, arm, folder = options.arm
        run_arm(name, kind, arm, Path(folder))
        return
    results: dict[str, Any] = {}
    for name in list(MODELS)[: 1 if options.quick else None]:
        with tempfile.TemporaryDirectory() as folder:
            write_data(Path(folder), name)
            for kind in KINDS:
                print(f"{name}, {kind}: {options.rounds} steps of each arm ...", flush=True)
                threads = {"OMP_NUM_THREADS": str(options.threads), "CUDA_VISIBLE_DEVICES": ""}
                command = [__file__, "--arm", name, kind]
                arms = [Arm(arm, [*command, arm, folder], threads) for arm in ARMS]
                found = take_turns(arms, options.rounds, uncounted=4)
                results.setdefault(name, {})[kind] = found
                print("\n".join(report(name, kind, found)), flush=True)
    if options.json:
        options.json.write_text(json.dumps(results, indent=1) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
