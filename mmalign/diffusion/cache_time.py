"""How long `mmalign cache` will take: an entry of each kind is computed and timed, not stored."""

from __future__ import annotations

import time
from typing import TYPE_CHECKING

import torch

from mmalign.diffusion import latents
from mmalign.diffusion.conditioning import PromptEncoder
from mmalign.diffusion.work import Processes, duration
from mmalign.diffusion.write_cache import CAPTIONS_AT_ONCE, pictures_at_once

if TYPE_CHECKING:
    from collections.abc import Callable

    from mmalign.config import RunConfig
    from mmalign.core import Needs
    from mmalign.diffusion.cache_plan import Plan


def forecast(plan: Plan, config: RunConfig, needs: Needs) -> str:
    """A sentence on the time that writing what is missing takes on this machine.

    Loads each part's model in turn, as writing does. Reading pictures is not in it: threads do that
    while the VAE works.

    Args:
        plan: What is missing.
        config: The run.
        needs: Of its objective.
    """
    parts: list[str] = []
    total = 0.0
    for part in plan.parts:
        if not part.missing:
            continue
        seconds = part.missing * _TIMERS[part.name](config, needs)
        total += seconds
        parts.append(f"{part.name} {duration(seconds)}")
    if not parts:
        return "nothing is left to compute"
    return f"about {duration(total)} on this device ({', '.join(parts)}), by timing one entry each"


def _latents(config: RunConfig, needs: Needs) -> float:
    place, model, side = Processes.launched(), config.model, config.diffusion.resolution
    vae = latents.load_vae(model.path, config.diffusion, revision=model.revision).to(place.device)
    size = pictures_at_once((3, side, side), place)
    pixels = torch.zeros(size, 3, side, side, device=place.device)
    return _seconds(lambda: vae.encode(pixels)) / size


def _prompts(config: RunConfig, needs: Needs) -> float:
    place, model = Processes.launched(), config.model
    dtype = getattr(torch, model.dtype)
    encoder = PromptEncoder.load(model.path, None, dtype, place.device, revision=model.revision)
    size = 1 if place.device.type == "cpu" else CAPTIONS_AT_ONCE
    return _seconds(lambda: encoder.encode(["a picture"] * size)) / size


def _errors(config: RunConfig, needs: Needs) -> float:
    from mmalign.core import Needs
    from mmalign.diffusion.adapter import DiffusionAdapter
    from mmalign.models.adapter import load_usable

    rows = load_usable(config, needs)[0][:1]
    place, draws = Processes.launched(), config.diffusion.num_draws
    policy = DiffusionAdapter.for_bank(config, Needs()).to(place.device).eval()
    policy.before_training(rows)
    size = min(draws, config.train.eval_batch_size or config.train.batch_size)
    batch = policy.collate(rows * size, list(range(size))).to(place.device)
    return _seconds(lambda: policy(batch, Needs())) * draws / size


def _seconds(work: Callable[[], object]) -> float:
    """Of a second call; the first one also sets things up."""
    with torch.no_grad():
        for _ in range(2):
            began = time.perf_counter()
            work()
            if torch.cuda.is_available():
                torch.cuda.synchronize()
            found = time.perf_counter() - began
    return found


_TIMERS: dict[str, Callable[[RunConfig, Needs], float]] = {
    "latents": _latents,
    "prompts": _prompts,
    "reference errors": _errors,
}
