"""What people get wrong, through the command line: one message, exit status 1, no traceback."""

from __future__ import annotations

import io
import json
import logging
import re
import shutil
import struct
import zlib
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import pytest
import tiny_diffusion
import tiny_pictures
from picture_runs import Data, write_config, write_data
from typer.testing import CliRunner

from mmalign.cli import app

FIXED = {"name": "diffusion_dpo", "beta": 2000}


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Data:
    kinds = ("pairs", "rated", "captioned", "captioned_pairs", "scored_pairs", "prompts")
    return write_data(tmp_path_factory.mktemp("data"), *kinds)


@pytest.fixture(scope="module")
def llama(tmp_path_factory: pytest.TempPathFactory) -> Path:
    from tiny import make_model, make_tokenizer

    folder = tmp_path_factory.mktemp("llama")
    make_model("llama").save_pretrained(folder)
    make_tokenizer().save_pretrained(folder)
    return folder


@dataclass
class Done:
    """What a command said, warnings included, and its exit status."""

    output: str
    exit_code: int


def run(*arguments: object) -> Done:
    said = io.StringIO()
    handler = logging.StreamHandler(said)
    logger = logging.getLogger("mmalign")
    logger.addHandler(handler)
    try:
        result = CliRunner().invoke(app, [str(argument) for argument in arguments])
    finally:
        logger.removeHandler(handler)
    assert result.exception is None or isinstance(result.exception, SystemExit), result.exc_info
    return Done(said.getvalue() + result.output, result.exit_code)


def refused(command: str, config: Path, *options: object) -> str:
    """The message of a command that must refuse, before it has written anything."""
    result = run(command, config, *options)
    assert result.exit_code == 1, result.output
    assert not (config.parent / "run").exists(), "nothing may be written"
    messages = [line for line in result.output.splitlines() if re.match(r"\w+Error: ", line)]
    assert len(messages) == 1, result.output
    return messages[0].partition(": ")[2]


def changed(
    folder: Path, source: Path, change: Callable[[Path, list[dict[str, Any]]], None]
) -> Path:
    """A copy of a data set after `change`."""
    shutil.copytree(source.parent, folder, dirs_exist_ok=True)
    file = folder / source.name
    rows = [json.loads(line) for line in file.read_text(encoding="utf-8").splitlines()]
    change(folder, rows)
    file.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    return file


def with_json(folder: Path, source: Path, file: str, **settings: Any) -> Path:
    """A copy of a pipeline with other settings in one of its files."""
    shutil.copytree(source, folder)
    path = folder / file
    given = json.loads(path.read_text(encoding="utf-8"))
    path.write_text(json.dumps({**given, **settings}), encoding="utf-8")
    return folder


# -- settings that do not fit each other -------------------------------------------------------

SETTINGS: dict[str, tuple[dict[str, Any], str]] = {
    "another prediction": (
        {"diffusion": {"prediction": "v_prediction", "resolution": 32}},
        "diffusion.prediction is 'v_prediction', but the model's scheduler says 'epsilon'.*auto",
    ),
    "a LoRA that fits nothing": (
        {"model": {"lora": {"targets": ["q_proj"]}}},
        "model.lora.targets: 'q_proj' fits no module of UNet2DConditionModel; it has .*to_q",
    ),
    "dropout": (
        {"model": {"lora": {"dropout": 0.1}}},
        "model.lora.dropout is 0.1, but with dropout .* cannot be compared. Remove it",
    ),
    "half a latent": (
        {"diffusion": {"resolution": 30}},
        "diffusion.resolution.*30 x 30.*multiple of 8, the nearest are 24 and 32",
    ),
    "text options": (
        {"text": {"block_size": 5}, "model": {"attention": "eager"}},
        "text, model.attention are only read with modality: text or video .found diffusion.",
    ),
    "wpo": (
        {"objective": {**FIXED, "wpo": True}},
        "needs the probabilities of all tokens .wpo., but modality diffusion has none. Remove",
    ),
    "ld_alpha": (
        {"objective": {"name": "dpo", "ld_alpha": 0.5}},
        "objective.ld_alpha acts on the tokens of a response; an image has none. Remove it",
    ),
    "weights of tokens": (
        {"objective": {"name": "rrpo"}},
        "objective 'rrpo' needs a weight for every token, but modality diffusion has none",
    ),
    "a flow's method": (
        {"objective": {"name": "flow_dpo"}},
        "objective 'flow_dpo' is for flow models, but this one predicts epsilon. Use diffusion_dpo",
    ),
    "soft ties": (
        {"data": {"ties": "soft"}},
        "data.ties is soft.*'diffusion_dpo' does not read labels.*drop or half",
    ),
    "no reference": (
        {"reference": {"kind": "none"}},
        "objective 'diffusion_dpo' needs a reference model, but reference.kind is none",
    ),
    "weights of a mixture": (
        {"reference": {"kind": "mixture", "mixture": [{"weight": 0.5}]}},
        "reference.mixture has weights that sum to 0.5; they must sum to 1",
    ),
    "random crops from a cache": (
        {"diffusion": {"cache": "on", "crop": "random"}},
        "crop is random, but cached latents are of one crop; use crop: center or cache: off",
    ),
    "a cache that is not there": (
        {"diffusion": {"cache": "on", "caption_dropout": 0.5, "resolution": 32}},
        "lacks the embeddings of 5 of 5 captions.*mmalign cache CONFIG",
    ),
    "a size that cannot be painted": (
        {"diffusion": {"sampling": {"height": 30}, "resolution": 32}, "sample": {"num_prompts": 1}},
        "diffusion.sampling: images of 30 x 32 pixels.*multiple of 8",
    ),
    "time ids without SDXL": (
        {"diffusion": {"time_ids": "constant", "resolution": 32}},
        "time_ids is constant, but only SDXL is conditioned on sizes.*family sd. Remove it",
    ),
    "a negative model that is not there": (
        {"diffusion": {"sampling": {"negative": "nowhere"}}},
        "diffusion.sampling.negative is nowhere: there is no such file or folder",
    ),
    "dcpo without captions": (
        {"objective": {"name": "dcpo"}},
        "'dcpo' scores each image under its own caption, but 4 of 4 rows have one caption "
        ".*'row-0'.*prompt_chosen and prompt_rejected, or use diffusion_dpo",
    ),
    "another's scheme": (
        {"objective": {"name": "inpo"}},
        "objective 'inpo' scores at inverted images, but diffusion.estimator.kind is forward",
    ),
}


@pytest.mark.parametrize("name", SETTINGS)
def test_settings(name: str, sd15_dir: Path, data: Data, tmp_path: Path) -> None:
    sections, message = SETTINGS[name]
    config = write_config(tmp_path, sd15_dir, data["pairs"], **sections)
    assert re.search(message, refused("train", config)), refused("train", config)


# -- models -------------------------------------------------------------------------------------


def test_models_that_are_no_text_to_image_pipelines(
    sd15_dir: Path, sd3_dir: Path, data: Data, llama: Path, tmp_path: Path
) -> None:
    single = tmp_path / "model.safetensors"
    single.write_bytes(b"")
    inpainting = tmp_path / "inpainting"
    inpainting.mkdir()
    for name in ("model_index.json", "tokenizer", "scheduler", "unet", "vae", "text_encoder"):
        (inpainting / name).symlink_to(sd15_dir / name)
    (inpainting / "unet").unlink()
    config = json.loads((sd15_dir / "unet/config.json").read_text(encoding="utf-8"))
    (inpainting / "unet").mkdir()
    (inpainting / "unet/config.json").write_text(json.dumps({**config, "in_channels": 9}))
    odd = with_json(
        tmp_path / "odd", sd15_dir, "scheduler/scheduler_config.json", prediction_type="speed"
    )
    for path, message in {
        single: "is a single-file checkpoint.*from_single_file",
        inpainting: "is an inpainting model: its U-Net reads 9 channels.*text-to-image model",
        llama: r"is a model of transformers \(llama\).*modality: text",
        odd: "prediction_type 'speed'; known are noise tables",
        tmp_path / "nowhere": "nowhere: no such folder",
    }.items():
        config = write_config(tmp_path / "runs", path, data["pairs"])
        assert re.search(message, refused("train", config)), path
    config = write_config(
        tmp_path / "runs", sd3_dir, data["pairs"], diffusion={"prediction": "epsilon"}
    )
    assert "scheduler is one of flow matching; use auto or flow" in refused("train", config)


@pytest.mark.runs
def test_references_of_another_kind(
    sd15_dir: Path, sdxl_dir: Path, digits_dir: Path, llama: Path, data: Data, tmp_path: Path
) -> None:
    scheduler = "scheduler/scheduler_config.json"
    other = with_json(tmp_path / "v", sd15_dir, scheduler, prediction_type="v_prediction")
    table = with_json(tmp_path / "table", sd15_dir, scheduler, beta_end=0.02)
    for path, message in {
        sdxl_dir: "its family is sdxl, that of model.path .* is sd",
        digits_dir: "its in_channels is 1, that of model.path .* is 4",
        other: "predicts v_prediction, model.path .* epsilon.*cannot be compared",
        table: "has another noise table than model.path",
        llama: "is a model of transformers",
    }.items():
        reference = {"kind": "frozen-copy", "path": str(path)}
        config = write_config(tmp_path / "runs", sd15_dir, data["pairs"], reference=reference)
        assert re.search(message, refused("train", config)), path


@pytest.mark.runs
def test_half_precision_overflow_of_a_vae(sdxl_dir: Path, data: Data, tmp_path: Path) -> None:
    from safetensors.torch import load_file, save_file

    folder = tmp_path / "pipeline"
    shutil.copytree(sdxl_dir, folder)
    file = folder / "vae/diffusion_pytorch_model.safetensors"
    weights = load_file(file)
    weights["encoder.conv_in.weight"] *= 3e5
    save_file(weights, file, {"format": "pt"})
    config = write_config(
        tmp_path, folder, data["pairs"], diffusion={"vae_dtype": "float16", "resolution": 32}
    )
    assert "not finite while encoding" in refused("train", config)
    assert "float16" in refused("train", config)


@pytest.mark.runs
def test_time_ids_are_asked_for(sdxl_dir: Path, data: Data, tmp_path: Path) -> None:
    """A caller that leaves them out gets a sentence, and not diffusers' KeyError."""
    from mmalign import config as configs
    from mmalign.errors import NeedsError
    from mmalign.models.adapter import build_adapter, load_usable
    from mmalign.preflight.check import check_config

    config = configs.load(write_config(tmp_path, sdxl_dir, data["pairs"]))
    needs = check_config(config).needs
    rows, _ = load_usable(config, needs)
    adapter = build_adapter(config, needs)
    batch = adapter.collate(rows[:2])
    with pytest.raises(NeedsError, match="SDXL needs time ids"):
        adapter(replace(batch, inputs=replace(batch.inputs, time_ids=None)), needs)


# -- data ---------------------------------------------------------------------------------------


def test_data_of_another_kind(sd15_dir: Path, data: Data, llama: Path, tmp_path: Path) -> None:
    text = tmp_path / "text.jsonl"
    rows = [{"prompt": f"q{i}", "chosen": "good", "rejected": "bad"} for i in range(4)]
    text.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    runs = tmp_path / "runs"

    def message(model: Path, train: Path, **sections: Any) -> str:
        return refused("train", write_config(runs, model, train, **sections))

    assert "the responses are text, and diffusion needs images" in message(sd15_dir, text)
    said = message(sd15_dir, data["rated"])
    assert "needs pair rows" in said
    assert "diffusion_kto" in said
    assert "needs pair rows" in message(sd15_dir, data["captioned"])
    kto = {"objective": {"name": "diffusion_kto"}}
    assert "is not rated; add desirable" in message(sd15_dir, data["captioned"], **kto)
    assert "no layout has the columns prompt" in message(sd15_dir, data["prompts"])
    prompts = {"path": str(data["prompts"]), "layout": "prompts"}
    said = refused("train", write_config(runs, sd15_dir, prompts))
    assert "estimator: {kind: truncated, generated: true}" in said

    plain: dict[str, Any] = {"modality": "text", "diffusion": {}, "objective": {"name": "dpo"}}
    plain["model"] = {"lora": None}
    file = write_config(runs, llama, data["pairs"], **plain)
    given = json.loads(file.read_text(encoding="utf-8"))
    del given["diffusion"]
    file.write_text(json.dumps(given), encoding="utf-8")
    assert "text needs a string. A model of images" in refused("train", file)
    said = refused("train", file, f"model.path={sd15_dir}")
    assert "is a pipeline of diffusers; set modality: diffusion" in said
    said = refused("train", file, "diffusion.resolution=64", "diffusion.flip=true")
    assert "diffusion is only read with modality: diffusion (found text); remove it" in said


@pytest.mark.runs
def test_pictures_that_cannot_be_used(sd15_dir: Path, data: Data, tmp_path: Path) -> None:
    """Rows go as a whole, counted and named; the rest is trained on."""

    def spoil(folder: Path, rows: list[dict[str, Any]]) -> None:
        whole = (folder / "1-chosen.png").read_bytes()
        (folder / "0-chosen.png").write_bytes(b"GIF but not really")
        (folder / "1-chosen.png").write_bytes(whole[: len(whole) // 2])
        rows += [dict(rows[0], id=f"row-{i}", prompt=f"more {i}") for i in (4, 5, 6)]
        tiny_pictures.picture(folder, "wide.png", size=(32, 80))
        tiny_pictures.picture(folder, "larger.png", size=(40, 48))
        (folder / "bomb.png").write_bytes(bomb())
        rows[4] |= {"image_chosen": "wide.png"}
        rows[5] |= {"image_chosen": "larger.png"}  # other sizes are no fault
        rows[6] |= {"image_chosen": "bomb.png"}

    file = changed(tmp_path / "spoiled", data["pairs"], spoil)
    result = run("train", write_config(tmp_path, sd15_dir, file), "--dry-run")
    assert result.exit_code == 0, result.output
    for part in (
        "of 7 rows: 3 rows with an image that cannot be decoded are left out: row-0: ",
        "0-chosen.png: is not an image of JPEG, PNG",
        "row-1: ",
        "1-chosen.png: cannot be decoded",
        "bomb.png: is too large",
        "1 rows with aspect ratios more than 2 to 1 apart are left out: row-4 (80 x 32 and 32 x",
        "3 to train on",
    ):
        assert part in result.output, part
    checked = run("data", "check", file)
    assert checked.exit_code == 1
    assert "problems in 3 of 7 records" in checked.output
    assert "differ in aspect ratio by more than 2 to 1: not trained on" in checked.output
    assert "80 x 32 and 32 x 32" in checked.output
    cached = run("cache", write_config(tmp_path, sd15_dir, file))
    assert cached.exit_code == 0, cached.output
    assert "latents: 6 written" in cached.output

    def ruin(folder: Path, rows: list[dict[str, Any]]) -> None:
        for row in rows:
            (folder / row["image_rejected"]).write_bytes(b"nothing")

    file = changed(tmp_path / "ruined", data["pairs"], ruin)
    config = write_config(tmp_path / "other", sd15_dir, file)
    assert "none of 4 rows can be used. 4 rows with an image" in refused("train", config)
    assert "none of 4 rows can be used" in refused("cache", config)


def bomb() -> bytes:
    """A png of a few bytes that says it has 3.6 thousand million pixels."""

    def chunk(kind: bytes, content: bytes) -> bytes:
        check = zlib.crc32(kind + content)
        return struct.pack(">I", len(content)) + kind + content + struct.pack(">I", check)

    head = struct.pack(">IIBBBBB", 60_000, 60_000, 8, 2, 0, 0, 0)
    body = chunk(b"IHDR", head) + chunk(b"IDAT", zlib.compress(b"\0")) + chunk(b"IEND", b"")
    return b"\x89PNG\r\n\x1a\n" + body


def test_pictures_that_are_not_there(sd15_dir: Path, data: Data, tmp_path: Path) -> None:
    def lose(folder: Path, rows: list[dict[str, Any]]) -> None:
        (folder / "0-chosen.png").unlink()
        rows[1]["image_rejected"] = "../../../../etc/hostname"

    file = changed(tmp_path / "lost", data["pairs"], lose)
    config = write_config(tmp_path, sd15_dir, file)
    said = refused("train", config)
    assert "data.jsonl:1 (id 'row-0'): image_chosen must name an image file that is there" in said
    assert "must stay inside" in said
    assert "data.bad_rows: drop leaves them out" in said
    result = run("train", config, "data.bad_rows=drop", "--dry-run")
    assert result.exit_code == 0
    assert "2 of 4 records have problems and are left out" in result.output
    assert "2 to train on" in result.output


@pytest.mark.runs
def test_captions_longer_than_the_model_reads(sd15_dir: Path, data: Data, tmp_path: Path) -> None:
    def lengthen(folder: Path, rows: list[dict[str, Any]]) -> None:
        rows[0]["prompt"] = "cat " * 100

    file = changed(tmp_path / "long", data["pairs"], lengthen)
    config = write_config(tmp_path, sd15_dir, file)
    found = "1 of 4 rows have a caption of more than 77 tokens ('row-0')"
    for choice, note, rows in (
        ("drop", ": left out; diffusion.long_captions: truncate keeps them", 3),
        ("truncate", ": the rest of it is not read", 4),
    ):
        result = run("train", config, f"diffusion.long_captions={choice}", "--dry-run")
        assert result.exit_code == 0, result.output
        assert found + note in result.output
        assert f"{rows} to train on" in result.output
    said = refused("train", config, "diffusion.long_captions=stop")
    assert said.startswith(found)
    assert "Shorten them, or use drop or truncate" in said

    def lengthen_all(folder: Path, rows: list[dict[str, Any]]) -> None:
        for row in rows:
            row["prompt"] = "cat " * 100

    file = changed(tmp_path / "all", data["pairs"], lengthen_all)
    said = refused("train", write_config(tmp_path, sd15_dir, file))
    assert "4 of 4 rows have a caption of more than 77 tokens" in said
    assert "no row is left" in said


@pytest.mark.runs
def test_ties_are_never_wins(sd15_dir: Path, data: Data, tmp_path: Path) -> None:
    def tie(folder: Path, rows: list[dict[str, Any]]) -> None:
        for row in rows[:2]:
            row["p_chosen"] = 0.5
        for row in rows[2:]:
            row["p_chosen"] = 1.0

    file = changed(tmp_path / "ties", data["pairs"], tie)
    config = write_config(tmp_path, sd15_dir, file)
    result = run("train", config, "--dry-run")
    assert "2 of 4 rows are ties and are left out" in result.output
    assert "2 to train on" in result.output
    result = run("train", config, "data.ties=half", "train.batch_size=6", "--dry-run")
    assert "6 to train on" in result.output
    smpo = {"objective": {"name": "smpo"}, "data": {"ties": "soft"}}
    result = run("train", write_config(tmp_path, sd15_dir, file, **smpo), "--dry-run")
    assert result.exit_code == 0, result.output
    assert "4 to train on" in result.output

    def tie_all(folder: Path, rows: list[dict[str, Any]]) -> None:
        for row in rows:
            row["p_chosen"] = 0.5

    file = changed(tmp_path / "all", data["pairs"], tie_all)
    said = refused("train", write_config(tmp_path, sd15_dir, file))
    assert "no row is left to train on" in said
    assert "see data.ties" in said


@pytest.mark.runs
def test_what_is_ignored_is_said(sd15_dir: Path, data: Data, tmp_path: Path) -> None:
    both = [str(data["pairs"]), str(data["captioned_pairs"])]
    config = write_config(tmp_path, sd15_dir, both, objective={"name": "dcpo"})
    result = run("train", config, "--dry-run")
    assert result.exit_code == 0, result.output
    said = "4 of 8 rows have one caption for both images ('row-0', 'row-1', 'row-2', 'row-3')"
    assert said in result.output
    result = run("train", write_config(tmp_path, sd15_dir, data["captioned_pairs"]), "--dry-run")
    assert "4 of 4 rows have a caption for each image" in result.output
    generated = {"estimator": {"kind": "truncated", "generated": True}, "resolution": 32}
    config = write_config(
        tmp_path, sd15_dir, data["pairs"], objective={"name": "self_npo"}, diffusion=generated
    )
    result = run("train", config, "--dry-run")
    assert result.exit_code == 0, result.output
    assert "the images of 4 of 4 rows are not used" in result.output


# -- other commands -----------------------------------------------------------------------------


def test_evaluating_what_is_not_there(sd15_dir: Path, data: Data, tmp_path: Path) -> None:
    config = write_config(tmp_path, sd15_dir, data["pairs"])
    assert "has neither a complete checkpoint nor final/" in refused("eval", config)
    said = refused("eval", config, "--checkpoint", tmp_path / "nowhere")
    assert "nowhere: there is no such folder" in said
    weights = tmp_path / "weights"
    tiny_diffusion.make_digits_like(weights)
    said = refused("eval", config, "--checkpoint", weights, "--data", data["pairs"])
    assert str(weights) in said


def test_caches_of_what_has_none(sd15_dir: Path, data: Data, tmp_path: Path) -> None:
    cached = {"reference": {"kind": "cached"}, "objective": {"name": "inpo"}}
    inverted = {"estimator": {"kind": "ddim_inversion"}, "resolution": 32}
    config = write_config(tmp_path, sd15_dir, data["pairs"], **cached, diffusion=inverted)
    for command in ("train", "cache"):
        assert "reference.kind is cached, which needs noised samples that do not" in refused(
            command, config
        )
    config = write_config(tmp_path, sd15_dir, data["pairs"], reference={"kind": "cached"})
    assert "lacks the reference errors of 4 of 4 rows" in refused("train", config)
