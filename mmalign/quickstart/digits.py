"""Real handwritten digits, a diffusion model of them trained on the spot, and pairs that
it generates.
"""

from __future__ import annotations

import json
from copy import deepcopy
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from PIL import Image as pil
from torch import nn
from torch.nn.functional import mse_loss

from mmalign.data.jobs import write_lines
from mmalign.data.sheet import sheet, write_image
from mmalign.errors import ConfigError
from mmalign.models.files import usual_mode

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence

    from numpy.typing import NDArray
    from PIL.Image import Image

    from mmalign.config import RunConfig
    from mmalign.diffusion.inputs import Inputs


# Real handwritten digits: images, prompts, ink, and a judge of legibility.
#
# 1,797 images of 8 x 8 pixels by many hands, as scikit-learn ships them.
#
# Source: UCI "Optical Recognition of Handwritten Digits" (Alpaydin and Kaynak, 1998).

NAMES = ("zero", "one", "two", "three", "four", "five", "six", "seven", "eight", "nine")
STYLES = ("light", "medium", "bold")
SIDE = 8  # pixels
_LEVELS = 16.0  # a pixel is between 0 and this
_NUM_TEST = 360


@dataclass(frozen=True, slots=True)
class Digits:
    """All images, what they show, and how much ink each has among its own kind."""

    pixels: NDArray[np.float32]  # [N, 8, 8] in [0, 1]; 1 is ink
    digits: NDArray[np.int64]  # [N], 0 to 9
    styles: NDArray[np.int64]  # [N], third of the ink among the images of the same digit


class Oracle:
    """Says which digit an image shows; a digit is legible when the oracle names it.

    A support vector machine on the raw pixels, trained on 1,437 images.
    """

    def __init__(self, digits: Digits) -> None:
        from sklearn.svm import SVC

        order = np.random.default_rng(0).permutation(len(digits.digits))
        test, train = order[:_NUM_TEST], order[_NUM_TEST:]
        flat = digits.pixels.reshape(len(order), -1)
        self._model: Any = SVC(C=10)  # a larger gamma than the default finds good samples illegible
        self._model.fit(flat[train], digits.digits[train])
        self.accuracy = float(self._model.score(flat[test], digits.digits[test]))

    def legible(self, pixels: NDArray[np.float32], digits: Sequence[int]) -> NDArray[np.bool_]:
        """Whether each image [N, 8, 8] shows its digit, [N]."""
        named = self._model.predict(pixels.reshape(len(pixels), -1))
        return np.asarray(named == np.asarray(digits))


@cache
def load() -> Digits:
    """The images.

    Raises:
        ConfigError: scikit-learn is not installed.
    """
    try:
        from sklearn.datasets import load_digits
    except ImportError as error:
        raise ConfigError(
            "the digits of `mmalign quickstart diffusion` come with scikit-learn, which is not "
            "installed. Run: pip install 'mmalign[quickstart]'"
        ) from error
    given: Any = load_digits()
    pixels = (given.images / _LEVELS).astype(np.float32)
    digits = given.target.astype(np.int64)
    styles = np.zeros(len(digits), np.int64)
    amount = ink(pixels)
    for digit in range(len(NAMES)):
        own = np.flatnonzero(digits == digit)
        rank = amount[own].argsort(kind="stable").argsort(kind="stable")
        styles[own] = rank * len(STYLES) // len(own)
    return Digits(pixels, digits, styles)


def ink(pixels: NDArray[np.float32]) -> NDArray[np.float32]:
    """Mean of the pixels of each image [N, 8, 8], [N]; 0 is empty and 1 is full."""
    return pixels.reshape(len(pixels), -1).mean(1).astype(np.float32)


def ink_of_styles(digits: Digits) -> dict[str, float]:
    """Mean ink of the real images of each style."""
    amount = ink(digits.pixels)
    means = [float(amount[digits.styles == index].mean()) for index in range(len(STYLES))]
    return {style: round(mean, 4) for style, mean in zip(STYLES, means, strict=True)}


def prompt(digit: int, style: str = "") -> str:
    """What an image is called, e.g. `a bold handwritten seven`; neutral without a style."""
    return " ".join(["a", *([style] if style else []), "handwritten", NAMES[digit]])


def to_pixels(pictures: Sequence[Image]) -> NDArray[np.float32]:
    """Generated images as [N, 8, 8] in [0, 1]."""
    shades = np.stack([np.asarray(picture.convert("L")) for picture in pictures])
    return shades.astype(np.float32) / np.float32(255)


# A diffusion model of handwritten digits, trained on the spot: about a minute on one core.
#
# What comes of it is an ordinary pipeline folder of diffusers without a VAE, so nothing after this
# module knows that the model is small.

NUM_STEPS = 700
_BATCH, _LR, _WARMUP = 64, 2e-3, 20
_NO_STYLE, _EMPTY = 1 / 3, 1 / 10  # shares of captions without a style word, and without any
_WIDTH, _LENGTH = 64, 8  # of the text encoder; tokens of a caption, both ends included
_START, _END, _UNKNOWN = "<|startoftext|>", "<|endoftext|>", "<|unknown|>"


def make(folder: Path, seed: int, num_steps: int = NUM_STEPS) -> Path:
    """Train a base model and write it as a pipeline folder.

    Args:
        folder: Where to write.
        seed: Decides the start, the order of the images, the captions and the noise.
        num_steps: Fewer for a smoke run.
    """
    torch.manual_seed(seed)
    tokenizer, encoder, unet, scheduler = _tokenizer(), _text_encoder(), _unet(), _scheduler()
    pair = _train(nn.ModuleDict({"unet": unet, "text": encoder}), tokenizer, seed, num_steps)
    pair["unet"].save_pretrained(folder / "unet")  # type: ignore[operator]
    pair["text"].save_pretrained(folder / "text_encoder")  # type: ignore[operator]
    tokenizer.save_pretrained(folder / "tokenizer")
    scheduler.save_pretrained(folder / "scheduler")
    usual_mode(folder)
    index = {
        "_class_name": "StableDiffusionPipeline",
        "scheduler": ["diffusers", "DDPMScheduler"],
        "text_encoder": ["transformers", "CLIPTextModel"],
        "tokenizer": ["transformers", "CLIPTokenizer"],
        "unet": ["diffusers", "UNet2DConditionModel"],
        "vae": [None, None],  # it paints pixels
    }
    (folder / "model_index.json").write_text(json.dumps(index, indent=2) + "\n", encoding="utf-8")
    return folder


def _train(networks: nn.ModuleDict, tokenizer: Any, seed: int, num_steps: int) -> nn.ModuleDict:
    """Both networks learn together to find the noise; returns their averages over the steps."""
    digits = load()
    random = np.random.default_rng(seed)
    scheduler = _scheduler()
    clean = torch.from_numpy(digits.pixels * 2 - 1)[:, None]
    average = deepcopy(networks).requires_grad_(False)
    optimizer = torch.optim.AdamW(networks.parameters(), lr=_LR, fused=True)
    order = np.empty(0, np.int64)
    networks.train()
    for step in range(num_steps):
        if len(order) < _BATCH:
            order = np.concatenate([order, random.permutation(len(clean))])
        rows, order = order[:_BATCH], order[_BATCH:]
        ids = _ids(tokenizer, _captions(digits, rows, random))
        x0 = clean[torch.from_numpy(rows)]
        noise = torch.randn_like(x0)
        t = torch.randint(0, scheduler.config.num_train_timesteps, (len(x0),))
        told = networks["text"](input_ids=ids).last_hidden_state
        x_t = scheduler.add_noise(x0, noise, t)
        loss = mse_loss(networks["unet"](x_t, t, encoder_hidden_states=told).sample, noise)
        loss.backward()
        for group in optimizer.param_groups:
            group["lr"] = _LR * min((step + 1) / _WARMUP, 1 - step / num_steps)
        nn.utils.clip_grad_norm_(networks.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
        kept = min(0.99, (1 + step) / (10 + step))
        with torch.no_grad():
            for mean, new in zip(average.parameters(), networks.parameters(), strict=True):
                mean.lerp_(new, 1 - kept)
    return average.eval()


def _captions(digits: Digits, rows: NDArray[np.int64], random: np.random.Generator) -> list[str]:
    """A caption for each image: with its style, without, or empty (for guidance)."""
    found: list[str] = []
    for row, plain, empty in zip(
        rows, random.random(len(rows)) < _NO_STYLE, random.random(len(rows)) < _EMPTY, strict=True
    ):
        style = "" if plain else STYLES[digits.styles[row]]
        found.append("" if empty else prompt(int(digits.digits[row]), style))
    return found


def _ids(tokenizer: Any, captions: Sequence[str]) -> torch.Tensor:  # [N, 8]
    return tokenizer(
        list(captions),
        padding="max_length",
        max_length=_LENGTH,
        truncation=True,
        return_tensors="pt",
    ).input_ids


def _tokenizer() -> Any:
    """Eighteen tokens: whole words, two ends, and one for everything else."""
    from transformers import AddedToken, CLIPTokenizer

    tokenizer = CLIPTokenizer(
        vocab={_START: 0, _END: 1, _UNKNOWN: 2},
        merges=[],
        unk_token=_UNKNOWN,
        model_max_length=_LENGTH,
    )
    # Whole words, so that no merges are needed to build them from letters.
    words = ("a", "handwritten", *STYLES, *NAMES)
    tokenizer.add_tokens([AddedToken(word, single_word=True, normalized=True) for word in words])
    return tokenizer


def _text_encoder() -> Any:  # 0.07 M parameters
    from transformers import CLIPTextConfig, CLIPTextModel

    config = CLIPTextConfig(
        vocab_size=3 + 2 + len(STYLES) + len(NAMES),
        hidden_size=_WIDTH,
        intermediate_size=2 * _WIDTH,
        num_hidden_layers=2,
        num_attention_heads=4,
        max_position_embeddings=_LENGTH,
        bos_token_id=0,
        eos_token_id=1,
        pad_token_id=1,
    )
    return CLIPTextModel(config)


def _unet() -> Any:  # 1.00 M parameters
    from diffusers.models.unets.unet_2d_condition import UNet2DConditionModel

    return UNet2DConditionModel(
        sample_size=SIDE,
        in_channels=1,
        out_channels=1,
        block_out_channels=(32, 64),
        layers_per_block=1,
        down_block_types=("DownBlock2D", "CrossAttnDownBlock2D"),
        up_block_types=("CrossAttnUpBlock2D", "UpBlock2D"),
        cross_attention_dim=_WIDTH,
        attention_head_dim=4,
        norm_num_groups=8,
    )


def _scheduler() -> Any:
    from diffusers.schedulers.scheduling_ddpm import DDPMScheduler

    return DDPMScheduler(num_train_timesteps=1000, beta_schedule="squaredcos_cap_v2")


# Pairs of generated digits, more ink against less, and what generated images look like.

SAMPLING: dict[str, Any] = {
    "guidance": 2.0,  # 3 and more ruin the base by themselves
    "sampler": "ddim",
    "clip_sample": True,
}
"""How every image of the demonstration is made, but for the number of steps."""

PAIRS = "pairs.jsonl"
_AT_ONCE = 100


@dataclass(frozen=True, slots=True)
class Shown:
    """Images of one model for the same prompts and start noise as those of any other."""

    digits: tuple[int, ...]  # what each should show
    pixels: NDArray[np.float32]  # [N, 8, 8] in [0, 1]
    legible: NDArray[np.bool_]  # [N]

    @property
    def ink(self) -> float:
        """Mean over all images."""
        return float(ink(self.pixels).mean())

    @property
    def legibility(self) -> float:
        """Share of the images in which the oracle sees the digit."""
        return float(self.legible.mean())

    def first(self, count: int) -> Shown:
        """The first of the images."""
        return Shown(self.digits[:count], self.pixels[:count], self.legible[:count])

    def numbers(self) -> dict[str, float]:
        """Both, rounded, for summaries."""
        return {"ink": round(self.ink, 4), "legibility": round(self.legibility, 4)}


class Painter:
    """Draws digits with the base's text encoder and any U-Net of its shape."""

    def __init__(self, config: RunConfig, oracle: Oracle) -> None:
        """Load the base.

        Args:
            config: Of any run on it; how images are made stands in `diffusion.sampling`.
            oracle: Judges the images.
        """
        from mmalign.core import Needs
        from mmalign.diffusion.components import load_components
        from mmalign.diffusion.inputs import Inputs
        from mmalign.diffusion.process import process_from

        self._oracle = oracle
        components = load_components(config.model, config.diffusion)
        process = process_from(components.scheduler_config)
        self.inputs: Inputs = Inputs(config, Needs(), components, process)
        self.base: nn.Module = components.denoiser

    def paint(
        self,
        model: nn.Module,
        digits: Sequence[int],
        first_seed: int,
        *,
        style: str = "",
        negative_model: nn.Module | None = None,
    ) -> Shown:
        """One image a digit; image i has the start noise of seed `first_seed` + i."""
        from mmalign.diffusion.samples import paint

        pictures = paint(
            self.inputs,
            model,
            [prompt(digit, style) for digit in digits],
            seeds=range(first_seed, first_seed + len(digits)),
            negative_model=negative_model,
            batch_size=_AT_ONCE,
        )
        pixels = to_pixels(pictures)
        return Shown(tuple(digits), pixels, self._oracle.legible(pixels, digits))


def each_digit(count: int) -> list[int]:
    """`count` digits, as many of each as can be."""
    return [index % len(NAMES) for index in range(count)]


def write_pairs(
    folder: Path, painter: Painter, first_seed: int, per_digit: int, kept: int
) -> dict[str, float]:
    """Draw digits with neutral prompts; of each, the inkiest against the least inky.

    Args:
        folder: For the images, and their records in `pairs.jsonl`.
        painter: Whose base draws.
        first_seed: Of the start noise, and of the pairing.
        per_digit: Images of each digit.
        kept: How many of each end become pairs.

    Returns:
        Number of pairs, and the mean and the smallest difference of ink inside them.
    """
    from PIL import Image

    shown = painter.paint(painter.base, each_digit(per_digit * len(NAMES)), first_seed)
    amount, digits = ink(shown.pixels), np.asarray(shown.digits)
    random = np.random.default_rng(first_seed)
    rows: list[dict[str, Any]] = []
    gaps: list[float] = []
    folder.mkdir(parents=True)
    for digit, name in enumerate(NAMES):
        own = np.flatnonzero(digits == digit)
        ranked = own[amount[own].argsort(kind="stable")]
        for number, (more, less) in enumerate(
            zip(ranked[-kept:], random.permutation(ranked[:kept]), strict=True)
        ):
            measured: dict[str, float] = {}
            row: dict[str, Any] = {"id": f"{name}-{number}", "prompt": prompt(digit)}
            for side, index in (("chosen", more), ("rejected", less)):
                levels = np.rint(shown.pixels[index] * 255).astype(np.uint8)
                file = f"{name}-{number}-{side}.png"
                Image.fromarray(levels).save(folder / file)
                row[f"image_{side}"] = file
                measured[f"ink_{side}"] = round(float(amount[index]), 4)
            rows.append(row | {"meta": measured})
            gaps.append(float(amount[more] - amount[less]))
    write_lines(folder / PAIRS, rows)
    return {
        "pairs": len(rows),
        "mean_gap": round(float(np.mean(gaps)), 4),
        "smallest_gap": round(min(gaps), 4),
    }


# Sheets of digits, enlarged pixel by pixel, black on white as on paper.


def write_same_noise(file: Path, count: int, in_row: int, columns: Mapping[str, Shown]) -> None:
    """The first `count` images of each model beside each other, with their ink."""
    many = list(columns.values())
    count = min(count, len(many[0].digits))
    amounts = [ink(shown.pixels[:count]) for shown in many]
    labels = [
        f"{NAMES[digit]}: " + " → ".join(f"{amount[i]:.2f}".lstrip("0") for amount in amounts)
        for i, digit in enumerate(many[0].digits[:count])
    ]
    pictures = [(name, [_on_paper(p) for p in s.pixels[:count]]) for name, s in columns.items()]
    write_image(sheet(labels, pictures, pairs_in_row=in_row), file)


def write_means(file: Path, before: Shown, after: Shown) -> None:
    """The mean image of each digit, and where it gained (red) or lost (blue) ink."""
    digits = np.asarray(before.digits)
    known = sorted(set(before.digits))
    means = [
        np.stack([shown.pixels[digits == digit].mean(0) for digit in known])
        for shown in (before, after)
    ]
    columns = [
        ("before", [_on_paper(mean) for mean in means[0]]),
        ("after", [_on_paper(mean) for mean in means[1]]),
        ("change", [_in_colours(change) for change in means[1] - means[0]]),
    ]
    names = [
        f"{NAMES[digit]}: {old.mean():.3f} → {new.mean():.3f}"
        for digit, old, new in zip(known, *means, strict=True)
    ]
    write_image(sheet(names, columns, pairs_in_row=5), file)


def _on_paper(pixels: NDArray[np.float32]) -> pil.Image:
    """Ink as black on white; the network paints it white on black."""
    return pil.fromarray(np.rint(255 - pixels * 255).astype(np.uint8))


def _in_colours(change: NDArray[np.float32]) -> pil.Image:
    """Gains of ink as red, losses as blue; a change of a quarter has the full colour."""
    share = np.clip(4 * change, -1, 1)[..., None]
    red, blue = np.array([176, 32, 40]), np.array([30, 80, 170])
    colours = np.where(share > 0, red, blue) * abs(share) + 255 * (1 - abs(share))
    return pil.fromarray(np.rint(colours).astype(np.uint8))
