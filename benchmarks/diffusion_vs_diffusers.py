"""One Diffusion-DPO step beside one built as diffusers' research script builds it, in one run.

    python benchmarks/diffusion_vs_diffusers.py [--device cpu|cuda] [--rounds N] [--json FILE]
    python benchmarks/diffusion_vs_diffusers.py --device cuda --model sdxl --resolution 1024

Stable Diffusion 1.5's architecture with random weights, LoRA of rank 16 on the attention's
projections, AdamW, gradients clipped at 1, one pair a step; on a CPU 256 pixels, float32 and 2
threads, on a GPU, the default where there is one, 512 pixels and bfloat16. The script's
step encodes the pair with the VAE and its caption with the text encoder, runs the U-Net under the
adapters with a gradient and once more without them, and steps. Ours reads latents and embeddings
that `mmalign cache` wrote, with the reference run beside the policy (live) or its errors stored at
4 draws a row (cached).

Every arm is a process of its own that holds its model and waits; the arms take their steps in turn,
so that whatever else the machine does meets all alike. A step is everything from the batch to the
updated weights: the script's begins with decoded pixels and token ids, as its data loader hands
them over; ours begins with collating rows. Ratios are of each arm's fastest step, since what else
runs on a machine only ever adds time; medians stand beside. Peak memory is the largest resident
size of the whole process during a step; on a GPU what PyTorch had allocated at most.

`usual layers` (with --usual) leaves our float32 products and small convolutions to PyTorch's own
kernels, as the script's are; `no caches` runs VAE and text encoder in every step.
"""

from __future__ import annotations

import argparse
import json
import os
import tempfile
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

from diffusers_step import BETA, DECAY, LR, RANK, run_script
from turns import Arm, Turns, device_of, ratio_line, take_turns

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator

    from torch import nn

ROWS = 2
ARMS: dict[str, dict[str, Any]] = {
    "script": {},
    "mmalign, live": {"reference": "auto"},
    "mmalign, cached": {"reference": "cached"},
}
MORE_CPU: dict[str, dict[str, Any]] = {
    "script": {},
    "mmalign, usual layers": {"reference": "auto", "usual": True},
    "mmalign, no caches": {"reference": "auto", "cache": "off"},
}
MORE_GPU: dict[str, dict[str, Any]] = {
    "mmalign, live, per candidate": {"reference": "auto", "backward": "per_candidate"},
    "mmalign, cached, per candidate": {"reference": "cached", "backward": "per_candidate"},
}
"""Arms to their options; on a CPU the further ones form a second comparison, to fit in memory."""
AIMS = {"mmalign, live": 1.35, "mmalign, cached": 2.0}


# Our step ---------------------------------------------------------------------------------------


def settings(folder: Path, given: dict[str, Any], options: dict[str, Any]) -> dict[str, Any]:
    """Our config; `options` are those of the arm."""
    half = given["dtype"] != "float32"
    return {
        "modality": "diffusion",
        "model": {
            "path": str(folder),
            "dtype": given["dtype"],
            "lora": {"rank": RANK, "alpha": RANK},
            "gradient_checkpointing": given["checkpointing"],
        },
        "reference": {"kind": options.get("reference", "auto")},
        "data": {"train": str(folder / "pairs.jsonl")},
        "objective": {"name": "diffusion_dpo", "beta": BETA},
        "diffusion": {
            "resolution": given["resolution"],
            "cache": options.get("cache", "on"),
            **({"num_draws": 4} if options.get("reference") == "cached" else {}),
        },
        "train": {
            "batch_size": 1,
            "num_steps": 10_000,
            "lr": LR,
            "weight_decay": DECAY,
            "schedule": "constant",
            "mixed_precision": "bf16" if half else "no",
            "backward": options.get("backward", "joint"),
            "num_threads": given["threads"],
        },
        "output": str(folder / "run"),
    }


def write_caches(folder: Path, given: dict[str, Any]) -> None:
    """Latents, embeddings and reference errors, as `mmalign cache` writes them."""
    from mmalign.config import RunConfig
    from mmalign.inference import write_cache

    options = {"reference": "cached", "cache": "auto"}
    print(write_cache(RunConfig.model_validate(settings(folder, given, options))), flush=True)


def run_mmalign(folder: Path, given: dict[str, Any], options: dict[str, Any]) -> None:
    from mmalign import config as configs
    from mmalign.preflight.check import check_config
    from mmalign.train.loop import _backward
    from mmalign.train.run import build_run

    turns = Turns(given["device"])
    config = configs.RunConfig.model_validate(settings(folder, given, options))
    run = build_run(config, check_config(config))
    if options.get("usual"):
        _with_usual_layers(run.model)
    turns.train(run, _backward(config))


def _with_usual_layers(model: nn.Module) -> None:
    from torch import nn

    from mmalign.models.cpu import CpuConv2d, CpuLinear

    for module in model.modules():
        if type(module) is CpuLinear:
            module.__class__ = nn.Linear
        elif type(module) is CpuConv2d:
            module.__class__ = nn.Conv2d


# The parent -------------------------------------------------------------------------------------


def report(found: dict[str, dict[str, Any]], aims: dict[str, float]) -> Iterator[str]:
    """The table of one comparison, its ratios, and whether they reach what they are to reach."""
    yield f"  {'':<32}{'s a step':>10}{'median':>10}{'pairs/s':>10}{'MiB':>8}"
    for name, values in found.items():
        seconds, median = values["seconds"], values["median_seconds"]
        size = values["mebibytes_whole_process"]
        yield f"  {name:<32}{seconds:>10.3f}{median:>10.3f}{1 / seconds:>10.3f}{size:>8.0f}"
    theirs = found["script"]
    for name, ours in found.items():
        if name == "script":
            continue
        yield f"  {name}:"
        ratio = theirs["seconds"] / ours["seconds"]
        yield ratio_line("  pairs a second, of the script's", ratio, aims.get(name), at_least=True)
        medians = theirs["median_seconds"] / ours["median_seconds"]
        yield ratio_line("  the same of medians", medians)
        size = ours["mebibytes_whole_process"] / theirs["mebibytes_whole_process"]
        yield ratio_line("  peak memory, of the script's", size, 1.0 if aims else None)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--model", choices=("sd15", "sdxl"), default="sd15")
    parser.add_argument("--device", choices=("auto", "cpu", "cuda"), default="auto")
    parser.add_argument("--dtype", choices=("float32", "bfloat16"))
    parser.add_argument("--resolution", type=int)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--checkpointing", action="store_true", help="default on for sdxl")
    parser.add_argument("--usual", action="store_true", help="a second comparison, of slower arms")
    parser.add_argument("--tiny", action="store_true", help="narrow layers, to try this program")
    parser.add_argument("--folder", type=Path, help="keep pipeline and caches here")
    parser.add_argument("--json", type=Path, help="write every number here")
    parser.add_argument("--arm", help=argparse.SUPPRESS)  # a child
    options = parser.parse_args()
    device = device_of(options.device)
    side = 1024 if options.model == "sdxl" else (256 if device == "cpu" else 512)
    given = {
        "model": options.model,
        "device": device,
        "dtype": options.dtype or ("float32" if device == "cpu" else "bfloat16"),
        "resolution": options.resolution or side,
        "threads": options.threads,
        "checkpointing": options.checkpointing or options.model == "sdxl",
    }
    if options.arm:
        return _child(options.arm, options.folder, given)
    with tempfile.TemporaryDirectory() as temporary:
        folder = options.folder or Path(temporary)
        _prepare(folder, given, options.tiny)
        arms = dict(ARMS)
        comparisons = [arms]
        if device == "cuda":
            arms |= MORE_GPU
        elif options.usual:
            comparisons.append(MORE_CPU)
        aims = AIMS if options.model == "sd15" and device == "cpu" and not options.tiny else {}
        results: list[Any] = []
        for comparison in comparisons:
            found = _compare(comparison, folder, given, options.rounds, aims)
            results.append(found)
            print("\n".join(report(found, aims)), flush=True)
    if options.json:
        record = {"settings": given, "comparisons": results}
        options.json.write_text(json.dumps(record, indent=1) + "\n", encoding="utf-8")
    return None


def _arguments(name: str, folder: Path, given: dict[str, Any]) -> list[str]:
    told = ["--arm", name, "--folder", str(folder)]
    for key, value in given.items():
        told += [f"--{key}", str(value)] if key != "checkpointing" else ["--checkpointing"] * value
    return [__file__, *told]


def _compare(
    comparison: dict[str, Any],
    folder: Path,
    given: dict[str, Any],
    rounds: int,
    aims: dict[str, float],
) -> dict[str, Any]:
    environment = {"OMP_NUM_THREADS": str(given["threads"])}
    if given["device"] == "cpu":
        environment |= {"CUDA_VISIBLE_DEVICES": ""}
    arms = [Arm(name, _arguments(name, folder, given), environment) for name in comparison]
    return take_turns(arms, rounds, report=partial(report, aims=aims))


def _prepare(folder: Path, given: dict[str, Any], tiny: bool) -> None:
    """Pipeline, images and caches, in a process that ends and gives all memory back."""
    if not (folder / "pairs.jsonl").is_file():
        folder.mkdir(parents=True, exist_ok=True)
        _in_child(_write, folder, given, tiny)
    _in_child(write_caches, folder, given)


def _write(folder: Path, given: dict[str, Any], tiny: bool) -> None:
    import torch
    from random_pipelines import write_pairs, write_pipeline

    dtype = getattr(torch, given["dtype"])
    write_pipeline(folder, given["model"], dtype, given["device"], tiny=tiny)
    write_pairs(folder, ROWS, given["resolution"])


def _in_child(function: Callable[..., None], *values: Any) -> None:
    import multiprocessing

    if values[1]["device"] == "cpu":
        os.environ["CUDA_VISIBLE_DEVICES"] = ""
    child = multiprocessing.get_context("spawn").Process(target=function, args=values)
    child.start()
    child.join()
    if child.exitcode:
        raise SystemExit(f"{function.__name__} failed")


def _child(name: str, folder: Path, given: dict[str, Any]) -> None:
    every = {**ARMS, **MORE_CPU, **MORE_GPU}
    if name == "script":
        run_script(folder, given)
    else:
        run_mmalign(folder, given, every[name])


if __name__ == "__main__":
    main()
