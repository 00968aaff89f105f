"""Caches give what the networks would give, are missed when anything changes, and are planned."""

from __future__ import annotations

import hashlib
import logging
import math
import os
import pickle
import re
import shutil
from collections import Counter
from typing import TYPE_CHECKING, Any

import pytest
import tiny_pictures
import torch
from cache_entries import entries
from tiny_diffusion import make_sd3

from mmalign.config import ReferenceConfig, RunConfig
from mmalign.core import Needs
from mmalign.data.jobs import duration
from mmalign.diffusion import cache_plan, components, tools
from mmalign.diffusion import pictures as notes
from mmalign.diffusion.adapter import DiffusionAdapter
from mmalign.diffusion.cache import ErrorCache, LatentCache, PromptCache
from mmalign.diffusion.cache_plan import Processes, ahead, progress
from mmalign.diffusion.conditioning import PromptEncoder
from mmalign.diffusion.families import Condition
from mmalign.diffusion.pictures import prepare, row_pictures
from mmalign.diffusion.tools import DiffusionTools
from mmalign.errors import ConfigError
from mmalign.inference import plan_cache
from mmalign.inference import write_cache as write
from mmalign.models.adapter import build_adapter, load_usable
from mmalign.preflight.check import check_config as check

if TYPE_CHECKING:
    from pathlib import Path

    from mmalign.data.example import Example


def configured(pipeline: Path, tmp_path: Path, *, num: int = 3, **sections: Any) -> RunConfig:
    """A run on pairs of images, one of them wide."""
    data = tmp_path / "data"
    if not data.exists():
        tiny_pictures.pairs(data, num)
        for seed, side in enumerate(("chosen", "rejected")):
            tiny_pictures.picture(data, f"0-{side}.png", size=(33, 66), seed=seed)
    given: dict[str, Any] = {
        "modality": "diffusion",
        "model": {"path": str(pipeline)},
        "data": {"train": str(data / "data.jsonl")},
        "objective": {"name": "diffusion_dpo"},
        "train": {"batch_size": 2, "num_threads": 1},
        "diffusion": {"resolution": 32, "num_draws": 3},
        "output": str(tmp_path / "run"),
    }
    for name, section in sections.items():
        given[name] = given.get(name, {}) | section if isinstance(section, dict) else section
    if given.get("reference", {}).get("kind") != "cached":  # it alone stores draws
        given["diffusion"].pop("num_draws", None)
    return RunConfig.model_validate(given)


def rows_of(config: RunConfig) -> list[Example]:
    return load_usable(config, check(config).needs)[0]


def refuse(*_: Any, **__: Any) -> None:
    raise AssertionError("it was loaded, and is not needed")


@pytest.mark.parametrize("family", ["sdxl", pytest.param("sd3", marks=pytest.mark.slow)])
def test_cached_latents_are_those_of_the_vae(
    family: str, request: pytest.FixtureRequest, tmp_path: Path
) -> None:
    """In float16, for an image as it is and mirrored, with the frame of SDXL's time ids."""
    pipeline = request.getfixturevalue(f"{family}_dir")
    buckets = {"flip": True, "buckets": True, "bucket_multiple": 8, "num_draws": 3}
    config = configured(pipeline, tmp_path, diffusion={"resolution": 32, **buckets})
    write(config)
    rows, cache = rows_of(config), LatentCache(config)
    vae = components.load_vae(str(pipeline), config.diffusion)
    shapes = set()
    for row in rows:
        done = prepare(row_pictures(row), config.diffusion, None)
        for flip in (False, True):
            mean, std, frames = cache.get(row, flip)
            pixels = torch.stack([torch.from_numpy(array) for array, _ in done])
            expected = vae.encode(pixels.flip(-1) if flip else pixels)
            assert std is not None
            assert mean.dtype == std.dtype == torch.float16
            for found, values in ((mean, expected[0]), (std, expected[1])):
                torch.testing.assert_close(found.float(), values, rtol=1e-3, atol=1e-5)
            assert frames == [frame for _, frame in done]
        shapes.add(tuple(mean.shape))
    assert len(shapes) == 2  # both images of a row in one shape


@pytest.mark.parametrize(
    ("family", "dtype"),
    [
        ("sd15", "float64"),
        ("sdxl", "bfloat16"),
        pytest.param("sd3", "float32", marks=pytest.mark.slow),
    ],
)
def test_cached_prompts_are_those_of_the_encoders(
    family: str, dtype: str, request: pytest.FixtureRequest, tmp_path: Path
) -> None:
    pipeline = request.getfixturevalue(f"{family}_dir")
    config = configured(
        pipeline, tmp_path, model={"dtype": dtype}, sample={"prompts": ["a dog, for show"]}
    )
    write(config)
    captions = ["", tiny_pictures.caption(0), "a dog, for show", tiny_pictures.caption(0)]
    found = PromptCache(config).get(captions)
    encoder = PromptEncoder(str(pipeline), getattr(torch, dtype))
    parts = [encoder.encode([caption]) for caption in captions]
    expected = Condition.cat(parts)
    assert found.keys() == ({"embeds"} if family == "sd15" else {"embeds", "pooled"})
    for name, value in found.items():
        assert value.dtype == getattr(torch, dtype)
        assert torch.equal(value, getattr(expected, name))


@pytest.mark.runs
@pytest.mark.parametrize("family", [pytest.param("sdxl", marks=pytest.mark.slow), "sd3", "digits"])
def test_training_from_caches_loads_no_vae_and_no_encoder(
    family: str, request: pytest.FixtureRequest, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """And gives the scores of training without them, up to the rounding of latents."""
    pipeline = request.getfixturevalue(f"{family}_dir")
    size = {"resolution": 8 if family == "digits" else 32, "flip": True}
    live = configured(pipeline, tmp_path, diffusion={"cache": "off", **size})
    rows, needs = rows_of(live), check(live).needs
    draws = [3, 4, 5]
    adapter = build_adapter(live, needs)
    adapter.setup(rows)
    expected = adapter(adapter.collate(rows, draws), needs).policy

    stored = configured(pipeline, tmp_path, diffusion={"cache": "on", **size})
    with pytest.raises(ConfigError, match="mmalign cache CONFIG"):
        build_adapter(stored, needs).setup(rows)
    write(stored)
    monkeypatch.setattr(components.Vae, "__init__", refuse)
    monkeypatch.setattr(PromptEncoder, "__init__", refuse)
    adapter = build_adapter(stored, needs)
    adapter.setup(rows)
    found = adapter(adapter.collate(rows, draws), needs).policy
    torch.testing.assert_close(found, expected, rtol=2e-3, atol=1e-5)


@pytest.mark.runs
@pytest.mark.parametrize(
    ("family", "options"),
    [
        ("sd15", {"flip": True}),
        pytest.param("sdxl", {}, marks=pytest.mark.slow),
        ("sd3", {"estimator": {"shared": False}}),
        pytest.param("digits", {"flip": True}, marks=pytest.mark.slow),
    ],
)
def test_a_cached_reference_gives_log_2(
    family: str, options: dict[str, Any], request: pytest.FixtureRequest, tmp_path: Path
) -> None:
    """At every stored draw, in training and held out."""
    pipeline = request.getfixturevalue(f"{family}_dir")
    size = {"resolution": 8 if family == "digits" else 32, "num_draws": 3}
    lora = {"path": str(pipeline), "lora": {"rank": 2}}
    config = configured(
        pipeline,
        tmp_path,
        reference={"kind": "cached"},
        model=lora,
        diffusion={**size, "caption_dropout": 0.5, "noise_offset": 0.1, **options},
    )
    said = write(config)
    assert "reference errors: 3 written, 0 were there" in said
    objective, rows = check(config), rows_of(config)
    adapter = build_adapter(config, objective.needs)
    held_out = DiffusionTools().eval_examples(config, rows)
    adapter.setup([*rows, *held_out])
    bank, seen = ErrorCache(config), set()
    live = DiffusionAdapter(
        config.model_copy(update={"reference": ReferenceConfig()}),
        objective.needs,
        components.load_components(config.model, config.diffusion),
        stored_draws=True,
    )
    live.setup(rows)
    with torch.no_grad():
        scores = live(live.collate([rows[1]] * 3, [0, 1, 2]), Needs(reference=True))
    errors = -scores.reference[..., 0] / config.diffusion.logp_scale
    stored = torch.stack([bank.get(rows[1], draw) for draw in range(3)])
    torch.testing.assert_close(stored, errors, rtol=1e-5, atol=1e-7)
    for visit in range(4):
        batch = adapter.collate(rows, [visit] * 3)
        assert torch.equal(batch.inputs.ref_errors[1], bank.get(rows[1], visit % 3))
        seen.add(tuple(batch.inputs.ref_errors[:, 0].tolist()))
        loss = objective(adapter(batch, objective.needs)).rows
        torch.testing.assert_close(loss, torch.full((3,), math.log(2)), rtol=0, atol=2e-3)
    assert len(seen) == 3  # the draws differ, and the fourth visit has the first one again
    batch = adapter.collate(held_out[:4])
    loss = objective(adapter(batch, objective.needs)).rows
    torch.testing.assert_close(loss, torch.full((4,), math.log(2)), rtol=0, atol=2e-3)


BANKED = {"kind": "cached"}


@pytest.mark.runs
@pytest.mark.parametrize(
    ("changes", "missing"),
    [
        ({"diffusion": {"resolution": 40}}, (3, 0, 3)),
        ({"diffusion": {"vae_dtype": "bfloat16"}}, (3, 0, 3)),
        ({"diffusion": {"flip": True}}, (3, 0, 3)),
        ({"diffusion": {"buckets": True, "bucket_multiple": 8}}, (1, 0, 3)),
        ({"diffusion": {"num_draws": 4}}, (0, 0, 3)),
        ({"diffusion": {"noise_offset": 0.1}}, (0, 0, 3)),
        ({"diffusion": {"timesteps": {"kind": "turbo"}}}, (0, 0, 3)),
        ({"diffusion": {"estimator": {"shared": False}}}, (0, 0, 3)),
        ({"diffusion": {"reduction": "sum"}}, (0, 0, 3)),
        ({"diffusion": {"caption_dropout": 0.1}}, (0, 0, 3)),
        ({"model": {"dtype": "bfloat16"}}, (0, 3, 3)),
        ({"train": {"mixed_precision": "bf16"}}, (0, 0, 3)),
        ({"data": {"swap": True}}, (0, 0, 3)),
        ({"diffusion": {"sampling": {"guidance": 3.0}, "eval_draws": 2}}, (0, 0, 0)),
        ({"train": {"lr": 1.0, "batch_size": 3}}, (0, 0, 0)),
    ],
    ids=lambda value: str(value) if isinstance(value, dict) else "",
)
def test_what_an_entry_depends_on(
    changes: dict[str, Any],
    missing: tuple[int, int, int],
    written: tuple[Path, RunConfig],
    sd15_dir: Path,
) -> None:
    """Rows, captions and rows that a change of the config leaves without entry."""
    folder, _ = written
    base = {"resolution": 32, "num_draws": 3} | changes.pop("diffusion", {})
    config = configured(sd15_dir, folder, reference=BANKED, diffusion=base, **changes)
    assert _lacking(config) == missing


@pytest.fixture(scope="module")
def written(sd15_dir: Path, tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, RunConfig]:
    """A cache that tests only read."""
    folder = tmp_path_factory.mktemp("written")
    config = configured(sd15_dir, folder, reference=BANKED)
    write(config)
    return folder, config


@pytest.mark.parametrize("part", ["vae", "text_encoder", "unet", "tokenizer"])
def test_a_changed_model_file_is_a_miss(
    part: str, written: tuple[Path, RunConfig], sd15_dir: Path, tmp_path: Path
) -> None:
    pipeline = tmp_path / "pipeline"
    shutil.copytree(sd15_dir, pipeline)
    config = configured(pipeline, written[0], reference=BANKED)
    assert _lacking(config) == (0, 0, 0)
    if part == "tokenizer":
        (pipeline / part / "added.json").write_text("{}")
    else:
        (file,) = (pipeline / part).glob("*.safetensors")
        data = bytearray(file.read_bytes())
        data[-1] ^= 1
        file.write_bytes(bytes(data))
    expected = {"vae": (3, 0, 3), "unet": (0, 0, 3)}
    assert _lacking(config) == expected.get(part, (0, 3, 3))


def test_model_files_are_hashed_once(
    written: tuple[Path, RunConfig], monkeypatch: pytest.MonkeyPatch
) -> None:
    _, config = written
    monkeypatch.setattr(notes, "_FINGERPRINTS", {})
    monkeypatch.setattr(notes, "component_fingerprint", refuse)
    assert _lacking(config) == (0, 0, 0)


def test_a_changed_picture_is_a_miss(written: tuple[Path, RunConfig]) -> None:
    folder, config = written
    file = folder / "data" / "1-chosen.png"
    before = file.stat().st_mtime_ns
    os.utime(file, ns=(1, 1))
    try:
        assert _lacking(config) == (1, 0, 1)
        with pytest.raises(ConfigError, match="lacks the reference errors of 1 of 3 rows"):
            # A held-out row comes once a draw, and counts once.
            ErrorCache(config).require(DiffusionTools().eval_examples(config, rows_of(config)))
    finally:
        os.utime(file, ns=(before, before))


def _lacking(config: RunConfig) -> tuple[int, int, int]:
    """Rows without latents, captions without embeddings, rows without errors."""
    rows = rows_of(config)
    return (
        len(LatentCache(config).missing(rows)),
        len(PromptCache(config).missing([tiny_pictures.caption(i) for i in range(3)])),
        len(ErrorCache(config).missing(rows)),
    )


def test_nothing_is_computed_twice(
    written: tuple[Path, RunConfig], monkeypatch: pytest.MonkeyPatch, caplog: Any
) -> None:
    _, config = written
    before = entries(notes.cache_folder(config))
    monkeypatch.setattr(components, "load_vae", refuse)
    monkeypatch.setattr(PromptEncoder, "__init__", refuse)
    monkeypatch.setattr(notes, "decode_all", lambda pictures, _: refuse() if pictures else {})
    assert "latents: 0 written, 6 were there; prompts: 0 written, 4" in write(config)
    assert entries(notes.cache_folder(config)) == before


def test_a_picture_of_two_rows_is_encoded_once(sd15_dir: Path, tmp_path: Path) -> None:
    config = configured(sd15_dir, tmp_path)
    file = tmp_path / "data" / "data.jsonl"
    text = file.read_text().replace("2-rejected.png", "1-rejected.png").replace('"row-1"', '"x"')
    file.write_text(text)
    assert "latents: 5 written" in write(config)
    LatentCache(config).require(rows_of(config))


def test_a_broken_picture_is_decoded_once_and_named_each_time(
    sd15_dir: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: Any
) -> None:
    config = configured(sd15_dir, tmp_path)
    (tmp_path / "data" / "1-rejected.png").write_bytes(b"\x89PNG\r\n\x1a\n broken")
    for again in (False, True):
        caplog.clear()
        with caplog.at_level(logging.WARNING, "mmalign"):
            said = write(config)
        assert "1-rejected.png" in caplog.text
        assert "row-1" in caplog.text
        assert f"latents: {0 if again else 4} written" in said
        monkeypatch.setattr(notes, "decode_all", lambda pictures, _: refuse() if pictures else {})


@pytest.mark.parametrize("total", [2, 3, 8])
def test_a_key_falls_to_one_process_and_all_get_their_share(total: int) -> None:
    keys = [hashlib.sha256(str(i).encode()).hexdigest() for i in range(4000)]
    places = [Processes(torch.device("cpu"), i, total) for i in range(total)]
    owners = Counter(tuple(place.number for place in places if place.is_mine(key)) for key in keys)
    assert set(owners) == {(i,) for i in range(total)}
    assert min(owners.values()) > 0.8 * len(keys) / total


@pytest.mark.runs
def test_processes_share_the_work(
    sd15_dir: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Each takes what its keys say, however late it starts."""
    config = configured(sd15_dir, tmp_path, num=6, reference=BANKED)
    rows, needs = rows_of(config), check(config).needs
    met: dict[str, int] = {}

    def alternate(place: Processes, key: str) -> bool:
        # So few keys, which hold the folder's name, fall to one process alone now and then.
        return met.setdefault(key, len(met)) % place.total == place.number

    monkeypatch.setattr(Processes, "is_mine", alternate)
    places = [Processes(torch.device("cpu"), i, 2) for i in range(2)]
    for name, (stage, _) in tools.STAGES.items():
        met.clear()
        numbers = [stage(config, needs, rows, place) for place in places]
        assert numbers == {"latents": [6, 6], "prompts": [4, 3], "reference errors": [3, 3]}[name]
    found = entries(notes.cache_folder(config))
    shards = Counter(kind.split()[0] for kind in found)
    assert shards == {"latents": 12, "prompts": 7, "errors": 6}
    alone = configured(sd15_dir, tmp_path, reference=BANKED, output=str(tmp_path / "alone" / "run"))
    write(alone)
    expected = {
        k: v for k, v in entries(notes.cache_folder(alone)).items() if not k.startswith("pictures")
    }
    assert found == expected


@pytest.mark.runs
@pytest.mark.parametrize("family", ["sdxl", pytest.param("sd3", marks=pytest.mark.slow)])
def test_a_plan_is_as_large_as_the_cache(
    family: str, request: pytest.FixtureRequest, tmp_path: Path
) -> None:
    pipeline = request.getfixturevalue(f"{family}_dir")
    config = configured(pipeline, tmp_path, num=8, reference=BANKED)
    needs = check(config).needs
    plan = cache_plan.plan(config, needs)
    text = plan_cache(config)
    assert "16 of 16 images to write" in text
    assert "9 of 9 captions" in text
    assert "8 of 8 rows of 3 draws" in text
    assert "has room for" in text
    write(config)
    folder = notes.cache_folder(config)
    for part, name in zip(plan.parts, ("latents", "prompts", "errors"), strict=True):
        size = sum(file.stat().st_size for file in (folder / name).iterdir())
        assert part.num_bytes == pytest.approx(size, rel=0.15), name
    assert cache_plan.plan(config, needs).num_bytes == 0


def test_a_disk_that_is_too_small_is_refused(
    sd15_dir: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    config = configured(sd15_dir, tmp_path)
    usage = type("Usage", (), {"free": 1000})
    monkeypatch.setattr(cache_plan.shutil, "disk_usage", lambda _: usage)
    with pytest.raises(ConfigError, match=r"has room for 1,000 bytes\. Set diffusion.cache_folder"):
        write(config)
    assert not (tmp_path / "cache" / "latents").exists()


def test_what_is_left_out_is_said(sd15_dir: Path, digits_dir: Path, tmp_path: Path) -> None:
    crops = configured(sd15_dir, tmp_path, diffusion={"crop": "random"})
    assert "latents are left out: diffusion.crop is random" in plan_cache(crops)
    pixels = configured(digits_dir, tmp_path, diffusion={"resolution": 8})
    assert "no VAE" in plan_cache(pixels)
    with pytest.raises(ConfigError, match="nothing to store"):
        plan_cache(configured(sd15_dir, tmp_path, diffusion={"cache": "off"}))
    with pytest.raises(ConfigError, match="captions of the rows beside them"):
        plan_cache(_mismatched(sd15_dir, tmp_path))


def _mismatched(pipeline: Path, tmp_path: Path) -> RunConfig:
    data = tiny_pictures.rated(tmp_path / "rated", 2)
    return configured(
        pipeline,
        tmp_path,
        data={"train": str(data)},
        objective={"name": "diffusion_kto", "baseline": "mismatched"},
        reference=BANKED,
    )


def test_zeros_at_the_end_take_no_room(sdxl_dir: Path, tmp_path: Path) -> None:
    config = configured(sdxl_dir, tmp_path)
    cache = PromptCache(config)
    embeds = torch.randn(2, 7, 4)
    embeds[0, 5:] = 0
    embeds[1] = 0
    with cache.store:
        cache.put(["some", "none"], Condition(embeds, torch.randn(2, 3)))
    found = PromptCache(config).get(["none", "some"])
    assert torch.equal(found["embeds"], embeds.flip(0))
    entry = cache.store.get(cache.key("none"))
    assert entry is not None
    assert entry["embeds"].shape == (0, 4)


def test_unfinished_shards_of_killed_runs_are_swept(tmp_path: Path) -> None:
    (tmp_path / "latents").mkdir()
    old, new = tmp_path / "latents" / ".a.1.part", tmp_path / "latents" / ".b.2.part"
    for file in (old, new):
        file.write_bytes(b"x")
    os.utime(old, (1, 1))
    tools.sweep(tmp_path)
    assert not old.exists()
    assert new.exists()


def test_threads_stay_a_few_items_ahead() -> None:
    started: list[int] = []

    def load(item: int) -> int:
        started.append(item)
        return item * item

    results = ahead(range(20), load, threads=2, depth=4)
    assert next(results) == 0
    assert len(started) <= 5
    assert list(results) == [i * i for i in range(1, 20)]


def test_an_error_while_loading_comes_through() -> None:
    def load(item: int) -> int:
        if item == 3:
            raise ValueError("three")
        return item

    with pytest.raises(ValueError, match="three"):
        list(ahead(range(10), load, threads=2, depth=4))


def test_progress_is_a_line_now_and_then(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    clock = iter([0.0, 1.0, 10.0, 11.0, 45.0])
    monkeypatch.setattr("mmalign.diffusion.cache_plan.time.monotonic", lambda: next(clock))
    with progress("latents", 1000) as seen:
        for _ in range(4):
            seen(100)
    lines = capsys.readouterr().err.splitlines()
    assert lines == [
        "latents: 200 of 1000, 20 a second, 40 s left",
        "latents: 400 of 1000, 8.89 a second, 68 s left",
    ]
    assert duration(7300) == "2 h 2 min"


def test_sd3_without_t5_stores_what_clip_says(tmp_path: Path) -> None:
    config = configured(make_sd3(tmp_path / "pipeline", t5=False), tmp_path)
    plan = cache_plan.plan(config, check(config).needs)
    write(config)
    cache = PromptCache(config)
    entry = cache.store.get(cache.key(""))
    assert entry is not None
    assert entry["embeds"].shape == (77, 64)
    assert cache.get([""])["embeds"].shape == (1, 77 + 256, 64)
    size = sum(file.stat().st_size for file in cache.store.folder.iterdir())
    assert plan.parts[1].num_bytes == pytest.approx(size, rel=0.05)


def test_stopped_by_hand_nothing_is_lost(
    sd15_dir: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    config = configured(sd15_dir, tmp_path)
    encode, calls = components.Vae.encode, []

    def interrupted(vae: components.Vae, pixels: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        calls.append(1)
        if len(calls) == 4:
            raise KeyboardInterrupt
        return encode(vae, pixels)

    monkeypatch.setattr(components.Vae, "encode", interrupted)
    with pytest.raises(KeyboardInterrupt):
        write(config)
    assert "latents: 3 written, 3 were there" in write(config)


def test_batches_of_pictures_are_always_full(
    sd15_dir: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As on an accelerator: what an image is encoded beside changes with what is missing."""
    monkeypatch.setattr(tools, "pictures_at_once", lambda shape, place: 4)
    whole = configured(sd15_dir, tmp_path, diffusion={"cache_folder": str(tmp_path / "whole")})
    write(whole)
    config = configured(sd15_dir, tmp_path)
    rows, place = rows_of(config), Processes(torch.device("cpu"))
    stage, _ = tools.STAGES["latents"]
    assert [stage(config, check(config).needs, [row], place) for row in rows] == [2, 2, 2]
    kinds = [
        {
            key: value
            for key, value in entries(notes.cache_folder(each)).items()
            if key.startswith("latents")
        }
        for each in (whole, config)
    ]
    assert len(kinds[0]) == 6
    assert kinds[0] == kinds[1]


def test_a_damaged_entry_names_the_file_to_remove(sd15_dir: Path, tmp_path: Path) -> None:
    config = configured(sd15_dir, tmp_path)
    write(config)
    (shard,) = (tmp_path / "cache" / "latents").glob("*.safetensors")
    data = bytearray(shard.read_bytes())
    data[-200:] = bytes(200)
    shard.write_bytes(bytes(data))
    rows, cache = rows_of(config), LatentCache(config)
    with pytest.raises(ConfigError, match=f"{shard.name} is damaged and held the latents of"):
        [cache.get(row, flip=False) for row in rows]
    shard.unlink()
    assert "latents: 6 written" in write(config)


def test_loader_workers_get_copies(written: tuple[Path, RunConfig]) -> None:
    _, config = written
    rows = rows_of(config)
    for cache in (LatentCache(config), ErrorCache(config)):
        before = cache.get(rows[0], 0)[0]
        assert torch.equal(pickle.loads(pickle.dumps(cache)).get(rows[0], 0)[0], before)


@pytest.mark.runs
def test_the_time_is_forecast_for_what_is_missing(sd15_dir: Path, tmp_path: Path) -> None:
    """Also where the run asks for a complete cache, which there is not yet."""
    config = configured(sd15_dir, tmp_path, reference={"kind": "cached"}, diffusion={"cache": "on"})
    said = plan_cache(config)
    assert re.search(r"about \d.* \(latents .*prompts .*reference errors .*\)", said), said
    write(config)
    assert "nothing is left to compute" in plan_cache(config)
