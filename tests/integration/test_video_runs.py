"""Whole runs on tiny video models: trained, resumed, cached, and the files that come out."""

from __future__ import annotations

import json
import logging
import math
import os
import re
import shutil
import subprocess
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pytest
import torch
from media_files import cut
from safetensors.torch import load_file
from typer.testing import CliRunner
from video_runs import configured, row, shrunk, write_config, write_rows

from mmalign import config as configs
from mmalign.cli import app
from mmalign.errors import ConfigError
from mmalign.inference import evaluate_checkpoint, write_cache
from mmalign.train.loop import train
from mmalign.train.metrics import read_json
from mmalign.train.run import Run

if TYPE_CHECKING:
    from collections.abc import Callable

    Models = Callable[[str], Path]

pytestmark = pytest.mark.runs

CONFIGS = Path(__file__).resolve().parents[2] / "configs"
KIND = "qwen2_5_vl"
LONGER = {"num_steps": 10, "lr": 3e-2, "save_every": 5, "eval_every": 5}


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory, clips_dir: Path) -> dict[str, Any]:
    """Eight pairs to train on and three to evaluate on; the clips lie beside the tests' others."""
    folder = tmp_path_factory.mktemp("rows")
    train_rows = write_rows(folder / "train.jsonl", [row(i) for i in range(8)])
    held_out = write_rows(folder / "eval.jsonl", [row(i) for i in (20, 25, 31)])
    plain = write_rows(folder / "plain.jsonl", [row(i, "plain") for i in range(8)])
    return {
        name: {"path": str(path), "pictures": str(clips_dir)}
        for name, path in {"train": train_rows, "eval": held_out, "plain": plain}.items()
    }


def run(*arguments: object) -> str:
    result = CliRunner().invoke(app, [str(argument) for argument in arguments])
    assert result.exit_code == 0, result.output
    return result.output


def test_a_run_learns_and_its_weights_work_without_this_package(
    video_models: Models, clips_dir: Path, data: dict[str, Any], tmp_path: Path
) -> None:
    held_out = {"data": {"eval": data["eval"]}, "sample": {"num_prompts": 2}}
    model = video_models(KIND)
    path = write_config(tmp_path, model, data["train"], train=LONGER, **held_out)
    said = run("train", path)
    folder = tmp_path / "run"
    assert f"weights: {folder / 'final'}" in said

    steps = [line for line in read_json(folder / "metrics.jsonl") if "loss" in line]
    assert steps[0]["loss"] == pytest.approx(math.log(2), abs=1e-5)
    assert steps[-1]["loss"] < 0.5
    assert steps[-1]["rewards/margins"] > 1.0
    evaluations = read_json(folder / "eval.jsonl")
    assert [line["step"] for line in evaluations] == [0, 5, 10]
    samples = [line for line in read_json(folder / "samples.jsonl") if line["step"] == 10]
    assert [line["media"][0]["file"] for line in samples] == ["clip0.mp4", "clip1.mp4"]
    assert all((folder / line["frames"]).is_file() for line in samples)

    assert "reward_accuracy" in run("eval", path)
    final = evaluate_checkpoint(configs.load(path), folder / "final").metrics
    for name in ("loss", "reward_accuracy", "log_ratio_margin", "kl"):
        assert final[name] == pytest.approx(evaluations[-1][name], rel=1e-4, abs=1e-6), name

    prompts = write_rows(
        clips_dir / "questions.jsonl",
        [
            {"prompt": "What does the cat do?", "video": "clip0.mp4", "chosen": "not read"},
            {"prompt": "And in <video>?", "videos": [{"path": "clip1.mp4", "end": 1.0}]},
            {"prompt": [{"role": "user", "content": "Which cat?"}]},
        ],
    )
    shown = run("sample", path, "--prompts", prompts)
    assert "> What does the cat do?  [clip0.mp4]\n" in shown
    assert "> Which cat?\n" in shown
    out = tmp_path / "answers.jsonl"
    run("sample", "--run", folder, "--prompts", prompts, "--out", out, "--base")
    answers = [json.loads(line) for line in out.read_text(encoding="utf-8").splitlines()]
    assert [len(answer.get("media", ())) for answer in answers] == [1, 1, 0]
    assert shown != "".join(
        f"> {answer['prompt']}\n{answer['response']}\n\n" for answer in answers
    ), "trained weights answer in another way"


@pytest.mark.parametrize(
    "kind",
    [
        KIND,
        pytest.param("llava_onevision", marks=pytest.mark.slow),
        pytest.param("qwen2_5_omni_thinker", marks=pytest.mark.slow),
    ],
)
def test_final_weights_give_the_runs_log_probabilities_by_plain_libraries(
    kind: str, video_models: Models, clips_dir: Path, data: dict[str, Any], tmp_path: Path
) -> None:
    """Through transformers and peft alone, with the processor of final/ and a prompt of its own."""
    from peft import PeftModel
    from transformers import AutoModelForImageTextToText, AutoProcessor

    from mmalign.core import Needs
    from mmalign.inference import restore
    from mmalign.models.adapter import build_adapter, load_usable

    short = {"num_steps": 3, "lr": 3e-2}
    config = configured(tmp_path, video_models(kind), data["train"], train=short)
    train(config)
    final = config.output / "final"

    needs = Needs(reference=True, rows="pair")
    rows, _ = load_usable(config, needs)
    adapter: Any = build_adapter(config, needs).eval()
    restore(adapter, final)
    with torch.no_grad():
        ours = adapter(adapter.collate(rows[:1]), needs).policy.sum(-1)[0]  # [2]

    processor = AutoProcessor.from_pretrained(final)
    base = AutoModelForImageTextToText.from_pretrained(video_models(kind))
    model = PeftModel.from_pretrained(base, str(final)).eval()
    shown = adapter.encoder.reader.decode(rows[0].media)
    frames, wave = shown.clips[0]
    pixels = torch.from_numpy(frames.pixels.copy())
    metadata = {
        "fps": frames.rate or frames.source_fps,
        "frames_indices": list(frames.indices),
        "total_num_frames": frames.num_source,
    }
    options: dict[str, Any] = {"videos": [pixels], "return_tensors": "pt"}
    options["videos_kwargs"] = {
        "do_sample_frames": False,
        "fps": frames.fps,
        "video_metadata": [metadata],
    }
    if "longest_edge" in dict(processor.video_processor.size or {}):
        options["videos_kwargs"]["size"] = dict(processor.video_processor.size)
    if wave is not None:
        options |= {"load_audio_from_video": True, "audio": [wave.samples]}
        options |= {"audio_from_video_indices": [0], "audio_kwargs": {"sampling_rate": 16_000}}
    turn = {
        "role": "user",
        "content": [{"type": "video"}, {"type": "text", "text": rows[0].prompt}],
    }
    text = processor.apply_chat_template([turn], add_generation_prompt=True)
    theirs: list[float] = []
    for candidate in rows[0].candidates:
        whole = processor(text=[f"{text}{candidate.response}<|im_end|>"], **options)
        before = processor(text=[text], **options)["input_ids"].shape[1]
        played = {"use_audio_in_video": True} if wave is not None else {}
        with torch.no_grad():
            logps = model(**whole, **played).logits[0].log_softmax(-1)
        ids = whole["input_ids"][0]
        taken = logps[before - 1 : -1].gather(1, ids[before:, None])
        theirs.append(float(taken.sum()))
    assert ours.tolist() == pytest.approx(theirs, rel=1e-4)


@pytest.mark.slow
@pytest.mark.parametrize("parts", [["language"], []], ids=["with LoRA", "alone"])
def test_final_clues_evaluate_as_the_run_did(
    parts: list[str], video_models: Models, data: dict[str, Any], tmp_path: Path
) -> None:
    clues = {"width": 64, "num_queries": 4, "num_layers": 2, "residual": True}
    sections = {"video": {"train": parts, "clues": clues}, "data": {"eval": data["eval"]}}
    sections |= {"train": {"lr": 1e-2}, "model": {"lora": {"rank": 2} if parts else None}}
    config = configured(tmp_path, video_models("qwen2_5_omni_thinker"), data["train"], **sections)
    train(config)
    found = evaluate_checkpoint(config, config.output / "final").metrics
    before, logged = read_json(config.output / "eval.jsonl")
    assert logged["loss"] < before["loss"] - 1e-3
    for name in ("loss", "log_ratio_margin"):
        assert found[name] == pytest.approx(logged[name], rel=1e-5), name


PAMI: dict[str, Any] = {
    "objective": {"name": "pami_vdpo"},
    "video": {
        "num_frames": 4,
        "corruption": {"operations": ["reverse", "shuffle", "crop", "gaussian_noise"]},
        "selection": {"num_candidates": 3, "mode": "soft", "tau_close": 0.2, "tau_start": 0.9},
    },
}


@pytest.mark.parametrize(
    ("rows", "sections"),
    [
        pytest.param("train", {"objective": {"name": "mdpo"}}, marks=pytest.mark.slow),
        ("plain", PAMI),
        pytest.param(
            "train",
            {"video": {"clues": {"width": 64, "num_queries": 4, "num_layers": 2}}},
            marks=pytest.mark.slow,
        ),
    ],
    ids=["mdpo", "pami_vdpo", "clues"],
)
def test_a_resumed_run_ends_with_the_same_bits(
    rows: str,
    sections: dict[str, Any],
    video_models: Models,
    data: dict[str, Any],
    tmp_path: Path,
) -> None:
    steps = {"train": {"num_steps": 2, "save_every": 1, "lr": 1e-2}}
    config = configured(tmp_path, video_models(KIND), data[rows], **steps, **sections)
    train(config)
    broken = config.model_copy(update={"output": tmp_path / "broken"})
    shutil.copytree(config.output, broken.output)
    shutil.rmtree(broken.output / "checkpoint-2")
    shutil.rmtree(broken.output / "final")
    result = train(broken, resume=True)
    assert result.steps == 2
    for name in ("checkpoint-2/weights.safetensors", "final/adapter_model.safetensors"):
        ours, theirs = load_file(broken.output / name), load_file(config.output / name)
        assert ours.keys() == theirs.keys()
        assert all(torch.equal(ours[key], theirs[key]) for key in ours), name
    kept = ("loss", "grad_norm", "rewards/margins")
    whole, resumed = (
        [
            {key: line[key] for key in kept if key in line}
            for line in read_json(folder / "metrics.jsonl")
        ]
        for folder in (config.output, broken.output)
    )
    assert resumed == whole


@pytest.mark.parametrize("objective", [pytest.param("dpo", marks=pytest.mark.slow), "tdpo2"])
def test_a_run_from_caches_never_runs_a_tower_and_is_the_live_one(
    objective: str,
    video_models: Models,
    data: dict[str, Any],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    sections = {"data": {"eval": data["eval"]}, "objective": {"name": objective}}
    path = write_config(tmp_path, video_models(KIND), data["train"], **sections)
    live = configs.load(path, [f"output={tmp_path / 'elsewhere' / 'live'}"])
    cached = configs.load(path, ["reference.kind=cached"])
    with pytest.raises(ConfigError, match="mmalign cache CONFIG"):
        train(cached)
    train(live)
    said = write_cache(cached)
    assert "features of 4 media written, 0 were there" in said
    assert "11 rows written" in said
    assert "features of 0 media written, 4 were there" in write_cache(cached)

    from mmalign.video import contexts

    def refuse(*_: Any, **__: Any) -> Any:
        raise AssertionError("encoded")

    monkeypatch.setattr(contexts, "encode", refuse)
    train(cached)
    ours, theirs = (
        load_file(config.output / "final/adapter_model.safetensors") for config in (cached, live)
    )
    for name in theirs:
        torch.testing.assert_close(ours[name], theirs[name], rtol=1e-3, atol=1e-6)


@pytest.mark.slow
@pytest.mark.parametrize("mode", ["fresh", "cached"])
def test_parts_of_bounded_tokens_train_as_the_whole_batch(
    mode: str,
    tmp_path: Path,
    video_models: Models,
    data: dict[str, Any],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Clips and their tokens go with their rows; cached, so do the reference's scores."""
    parts_of = Run.parts

    def counted(passes: list[int]) -> Callable[..., list[Any]]:
        def parts(run: Run, batch: Any) -> list[Any]:
            found = parts_of(run, batch)
            passes.append(len(found))
            return found

        return parts

    common = {"video": {"num_frames": 4, "frame_pixels": 3136}}
    if mode == "cached":
        common["reference"] = {"kind": "cached"}
    found = []
    for name, bound in (("whole", None), ("parts", 120)):
        given = {"batch_size": 4, "num_steps": 3, "optimizer": "sgd", "lr": 1.0}
        config = configured(
            tmp_path / name, video_models(KIND), data["train"], **common,
            train={**given, "tokens_per_batch": bound},
        )  # fmt: skip
        if mode == "cached":
            write_cache(config)
        passes: list[int] = []
        monkeypatch.setattr(Run, "parts", counted(passes))
        train(config)
        assert min(passes) > 1 if bound else max(passes) == 1
        lines = read_json(config.output / "metrics.jsonl")
        weights = load_file(config.output / "final/adapter_model.safetensors")
        found.append(([line["loss"] for line in lines], weights))
    (whole, weights), (parts, others) = found
    assert parts == pytest.approx(whole, rel=1e-4)
    for key, value in weights.items():
        torch.testing.assert_close(others[key], value, rtol=1e-3, atol=1e-5)


def test_worker_processes_give_the_same_run(
    video_models: Models, data: dict[str, Any], tmp_path: Path
) -> None:
    model = video_models(KIND)
    config = configured(tmp_path, model, data["train"], objective={"name": "mdpo"})
    train(config)
    workers = configs.load(
        tmp_path / "config.json", ["data.num_workers=2", f"output={tmp_path / 'workers'}"]
    )
    train(workers)
    name = "final/adapter_model.safetensors"
    ours, theirs = load_file(workers.output / name), load_file(config.output / name)
    assert all(torch.equal(ours[key], theirs[key]) for key in theirs)


def test_a_folder_with_broken_clips_trains_to_the_end(
    video_models: Models,
    clips_dir: Path,
    tmp_path: Path,
    caplog: pytest.LogCaptureFixture,
) -> None:
    """40 clips, a tenth of them broken, each in a way of its own; two questions about each."""
    folder = tmp_path / "clips"
    folder.mkdir()
    for number in range(40):
        shutil.copy(clips_dir / f"clip{number % 4}.mp4", folder / f"{number:02d}.mp4")
    cut(clips_dir / "clip0.mp4", folder / "11.mp4", 0.6)
    (folder / "23.mp4").write_bytes(b"")
    (folder / "37.mp4").write_text("this is a text and no clip\n" * 50)
    write_sound_alone(folder / "32.mp4")
    records = [
        row(i, "plain") | {"id": f"{clip:02d}-{i}", "video": f"{clip:02d}.mp4"}
        for clip in range(40)
        for i in range(2)
    ]
    data = write_rows(folder / "rows.jsonl", records)
    fast = {"num_steps": None, "num_epochs": 1, "batch_size": 16}
    sections = {"video": {"num_frames": 2}, "objective": {"name": "sft"}, "train": fast}
    sections["data"] = {"eval_fraction": 0.2}
    with caplog.at_level(logging.WARNING, "mmalign"):
        result = train(configured(tmp_path, video_models(KIND), data, **sections))
    assert result.final_dir is not None
    for name, fault in {
        "11.mp4": "broken or cut off",
        "23.mp4": "the file is empty",
        "37.mp4": "of no format that is read",
        "32.mp4": "has no video stream",
    }.items():
        named = [message for message in caplog.messages if name in message]
        assert len(named) == 1, named
        assert fault in named[0]
    counted = [message for message in caplog.messages if "left out" in message]
    assert counted == ["8 of 80 rows are left out for the 4 of 40 media files named above"]
    held_out = [line["id"] for line in read_json(result.run_dir / "eval.jsonl")[-1]["rows"]]
    assert held_out
    assert not {name for name in held_out if name[:2] in ("11", "23", "37", "32")}
    assert result.steps == -(-(72 - len(held_out)) // 16)


def write_sound_alone(path: Path) -> None:
    """A track without images, in a container for both."""
    from fractions import Fraction

    import av
    import numpy as np

    with av.open(path, "w") as container:
        stream: Any = container.add_stream("aac", rate=16_000, layout="mono")
        wave = 0.1 * np.sin(np.arange(16_000) / 8, dtype=np.float32)[None]
        block = av.AudioFrame.from_ndarray(wave, format="fltp", layout="mono")
        block.sample_rate, block.pts, block.time_base = 16_000, 0, Fraction(1, 16_000)
        container.mux(stream.encode(block))
        container.mux(stream.encode())


@pytest.mark.slow
@pytest.mark.parametrize(
    ("name", "kind"),
    [
        ("rrpo_qwen25vl", "qwen2_5_vl"),
        ("rrpo_qwen25vl", "qwen2_5_omni_thinker"),
        ("adpo_qwen25omni", "qwen2_5_omni_thinker"),
        ("pami_vdpo_llavaov", "llava_onevision"),
        ("pami_vdpo_llavaov", "qwen2_5_vl"),
        ("pami_vdpo_llavaov", "qwen2_5_omni_thinker"),
        ("mdpo_qwen25vl", "qwen2_5_vl"),
        ("mdpo_qwen25vl", "qwen2_5_omni_thinker"),
        ("tdpo2_qwen25vl", "qwen2_5_vl"),
        ("tdpo2_qwen25vl", "qwen2_5_omni_thinker"),
    ],
)
def test_configs_train_on_real_clips_with_sound(
    name: str,
    kind: str,
    video_models: Models,
    shared_data: Path,
    tmp_path: Path,
    caplog: pytest.LogCaptureFixture,
) -> None:
    """27 pairs about five files; one is sound alone, one has a track of silence."""
    folder = shared_data / "video"
    model = video_models(kind)
    config = shrunk(CONFIGS / f"{name}.yaml", model, folder / "av_pairs.jsonl", folder, tmp_path)
    steps = {"num_steps": 4, "batch_size": 2, "accumulate": 1, "lr": 1e-2, "eval_batch_size": 4}
    held_out = config.data.model_copy(update={"eval_fraction": 0.2})
    config = config.model_copy(
        update={"train": config.train.model_copy(update=steps), "data": held_out}
    )
    if config.reference.kind == "cached":
        write_cache(config)
        caplog.clear()
    with caplog.at_level(logging.WARNING, "mmalign"):
        result = train(config)
    hears = "omni" in kind
    said = [m for m in caplog.messages if "which" in m and "does not take" in m]
    assert len(said) == (0 if hears else 1), caplog.messages
    if not hears:
        assert re.search(r"2 of \d+ rows have audio", said[0]), said
    lines = read_json(result.run_dir / "metrics.jsonl")
    losses = [line["loss"] for line in lines if "loss" in line]
    assert len(losses) == 4
    assert all(map(math.isfinite, losses))
    assert all(line["grad_norm"] > 0 for line in lines if "grad_norm" in line)
    weights = load_file(result.run_dir / "final/adapter_model.safetensors")
    assert max(w.abs().max() for key, w in weights.items() if "lora_B" in key) > 0
    evaluations = read_json(result.run_dir / "eval.jsonl")
    assert [line["step"] for line in evaluations] == [0, 4]
    assert evaluations[0]["loss"] != evaluations[1]["loss"]
    assert math.isfinite(evaluations[1]["loss"])
    samples = [line for line in read_json(result.run_dir / "samples.jsonl") if line["step"] == 4]
    assert all(isinstance(line["response"], str) for line in samples)
    rows = len(evaluations[-1]["rows"])
    assert rows > 0


@pytest.mark.slow
def test_two_processes_train_as_one_with_the_double_batch(
    video_models: Models, clips_dir: Path, tmp_path: Path
) -> None:
    folder = tmp_path / "clips"
    folder.mkdir()
    for number in range(4):
        shutil.copy(clips_dir / f"clip{number}.mp4", folder)
    (folder / "broken.mp4").write_bytes(b"")
    records = [row(i) for i in range(8)]
    data = write_rows(folder / "rows.jsonl", [*records, row(8) | {"video": "broken.mp4"}])
    steps = {"num_steps": 2, "lr": 1e-2, "optimizer": "sgd"}
    model = {"dtype": "float64", "lora": {"rank": 2, "alpha": 4}}
    one, two = (
        write_config(
            tmp_path / name, video_models(KIND), data, model=model,
            train={**steps, "batch_size": size}, objective={"name": "mdpo"},
        )
        for name, size in (("one", 4), ("two", 2))
    )  # fmt: skip
    train(configs.load(one))
    done = subprocess.run(
        [
            *(sys.executable, "-m", "torch.distributed.run", "--standalone"),
            *("--nproc_per_node=2", "-m", "mmalign", "train", str(two)),
        ],
        env={**os.environ, "OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": ""},
        capture_output=True, text=True, timeout=300, check=False,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    assert done.stderr.count("broken.mp4") == 1, done.stderr
    assert "1 of 9 rows are left out" in done.stderr
    checked = (two.parent / "cache" / "media_checks.jsonl").read_text().splitlines()
    assert len(checked) == 5, "one process decodes"
    ours, theirs = (
        load_file(path.parent / "run/final/adapter_model.safetensors") for path in (two, one)
    )
    for name, expected in theirs.items():
        torch.testing.assert_close(ours[name], expected, rtol=1e-5, atol=1e-9)
