"""Real digits, the shipped model of them, and the pairs of its images."""

from __future__ import annotations

import json
import sys
from pathlib import Path

import numpy as np
import pytest

from mmalign.quickstart import diffusion, digits
from mmalign.quickstart.digits import BASE, Shown

pytest.importorskip("sklearn")

sys.path.append(str(Path(__file__).parents[2] / "benchmarks"))
import quickstart_digits_base as maker

PROMPTS = ["a bold handwritten seven", "A handwritten  nine", "", "a handwritten cat"]


def test_digits_are_the_published_ones() -> None:
    real = digits.load()
    assert real.pixels.shape == (1797, 8, 8)
    assert real.pixels.min() == 0.0
    assert real.pixels.max() == 1.0
    assert digits.ink(real.pixels).mean() == pytest.approx(0.3053, abs=1e-4)


def test_oracle_reads_unseen_digits_and_no_noise() -> None:
    oracle = digits.Oracle(digits.load())
    assert oracle.accuracy > 0.97
    noise = np.random.default_rng(0).random((200, 8, 8), np.float32)
    assert oracle.legible(noise, digits.each_digit(200)).mean() < 0.3


def test_ink_is_the_mean_of_the_pixels() -> None:
    pixels = np.zeros((2, 8, 8), np.float32)
    pixels[1, :4] = 1.0
    assert digits.ink(pixels).tolist() == [0.0, 0.5]


def test_shipped_model_is_small_and_says_where_it_is_from() -> None:
    files = [file for file in BASE.rglob("*") if file.is_file()]
    assert sum(file.stat().st_size for file in files) < 4e6
    about = (BASE / "README.md").read_text(encoding="utf-8")
    assert "python benchmarks/quickstart_digits_base.py" in about
    assert "Alpaydin" in about


def test_shipped_model_has_the_parts_that_its_maker_builds() -> None:
    from safetensors.torch import load_file

    for made, file in (
        (maker._unet(), "unet/diffusion_pytorch_model.safetensors"),
        (maker._text_encoder(), "text_encoder/model.safetensors"),
    ):
        stored = load_file(BASE / file)
        assert {key: tuple(value.shape) for key, value in stored.items()} == {
            key: tuple(value.shape) for key, value in made.state_dict().items()
        }


def test_shipped_tokenizer_is_that_of_its_maker() -> None:
    from transformers import CLIPTokenizer

    stored = CLIPTokenizer.from_pretrained(BASE / "tokenizer")
    assert len(stored) == 18
    ids = maker._ids(stored, PROMPTS)
    assert ids.tolist() == maker._ids(maker._tokenizer(), PROMPTS).tolist()
    assert ids.shape == (4, 8)
    assert ids[0, :6].tolist() == [0, 3, 7, 4, 15, 1]
    assert ids[1, 1:4].tolist() == [3, 4, 17], "capitals and spaces do not matter"
    assert ids[2].tolist() == [0] + 7 * [1]
    assert 2 in ids[3], "an unknown word has a token of its own"


def test_styles_are_thirds_of_each_digit() -> None:
    """A bold one has less ink than a light eight; the style is about its own kind."""
    real = digits.load()
    amount, styles = digits.ink(real.pixels), maker.styles_of(real)
    means = [float(amount[styles == style].mean()) for style in range(3)]
    assert means == pytest.approx([0.2688, 0.3051, 0.3422], abs=1e-4)
    for digit in range(10):
        own = real.digits == digit
        counts = np.bincount(styles[own], minlength=3)
        assert counts.max() - counts.min() <= 1
        light, bold = amount[own & (styles == 0)], amount[own & (styles == 2)]
        assert light.max() <= bold.min()


def test_captions_leave_styles_and_words_out_as_often_as_said() -> None:
    real = digits.load()
    captions = maker._captions(real.digits, maker.styles_of(real), np.random.default_rng(0))
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


@pytest.mark.slow
def test_maker_gives_the_same_model_for_a_seed(tmp_path: Path) -> None:
    from safetensors.torch import load_file

    names, weights = ("first", "again", "other"), {}
    for name, seed in zip(names, (0, 0, 1), strict=True):
        maker.make(tmp_path / name, seed, num_steps=2)
        weights[name] = load_file(tmp_path / name / "unet/diffusion_pytorch_model.safetensors")
    assert all(weights["first"][key].equal(weights["again"][key]) for key in weights["first"])
    assert not weights["first"]["conv_in.weight"].equal(weights["other"]["conv_in.weight"])


def drawn(per_digit: int) -> Shown:
    """Images of random ink."""
    what = tuple(digits.each_digit(10 * per_digit))
    pixels = np.random.default_rng(5).random((len(what), 8, 8), np.float32)
    return Shown(what, pixels, np.ones(len(what), np.bool_))


def test_pairs_are_of_the_less_inky_half_of_each_digit() -> None:
    shown = drawn(8)
    pairs = diffusion.thin_pairs(shown, held_out=1, seed=0)
    assert len(pairs) == 20
    assert [split for *_, split in pairs].count("eval") == 10
    for digit in range(10):
        own = [pair for pair in pairs if shown.digits[pair[0]] == digit]
        used = [index for more, less, _ in own for index in (more, less)]
        assert all(shown.digits[index] == digit for index in used)
        assert all(shown.ink[more] > shown.ink[less] for more, less, _ in own)
        others = set(range(digit, 80, 10)) - set(used)
        assert len(set(used)) == len(others) == 4
        assert max(shown.ink[used]) < min(shown.ink[list(others)])
    assert pairs != diffusion.thin_pairs(shown, held_out=1, seed=1)


def test_pairs_are_written_as_the_package_reads_them(tmp_path: Path) -> None:
    from PIL import Image

    shown = drawn(4)
    pairs = diffusion.thin_pairs(shown, held_out=0, seed=0)
    file = digits.write_pairs(tmp_path / "pairs", shown, pairs)
    rows = [json.loads(line) for line in file.read_text(encoding="utf-8").splitlines()]
    assert {row["prompt"] for row in rows} == {digits.prompt(digit) for digit in range(10)}
    for row, (more, less, _) in zip(rows, pairs, strict=True):
        for side, index in (("chosen", more), ("rejected", less)):
            assert row["meta"][f"ink_{side}"] == pytest.approx(shown.ink[index], abs=1e-4)
            with Image.open(file.parent / row[f"image_{side}"]) as image:
                pixels = np.asarray(image, np.float32) / 255
            np.testing.assert_allclose(pixels, shown.pixels[index], atol=0.6 / 255)


def test_numbers_of_an_arm_are_paired_with_the_base() -> None:
    base = drawn(2)
    more = Shown(base.digits, base.pixels + 0.125, np.arange(20) > 0)
    held_out = {
        "reward_accuracy": 0.9,
        "errors/chosen_diff": -0.01234,
        "intervals": {"reward_accuracy": [0.8, 1.0]},
    }
    numbers = diffusion.numbers_of(more, base, held_out)
    assert numbers["ink_change"] == [0.125] * 3, "the same for each image, whatever its ink"
    low, mean, high = (numbers["ink"][i] for i in (1, 0, 2))
    assert low < mean < high
    assert numbers["legibility"] == [0.95, 0.7639, 0.9911]
    assert numbers["held_out_accuracy"] == [0.9, 0.8, 1.0]
    assert numbers["pixel_change"] == 0.125
    assert numbers["winner_error"] == -0.0123
