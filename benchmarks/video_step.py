"""One DPO step on pairs about a clip beside the plain one: pairs per second, memory, on a CPU.

    python benchmarks/video_step.py [--quick] [--rounds N] [--like 7b] [--usual] [--json FILE]

A Qwen2.5-VL of random weights in small: text of width 512, 8 layers, 8 heads on 2, and a tower of
width 320, float32, LoRA of rank 16 on all linear layers of the text part, AdamW, no gradient
checkpointing, 2 threads, one pair a step. A clip of 16 frames makes 2,016 tokens; a question has
20, an answer 60. The proportions are those of Qwen2.5-VL-3B: a forward pass of tower and merger
takes 0.94 of the multiplications of the text layers (0.92 there), the head 0.11 of their weights
(0.11 there), for which the vocabulary is 8,192. `--like 7b` has a shallower tower, 0.44 (0.39 in
Qwen2.5-VL-7B). Attention takes a larger share than in wide models.

`plain` is written again from what trainers forked from TRL's DPO do: a batch of chosen and
rejected, each with the clip; tower, text layers and head over all tokens, with the LoRA and once
more without it; log-softmax over all positions. It begins with pixels and ids that are ready. Ours
begins with rows and is the body of the training loop, with the default settings: a clip's features
are kept from its first step on, so what is timed is a step of any epoch but the first. `no
features kept` is a step of the first epoch: everything but decoding is done in it. The first step
of every arm must give the same loss and gradient norm, from the same LoRA.

Every arm is a process of its own, and the arms take their steps in turn, so that whatever else the
machine does meets all alike. Ratios are of each arm's fastest step, since what else runs only ever
adds time; medians stand beside, and the medians of the CPU's seconds over all threads, which other
work hardly moves. Peak memory is the largest resident size during a step, less that after the
imports. `usual layers` (with --usual) leaves our float32 products to PyTorch's own, as the plain
step's are.
"""

from __future__ import annotations

import argparse
import json
import math
import tempfile
from pathlib import Path
from typing import TYPE_CHECKING, Any

from random_video_model import DEPTHS, make_rows, write_model
from turns import Arm, Turns, ratio_line, take_turns
from video_plain_step import BETA, LR, RANK, move, note_first, run_plain

if TYPE_CHECKING:
    from collections.abc import Iterator

    from mmalign.config import RunConfig

ARMS: dict[str, dict[str, Any]] = {
    "plain": {},
    "live": {},
    "cached": {"reference": "cached"},
    "live, no features kept": {"feature_cache": 0},
    "cached, no features kept": {"reference": "cached", "feature_cache": 0},
}
USUAL: dict[str, dict[str, Any]] = {
    "live, usual layers": {"usual": True},
    "cached, usual layers": {"reference": "cached", "usual": True},
}
SPEED, MEMORY = {"live": 2.2, "cached": 2.8}, 0.55  # to reach


def settings(folder: Path, options: dict[str, Any]) -> RunConfig:
    """Our config; `options` are those of the arm."""
    from mmalign.config import RunConfig

    return RunConfig.model_validate(
        {
            "modality": "video",
            "model": {"path": str(folder), "lora": {"rank": RANK, "alpha": RANK}},
            "reference": {
                "kind": options.get("reference", "auto"),
                **({"cache": str(folder / "cache")} if "reference" in options else {}),
            },
            "data": {"train": str(folder / "rows.jsonl")},
            "objective": {"name": "dpo", "beta": BETA},
            "video": {"num_frames": 16, "feature_cache": options.get("feature_cache", 1024)},
            "train": {"batch_size": 1, "lr": LR, "schedule": "constant"},
            "output": str(folder / "run"),
        }
    )


def run_mmalign(folder: Path, given: dict[str, Any], options: dict[str, Any]) -> None:
    import torch
    from accelerate import Accelerator
    from torch import nn

    from mmalign.models.adapter import build_adapter
    from mmalign.models.cpu import CpuLinear
    from mmalign.preflight.check import check_config
    from mmalign.train.backward import backward_joint
    from mmalign.train.run import build_optimizer
    from mmalign.video.adapter import VideoAdapter

    turns = Turns()
    torch.set_num_threads(given["threads"])
    config = settings(folder, options)
    objective = check_config(config)
    adapter: VideoAdapter = build_adapter(config, objective.needs)  # type: ignore[assignment]
    move(adapter.policy)
    if options.get("usual"):
        for module in adapter.modules():
            if type(module) is CpuLinear:
                module.__class__ = nn.Linear
    accelerator = Accelerator(cpu=True)
    model, optimizer = accelerator.prepare(adapter, build_optimizer(adapter, config.train))
    model.train()
    rows = make_rows(folder, given["rows"])
    adapter.setup(rows)
    trained = [p for p in model.parameters() if p.requires_grad]
    steps = 0
    while True:  # the body of train/loop.py
        turns.begin()
        batch = adapter.collate([rows[steps % len(rows)]])
        loss, _ = backward_joint(accelerator, model, objective, batch)
        norm = accelerator.clip_grad_norm_(trained, config.train.max_grad_norm)
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
        adapter.after_step(steps)
        note_first(folder, given["arm"], steps, loss.value, norm)
        del batch, loss, _
        steps += 1
        turns.end()


def write_cache(folder: Path, given: dict[str, Any]) -> None:
    """The reference's log-probabilities, as `mmalign cache` stores them."""
    from mmalign.models.adapter import build_adapter
    from mmalign.preflight.check import check_config
    from mmalign.text.cache import ReferenceCache

    needs = check_config(settings(folder, {})).needs
    adapter: Any = build_adapter(settings(folder, {}), needs)
    cache = ReferenceCache(settings(folder, {"reference": "cached"}), adapter.encoder, needs)
    with cache.store:
        for row in make_rows(folder, given["rows"]):
            values = adapter.reference_values(adapter.collate([row]), needs)
            cache.put(row, values["ref_logps"][0])


# The parent --------------------------------------------------------------------------------------


def report(found: dict[str, dict[str, Any]]) -> Iterator[str]:
    """The table, the ratios, and whether they reach what they are to reach."""
    yield f"  {'':<28}{'s a step':>10}{'median':>10}{'CPU s':>10}{'pairs/s':>10}{'MiB':>8}"
    for name, values in found.items():
        keys = ("seconds", "median_seconds", "cpu_seconds", "mebibytes")
        seconds, median, worked, size = (values[key] for key in keys)
        times = f"{seconds:>10.3f}{median:>10.3f}{worked:>10.3f}{1 / seconds:>10.3f}"
        yield f"  {name:<28}{times}{size:>8.0f}"
    plain = found["plain"]
    for name, ours in found.items():
        if name == "plain":
            continue
        yield f"  {name}:"
        speed = plain["seconds"] / ours["seconds"]
        yield ratio_line("  pairs a second, of plain", speed, SPEED.get(name), at_least=True)
        middle = plain["median_seconds"] / ours["median_seconds"]
        rounds = [p / o for p, o in zip(plain["all_seconds"], ours["all_seconds"], strict=True)]
        line = ratio_line("  the same of medians", middle)
        yield f"{line}  (rounds {min(rounds):.2f} to {max(rounds):.2f})"
        worked = plain["cpu_seconds"] / ours["cpu_seconds"]
        yield ratio_line("  CPU seconds, plain's of these", worked)
        size = ours["mebibytes"] / plain["mebibytes"]
        yield ratio_line("  peak memory, of plain", size, MEMORY if name in SPEED else None)


def check_first_steps(folder: Path, names: list[str]) -> str:
    """That all arms began with one loss and one gradient norm.

    Raises:
        SystemExit: One differs.
    """
    notes = {name: json.loads((folder / f"{name}.json").read_text("utf-8")) for name in names}
    plain = notes["plain"]
    for name, note in notes.items():
        for what in ("loss", "norm"):
            if not math.isclose(note[what], plain[what], rel_tol=1e-4, abs_tol=1e-4):
                raise SystemExit(
                    f"first step: {what} is {note[what]} in {name}, {plain[what]} in plain"
                )
    largest = max(abs(note["loss"] - plain["loss"]) for note in notes.values())
    return f"  first step: loss {plain['loss']:.6f} in every arm, within {largest:.1e}"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--quick", action="store_true", help="2 rounds")
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument("--like", choices=tuple(DEPTHS), default="3b")
    parser.add_argument("--rows", type=int, default=2, help="pairs, each with a clip of its own")
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--usual", action="store_true", help="more arms, with PyTorch's layers")
    parser.add_argument("--json", type=Path, help="write every number here")
    parser.add_argument("--arm", nargs=2, help=argparse.SUPPRESS)  # a child: name, folder
    options = parser.parse_args()
    given = {"rows": options.rows, "threads": options.threads}
    if options.arm:
        name, folder = options.arm[0], Path(options.arm[1])
        if name == "cache":
            write_cache(folder, given)
        elif name == "plain":
            run_plain(folder, given)
        else:
            run_mmalign(folder, {**given, "arm": name}, {**ARMS, **USUAL}[name])
        return
    arms = {**ARMS, **(USUAL if options.usual else {})}
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        write_model(folder, options.like)
        make_rows(folder, options.rows)
        told = [f"--rows={options.rows}", f"--threads={options.threads}"]
        threads = {"OMP_NUM_THREADS": str(options.threads), "CUDA_VISIBLE_DEVICES": ""}

        def start(arm: str) -> Arm:
            return Arm(arm, [__file__, *told, "--arm", arm, name], threads)

        cache = start("cache")
        cache.process.communicate()
        if cache.process.returncode:
            cache.fail()
        rounds = 2 if options.quick else options.rounds
        # Every row once before what counts: caches are full then.
        started = [start(arm) for arm in arms]
        found = take_turns(started, rounds, uncounted=options.rows, report=report)
        print(check_first_steps(folder, list(arms)))
    print("\n".join(report(found)), flush=True)
    if options.json:
        record = {"like": options.like, **given, "arms": found}
        options.json.write_text(json.dumps(record, indent=1) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
