"""Trained weights as files that other programs load, and back."""

from __future__ import annotations

import json
import logging
from typing import TYPE_CHECKING, Any

from peft import LoraConfig, PeftModel, get_peft_model, set_peft_model_state_dict

from mmalign.diffusion.kohya import kohya_metadata, kohya_tensors, readable
from mmalign.diffusion.process import process_from
from mmalign.errors import CheckpointError
from mmalign.models.files import denoiser_folder, weight_files
from mmalign.models.lora import TRAINED
from mmalign.models.lora_files import DIFFUSERS_LORA, LoraWeights, is_lora, read_lora

if TYPE_CHECKING:
    from pathlib import Path

    from torch import Tensor, nn

    from mmalign.config import RunConfig
    from mmalign.diffusion.models import Components

KOHYA_LORA = "mmalign_kohya.safetensors"
"""The same LoRA as `pytorch_lora_weights.safetensors`, with the names of kohya and ComfyUI."""

log = logging.getLogger(__name__)


def save_trained(
    policy: nn.Module, components: Components, folder: Path, config: RunConfig
) -> list[Path]:
    """Write what was trained, in the layouts of the programs that will use it.

    A LoRA: `pytorch_lora_weights.safetensors` for diffusers, whose factor B is multiplied by the
    scale alpha / rank, so that it acts alike where a program does not know the scale; and for SD
    and SDXL `mmalign_kohya.safetensors`, with alpha beside. Whole weights: a folder unet/ or
    transformer/.

    Returns:
        What was written.
    """
    folder.mkdir(parents=True, exist_ok=True)
    if not isinstance(policy, PeftModel):
        target = folder / _part(components.family)
        policy.save_pretrained(str(target))  # pyright: ignore[reportCallIssue]
        return [target]
    files = [_save_diffusers(policy, components.family, folder / DIFFUSERS_LORA)]
    problem = _save_kohya(policy, components, folder / KOHYA_LORA, config)
    if problem:
        log.info("%s is not written: %s", KOHYA_LORA, problem)
    else:
        files.append(folder / KOHYA_LORA)
    return files


def load_trained(policy: nn.Module, folder: Path) -> nn.Module:
    """Put what `save_trained` wrote into a policy that is as before training.

    Args:
        policy: With a LoRA of the same rank and targets, or whole weights.
        folder: The folder, or a LoRA file in the layout of diffusers, kohya or peft.

    Returns:
        The policy.

    Raises:
        CheckpointError: The folder holds other weights than the policy has.
    """
    has_lora = isinstance(policy, PeftModel)
    if is_lora(folder) != has_lora:
        has = "a LoRA" if is_lora(folder) else "whole weights"
        lacks = "has a LoRA" if has_lora else "has none"
        raise CheckpointError(f"{folder}: holds {has}, but the config's model {lacks}")
    if isinstance(policy, PeftModel):
        _load_factors(policy, folder)
    else:
        _load_whole(policy, folder)
    return policy


def continue_lora(denoiser: nn.Module, path: Path, *, dropout: float = 0.0) -> PeftModel:
    """The denoiser with a LoRA from a file, to go on training it.

    Args:
        denoiser: The base; its own parameters are frozen.
        path: File or folder in the layout of diffusers, kohya or peft.
        dropout: Of the LoRA's input.

    Raises:
        CheckpointError: The file is of another model, or of a kind that is not known here.
    """
    lora = read_lora(path, _layers(denoiser))
    _check_layers(lora, denoiser)
    ranks = {module: len(parts["A"]) for module, parts in lora.parts.items()}
    rank = max(ranks.values(), key=list(ranks.values()).count)
    alphas = {module: lora.scale(module) * ranks[module] for module in ranks}
    alpha = max(alphas.values(), key=list(alphas.values()).count)
    config = LoraConfig(
        r=rank,
        lora_alpha=alpha,  # pyright: ignore[reportArgumentType]  peft takes any number
        lora_dropout=dropout,
        target_modules=sorted(ranks),
        rank_pattern={f"^{m}": r for m, r in ranks.items() if r != rank},
        alpha_pattern={f"^{m}": a for m, a in alphas.items() if a != alpha},
        use_dora=any("magnitude" in parts for parts in lora.parts.values()),
    )
    policy: Any = get_peft_model(denoiser, config)  # pyright: ignore[reportArgumentType]
    _load_factors(policy, path)
    return policy


def factors(policy: PeftModel) -> dict[str, tuple[Tensor, Tensor, float]]:
    """By name of the layer in the base: A, B and the scale of their product."""
    found: dict[str, tuple[Tensor, Tensor, float]] = {}
    for name, layer in policy.base_model.model.named_modules():
        if TRAINED in getattr(layer, "lora_A", {}):
            down, up = layer.lora_A[TRAINED].weight, layer.lora_B[TRAINED].weight
            found[name] = (down.detach(), up.detach(), float(layer.scaling[TRAINED]))
    return found


def _save_diffusers(policy: PeftModel, family: str, file: Path) -> Path:
    from safetensors.torch import save_file

    prefix = _part(family)
    tensors: dict[str, Tensor] = {}
    for name, (down, up, scale) in factors(policy).items():
        scaled = (up.double() * scale).to(up.dtype)
        tensors[f"{prefix}.{name}.lora_A.weight"] = down.cpu().contiguous()
        tensors[f"{prefix}.{name}.lora_B.weight"] = scaled.cpu().contiguous()
        magnitude = _magnitude(policy, name)
        if magnitude is not None:
            tensors[f"{prefix}.{name}.lora_magnitude_vector"] = magnitude.cpu().contiguous()
    _write(save_file, tensors, file, {"format": "pt", "mmalign": json.dumps(_record(policy))})
    return file


def _record(policy: PeftModel) -> dict[str, Any]:
    """How the LoRA was trained, for people: the file itself says alpha = rank."""
    spec: Any = policy.peft_config[TRAINED]
    return {"rank": spec.r, "alpha": spec.lora_alpha, "scale_in_B": True}


def _save_kohya(
    policy: PeftModel, components: Components, file: Path, config: RunConfig
) -> str | None:
    """Write the file, or say why it cannot be written."""
    family = components.family
    if family == "sd3":
        return "diffusers cannot read kohya's names of SD3; ComfyUI reads diffusers' file"
    spec: Any = policy.peft_config[TRAINED]
    if spec.use_dora:
        return "programs read a DoRA in this layout in different ways"
    from safetensors.torch import save_file

    denoiser: Any = policy.base_model.model
    layers = int(denoiser.config.layers_per_block)
    found = {
        name: (down.cpu().contiguous(), up.cpu().contiguous(), scale * len(down))
        for name, (down, up, scale) in factors(policy).items()
    }
    tensors = kohya_tensors(found, family, layers)
    if not readable(tensors, list(found), family, layers):
        return "model.lora.targets names layers that diffusers does not find in such a file"
    process = process_from(components.scheduler_config, config.diffusion.prediction)
    metadata = kohya_metadata(
        config,
        family,
        rank=spec.r,
        alpha=spec.lora_alpha,
        prediction=process_from(
            components.scheduler_config, config.diffusion.prediction
        ).prediction,
        text_width=denoiser.config.cross_attention_dim,
    )
    _write(save_file, tensors, file, metadata)
    return None


def _write(save: Any, tensors: dict[str, Tensor], file: Path, metadata: dict[str, str]) -> None:
    unfinished = file.with_name(f".{file.name}.tmp")
    save(tensors, unfinished, metadata=metadata)
    unfinished.replace(file)


def _load_factors(policy: PeftModel, path: Path) -> None:
    """Put the factors of a file under the policy's own scale."""
    denoiser = policy.base_model.model
    lora = read_lora(path, _layers(denoiser))
    _check_layers(lora, denoiser)
    own = factors(policy)
    odd = sorted(own.keys() ^ lora.parts.keys())
    if odd:
        raise CheckpointError(
            f"{path}: adapts other layers than the config's model.lora: {len(odd)} are only in one "
            f"of them, e.g. {odd[0]}"
        )
    state: dict[str, Tensor] = {}
    for name, (down, up, scale) in own.items():
        parts = lora.parts[name]
        if parts["A"].shape != down.shape or parts["B"].shape != up.shape:
            raise CheckpointError(
                f"{path}: {name} has rank {len(parts['A'])}, but model.lora.rank is {len(down)}"
            )
        key = f"base_model.model.{name}"
        state[f"{key}.lora_A.weight"] = parts["A"]
        factor = lora.scale(name) / scale
        state[f"{key}.lora_B.weight"] = (parts["B"].double() * factor).to(parts["B"].dtype)
        if ("magnitude" in parts) != (_magnitude(policy, name) is not None):
            raise CheckpointError(f"{path}: of it and the config's model.lora one only is a DoRA")
        if "magnitude" in parts:
            state[f"{key}.lora_magnitude_vector"] = parts["magnitude"]
    set_peft_model_state_dict(policy, state, adapter_name=TRAINED)


def _load_whole(policy: nn.Module, folder: Path) -> None:
    from safetensors.torch import load_file

    files = weight_files(denoiser_folder(folder))
    state = {name: tensor for file in files for name, tensor in load_file(file).items()}
    own = policy.state_dict()
    odd = sorted(own.keys() ^ state.keys()) or [
        name for name, tensor in state.items() if tensor.shape != own[name].shape
    ]
    if odd:
        raise CheckpointError(
            f"{folder}: holds another model than the config's: {len(odd)} tensors differ, e.g. "
            f"{odd[0]}"
        )
    policy.load_state_dict(state)


def _check_layers(lora: LoraWeights, denoiser: nn.Module) -> None:
    known = set(_layers(denoiser))
    for name, parts in lora.parts.items():
        if name not in known or not {"A", "B"} <= parts.keys():
            raise CheckpointError(f"{lora.path}: {name} fits no layer of the config's model")


def _layers(denoiser: nn.Module) -> list[str]:
    """Names of all layers as the base has them, without the wrappers of an adapter."""
    names: list[str] = []
    for name, _ in denoiser.named_modules():
        if not any(part.startswith("lora_") for part in name.split(".")):
            names.append(name.removesuffix(".base_layer"))
    return list(dict.fromkeys(names))


def _magnitude(policy: PeftModel, name: str) -> Tensor | None:
    layer: Any = policy.base_model.model.get_submodule(name)
    vectors = getattr(layer, "lora_magnitude_vector", {})
    return vectors[TRAINED].weight.detach() if TRAINED in vectors else None


def _part(family: str) -> str:
    return "transformer" if family == "sd3" else "unet"
