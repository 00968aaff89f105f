"""The loop around a diffusion step: the same numbers however the work is cut or resumed."""

from __future__ import annotations

import json
import math
import os
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import tiny_pictures
import torch
from picture_runs import Data, configured, write_config, write_data
from safetensors.torch import load_file, save_file
from torch.utils import checkpoint as recomputing

from mmalign.diffusion.tools import DiffusionTools
from mmalign.errors import ConfigError
from mmalign.inference import evaluate_checkpoint, write_cache
from mmalign.train.loop import train
from mmalign.train.metrics import read_json

pytestmark = pytest.mark.runs

DRAWN = {"flip": True, "crop": "random", "caption_dropout": 0.3}
"""All that is drawn at random for a row."""


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Data:
    kinds = ("pairs", "rated", "ranked", "scored_pairs", "captioned", "prompts")
    return write_data(tmp_path_factory.mktemp("data"), *kinds, num=5, side=36)


@pytest.fixture(scope="module")
def small(tmp_path_factory: pytest.TempPathFactory) -> Data:
    """Pictures of a pipeline on pixels."""
    return write_data(tmp_path_factory.mktemp("small"), "pairs", "prompts", num=5, side=10)


def trained(folder: Path, pipeline: Path, rows: Any, /, **sections: Any) -> dict[str, torch.Tensor]:
    """Weights after two steps of SGD, whose result is linear in the gradients' rounding."""
    plain = {"num_steps": 2, "lr": 1e-2, "optimizer": "sgd"}
    sections["train"] = {**plain, **sections.get("train", {})}
    sections["diffusion"] = {"resolution": 32, **sections.get("diffusion", {})}
    config = configured(folder, pipeline, rows, **sections)
    train(config)
    return load_file(config.output / f"checkpoint-{config.train.num_steps}" / "weights.safetensors")


def logged(folder: Path, name: str = "loss") -> list[float]:
    return [line[name] for line in read_json(folder / "run/metrics.jsonl") if name in line]


def gap(a: dict[str, torch.Tensor], b: dict[str, torch.Tensor]) -> float:
    assert a.keys() == b.keys()
    return max(float((a[name] - b[name]).abs().max()) for name in a)


def test_the_same_run_however_it_is_cut(
    sd15_dir: Path, data: Data, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def run(name: str, **sections: Any) -> dict[str, torch.Tensor]:
        return trained(tmp_path / name, sd15_dir, data["pairs"], diffusion=DRAWN, **sections)

    whole = run("whole")
    assert logged(tmp_path / "whole")[0] == pytest.approx(math.log(2), abs=1e-6)
    assert gap(run("workers", data={"num_workers": 2}), whole) == 0.0
    halves = {"batch_size": 1, "accumulate": 2}
    assert gap(run("halves", train=halves), whole) < 1e-5
    assert gap(run("in turn", train={"backward": "per_candidate"}), whole) < 1e-5
    mixed = run("mixed", train={"mixed_precision": "bf16"})
    assert logged(tmp_path / "mixed")[0] == pytest.approx(math.log(2), abs=1e-4)
    assert 0.0 < gap(mixed, whole) < 0.01

    calls = 0
    original = recomputing.checkpoint

    def counted(*args: Any, **options: Any) -> Any:
        nonlocal calls
        calls += 1
        return original(*args, **options)

    monkeypatch.setattr(recomputing, "checkpoint", counted)
    assert gap(run("recomputed", model={"gradient_checkpointing": True}), whole) < 1e-7
    assert calls > 0, "activations are recomputed"


RESUMED: dict[str, dict[str, Any]] = {
    "ema": {"reference": {"kind": "ema", "decay": 0.5}},
    "ema of a whole network": {
        "reference": {"kind": "ema", "decay": 0.5, "every": 2},
        "model": {"lora": None},
    },
    "self_npo": {
        "objective": {"name": "self_npo"},
        "diffusion": {"estimator": {"kind": "truncated", "num_steps": 5, "teacher_decay": 0.5}},
    },
    "self_npo from prompts": {
        "objective": {"name": "self_npo"},
        "diffusion": {
            "estimator": {
                "kind": "truncated",
                "num_steps": 5,
                "num_moves": 2,
                "generated": True,
                "teacher_decay": 0.5,
            }
        },
    },
}


@pytest.mark.parametrize(
    "name",
    [
        pytest.param("ema", marks=pytest.mark.slow),
        "ema of a whole network",
        pytest.param("self_npo", marks=pytest.mark.slow),
        pytest.param("self_npo from prompts", marks=pytest.mark.slow),
    ],
)
def test_a_run_goes_on_to_the_same_bits(
    name: str, digits_dir: Path, small: Data, tmp_path: Path
) -> None:
    sections = RESUMED[name]
    sections |= {"train": {"num_steps": 4, "save_every": 2, "lr": 1e-2}}
    sections["diffusion"] = {"resolution": 8, **sections.get("diffusion", {})}
    rows: Any = small["pairs"]
    if "prompts" in name:
        rows = {"path": str(small["prompts"]), "layout": "prompts"}
    config = configured(tmp_path, digits_dir, rows, **sections)
    train(config)
    last = config.output / "checkpoint-4"
    whole = {file.name: file.read_bytes() for file in last.glob("*.safetensors")}
    assert whole
    for file in sorted(last.rglob("*"), reverse=True):
        file.unlink()
    last.rmdir()
    for file in sorted((config.output / "final").rglob("*"), reverse=True):
        file.rmdir() if file.is_dir() else file.unlink()
    train(config, resume=True)
    assert {file.name: file.read_bytes() for file in last.glob("*.safetensors")} == whole


@pytest.mark.slow
def test_a_reference_that_inverts(sd15_dir: Path, data: Data, tmp_path: Path) -> None:
    """The first step's images are those that the policy itself would find; later ones are not."""
    runs: dict[str, list[float]] = {}
    for network in ("policy", "reference"):
        inverts = {"estimator": {"kind": "ddim_inversion", "num_steps": 4, "network": network}}
        sections: dict[str, Any] = {"objective": {"name": "inpo"}, "diffusion": inverts}
        trained(tmp_path / network, sd15_dir, data["pairs"], **sections, train={"lr": 1.0})
        runs[network] = logged(tmp_path / network, "errors/ref_chosen")
    assert runs["policy"][0] == runs["reference"][0]
    assert runs["policy"][1] != runs["reference"][1]


@pytest.mark.slow
def test_shapes_in_one_batch(sdxl_dir: Path, tmp_path: Path) -> None:
    """Rows of other aspect ratios in one batch: each as alone."""
    files: list[str] = []
    for i, size in enumerate([(64, 64), (48, 80), (80, 48), (64, 64)]):
        folder = tmp_path / f"data-{i}"
        folder.mkdir()
        files.append(str(tiny_pictures.pairs(folder, 1, size=size)))
        text = Path(files[-1]).read_text(encoding="utf-8").replace("row-0", f"row-{i}")
        Path(files[-1]).write_text(text, encoding="utf-8")
    buckets = {"resolution": 64, "buckets": True, "bucket_multiple": 16}

    def run(name: str, **numbers: int) -> dict[str, torch.Tensor]:
        return trained(tmp_path / name, sdxl_dir, files, diffusion=buckets, train=numbers)

    together = run("together", batch_size=4)
    assert gap(run("apart", batch_size=1, accumulate=4), together) < 1e-5
    assert logged(tmp_path / "together")[0] == pytest.approx(math.log(2), abs=1e-6)


def test_rated_pictures_and_another_rows_caption(
    sd15_dir: Path, data: Data, tmp_path: Path
) -> None:
    sections: dict[str, Any] = {"objective": {"name": "kto"}, "diffusion": DRAWN}
    sections["data"] = {"eval": str(data["rated"])}
    trained(tmp_path, sd15_dir, data["rated"], **sections)
    first = next(iter(read_json(tmp_path / "run/metrics.jsonl")))
    assert first["eval_loss"] == pytest.approx(0.5, abs=1e-6)
    assert 0.0 <= first["eval_separation"] <= 1.0
    said = [line for line in read_json(tmp_path / "run/metrics.jsonl") if "loss" in line]
    for good in ("chosen", "rejected"):  # of rated images, not of another row's caption
        assert any(line[f"errors/policy_{good}"] is not None for line in said)
    plain = {"objective": {"name": "sft"}}
    trained(tmp_path / "plain", sd15_dir, data["captioned"], **plain)
    assert logged(tmp_path / "plain", "errors/policy_chosen")
    assert not logged(tmp_path / "plain", "errors/policy_rejected")
    kto = {"objective": {"name": "diffusion_kto"}}
    assert trained(tmp_path / "pairs", sd15_dir, data["pairs"], **kto)
    sections["train"] = {"batch_size": 1}
    with pytest.raises(ConfigError, match=r"at least 2.*another row"):
        trained(tmp_path / "one", sd15_dir, data["rated"], **sections)


@pytest.mark.slow
def test_ranked_pictures(sd15_dir: Path, data: Data, tmp_path: Path) -> None:
    ranking = {"objective": {"name": "plackett_luce"}}
    trained(tmp_path / "list", sd15_dir, data["ranked"], **ranking)
    assert logged(tmp_path / "list")[0] == pytest.approx(math.log(6), abs=1e-5)
    every = {"data": {"list_pairs": "all"}}
    trained(tmp_path / "pairs", sd15_dir, data["ranked"], **every)
    assert logged(tmp_path / "pairs")[0] == pytest.approx(math.log(2), abs=1e-6)


@pytest.mark.slow
def test_exchanged_pairs_go_the_other_way(sd15_dir: Path, data: Data, tmp_path: Path) -> None:
    one_step = {"train": {"lr": 1e-4}}
    forth = trained(tmp_path / "forth", sd15_dir, data["pairs"], **one_step)
    back = trained(tmp_path / "back", sd15_dir, data["pairs"], **one_step, data={"swap": True})
    values = [logged(tmp_path / name, "errors/chosen_diff") for name in ("forth", "back")]
    assert values[0][0] == values[1][0] == 0.0
    lora_b = [name for name in forth if "lora_B" in name]
    together = sum(float((forth[name] * back[name]).sum()) for name in lora_b)
    assert together < 0.0, "the first gradients are each other's negatives"


@pytest.mark.slow
def test_stored_errors_with_flips(sd15_dir: Path, data: Data, tmp_path: Path) -> None:
    """A bank's draws hold the flip and the posterior's noise: its errors are the live ones."""
    sections: dict[str, Any] = {"diffusion": {"flip": True, "num_draws": 3}}
    sections |= {"reference": {"kind": "cached"}, "data": {"eval": str(data["scored_pairs"])}}
    config = configured(tmp_path, sd15_dir, data["pairs"], **sections)
    write_cache(config)
    train(config)
    assert logged(tmp_path)[0] == pytest.approx(math.log(2), abs=1e-3)
    assert logged(tmp_path, "eval_loss")[0] == pytest.approx(math.log(2), abs=1e-3)
    sections["diffusion"] = {"crop": "random", "num_draws": 2, "resolution": 32}
    config = configured(tmp_path / "crops", sd15_dir, data["pairs"], **sections)
    write_cache(config)
    train(config)
    assert logged(tmp_path / "crops")[0] == pytest.approx(math.log(2), abs=1e-3)


def test_caches_change_nothing_but_rounding(sdxl_dir: Path, data: Data, tmp_path: Path) -> None:
    """Captions left out by chance, flips and the posterior's noise included; latents are halves."""
    drawn = {"flip": True, "caption_dropout": 0.5}
    live = trained(tmp_path / "live", sdxl_dir, data["pairs"], diffusion={**drawn, "cache": "off"})
    cached = {"diffusion": {**drawn, "cache": "on"}}
    write_cache(configured(tmp_path / "cached", sdxl_dir, data["pairs"], **cached))
    stored = trained(tmp_path / "cached", sdxl_dir, data["pairs"], **cached)
    moved = max(float(value.abs().max()) for name, value in live.items() if "lora_B" in name)
    assert moved > 0.0
    assert gap(stored, live) < 0.02 * moved


@pytest.mark.slow
def test_references_that_are_the_same_model(
    sd15_dir: Path, digits_dir: Path, data: Data, tmp_path: Path
) -> None:
    def run(name: str, **sections: Any) -> dict[str, torch.Tensor]:
        return trained(tmp_path / name, sd15_dir, data["pairs"], **sections)

    own = run("own")
    itself = {"kind": "frozen-copy", "path": str(sd15_dir)}
    assert gap(run("copy", reference=itself), own) < 1e-7
    halves = [{"weight": 0.5}, {"weight": 0.5, "path": str(sd15_dir)}]
    assert gap(run("mixture", reference={"kind": "mixture", "mixture": halves}), own) < 1e-6
    # A LoRA that goes on has itself, as it is now, for a reference.
    before = {"lora": None, "adapter": str(tmp_path / "own/run/final")}
    further = run("further", model=before)
    assert logged(tmp_path / "further")[0] == pytest.approx(math.log(2), abs=1e-6)
    assert gap(further, own) > 0.0


@pytest.mark.parametrize("lora", [pytest.param({"rank": 2}, marks=pytest.mark.slow), None])
def test_checkpoints_and_final_weights_evaluate_as_the_run_did(
    digits_dir: Path, small: Data, tmp_path: Path, lora: dict[str, int] | None
) -> None:
    config = configured(
        tmp_path,
        digits_dir,
        small["pairs"],
        model={"lora": lora},
        data={"eval": str(small["pairs"])},
        train={"num_steps": 2, "save_every": 1, "eval_every": 1, "lr": 1e-2},
        diffusion={"resolution": 8, "eval_draws": 2},
    )
    train(config)
    seen = {line["step"]: line for line in read_json(config.output / "eval.jsonl")}
    for folder, step in (("checkpoint-1", 1), ("checkpoint-2", 2), ("final", 2)):
        found = evaluate_checkpoint(config, config.output / folder).metrics
        for name in ("loss", "reward_accuracy", "errors/chosen_diff"):
            assert found[name] == pytest.approx(seen[step][name], rel=1e-4, abs=1e-6), (
                folder,
                name,
            )
    assert seen[1]["loss"] != seen[2]["loss"]


@pytest.mark.slow
def test_a_negative_model_is_used_for_sheets(digits_dir: Path, small: Data, tmp_path: Path) -> None:
    """And what is not needed from step to step is let go after them."""
    painted: dict[str, bytes] = {}
    for name, sampling in {
        "plain": {},
        "against itself": {"negative": str(digits_dir / "unet")},
        "against another": {"negative": str(tmp_path / "other")},
    }.items():
        if name == "against another":
            shutil.copytree(digits_dir / "unet", tmp_path / "other")
            file = next((tmp_path / "other").glob("*.safetensors"))
            weights = {k: v * 1.2 for k, v in load_file(file).items()}
            save_file(weights, file, {"format": "pt"})
        config = configured(
            tmp_path / name,
            digits_dir,
            small["pairs"],
            diffusion={"resolution": 8, "sampling": {"num_steps": 3, "guidance": 4, **sampling}},
            sample={"prompts": ["a cat"]},
            train={"num_steps": 1},
        )
        train(config)
        painted[name] = (config.output / "samples/step-0/000.png").read_bytes()
    assert painted["against itself"] == painted["plain"]
    assert painted["against another"] != painted["plain"]


ELSEWHERE: dict[str, dict[str, Any]] = {
    "pairs with a KL": {"objective": {"name": "tdpo1"}},
    "a frozen copy, weighted": {
        "reference": {"kind": "frozen-copy"},
        "diffusion": {"timesteps": {"weighting": "min_snr"}, "noise_offset": 0.1},
    },
    "a teacher": {"objective": {"name": "self_npo"}, "diffusion": {"estimator": "truncated"}},
    "stored errors": {"reference": {"kind": "cached"}, "diffusion": {"num_draws": 2}},
}


@pytest.mark.parametrize(
    ("family", "name"),
    [
        pytest.param("sdxl", "pairs with a KL", marks=pytest.mark.slow),
        # Not sd3: a flow keeps nothing of an image at its last level, where a teacher starts.
        pytest.param("sdxl", "a teacher", marks=pytest.mark.slow),
        ("sd3", "a frozen copy, weighted"),
        ("sd3", "stored errors"),
        pytest.param("sdxl", "a frozen copy, weighted", marks=pytest.mark.slow),
        pytest.param("sdxl", "stored errors", marks=pytest.mark.slow),
        pytest.param("sd3", "pairs with a KL", marks=pytest.mark.slow),
    ],
)
def test_a_step_never_waits_for_the_device(
    name: str, family: str, data: Data, tmp_path: Path, request: pytest.FixtureRequest
) -> None:
    """On PyTorch's meta device, where a number cannot be read and other devices do not mix in."""
    from mmalign.core import Needs
    from mmalign.models.adapter import build_adapter, load_usable
    from mmalign.preflight.check import check_config

    sections = dict(ELSEWHERE[name])
    drawn = {"flip": True, "caption_dropout": 0.5, "cache": "on"}
    sections["diffusion"] = {**drawn, "resolution": 32, **sections.get("diffusion", {})}
    if sections["diffusion"].get("estimator") == "truncated":
        sections["diffusion"]["estimator"] = {"kind": "truncated", "num_steps": 3}
    pipeline = request.getfixturevalue(f"{family}_dir")
    if family == "sd3":
        sections["diffusion"] |= {"timesteps": {"kind": "logit_normal"}}
    config = configured(tmp_path, pipeline, data["pairs"], **sections)
    write_cache(config)
    objective = check_config(config)
    rows, _ = load_usable(config, objective.needs)
    adapter: Any = build_adapter(config, objective.needs)
    adapter.setup(rows)
    batch = adapter.collate(rows[:2], [3, 4])
    adapter.inputs.empty(torch.device("cpu"))  # embedded once a run
    adapter.to("meta")
    elsewhere = batch.to("meta")
    needs = objective.needs | Needs(reference=objective.needs.reference)
    logps = adapter(elsewhere, needs)
    assert {value.device.type for _, value in logps.tensors()} == {"meta"}
    objective.to("meta")(logps).value.backward()
    assert adapter.metrics(elsewhere, logps)
    gradients = [p.grad for p in adapter.parameters() if p.requires_grad]
    assert all(grad is not None and grad.device.type == "meta" for grad in gradients)


def test_encoders_are_let_go_where_their_output_is_cached(
    sd15_dir: Path, data: Data, tmp_path: Path
) -> None:
    from mmalign.models.adapter import build_adapter, load_usable
    from mmalign.preflight.check import check_config

    config = configured(tmp_path, sd15_dir, data["pairs"], diffusion={"cache": "on"})
    write_cache(config)
    needs = check_config(config).needs
    rows, _ = load_usable(config, needs)
    adapter: Any = build_adapter(config, needs)
    adapter.setup(rows)
    told = {"p": "a red dog"}
    first = DiffusionTools().write_samples(adapter, told, tmp_path, 0, config.sample)
    picture = (tmp_path / first[0]["image"]).read_bytes()
    assert "encoder" not in vars(adapter.inputs)
    again = DiffusionTools().write_samples(adapter, told, tmp_path, 1, config.sample)
    assert (tmp_path / again[0]["image"]).read_bytes() == picture
    assert "encoder" not in vars(adapter.inputs), "prompts to show are remembered"


# -- processes ----------------------------------------------------------------------------------


def environment() -> dict[str, str]:
    return {**os.environ, "OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": ""}


@pytest.mark.slow
@pytest.mark.parametrize("command", ["train", "cache"])
def test_ctrl_c_loses_nothing(
    command: str, digits_dir: Path, sd15_dir: Path, data: Data, small: Data, tmp_path: Path
) -> None:
    if command == "train":
        forever = {"num_steps": 100_000}
        path = write_config(
            tmp_path, digits_dir, small["pairs"], train=forever, diffusion={"resolution": 8}
        )
        sign = tmp_path / "run/metrics.jsonl"
    else:
        many = write_data(tmp_path / "many", "captioned", num=400, side=32)["captioned"]
        path = write_config(tmp_path, sd15_dir, many, objective={"name": "sft"})
        sign = tmp_path / "cache"
    process = subprocess.Popen(
        [sys.executable, "-m", "mmalign", command, str(path)],
        env=environment(),
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
    )
    deadline = time.monotonic() + 120
    while not sign.exists():
        assert process.poll() is None, process.stdout and process.stdout.read()
        assert time.monotonic() < deadline
        time.sleep(0.01)
    process.send_signal(signal.SIGINT)
    said, _ = process.communicate(timeout=60)
    assert process.returncode == 130, said
    assert "Traceback" not in said
    if command == "train":
        assert "saving after this step" in said
        assert "--resume" in said
        (saved,) = (tmp_path / "run").glob("checkpoint-*")
        assert (saved / "weights.safetensors").is_file()


@pytest.mark.slow
def test_two_processes_equal_one_with_the_double_batch(
    digits_dir: Path, small: Data, tmp_path: Path
) -> None:
    prompts = {"path": str(small["prompts"]), "layout": "prompts"}
    generated = {"kind": "truncated", "num_steps": 5, "generated": True}
    for name, rows, sections in (
        ("pairs", small["pairs"], {"data": {"eval": str(small["pairs"])}}),
        (
            "generated",
            prompts,
            {"objective": {"name": "self_npo"}, "diffusion": {"estimator": generated}},
        ),
    ):
        given: dict[str, Any] = dict(sections)
        given["diffusion"] = {"resolution": 8, "flip": True, **given.get("diffusion", {})}
        given["diffusion"]["flip"] = name == "pairs"
        one, two = tmp_path / name / "one", tmp_path / name / "two"
        sgd = {"num_steps": 3, "optimizer": "sgd", "lr": 1e-2, "accumulate": 2}
        train(configured(one, digits_dir, rows, **given, train={**sgd, "batch_size": 4}))
        path = write_config(two, digits_dir, rows, **given, train={**sgd, "batch_size": 2})
        run = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node=2"]
        done = subprocess.run(
            [*run, "-m", "mmalign", "train", str(path)],
            env=environment(),
            capture_output=True,
            text=True,
            timeout=300,
            check=False,
        )
        assert done.returncode == 0, done.stderr
        weights = [load_file(d / "run/checkpoint-3/weights.safetensors") for d in (one, two)]
        assert gap(*weights) < 1e-5
        np.testing.assert_allclose(logged(one), logged(two), rtol=1e-4)
        if name == "pairs":
            ends = [read_json(d / "run/eval.jsonl")[-1] for d in (one, two)]
            assert json.dumps([r["id"] for r in ends[0]["rows"]]) == json.dumps(
                [r["id"] for r in ends[1]["rows"]]
            )
            assert ends[0]["loss"] == pytest.approx(ends[1]["loss"], rel=1e-4)
