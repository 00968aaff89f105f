"""Prompts to embeddings: equal to what diffusers' own pipelines compute."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import tiny_diffusion
import torch
from tiny import run_config

from mmalign.diffusion.cache import PromptCache
from mmalign.diffusion.conditioning import PromptEncoder, load_tokenizers
from mmalign.errors import ConfigError

PROMPTS = ["a red cat", "A dog, and another DOG!"]
OPTIONS: dict[str, dict[str, Any]] = {
    "sd15": {"num_images_per_prompt": 1, "do_classifier_free_guidance": True},
    "sdxl": {"prompt_2": None},
    "sd3": {"prompt_2": None, "prompt_3": None},
}


def close(found: torch.Tensor | None, expected: torch.Tensor) -> None:
    """Equal but for the order of sums, which differs between two matrix libraries."""
    torch.testing.assert_close(found, expected, rtol=1e-5, atol=1e-5)


def diffusers_pipeline(folder: Path, **parts: Any) -> Any:
    import diffusers

    kind = json.loads((folder / "model_index.json").read_text())["_class_name"]
    return getattr(diffusers, kind).from_pretrained(folder, **parts)


def key(folder: Path, tmp_path: Path, **model: Any) -> str:
    """Of a caption in the cache: what decides its embedding."""
    given = {"path": str(folder), **model}
    return PromptCache(run_config(modality="diffusion", model=given, output=tmp_path / "run")).key(
        "a"
    )


@torch.no_grad()
@pytest.mark.parametrize("name", ["sd15", "sdxl", "sd3"])
def test_equal_to_the_pipelines_own(name: str, request: pytest.FixtureRequest) -> None:
    folder = request.getfixturevalue(f"{name}_dir")
    expected = diffusers_pipeline(folder).encode_prompt(PROMPTS, device="cpu", **OPTIONS[name])
    encoder = PromptEncoder(folder)
    found, empty = encoder.encode(PROMPTS), encoder.encode([""] * 2)
    close(found.embeds, expected[0])
    close(empty.embeds, expected[1])  # the branch that guidance uses
    if name == "sd15":
        assert found.pooled is None
    else:
        close(found.pooled, expected[2])
        close(empty.pooled, expected[3])
    assert found.time_ids is None
    assert not found.embeds.requires_grad


@torch.no_grad()
def test_sd3_without_t5_has_zeros_in_its_place(tmp_path: Path) -> None:
    folder = tiny_diffusion.make_sd3(tmp_path, t5=False)
    encoder = PromptEncoder(folder)
    assert (encoder.tokenizers.limit, set(encoder.tokenizers.tokenize(["a"]))) == (
        77,
        {"text_encoder", "text_encoder_2"},
    )
    own = diffusers_pipeline(folder, text_encoder_3=None, tokenizer_3=None)
    expected = own.encode_prompt(PROMPTS, device="cpu", **OPTIONS["sd3"])
    found = encoder.encode(PROMPTS)
    assert found.embeds.shape == (2, 77 + 256, 64)
    close(found.embeds, expected[0])
    close(found.pooled, expected[2])


def test_sdxl_embeds_the_empty_prompt_where_the_pipeline_says_so(
    sdxl_dir: Path, tmp_path: Path
) -> None:
    zeros = PromptEncoder(sdxl_dir)
    both = zeros.encode(["", "a cat"])
    assert both.embeds[0].abs().max() == both.pooled[0].abs().max() == 0
    close(both.embeds[1:], zeros.encode(["a cat"]).embeds)

    shutil.copytree(sdxl_dir, tmp_path / "copy")
    index = json.loads((tmp_path / "copy" / "model_index.json").read_text())
    index["force_zeros_for_empty_prompt"] = False
    (tmp_path / "copy" / "model_index.json").write_text(json.dumps(index))
    plain = PromptEncoder(tmp_path / "copy")
    assert plain.encode([""]).embeds.abs().max() > 0
    assert key(tmp_path / "copy", tmp_path) != key(sdxl_dir, tmp_path)


@pytest.mark.parametrize("name", ["sd15", "sdxl", "sd3"])
def test_token_ids_are_plain_tensors_and_rows_independent(
    name: str, request: pytest.FixtureRequest
) -> None:
    encoder = PromptEncoder(request.getfixturevalue(f"{name}_dir"), dtype=torch.float64)
    ids = encoder.tokenizers.tokenize(PROMPTS)
    assert all(value.dtype == torch.int64 and value.device.type == "cpu" for value in ids.values())
    both = encoder.embed(ids)
    alone = encoder.embed({key: value[1:] for key, value in ids.items()})
    assert both.embeds.dtype == torch.float64
    torch.testing.assert_close(alone.embeds, both.embeds[1:], rtol=1e-10, atol=1e-12)


def test_autocast_does_not_change_an_embedding(sd15_dir: Path) -> None:
    encoder = PromptEncoder(sd15_dir)
    with torch.autocast("cpu", torch.bfloat16):
        found = encoder.encode(PROMPTS)
    assert torch.equal(found.embeds, encoder.encode(PROMPTS).embeds)


def test_tokens_are_counted_without_cutting(sd15_dir: Path, sd3_dir: Path) -> None:
    tokenizers = load_tokenizers(sd15_dir)
    assert tokenizers.limit == 77
    assert tokenizers.num_tokens("") == 2
    assert tokenizers.num_tokens("a red cat") == 5
    long = "cat " * 90
    assert tokenizers.num_tokens(long) == 92
    assert tokenizers.tokenize([long])["text_encoder"].shape == (1, 77)
    three = load_tokenizers(sd3_dir)  # T5 reads on where CLIP stops
    assert three.limit == 256
    assert three.num_tokens("abc") == 5  # the mark of a word, three letters, the end


def test_fingerprints_follow_encoders_tokenizers_and_dtype(sd15_dir: Path, tmp_path: Path) -> None:
    first = key(sd15_dir, tmp_path)
    assert key(sd15_dir, tmp_path, dtype="bfloat16") != first
    shutil.copytree(sd15_dir, tmp_path / "copy")
    assert key(tmp_path / "copy", tmp_path) == first
    settings = tmp_path / "copy" / "tokenizer" / "tokenizer_config.json"
    settings.write_text(settings.read_text().replace("77", "60"))
    assert key(tmp_path / "copy", tmp_path) != first
    assert load_tokenizers(tmp_path / "copy").limit == 60


def test_what_is_missing_or_foreign_is_named(sd15_dir: Path, tmp_path: Path) -> None:
    folder = tmp_path / "copy"
    shutil.copytree(sd15_dir, folder)
    settings = folder / "text_encoder" / "config.json"
    config = json.loads(settings.read_text())
    settings.write_text(json.dumps(config | {"architectures": ["RobertaModel"]}))
    with pytest.raises(ConfigError, match=r"text_encoder/ is a RobertaModel; supported are CLIP"):
        PromptEncoder(folder)
    shutil.rmtree(folder / "tokenizer")
    with pytest.raises(ConfigError, match="no folder tokenizer/"):
        PromptEncoder(folder)
    index = json.loads((folder / "model_index.json").read_text())
    index["text_encoder"] = [None, None]
    (folder / "model_index.json").write_text(json.dumps(index))
    with pytest.raises(ConfigError, match="has no text_encoder/"):
        PromptEncoder(folder)
