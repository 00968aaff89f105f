"""Pictures of the policy during training.

Sheets, and what log and report say of denoising errors.
"""

from __future__ import annotations

from collections import defaultdict
from functools import cache
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from PIL import Image, ImageDraw, ImageFont
from PIL import Image as pil

from mmalign.diffusion.sample import generate, load_negative, picture_size, scheduler_for
from mmalign.safe import replacing

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence

    from PIL.Image import Image as PilImage
    from torch import Tensor, nn

    from mmalign.config import DiffusionConfig
    from mmalign.core import CandidateLogps, Needs
    from mmalign.diffusion.components import Components
    from mmalign.diffusion.inputs import Inputs


# Sheets of pictures: grids, and policy beside reference for the same prompts and start noise.

SHEET = "sheet.png"
"""Name of the sheet in the folder of a step's samples."""

_SMALL, _LARGE = 96, 256  # sides between which pictures are shown
_GAP, _PAPER, _INK, _SOFT = 8, "white", "#1b1f27", "#505968"
_MAX_LINES = 3
_PAGE = 1100  # width of a sheet


def grid(
    images: Sequence[Image.Image], columns: int, labels: Sequence[str] | None = None
) -> Image.Image:
    """Pictures row by row, each over its label.

    Args:
        images: Of any sizes; small ones are enlarged by a whole factor without smoothing, large
            ones made smaller.
        columns: Pictures in a row.
        labels: Text under each picture; None for none.

    Raises:
        ValueError: No pictures, or as many labels as there are not pictures.
    """
    if not images or columns < 1:
        raise ValueError("a grid needs at least one picture and one column")
    names = [""] * len(images) if labels is None else labels
    cells = [_captioned([image], name) for image, name in zip(images, names, strict=True)]
    return _arranged(cells, columns)


def sheet(
    prompts: Sequence[str],
    columns: Sequence[tuple[str, Sequence[Image.Image]]],
    *,
    pairs_in_row: int | None = None,
) -> Image.Image:
    """The same prompts under several models, side by side, each prompt below its pictures.

    Args:
        prompts: One a row of pictures.
        columns: Name of a model and its pictures, one a prompt, e.g. ("reference", [...]).
        pairs_in_row: Prompts beside each other; by default as many as fit into about 1100 pixels.

    Raises:
        ValueError: Columns of other lengths than the prompts.
    """
    if not prompts or any(len(images) != len(prompts) for _, images in columns):
        raise ValueError("a sheet needs one picture of each model for each prompt")
    names = [name for name, _ in columns]
    cells = [
        _captioned([images[i] for _, images in columns], prompt, names)
        for i, prompt in enumerate(prompts)
    ]
    widest = max(cell.width for cell in cells) + 2 * _GAP
    return _arranged(cells, pairs_in_row or max(1, _PAGE // widest))


def write_sheet(
    path: Path, prompts: Sequence[str], columns: Sequence[tuple[str, Sequence[Image.Image]]]
) -> Path:
    """Write `sheet(prompts, columns)` as a PNG file, complete or not at all."""
    return write_picture(sheet(prompts, columns), path)


def write_picture(image: Image.Image, path: Path) -> Path:
    """Write a PNG file, complete or not at all."""
    path.parent.mkdir(parents=True, exist_ok=True)
    with replacing(path) as temporary:
        image.save(temporary, format="PNG")
    return path


def shown(image: Image.Image) -> Image.Image:
    """The picture as RGB at a size that can be looked at.

    Pictures below 96 pixels become larger by a whole factor, pixel by pixel; pictures above 256
    become smaller.
    """
    picture = image.convert("RGB")
    longest = max(picture.size)
    if longest < _SMALL:
        factor = -(-_SMALL // longest)
        size = (picture.width * factor, picture.height * factor)
        return picture.resize(size, Image.Resampling.NEAREST)
    if longest > _LARGE:
        picture.thumbnail((_LARGE, _LARGE), Image.Resampling.LANCZOS)
    return picture


def _captioned(
    images: Sequence[Image.Image], caption: str, names: Sequence[str] = ()
) -> Image.Image:
    """Pictures beside each other, their names above and the caption below."""
    pictures = [shown(image) for image in images]
    width = sum(p.width for p in pictures) + _GAP * (len(pictures) - 1)
    width = max(width, 2 * _SMALL if names else 0)
    small, normal = _font(11), _font(12)
    lines = _wrapped(caption, normal, width)
    head, line = (15 if names else 0), 16
    height = head + max(p.height for p in pictures) + (4 + line * len(lines) if lines else 0)
    cell = Image.new("RGB", (width, height), _PAPER)
    draw = ImageDraw.Draw(cell)
    left = 0
    for index, picture in enumerate(pictures):
        if names:
            draw.text((left, 0), names[index], font=small, fill=_SOFT)
        cell.paste(picture, (left, head))
        left += picture.width + _GAP
    for index, text in enumerate(lines):
        top = height - line * (len(lines) - index)
        draw.text((0, top), text, font=normal, fill=_INK)
    return cell


@cache
def _font(size: int) -> ImageFont.FreeTypeFont:
    """A font that every installation has; matplotlib brings it, with Greek and Cyrillic."""
    import matplotlib as mpl

    return ImageFont.truetype(Path(mpl.get_data_path()) / "fonts/ttf/DejaVuSans.ttf", size)


def _wrapped(text: str, font: ImageFont.FreeTypeFont, width: int) -> list[str]:
    """Lines of at most `width` pixels, at most three; what does not fit ends in an ellipsis."""
    lines: list[str] = []
    for word in text.split():
        longer = f"{lines[-1]} {word}" if lines else word
        if lines and font.getlength(longer) <= width:
            lines[-1] = longer
        else:
            lines.append(word)
    if len(lines) > _MAX_LINES:
        lines = [*lines[: _MAX_LINES - 1], f"{lines[_MAX_LINES - 1]} ..."]
    return [_cut(line, font, width) for line in lines]


def _cut(line: str, font: ImageFont.FreeTypeFont, width: int) -> str:
    if font.getlength(line) <= width:
        return line
    stem = line.removesuffix(" ...")
    while stem and font.getlength(f"{stem}...") > width:
        stem = stem[:-1]
    return f"{stem}..."


def _arranged(cells: Sequence[Image.Image], columns: int) -> Image.Image:
    """Cells in rows; a column is as wide as its widest cell, a row as high as its highest."""
    columns = min(columns, len(cells))
    rows = [cells[i : i + columns] for i in range(0, len(cells), columns)]
    widths = [max(row[j].width for row in rows if j < len(row)) for j in range(columns)]
    heights = [max(cell.height for cell in row) for row in rows]
    gap = 2 * _GAP
    size = (sum(widths) + gap * (columns + 1), sum(heights) + gap * (len(rows) + 1))
    page = Image.new("RGB", size, _PAPER)
    top = gap
    for row, height in zip(rows, heights, strict=True):
        left = gap
        for cell, width in zip(row, widths, strict=False):
            page.paste(cell, (left, top))
            left += width + gap
        top += height + gap
    return page


# Pictures of the policy in the course of a run, from the same start noise each time.


def check_sampling(components: Components, diffusion: DiffusionConfig) -> None:
    """Refuse, before training, settings of `diffusion.sampling` that no picture can be made with.

    Raises:
        ConfigError: A sampler that does not fit the model, or a size that does not fit the VAE.
    """
    height, width = picture_size(diffusion, components.factor)
    scheduler_for(components, diffusion, (height // components.factor, width // components.factor))


def paint(
    inputs: Inputs,
    model: nn.Module,
    prompts: Sequence[str],
    *,
    seeds: Sequence[int] | None = None,
    negative_model: nn.Module | None = None,
    batch_size: int = 4,
) -> list[PilImage]:
    """One picture a prompt, with the settings of `diffusion.sampling`.

    Args:
        inputs: Embeds the prompts and decodes the latents.
        model: The network to sample from.
        prompts: N prompts.
        seeds: Of each start noise; by default `diffusion.sampling.seed` and those after it.
        negative_model: A second network for the empty prompt.
        batch_size: Pictures at one time.
    """
    device = next(model.parameters()).device
    diffusion = inputs.config.diffusion
    first = diffusion.sampling.seed
    return generate(
        model,
        inputs.components,
        inputs.vae.to(device),
        diffusion,
        inputs.embed(prompts, device),
        inputs.empty(device) if diffusion.sampling.guidance > 1.0 else None,
        seeds=range(first, first + len(prompts)) if seeds is None else seeds,
        negative_model=negative_model,
        batch_size=batch_size,
    )


def write_samples(
    inputs: Inputs, policy: nn.Module, prompts: Mapping[str, str], run: Path, step: int
) -> list[dict[str, Any]]:
    """Write `samples/step-N/`: a picture a prompt, and a sheet beside those of before training.

    Returns:
        A record a prompt, with the picture's path inside the run folder.
    """
    spec = inputs.config.diffusion.sampling
    seed = spec.seed
    # Read anew each time: it may hold a share of what the policy has learned by now.
    negative = load_negative(spec, inputs.config.model, policy)
    images = paint(inputs, policy, list(prompts.values()), negative_model=negative)
    inputs.release()
    names = [f"{i:03d}.png" for i in range(len(images))]
    folder, before = run / "samples" / f"step-{step}", run / "samples" / "step-0"
    for name, image in zip(names, images, strict=True):
        write_picture(image, folder / name)
    columns: list[tuple[str, Sequence[PilImage]]] = [(f"step {step}", images)]
    if step and all((before / name).is_file() for name in names):
        columns.insert(0, ("before", [_opened(before / name) for name in names]))
    write_sheet(folder / SHEET, list(prompts.values()), columns)
    return [
        {"id": row, "prompt": prompt, "seed": seed + i, "image": f"samples/step-{step}/{names[i]}"}
        for i, (row, prompt) in enumerate(prompts.items())
    ]


def _opened(path: Path) -> PilImage:
    with pil.open(path) as image:
        return image.convert("RGB")


# What the log and the report say of denoising errors.

NUM_BUCKETS = 4


@torch.no_grad()
def batch_metrics(logps: CandidateLogps, logp_scale: float, needs: Needs) -> dict[str, Tensor]:
    """Mean errors of the preferred and the rejected pictures.

    errors/chosen_diff is the policy's error minus the reference's on the preferred pictures: above
    0 the policy explains them worse than before, which implicit accuracy does not show.

    Args:
        logps: Scores -logp_scale * e, [B, K, 1].
        logp_scale: Log-probability a unit of error.
        needs: Of the objective: which candidates are not rated, and whether rows are.
    """
    num_rated = logps.labels.shape[1] - len(needs.roles)
    labels = logps.labels[:, :num_rated]
    sides = {"policy": -logps.policy[:, :num_rated, 0] / logp_scale}  # [B, K rated]
    if logps.reference is not None:
        sides["ref"] = -logps.reference[:, :num_rated, 0] / logp_scale
    if num_rated == 1 and needs.rows != "unpaired":
        picked = {name: {"chosen": e.mean()} for name, e in sides.items()}
    elif num_rated == 1:
        # The mean of none is nan, which does not count; choosing rows would wait for a GPU.
        good = (labels[:, 0] > 0.5).to(logps.policy.dtype)
        shares = {"chosen": good / good.sum(), "rejected": (1 - good) / (1 - good).sum()}
        picked = {
            name: {side: (share * e[:, 0]).sum() for side, share in shares.items()}
            for name, e in sides.items()
        }
    else:
        at = torch.arange(len(labels), device=labels.device)
        best = labels.argmax(1)
        worst = num_rated - 1 - labels.flip(1).argmin(1)
        picked = {
            name: {"chosen": e[at, best].mean(), "rejected": e[at, worst].mean()}
            for name, e in sides.items()
        }
    found: dict[str, Tensor] = {}
    for side in picked["policy"]:
        errors = {name: values[side] for name, values in picked.items()}
        found |= {f"errors/{name}_{side}": value for name, value in errors.items()}
        if "ref" in errors:
            found[f"errors/{side}_diff"] = errors["policy"] - errors["ref"]
    return found


def by_timestep(rows: Sequence[Mapping[str, Any]], logp_scale: float) -> dict[str, float]:
    """Held-out implicit accuracy and error differences, over all rows and by noise level.

    Args:
        rows: With `labels`, `logps`, `noise_level`, and `ref_logps` where there is a reference.
        logp_scale: Log-probability a unit of error.

    Returns:
        errors/policy_chosen, errors/chosen_diff, errors/rejected_diff over all rows; the last two
        and reward_accuracy also as NAME/tLOW-HIGH, where LOW and HIGH are per mille of the
        schedule.
    """
    columns: dict[str, list[float]] = defaultdict(list)
    for row in rows:
        labels, logps = row["labels"], row["logps"]
        best, worst = labels.index(max(labels)), len(labels) - 1 - labels[::-1].index(min(labels))
        side = "chosen" if labels[best] > 0.5 or len(labels) > 1 else "rejected"
        columns[f"errors/policy_{side}"].append(-logps[best] / logp_scale)
        if "ref_logps" not in row:
            continue
        ratios = [p - r for p, r in zip(logps, row["ref_logps"], strict=True)]
        values = {f"errors/{side}_diff": -ratios[best] / logp_scale}
        if len(labels) > 1:
            values["errors/rejected_diff"] = -ratios[worst] / logp_scale
            values["reward_accuracy"] = (
                0.5 if ratios[best] == ratios[worst] else float(ratios[best] > ratios[worst])
            )
        bucket = min(int(row["noise_level"] * NUM_BUCKETS), NUM_BUCKETS - 1)
        width = 1000 // NUM_BUCKETS
        name = f"t{bucket * width:03d}-{(bucket + 1) * width - 1:03d}"
        for key, value in values.items():
            if key != "reward_accuracy":
                columns[key].append(value)
            columns[f"{key}/{name}"].append(value)
    return {key: sum(found) / len(found) for key, found in sorted(columns.items())}
