"""What each diffusion method does to a small model of handwritten digits.

The base is that of `mmalign quickstart diffusion`. For every seed new pairs, of much ink against
little, and new noise for training and measuring; every method learns from the same pairs and is
measured from the same start noise. What is finished stays in the folder, so an interrupted table
goes on, and processes with different seeds can share a folder.

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
from quickstart_digits_base import STYLES, styles_of

from mmalign.config import RunConfig
from mmalign.diffusion.components import load_denoiser
from mmalign.diffusion.sample import load_negative
from mmalign.inference import evaluate_checkpoint
from mmalign.quickstart import digits
from mmalign.quickstart.digits import BASE, PAIRS, SAMPLING, Painter, Shown, each_digit, write_pairs
from mmalign.quickstart.driver import one_thread
from mmalign.train.loop import train

BETA = 20000.0  # published ones are for latents a hundred times as large
RESOLUTION = {"ink": 0.002, "legibility": 0.014}  # standard errors of 200 images


@dataclass(frozen=True)
class Method:
    """How a method differs from the plain run of Diffusion-DPO, and how it is judged."""

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


@dataclass(frozen=True)
class Sizes:
    """How much of everything."""

    per_digit: int = 48  # images, of which
    kept: int = 16  # of each end become training pairs
    held_out_per_digit: int = 18
    held_out_kept: int = 6
    measured: int = 200  # images
    steps: int = 100
    batch_size: int = 32  # pairs
    denoising_steps: int = 20


QUICK = Sizes(2, 1, 2, 1, 20, 2, 4, 2)


class Bench:
    """The folder of one seed."""

    def __init__(self, work: Path, seed: int, quick: bool) -> None:
        self.seed = seed
        self.sizes = QUICK if quick else Sizes()
        self.folder = work / f"seed-{seed}"
        self.oracle = digits.Oracle(digits.load())
        self.noise = seed * 1_000_000 + 200_000
        self._painters: dict[float, Painter] = {}
        if not (self.folder / "pairs" / "done").is_file():
            self._write_data()

    def plain(self, output: Path) -> dict[str, Any]:
        """Settings of Diffusion-DPO on the pairs of this seed."""
        pairs, sizes = self.folder / "pairs", self.sizes
        return {
            "modality": "diffusion",
            "model": {"path": str(BASE)},
            "data": {
                "train": {"path": str(pairs / "train" / PAIRS)},
                "eval": {"path": str(pairs / "eval" / PAIRS)},
            },
            "objective": {"name": "diffusion_dpo", "beta": BETA},
            "train": {
                "batch_size": sizes.batch_size,
                "eval_batch_size": 60,
                "num_steps": sizes.steps,
                "lr": 2e-5,
                "check_settings": False,  # of a model far smaller than any that was published
                "warmup": min(10, sizes.steps - 1),
                "num_threads": 1,
                "seed": self.seed,
            },
            "sample": {"num_prompts": 0},
            "diffusion": {
                "resolution": digits.SIDE,
                "eval_draws": 6,
                "cache": "off",
                "sampling": {**SAMPLING, "num_steps": sizes.denoising_steps},
            },
            "output": str(output),
        }

    def config(self, name: str, **sampling: Any) -> RunConfig:
        """The run of a method: the plain one, changed."""
        settings, method = self.plain(self.folder / name), METHODS[name]
        merge(settings, method.changes)
        if method.changes.get("objective"):
            settings["objective"] = method.changes["objective"]
        if self.sizes is QUICK:
            settings["train"] |= {"num_steps": 2, "warmup": 0, "batch_size": 4}
        settings["data"]["train"] = {"path": str(self.folder / "pairs" / "train" / method.data)}
        settings["data"].pop("eval")  # all are held to the same pairs, below
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
        judged = RunConfig.model_validate(self.plain(config.output))
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
                source = str(BASE if positive == "base" else aligned)
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
        asked = each_digit(self.sizes.measured)
        seeds = range(self.noise, self.noise + len(asked))
        images = painter.paint(model, asked, seeds, negative_model=negative)
        shown = self.oracle.look(asked, images)
        return {"ink": float(shown.ink.mean()), "legibility": float(shown.legible.mean())}

    def painter(self, guidance: float) -> Painter:
        """Draws with this guidance."""
        if guidance not in self._painters:
            config = self.config("diffusion_dpo", guidance=guidance)
            self._painters[guidance] = Painter(config)
        return self._painters[guidance]

    def _write_data(self) -> None:
        """Pairs of much ink against little, and the same images in other layouts."""
        pairs, sizes, first = self.folder / "pairs", self.sizes, self.seed * 1_000_000
        shutil.rmtree(pairs, ignore_errors=True)
        painter = self.painter(2.0)
        for split, seed, per_digit, kept in (
            ("train", first, sizes.per_digit, sizes.kept),
            ("eval", first + 100_000, sizes.held_out_per_digit, sizes.held_out_kept),
        ):
            asked = each_digit(10 * per_digit)
            images = painter.paint(painter.base, asked, range(seed, seed + len(asked)))
            shown = self.oracle.look(asked, images)
            write_pairs(pairs / split, shown, extremes(shown, kept, seed))
        rows = [json.loads(line) for line in (pairs / "train" / PAIRS).read_text().splitlines()]
        mean = statistics.fmean(map(gap, rows))
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
            row | {f"prompt_{s}": described(row, s) for s in ("chosen", "rejected")} for row in rows
        ]
        for name, many in (("graded", graded), ("rated", rated), ("captions", captions)):
            text = "".join(json.dumps(row) + "\n" for row in many)
            (pairs / "train" / f"{name}.jsonl").write_text(text)
        (pairs / "done").touch()


def extremes(shown: Shown, kept: int, seed: int) -> list[tuple[int, int, str]]:
    """Of each digit the inkiest images, each against one of the least inky, by chance."""
    random, amount, digit = np.random.default_rng(seed), shown.ink, np.asarray(shown.digits)
    pairs: list[tuple[int, int, str]] = []
    for number in range(len(digits.NAMES)):
        own = np.flatnonzero(digit == number)
        ranked = own[amount[own].argsort(kind="stable")]
        few = random.permutation(ranked[:kept]).tolist()
        pairs += [(more, less, "") for more, less in zip(ranked[-kept:].tolist(), few, strict=True)]
    return pairs


def gap(row: dict[str, Any]) -> float:
    """Difference of ink within a pair."""
    return row["meta"]["ink_chosen"] - row["meta"]["ink_rejected"]


def preference(row: dict[str, Any], scale: float) -> float:
    """A soft label from the difference of ink, as SmPO takes one from a score: sigmoid(gap / s)."""
    return float(1 / (1 + np.exp(-gap(row) / scale)))


def described(row: dict[str, Any], side: str) -> str:
    """The caption that a describer who looks at the strokes would give this image."""
    digit = digits.NAMES.index(row["prompt"].split()[-1])
    real = digits.load()
    own = real.digits == digit
    styles = styles_of(real)
    means = [digits.ink(real.pixels[own & (styles == s)]).mean() for s in range(len(STYLES))]
    nearest = int(np.abs(np.asarray(means) - row["meta"][f"ink_{side}"]).argmin())
    return digits.prompt(digit, STYLES[nearest])


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
