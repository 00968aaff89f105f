"""What each diffusion method does to a small model of handwritten digits.

One base, made once and kept in the folder. For every seed new pairs, and new noise for training and
measuring; every method learns from the same pairs and is measured from the same start noise. What
is finished stays in the folder, so an interrupted table goes on, and two processes with different
seeds can share a folder once the base is there.

    python benchmarks/diffusion_methods.py --output DIR --seeds 0 1 2 [--methods smpo mapo]
"""

from __future__ import annotations

import argparse
import json
import shutil
import statistics
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

from mmalign.config import RunConfig
from mmalign.diffusion.components import load_denoiser
from mmalign.diffusion.sample import load_negative
from mmalign.inference import evaluate_checkpoint
from mmalign.quickstart import diffusion as demo
from mmalign.quickstart import digits
from mmalign.quickstart.digits import PAIRS, Painter, each_digit, write_pairs
from mmalign.quickstart.driver import one_thread
from mmalign.train.loop import train

BETA = 20000.0  # of the demonstration; published ones are for latents a hundred times as large
COUNT = 200  # images a measurement
RESOLUTION = {"ink": 0.002, "legibility": 0.014}  # standard errors of so many images


@dataclass(frozen=True)
class Method:
    """How a method differs from the demonstration's run, and how it is judged."""

    purpose: str
    changes: dict[str, Any] = field(default_factory=dict)
    data: str = PAIRS
    negative_of: tuple[str, ...] = ()  # base, aligned: sampled as the negative model of these
    goal: str = "ink"
    against: str = "base"


METHODS: dict[str, Method] = {
    "diffusion_dpo": Method("ink of neutral prompts up"),
    "sft": Method(
        "control: imitation of the inky images, without preferences",
        {"objective": {"name": "sft"}},
    ),
    "smpo": Method(
        "as much ink as DPO's or more, by graded pairs scored where the model would pass",
        {
            "objective": {"name": "smpo", "beta": 2 * BETA},
            "diffusion": {"estimator": {"kind": "renoise"}},
        },
        data="graded.jsonl",
        against="diffusion_dpo",
    ),
    "inpo": Method(
        "more ink than DPO's in as many steps, by inversion",
        {
            "objective": {"name": "inpo", "beta": BETA},
            "diffusion": {"estimator": {"kind": "ddim_inversion"}},
        },
        against="diffusion_dpo",
    ),
    "dcpo": Method(
        "more ink than DPO's, by a caption for each picture",
        {"objective": {"name": "dcpo", "beta": BETA}},
        data="captions.jsonl",
        against="diffusion_dpo",
    ),
    "diffusion_kto": Method(
        "ink up from single rated images, without pairs",
        {"objective": {"name": "diffusion_kto", "beta": BETA / 2}, "train": {"batch_size": 64}},
        data="rated.jsonl",
    ),
    "mapo": Method(
        "ink up without a reference",
        {"objective": {"name": "mapo"}},
    ),
    "diffusion_orpo": Method(
        "ink up without a reference",
        {"objective": {"name": "diffusion_orpo"}},
    ),
    "diffusion_npo": Method(
        "ink up by a negative model",
        {"objective": {"name": "diffusion_npo", "beta": BETA}, "data": {"swap": True}},
        negative_of=("base", "aligned"),
    ),
    "self_npo": Method(
        "legibility up by a negative model, without preferences",
        {
            "objective": {"name": "self_npo"},
            "diffusion": {"estimator": {"kind": "truncated"}},
            "train": {"num_steps": 60, "lr": 1e-4, "schedule": "constant", "warmup": 0},
        },
        data="rated.jsonl",
        negative_of=("base", "aligned"),
        goal="legibility",
    ),
}
GUIDANCE = (1.5, 2.0, 2.5)  # of the base, and with negative models of it
GUIDANCE_ALIGNED = GUIDANCE[:2]  # 2.5 is too much for it; other models alone are measured at 2


class Bench:
    """The folder of one seed."""

    def __init__(self, work: Path, seed: int, quick: bool) -> None:
        self.work, self.seed = work, seed
        self.sizes = demo.FAST if quick else demo.FULL
        self.count = 20 if quick else COUNT
        self.base = work / "base"
        self.folder = work / f"seed-{seed}"
        self.oracle = digits.Oracle(digits.load())
        self.noise = seed * 1_000_000 + 200_000
        self._painters: dict[float, Painter] = {}
        if not (self.base / "model_index.json").is_file():
            print("base ...", flush=True)
            digits.make(self.base, 0, self.sizes.base_steps)
        if not (self.folder / "pairs" / "done").is_file():
            self._write_data()

    def config(self, name: str, **sampling: Any) -> RunConfig:
        """The run of a method: the demonstration's, changed."""
        output = self.folder / name
        plain = demo.config(self.base, demo.ALIGNED, output, self.seed, self.sizes)
        settings = json.loads(plain.model_dump_json(exclude_defaults=True))
        method = METHODS[name]
        merge(settings, {"train": dict.fromkeys(("eval_every", "save_every", "keep_checkpoints"))})
        merge(settings, method.changes)
        if method.changes.get("objective"):
            settings["objective"] = method.changes["objective"]
        if self.sizes is demo.FAST:
            settings["train"] |= {"num_steps": 2, "warmup": 0, "batch_size": 4}
        settings["data"]["train"] = {"path": str(self.folder / "pairs" / "train" / method.data)}
        settings["data"].pop("eval")  # all are held to the same pairs, below
        settings["sample"] = {"num_prompts": 0}
        merge(settings, {"diffusion": {"sampling": sampling}})
        return RunConfig.model_validate(settings)

    def run(self, name: str) -> list[dict[str, Any]]:
        """Train a method, measure it; one record a way of sampling from it."""
        config = self.config(name)
        final = config.output / "final"
        if not final.is_dir():
            shutil.rmtree(config.output, ignore_errors=True)
            seconds = train(config).seconds
            (config.output / "seconds").write_text(f"{seconds:.1f}")
        judged = demo.config(self.base, demo.ALIGNED, config.output, self.seed, self.sizes)
        metrics = evaluate_checkpoint(judged, final).metrics
        common = {
            "method": name,
            "seed": self.seed,
            "seconds": float((config.output / "seconds").read_text()),
            "winner_error": metrics["errors/chosen_diff"],
            "held_out_accuracy": metrics["reward_accuracy"],
        }
        if not METHODS[name].negative_of:
            model = load_denoiser(str(final), config.model)
            return [
                common | {"sampled": "alone", "guidance": g} | self.measure(model, g)
                for g in (GUIDANCE_ALIGNED if name == "diffusion_dpo" else (2.0,))
            ]
        return [common | record for record in self._as_negative(final)]

    def run_base(self) -> list[dict[str, Any]]:
        """The base by itself."""
        return [
            {"method": "base", "seed": self.seed, "sampled": "alone", "guidance": g}
            | self.measure(self.painter(g).base, g)
            for g in GUIDANCE
        ]

    def _as_negative(self, final: Path) -> list[dict[str, Any]]:
        """The base, and the model that DPO aligned, with this negative one."""
        aligned = self.folder / "diffusion_dpo" / "final"
        if not aligned.is_dir():
            raise SystemExit("negative models of the aligned one need diffusion_dpo first")
        records: list[dict[str, Any]] = []
        for positive, keeps in (("base", 0.0), ("aligned", 0.0), ("aligned", 1.0)):
            for g in GUIDANCE if positive == "base" else GUIDANCE_ALIGNED:
                spec = {"negative": str(final), "negative_keeps": keeps, "guidance": g}
                config = self.config("diffusion_dpo", **spec)
                source = str(self.base if positive == "base" else aligned)
                model = load_denoiser(source, config.model)
                negative = load_negative(config.diffusion.sampling, config.model, model)
                kept = f", a = {keeps:g}, b = 1" if positive == "aligned" else ""
                records.append(
                    {"sampled": f"negative of {positive}{kept}", "guidance": g}
                    | self.measure(model, g, negative)
                )
        return records

    def measure(self, model: Any, guidance: float, negative: Any = None) -> dict[str, float]:
        """Ink and legibility of neutral prompts, always from the same start noise."""
        painter = self.painter(guidance)
        shown = painter.paint(model, each_digit(self.count), self.noise, negative_model=negative)
        return shown.numbers()

    def painter(self, guidance: float) -> Painter:
        """Draws with this guidance."""
        if guidance not in self._painters:
            config = self.config("diffusion_dpo", guidance=guidance)
            self._painters[guidance] = Painter(config, self.oracle)
        return self._painters[guidance]

    def _write_data(self) -> None:
        """Pairs as the demonstration makes them, and the same images in other layouts."""
        pairs, sizes, first = self.folder / "pairs", self.sizes, self.seed * 1_000_000
        shutil.rmtree(pairs, ignore_errors=True)
        painter = self.painter(2.0)
        write_pairs(pairs / "train", painter, first, sizes.per_digit, sizes.kept)
        write_pairs(
            pairs / "eval",
            painter,
            first + 100_000,
            sizes.held_out_per_digit,
            sizes.held_out_kept,
        )
        rows = [json.loads(line) for line in (pairs / "train" / PAIRS).read_text().splitlines()]
        mean = statistics.fmean(row["ink_chosen"] - row["ink_rejected"] for row in rows)
        graded = [row | {"p_chosen": preference(row, mean)} for row in rows]
        rated = [
            {
                "id": f"{row['id']}-{side}",
                "prompt": row["prompt"],
                "image": row[f"image_{side}"],
                "desirable": side == "chosen",
            }
            for row in rows
            for side in ("chosen", "rejected")
        ]
        captions = [
            row
            | {f"prompt_{s}": described(pairs / "train", row, s) for s in ("chosen", "rejected")}
            for row in rows
        ]
        for name, many in (("graded", graded), ("rated", rated), ("captions", captions)):
            text = "".join(json.dumps(row) + "\n" for row in many)
            (pairs / "train" / f"{name}.jsonl").write_text(text)
        (pairs / "done").touch()


def preference(row: dict[str, Any], scale: float) -> float:
    """A soft label from the difference of ink, as SmPO takes one from a score: sigmoid(gap / s)."""
    return float(1 / (1 + np.exp(-(row["ink_chosen"] - row["ink_rejected"]) / scale)))


def described(folder: Path, row: dict[str, Any], side: str) -> str:
    """The caption that a describer who looks at the strokes would give this image."""
    digit = digits.NAMES.index(row["prompt"].split()[-1])
    real = digits.load()
    own = real.digits == digit
    means = [digits.ink(real.pixels[own & (real.styles == s)]).mean() for s in range(3)]
    with Image.open(folder / row[f"image_{side}"]) as image:
        amount = digits.ink(digits.to_pixels([image]))[0]
    nearest = int(np.abs(np.asarray(means) - amount).argmin())
    return digits.prompt(digit, digits.STYLES[nearest])


def merge(settings: dict[str, Any], changes: dict[str, Any]) -> None:
    """Put nested changes into settings; None removes."""
    for key, value in changes.items():
        if isinstance(value, dict):
            merge(settings.setdefault(key, {}), value)
        elif value is None:
            settings.pop(key, None)
        else:
            settings[key] = value


# -- the table ---------------------------------------------------------------------------------


def table(records: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """One line a method and way of sampling: means, spreads over seeds, and the verdict."""
    groups: dict[tuple[str, str, float], dict[int, dict[str, Any]]] = {}
    for record in records:
        key = (record["method"], record["sampled"], record["guidance"])
        groups.setdefault(key, {})[record["seed"]] = record
    lines: list[dict[str, Any]] = []
    for (name, sampled, guidance), own in groups.items():
        line: dict[str, Any] = {
            "method": name,
            "sampled": sampled,
            "guidance": guidance,
            "seeds": len(own),
        }
        for key in ("ink", "legibility", "winner_error", "held_out_accuracy", "seconds"):
            values = [record[key] for record in own.values() if key in record]
            if values:
                line[key] = statistics.fmean(values)
                line[f"{key}_sd"] = statistics.stdev(values) if len(values) > 1 else None
        method = METHODS.get(name)
        if method is not None:
            against = "diffusion_dpo" if "aligned" in sampled else method.against
            other = groups.get((against, "alone", guidance), {})
            line |= {"purpose": method.purpose, "goal": method.goal, "against": against}
            line |= compared(own, other, method.goal)
        lines.append(line)
    return lines


def compared(
    own: dict[int, dict[str, Any]], other: dict[int, dict[str, Any]], goal: str
) -> dict[str, Any]:
    """Differences by seed, and whether the goal's is beyond the spread of the seeds.

    It is where the mean difference is more than two standard deviations of the seeds' differences,
    and more than what 200 images can tell.
    """
    found: dict[str, Any] = {}
    seeds = sorted(own.keys() & other.keys())
    for key in ("ink", "legibility"):
        gaps = [own[s][key] - other[s][key] for s in seeds]
        if not gaps:
            continue
        found[f"{key}_change"] = statistics.fmean(gaps)
        if len(gaps) < 2:
            continue
        spread = statistics.stdev(gaps)
        found[f"{key}_change_sd"] = spread
        if key == goal:
            mean = found[f"{key}_change"]
            clear = abs(mean) > max(2 * spread, RESOLUTION[key])
            found["verdict"] = ("yes" if mean > 0 else "worse") if clear else "no"
    return found


def markdown(lines: list[dict[str, Any]]) -> str:
    """The table as it stands in the documentation."""
    header = [
        *("method", "sampled", "g", "ink", "legible, %", "winner error", "held-out acc., %"),
        *("against", "change of ink", "change of legible", "meant to improve", "did it?"),
    ]
    rows = [header, ["---"] * len(header)]
    for line in lines:
        rows.append(
            [
                line["method"],
                line["sampled"],
                f"{line['guidance']:g}",
                spread(line, "ink", 1, ".3f"),
                spread(line, "legibility", 100, ".1f"),
                spread(line, "winner_error", 1, "+.2g"),
                spread(line, "held_out_accuracy", 100, ".0f"),
                line.get("against", ""),
                spread(line, "ink_change", 1, "+.3f"),
                spread(line, "legibility_change", 100, "+.1f"),
                line.get("goal", ""),
                line.get("verdict", ""),
            ]
        )
    return "\n".join("| " + " | ".join(row) + " |" for row in rows)


def spread(line: dict[str, Any], key: str, factor: float, form: str) -> str:
    """Mean and standard deviation over seeds."""
    if key not in line:
        return ""
    text = format(factor * line[key], form).replace("-", "−")
    deviation = line.get(f"{key}_sd")
    if deviation is None:
        return text
    return f"{text} ({format(factor * deviation, form.replace('+', ''))})"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--output", type=Path, required=True, help="folder to keep everything in")
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    parser.add_argument("--methods", nargs="+", choices=list(METHODS), default=list(METHODS))
    parser.add_argument("--quick", action="store_true", help="a smoke run: numbers mean nothing")
    options = parser.parse_args()

    one_thread()
    for seed in options.seeds:
        bench = Bench(options.output, seed, options.quick)
        for name in ["base", *options.methods]:
            kept = bench.folder / f"{name}.json"
            if not kept.is_file():
                records = bench.run_base() if name == "base" else bench.run(name)
                kept.write_text(json.dumps(records, indent=2) + "\n")
            print(f"seed {seed}  {name}: {kept.read_text()}", flush=True)
    order = ["base", *METHODS]
    files = sorted(options.output.glob("seed-*/*.json"), key=lambda f: (order.index(f.stem), f))
    lines = table([record for file in files for record in json.loads(file.read_text())])
    (options.output / "table.json").write_text(json.dumps(lines, indent=2) + "\n")
    print(markdown(lines))


if __name__ == "__main__":
    main()
