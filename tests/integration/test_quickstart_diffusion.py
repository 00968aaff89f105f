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

from mmalign.config import load
from mmalign.errors import ConfigError
from mmalign.quickstart import diffusion, digits
from mmalign.quickstart.digits import BASE

pytest.importorskip("sklearn")


@pytest.fixture(scope="module")
def demo(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("demo") / "new"
    diffusion.run(folder, seed=3, fast=True)
    return folder


@pytest.mark.slow
def test_demo_writes_its_runs_pairs_and_summary(demo: Path) -> None:
    result = json.loads((demo / "summary.json").read_text(encoding="utf-8"))
    assert (result["seed"], result["fast"]) == (3, True)
    assert result["seconds"] >= sum(result["stages"].values()) - 0.5
    assert tuple(result)[:3] == diffusion.ARMS
    for arm in diffusion.ARMS:
        ink, low, high = result[arm]["ink"][0], *result[arm]["ink"][1:]
        assert 0.0 < low < ink < high < 1.0
        assert len(result[arm]["ink_change_by_digit"]) == 10
        config = load(demo / arm / "config.yaml") if arm != "base" else None
        assert config is None or config.model.path == str(BASE)
    assert result["base"]["held_out_accuracy"] == [0.5] * 3, "before a step all pairs are ties"
    assert result["base"]["ink_change"] == [0.0] * 3
    assert result["base"]["winner_error"] == result["base"]["pixel_change"] == 0.0
    assert result["sft"]["winner_error"] != result["dpo"]["winner_error"] != 0.0
    assert result["sft"]["pixel_change"] > 0.0 < result["dpo"]["pixel_change"]
    rows = (demo / "pairs" / "pairs.jsonl").read_text(encoding="utf-8").splitlines()
    splits = [json.loads(row)["split"] for row in rows]
    assert (splits.count("train"), splits.count("eval")) == (10, 10)


@pytest.mark.slow
def test_demo_report_is_honest_and_self_contained(demo: Path) -> None:
    page = (demo / "report.html").read_text(encoding="utf-8")
    for heading in ("What happened", "Where the ink went", "What this does not show"):
        assert page.count(f"<h2>{heading}</h2>") == 1, heading
    assert "smoke run" in page
    assert page.count('class="sheet" src="data:image/png;base64,') == 2
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


def test_arms_differ_in_their_objective_alone() -> None:
    sft, dpo = (
        diffusion.config(Path("pairs.jsonl"), arm, Path("out"), seed=1) for arm in ("sft", "dpo")
    )
    train = dpo.train
    assert (train.num_steps, train.batch_size, train.warmup, train.lr) == (60, 32, 10, 5e-5)
    assert dpo.objective.keywords == {"beta": 20000.0}
    assert sft.objective.name == "sft"
    assert sft.train == train.model_copy(update={"eval_every": None})
    assert sft.diffusion == dpo.diffusion
    assert sft.data.train == dpo.data.train


@pytest.mark.slow
def test_images_do_not_depend_on_how_many_are_drawn(tmp_path: Path) -> None:
    config = diffusion.config(tmp_path, "dpo", tmp_path / "unused", seed=0, sizes=diffusion.FAST)
    painter = digits.Painter(config)
    many = painter.paint(painter.base, digits.each_digit(120), range(40, 160))
    few = painter.paint(painter.base, digits.each_digit(3), range(40, 43))
    np.testing.assert_allclose(many[:3], few, atol=1.5 / 255)
    part = digits.Painting(config, None, digits.each_digit(120)[100:], range(140, 160))
    np.testing.assert_array_equal(digits.paint(part), many[100:])


@pytest.mark.slow
def test_demo_in_full_reaches_what_it_promises(tmp_path: Path) -> None:
    result = diffusion.run(tmp_path / "full", seed=0)
    base, sft, dpo = (result[arm] for arm in diffusion.ARMS)
    assert result["pairs"]["ink_preferred"][0] < base["ink"][0], "nothing to imitate"
    assert dpo["ink_change"][1] > 0.01, "the whole interval"
    assert sft["ink_change"][2] < 0.01, "the whole interval"
    assert dpo["legibility"][0] >= 0.92
    assert dpo["held_out_accuracy"][0] > sft["held_out_accuracy"][0]


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
        patch.setattr(components.Vae, "__init__", never)
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
