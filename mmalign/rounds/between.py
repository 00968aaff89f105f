"""What becomes of a round's result before the next round starts from it: nothing, or momentum.

    theta_{t+1} = hat_{t+1} + alpha (hat_{t+1} - hat_t),    hat_0 = the base

hat is what training ends with, theta what the next round starts from and is measured against. Whole
weights are `mmalign merge BASE --add hat_{t+1}=1+alpha --add hat_t=-alpha`. A LoRA is its product
s B A, and a sum of products is one LoRA whose factors stand side by side: exact, at the sum of the
ranks. The factors themselves must not be extrapolated, since B A is not linear in both.

Source: Accelerated Preference Optimization, He et al. 2024, arXiv:2410.06293; alpha 0.3 is ours.
Departs: weights are extrapolated in place of log-probabilities, which is the same where these are
    linear in the weights.
"""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Mapping
from pathlib import Path

import torch
from torch import Tensor

from mmalign.config.rounds import BetweenSpec
from mmalign.errors import CheckpointError
from mmalign.models.files import ADAPTER_CONFIG, denoiser_folder, save_tensors
from mmalign.models.lora_files import LoraWeights, is_lora, read_lora
from mmalign.models.merge import merge_checkpoints
from mmalign.rounds.weights import Weights

Factors = tuple[Tensor, Tensor]  # B [out, r], A [r, in]; the layer changes by scale * B A


def next_weights(base: str, spec: BetweenSpec, hat: Path, before: Path | None, out: Path) -> str:
    """Make what the next round starts from; it appears whole or not at all.

    Args:
        base: Folder or hub name of the base.
        spec: The section `rounds.between`.
        hat: What the round's training came to.
        before: The same of the round before; None: the base.
        out: Folder to make, or a link where it is `hat` itself.

    Returns:
        What was lost, as a sentence; "" where nothing was.
    """
    alpha = spec.alpha if spec.kind == "momentum" else 0.0
    whole = not is_lora(hat)
    is_part = whole and denoiser_folder(hat) != hat  # of a pipeline, whose rest is the base's
    if alpha == 0.0 and not is_part:
        link(hat, out)
        return ""
    if whole:
        added = [(hat, 1.0 + alpha)] + ([(before, -alpha)] if before and alpha else [])
        merge_checkpoints(base, added, out)
        return ""
    old = None if before is None else read_lora(before, ())
    return write_lora(extrapolated(read_lora(hat, ()), old, alpha, spec.rank), hat, out)


def link(target: Path, out: Path) -> None:
    """Make `out` another name of a folder beside it."""
    os.symlink(os.path.relpath(target, out.parent), out, target_is_directory=True)


def weights_in(folder: Path) -> Weights:
    """A folder of trained weights as what a round starts from."""
    return Weights(folder, adapter=is_lora(folder))


def extrapolated(
    new: LoraWeights, old: LoraWeights | None, alpha: float, rank: int | None
) -> tuple[dict[str, Factors], dict[str, float], float]:
    """The factors of new + alpha (new - old), under the scale of `new`.

    Args:
        new: Of this round.
        old: Of the last one; None: it changed nothing.
        alpha: How far to go on.
        rank: To keep at most; None: all.

    Returns:
        Factors and scale by module, and the share of the change's norm that was cut off.

    Raises:
        CheckpointError: An adapter that is more than low-rank factors, or two of other layers.
    """
    for lora in (new, old):
        odd = [n for n, parts in (lora.parts if lora else {}).items() if parts.keys() - _KNOWN]
        if lora is not None and odd:
            raise CheckpointError(
                f"{lora.path}: {odd[0]} has {', '.join(sorted(lora.parts[odd[0]]))}, and momentum "
                "between rounds adds low-rank factors alone; train a plain LoRA, or all weights"
            )
    if old is not None and old.parts.keys() != new.parts.keys():
        raise CheckpointError(f"{old.path} and {new.path} adapt different layers")
    found: dict[str, Factors] = {}
    scales: dict[str, float] = {}
    lost = total = 0.0
    for module, parts in new.parts.items():
        up, down = (1.0 + alpha) * parts["B"].double(), parts["A"].double()
        scales[module] = scale = new.scale(module)
        if old is not None:
            share = alpha * old.scale(module) / scale
            up = torch.cat([up, -share * old.parts[module]["B"].double()], dim=1)
            down = torch.cat([down, old.parts[module]["A"].double()])
        if rank is not None and rank < len(down):
            b, a, cut, norm = truncated(up.flatten(1), down.flatten(1), rank)
            up, down = b.view(len(b), rank, *up.shape[2:]), a.view(rank, *down.shape[1:])
            lost, total = lost + (scale * cut) ** 2, total + (scale * norm) ** 2
        dtype = parts["B"].dtype
        found[module] = (up.to(dtype).contiguous(), down.to(dtype).contiguous())
    return found, scales, (lost / total) ** 0.5 if total else 0.0


_KNOWN = {"A", "B", "alpha"}


def truncated(up: Tensor, down: Tensor, rank: int) -> tuple[Tensor, Tensor, float, float]:
    """The best factors of a rank for a product: B [out, R] and A [R, in] to B [out, r], A [r, in].

    By singular values of the product of the factors' triangles, so that nothing of the size of the
    layer is made. Both factors get the root of each value.

    Returns:
        The factors, the Frobenius norm of what was cut off, and that of the product.
    """
    (q, r), (p, s) = torch.linalg.qr(up), torch.linalg.qr(down.T)
    left, values, right = torch.linalg.svd(r @ s.T)
    root = values[:rank].sqrt()
    b, a = (q @ left[:, :rank]) * root, root[:, None] * (right[:rank] @ p.T)
    return b, a, float(values[rank:].norm()), float(values.norm())


def write_lora(
    made: tuple[Mapping[str, Factors], Mapping[str, float], float], like: Path, out: Path
) -> str:
    """Write factors in peft's layout, which all modalities continue from.

    Args:
        made: What `extrapolated` gave.
        like: The adapter whose other settings and files are kept.
        out: Folder to make.
    """
    factors, scales, lost = made
    ranks = {module: down.shape[0] for module, (_, down) in factors.items()}
    alphas = {module: scales[module] * rank for module, rank in ranks.items()}
    rank, alpha = (max(v := list(d.values()), key=v.count) for d in (ranks, alphas))
    kept = {}
    if (like / ADAPTER_CONFIG).is_file():
        kept = json.loads((like / ADAPTER_CONFIG).read_text(encoding="utf-8"))
    settings = {
        "task_type": None,
        "fan_in_fan_out": False,
        "bias": "none",
        **kept,
        "peft_type": "LORA",
        "r": rank,
        "lora_alpha": alpha,
        "use_rslora": False,
        "init_lora_weights": True,
        "target_modules": sorted(factors),
        "exclude_modules": None,
        "rank_pattern": {f"^{m}": r for m, r in ranks.items() if r != rank},
        "alpha_pattern": {f"^{m}": a for m, a in alphas.items() if a != alpha},
    }
    tensors: dict[str, Tensor] = {}
    for module, (up, down) in factors.items():
        tensors[f"base_model.model.{module}.lora_A.weight"] = down
        tensors[f"base_model.model.{module}.lora_B.weight"] = up
    partial = out.with_name(f".{out.name}.tmp")
    shutil.rmtree(partial, ignore_errors=True)
    partial.mkdir(parents=True)
    for file in like.iterdir():  # the tokenizer and the like
        if file.is_file() and file.suffix not in (".safetensors", ".md"):
            shutil.copyfile(file, partial / file.name)
    save_tensors(tensors, partial / "adapter_model.safetensors")
    text = json.dumps(settings, indent=2, sort_keys=True) + "\n"
    (partial / ADAPTER_CONFIG).write_text(text, encoding="utf-8")
    partial.rename(out)
    if not lost:
        return ""
    return f"of the LoRA's change {lost:.2%} of its norm was cut off to keep rank {rank}"
