"""Images of the policy during training.

Sheets, and what log and report say of denoising errors.
"""

from __future__ import annotations

from collections import defaultdict
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from PIL import Image as pil

from mmalign.data.sheet import sheet, write_image
from mmalign.diffusion.sample import generate, load_negative, picture_size, scheduler_for

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence

    from PIL.Image import Image as PilImage
    from torch import Tensor, nn

    from mmalign.config import DiffusionConfig
    from mmalign.core import CandidateLogps, Needs
    from mmalign.diffusion.components import Components
    from mmalign.diffusion.inputs import Inputs


SHEET = "sheet.png"
"""Name of the sheet in the folder of a step's samples."""


# Images of the policy during training, from the same start noise each time.


def check_sampling(components: Components, diffusion: DiffusionConfig) -> None:
    """Refuse, before training, settings of `diffusion.sampling` that no image can be made with.

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
    """One image a prompt, with the settings of `diffusion.sampling`.

    Args:
        inputs: Embeds the prompts and decodes the latents.
        model: The network to sample from.
        prompts: N prompts.
        seeds: Of each start noise; by default `diffusion.sampling.seed` and those after it.
        negative_model: A second network for the empty prompt.
        batch_size: Images at one time.
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
    """Write `samples/step-N/`: an image a prompt, and a sheet beside those of before training.

    Returns:
        A record a prompt, with the image's path inside the run folder.
    """
    spec = inputs.config.diffusion.sampling
    seed = spec.seed
    # Read again each time: it may hold a share of what the policy has learned by now.
    negative = load_negative(spec, inputs.config.model, policy)
    images = paint(inputs, policy, list(prompts.values()), negative_model=negative)
    inputs.release()
    names = [f"{i:03d}.png" for i in range(len(images))]
    folder, before = run / "samples" / f"step-{step}", run / "samples" / "step-0"
    for name, image in zip(names, images, strict=True):
        write_image(image, folder / name)
    columns: list[tuple[str, Sequence[PilImage]]] = [(f"step {step}", images)]
    if step and all((before / name).is_file() for name in names):
        columns.insert(0, ("before", [_opened(before / name) for name in names]))
    write_image(sheet(list(prompts.values()), columns), folder / SHEET)
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
    """Mean errors of the preferred and the rejected images.

    errors/chosen_diff is the policy's error minus the reference's on the preferred images: above
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
