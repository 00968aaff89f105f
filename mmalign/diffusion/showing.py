"""Pictures of the policy in the course of a run, from the same start noise each time."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from PIL import Image as pil

from mmalign.diffusion.latents import factor_of
from mmalign.diffusion.negative import load_negative
from mmalign.diffusion.sample import generate, picture_size, scheduler_for
from mmalign.diffusion.sheets import SHEET, write_picture, write_sheet

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence
    from pathlib import Path

    from PIL.Image import Image
    from torch import nn

    from mmalign.config import DiffusionConfig
    from mmalign.diffusion.inputs import Inputs
    from mmalign.diffusion.models import Components


def check_sampling(components: Components, diffusion: DiffusionConfig) -> None:
    """Refuse, before training, settings of `diffusion.sampling` that no picture can be made with.

    Raises:
        ConfigError: A sampler that does not fit the model, or a size that does not fit the VAE.
    """
    scheduler_for(components.scheduler_config, diffusion)
    picture_size(diffusion, factor_of(components.folder))


def paint(
    inputs: Inputs,
    model: nn.Module,
    prompts: Sequence[str],
    *,
    seeds: Sequence[int] | None = None,
    negative_model: nn.Module | None = None,
    batch_size: int = 4,
) -> list[Image]:
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
    columns: list[tuple[str, Sequence[Image]]] = [(f"step {step}", images)]
    if step and all((before / name).is_file() for name in names):
        columns.insert(0, ("before", [_opened(before / name) for name in names]))
    write_sheet(folder / SHEET, list(prompts.values()), columns)
    return [
        {"id": row, "prompt": prompt, "seed": seed + i, "image": f"samples/step-{step}/{names[i]}"}
        for i, (row, prompt) in enumerate(prompts.items())
    ]


def _opened(path: Path) -> Image:
    with pil.open(path) as image:
        return image.convert("RGB")
