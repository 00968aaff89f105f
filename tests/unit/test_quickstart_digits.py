"""Real digits, their prompts and the parts of the base that are not trained."""

from __future__ import annotations

import builtins
from typing import TYPE_CHECKING, Any

import numpy as np
import pytest

from mmalign.errors import ConfigError
from mmalign.quickstart import digits

if TYPE_CHECKING:
    from pathlib import Path

pytest.importorskip("sklearn")


def test_digits_are_the_published_ones() -> None:
    real = digits.load()
    assert real.pixels.shape == (1797, 8, 8)
    assert real.pixels.min() == 0.0
    assert real.pixels.max() == 1.0
    assert digits.ink_of_styles(real) == {"light": 0.2688, "medium": 0.3051, "bold": 0.3422}


def test_styles_are_thirds_of_each_digit() -> None:
    """A bold one has less ink than a light eight; the style is about its own kind."""
    real = digits.load()
    amount = digits.ink(real.pixels)
    for digit in range(10):
        own = real.digits == digit
        counts = np.bincount(real.styles[own], minlength=3)
        assert counts.max() - counts.min() <= 1
        light, bold = amount[own & (real.styles == 0)], amount[own & (real.styles == 2)]
        assert light.max() <= bold.min()


def test_oracle_reads_unseen_digits_and_no_noise() -> None:
    real = digits.load()
    oracle = digits.Oracle(real)
    assert oracle.accuracy > 0.97
    noise = np.random.default_rng(0).random((200, 8, 8), np.float32)
    assert oracle.legible(noise, [index % 10 for index in range(200)]).mean() < 0.3


def test_ink_is_the_mean_of_the_pixels() -> None:
    pixels = np.zeros((2, 8, 8), np.float32)
    pixels[1, :4] = 1.0
    assert digits.ink(pixels).tolist() == [0.0, 0.5]


def test_without_scikit_learn_one_command_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    real_import = builtins.__import__

    def missing(name: str, *args: Any) -> Any:
        if name.startswith("sklearn"):
            raise ImportError(name)
        return real_import(name, *args)

    digits.load.cache_clear()
    monkeypatch.setattr(builtins, "__import__", missing)
    with pytest.raises(ConfigError, match=r"pip install 'mmalign\[quickstart\]'"):
        digits.load()


def test_tokenizer_is_the_same_after_loading(tmp_path: Path) -> None:
    from transformers import CLIPTokenizer

    made = digits._tokenizer()
    made.save_pretrained(tmp_path)
    loaded = CLIPTokenizer.from_pretrained(tmp_path)
    assert len(loaded) == 18
    prompts = ["a bold handwritten seven", "A handwritten  nine", "", "a handwritten cat"]
    ids = digits._ids(loaded, prompts)
    assert ids.tolist() == digits._ids(made, prompts).tolist()
    assert ids.shape == (4, 8)
    assert ids[0, :6].tolist() == [0, 3, 7, 4, 15, 1]
    assert ids[1, 1:4].tolist() == [3, 4, 17], "capitals and spaces do not matter"
    assert ids[2].tolist() == [0] + 7 * [1]
    assert 2 in ids[3], "an unknown word has a token of its own"


def test_captions_leave_styles_and_words_out_as_often_as_said() -> None:
    real = digits.load()
    rows = np.arange(1797)
    captions = digits._captions(real, rows, np.random.default_rng(0))
    empty = [caption == "" for caption in captions]
    told = [caption for caption in captions if caption]
    plain = [caption.startswith("a handwritten") for caption in told]
    assert np.mean(empty) == pytest.approx(0.1, abs=0.03)
    assert np.mean(plain) == pytest.approx(1 / 3, abs=0.04)
    assert all(
        caption.endswith(digits.NAMES[d])
        for caption, d in zip(captions, real.digits, strict=True)
        if caption
    )


def test_networks_have_the_size_that_the_recipe_names() -> None:
    def millions(network: Any) -> float:
        return sum(p.numel() for p in network.parameters()) / 1e6

    assert millions(digits._unet()) == pytest.approx(1.0, abs=0.005)
    assert millions(digits._text_encoder()) == pytest.approx(0.07, abs=0.005)


@pytest.mark.slow
def test_base_is_a_pipeline_and_the_same_for_a_seed(tmp_path: Path) -> None:
    from safetensors.torch import load_file

    from mmalign.config import DiffusionConfig, ModelConfig
    from mmalign.diffusion.components import load_components
    from mmalign.diffusion.conditioning import PromptEncoder

    folders = [
        digits.make(tmp_path / name, seed, num_steps=2)
        for name, seed in (("first", 0), ("again", 0), ("other", 1))
    ]
    weights = [
        load_file(folder / "unet" / "diffusion_pytorch_model.safetensors") for folder in folders
    ]
    key = "conv_in.weight"
    assert all(weights[0][name].equal(weights[1][name]) for name in weights[0])
    assert not weights[0][key].equal(weights[2][key])
    components = load_components(ModelConfig(path=str(folders[0])), DiffusionConfig(resolution=8))
    assert (components.family, components.latent_channels, components.has_vae) == ("sd", 1, False)
    told = PromptEncoder.load(str(folders[0]), "sd", weights[0][key].dtype)
    assert told.encode(["a handwritten seven", ""]).embeds.shape == (2, 8, 64)
