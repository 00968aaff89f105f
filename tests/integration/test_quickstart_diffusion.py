"""The diffusion demonstration in seconds; in full, and on real images with a real VAE, slowly."""

from __future__ import annotations

import json
import math
import re
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from mmalign.errors import ConfigError
from mmalign.quickstart import diffusion

pytest.importorskip("sklearn")

ARMS = ("before", "after", "too_far")


@pytest.fixture(scope="module")
def demo(tmp_path_factory: pytest.TempPathFactory) -> Path:
    import torch

    torch.set_num_threads(1)
    folder = tmp_path_factory.mktemp("demo") / "new"
    diffusion.run(folder, seed=3, fast=True)
    return folder


@pytest.mark.slow
def test_demo_writes_its_runs_pictures_and_summary(demo: Path) -> None:
    result = json.loads((demo / "summary.json").read_text(encoding="utf-8"))
    assert result["seed"] == 3
    assert result["fast"] is True
    assert result["seconds"] >= sum(result["stages"].values()) - 0.5
    for arm in ARMS:
        assert set(result[arm]) == {"ink", "legibility", "held_out_accuracy", "winner_error"}
        assert 0.0 < result[arm]["ink"] < 1.0
        assert 0.0 <= result[arm]["legibility"] <= 1.0
    assert result["before"]["held_out_accuracy"] == 0.5, "before a step all pairs are ties"
    assert result["before"]["winner_error"] == 0.0
    assert result["after"]["winner_error"] != 0.0
    assert result["too_far"]["winner_error"] != result["after"]["winner_error"]
    assert result["pairs"]["pairs"] == 10
    assert [point["step"] for point in result["by_step"]["aligned"]] == [0, 1, 2]
    assert (demo / "aligned" / "final" / "unet" / "config.json").is_file()


@pytest.mark.slow
def test_demo_trains_with_the_ordinary_loop_from_an_ordinary_config(demo: Path) -> None:
    from mmalign.config import load
    from mmalign.quickstart.digits import prompt

    config = load(demo / "aligned" / "config.yaml")
    assert config.modality == "diffusion"
    assert config.objective.name == "diffusion_dpo"
    assert config.model.lora is None
    rows = [
        json.loads(line)
        for line in (demo / "pairs" / "train" / "pairs.jsonl").read_text().splitlines()
    ]
    ink = [row["meta"] for row in rows]
    assert all(row["ink_chosen"] >= row["ink_rejected"] for row in ink)
    assert {row["prompt"] for row in rows} == {prompt(digit) for digit in range(10)}, "no styles"


@pytest.mark.slow
def test_demo_report_is_honest_and_self_contained(demo: Path) -> None:
    page = (demo / "report.html").read_text(encoding="utf-8")
    for heading in (
        "What happened",
        "Ink and legibility, step by step",
        "Ink of every image",
        "What leaks",
        "Too far",
        "What this does not show",
    ):
        assert page.count(f"<h2>{heading}</h2>") == 1, heading
    assert "smoke run" in page
    assert page.count('class="sheet" src="data:image/png;base64,') >= 2
    assert not re.search(r'(src|href)="(?!data:|#)', page), "nothing is fetched"


@pytest.mark.slow
def test_demo_is_the_same_for_a_seed(demo: Path, tmp_path: Path) -> None:
    again = diffusion.run(tmp_path / "again", seed=3, fast=True)
    first = json.loads((demo / "summary.json").read_text(encoding="utf-8"))
    timed = ("seconds", "stages")
    assert {k: v for k, v in again.items() if k not in timed} == {
        k: v for k, v in first.items() if k not in timed
    }


def test_demo_leaves_a_used_folder_alone(tmp_path: Path) -> None:
    (tmp_path / "mine.txt").write_text("keep", encoding="utf-8")
    with pytest.raises(ConfigError, match="not an empty folder"):
        diffusion.run(tmp_path, fast=True)
    assert [path.name for path in tmp_path.iterdir()] == ["mine.txt"]


def test_settings_are_those_of_the_recipe() -> None:
    config = diffusion.config(Path("base"), diffusion.ALIGNED, Path("runs/aligned"), seed=1)
    train = config.train
    assert (train.num_steps, train.batch_size, train.warmup) == (100, 32, 10)
    assert (train.lr, train.schedule, train.weight_decay) == (2e-5, "linear", 0.0)
    assert config.objective.keywords == {"beta": 20000.0}
    sampling = config.diffusion.sampling
    assert (sampling.num_steps, sampling.guidance, sampling.sampler) == (20, 2.0, "ddim")
    assert sampling.clip_sample
    assert config.diffusion.caption_dropout == 0.0
    assert config.data.train[0].path == "runs/pairs/train/pairs.jsonl"


@pytest.mark.slow
def test_pictures_of_a_seed_do_not_depend_on_how_many_are_drawn(demo: Path) -> None:
    from mmalign.quickstart import digits
    from mmalign.quickstart.digits import Painter, each_digit

    config = diffusion.config(
        demo / "base", diffusion.ALIGNED, demo / "unused", seed=0, sizes=diffusion.FAST
    )
    painter = Painter(config, digits.Oracle(digits.load()))
    many = painter.paint(painter.base, each_digit(12), 40)
    few = painter.paint(painter.base, each_digit(3), 40)
    np.testing.assert_allclose(many.pixels[:3], few.pixels, atol=1.5 / 255)
    assert many.first(3).digits == few.digits


@pytest.mark.slow
def test_demo_in_full_reaches_what_it_promises(tmp_path: Path) -> None:
    result = diffusion.run(tmp_path / "full", seed=0)
    before, after, too_far = (result[arm] for arm in ARMS)
    assert after["ink"] - before["ink"] >= 0.015
    assert after["legibility"] >= 0.92
    assert after["held_out_accuracy"] >= 0.95
    assert after["winner_error"] < 0.005
    assert too_far["legibility"] < 0.9
    assert too_far["winner_error"] > 0.1


@pytest.mark.slow
def test_latents_of_real_pictures_are_aligned_through_caches(
    shared_data: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Emoji in colour against the same in grey, encoded by a real VAE that training never loads."""
    import torch
    from PIL import Image

    from mmalign.config import RunConfig
    from mmalign.diffusion import components
    from mmalign.diffusion.components import load_denoiser
    from mmalign.inference import write_cache
    from mmalign.quickstart.digits import PAIRS
    from mmalign.train.loop import train
    from mmalign.train.metrics import read_json

    emoji = cut_emoji(shared_data, tmp_path / "emoji")
    base = emoji_pipeline(shared_data, tmp_path / "base")

    def settings(name: str, objective: dict[str, Any], **train: Any) -> dict[str, Any]:
        return {
            "modality": "diffusion",
            "model": {"path": str(base)},
            "data": {
                "train": {"path": str(emoji / "train" / PAIRS)},
                "eval": {"path": str(emoji / "eval" / PAIRS)},
            },
            "objective": objective,
            "train": {"batch_size": 16, "num_threads": 1, "warmup": 5, "seed": 0, **train},
            "sample": {"num_prompts": 0},
            "diffusion": {"resolution": 64, "cache": "on", "cache_folder": str(tmp_path / "cache")},
            "output": str(tmp_path / name),
        }

    learn = RunConfig.model_validate(settings("learn", {"name": "sft"}, num_steps=100, lr=2e-3))
    objective = {"name": "diffusion_dpo", "beta": 2000.0}
    align = RunConfig.model_validate(settings("align", objective, num_steps=40, lr=2e-4))
    write_cache(learn)  # of the coloured images alone: nothing else is read
    write_cache(align)
    files = {path: path.stat().st_mtime_ns for path in (tmp_path / "cache").rglob("*.safetensors")}
    write_cache(align)
    again = {path: path.stat().st_mtime_ns for path in (tmp_path / "cache").rglob("*.safetensors")}
    assert files == again, "what is there is not computed again"

    with monkeypatch.context() as patch:
        patch.setattr(components.Vae, "load", classmethod(never))
        train(learn)
        shutil.rmtree(base / "unet")
        shutil.copytree(tmp_path / "learn" / "final" / "unet", base / "unet")
        train(align)
    learned, aligned = (read_json(tmp_path / name / "eval.jsonl") for name in ("learn", "align"))
    assert learned[-1]["loss"] < 0.8 * learned[0]["loss"], "it learned to find noise in latents"
    steps = read_json(tmp_path / "align" / "metrics.jsonl")
    losses = [record["loss"] for record in steps if "loss" in record]
    assert losses[0] == pytest.approx(math.log(2), abs=1e-5)
    assert aligned[0]["reward_accuracy"] == 0.5, "all tied"
    assert aligned[-1]["reward_accuracy"] > 0.8, "colour wins on images it never saw"
    assert aligned[-1]["loss"] < math.log(2)

    vae = components.load_vae(base, align.diffusion)
    with Image.open(emoji / "eval" / "chosen-0.png") as image:
        pixels = torch.from_numpy(np.asarray(image, np.float32) / 127.5 - 1).permute(2, 0, 1)[None]
    assert (vae.decode(vae.encode(pixels)[0]) - pixels).abs().mean() < 0.1
    unet = load_denoiser(str(tmp_path / "align" / "final"), align.model)
    assert unet.conv_in.weight.shape[1] == vae.channels == 32


def never(*arguments: Any, **options: Any) -> None:
    raise AssertionError("with complete caches the VAE is not loaded")


def cut_emoji(shared_data: Path, folder: Path, count: int = 96, held_out: int = 24) -> Path:
    """Pairs of a coloured image and the same in grey, captioned with its name."""
    from PIL import Image

    from mmalign.quickstart.digits import PAIRS

    lines = (shared_data / "images" / "noto_emoji_64.jsonl").read_text().splitlines()
    about = [json.loads(line) for line in lines]
    chosen = about[:: len(about) // (count + held_out)][: count + held_out]
    with Image.open(shared_data / "images" / "noto_emoji_64.webp") as opened:
        sheet = opened.convert("RGB")
    for name, part in (("train", chosen[held_out:]), ("eval", chosen[:held_out])):
        own = folder / name
        own.mkdir(parents=True)
        rows = []
        for i, record in enumerate(part):
            left, top = 64 * record["col"], 64 * record["row"]
            picture = sheet.crop((left, top, left + 64, top + 64))
            picture.save(own / f"chosen-{i}.png")
            picture.convert("L").convert("RGB").save(own / f"rejected-{i}.png")
            files = {f"image_{side}": f"{side}-{i}.png" for side in ("chosen", "rejected")}
            rows.append(json.dumps({"prompt": record["name"], **files}))
        (own / PAIRS).write_text("\n".join(rows) + "\n")
    return folder


def emoji_pipeline(shared_data: Path, folder: Path) -> Path:
    """A small random U-Net on the latents of a real VAE."""
    import tiny_diffusion

    source = shared_data / "models" / "taef2"
    if not source.is_dir():
        pytest.skip("the VAE is not beside this checkout")
    tiny_diffusion.make_sd15(
        folder, in_channels=32, out_channels=32, block_out_channels=(64, 64), norm_num_groups=8
    )
    shutil.rmtree(folder / "vae")
    shutil.copytree(source, folder / "vae")
    return folder


@pytest.mark.slow
def test_table_of_methods_runs_to_its_end(tmp_path: Path) -> None:
    """Every method trains from its config and is measured; numbers of so few steps mean nothing."""
    script = Path(__file__).parents[2] / "benchmarks" / "diffusion_methods.py"
    command = [sys.executable, str(script), "--output", str(tmp_path), "--seeds", "0", "--quick"]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr[-2000:]
    lines = json.loads((tmp_path / "table.json").read_text(encoding="utf-8"))
    assert {line["method"] for line in lines} >= {
        *("base", "diffusion_dpo", "sft", "smpo", "inpo", "dcpo", "diffusion_kto", "mapo"),
        *("diffusion_orpo", "diffusion_npo", "self_npo"),
    }
    assert sum(line["method"] == "self_npo" for line in lines) == 7, "merged and not, two models"
    assert done.stdout.count("\n| ") == len(lines) + 2
