"""Trained weights as files that other programs load, and back."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from peft import LoraConfig, PeftModel, get_peft_model, set_peft_model_state_dict

from mmalign.diffusion.lora_export import lora_of, part_of, times, write, write_lora
from mmalign.errors import CheckpointError
from mmalign.models.adapter import Saved
from mmalign.models.files import denoiser_folder, read_tensors, weight_files
from mmalign.models.lora import wide_norms
from mmalign.models.lora_files import LoraWeights, is_lora, read_lora
from mmalign.models.lora_load import TRAINED
from mmalign.models.lora_settings import start_of
from mmalign.models.merge import without_start

if TYPE_CHECKING:
    from torch import Tensor, nn

    from mmalign.config import RunConfig
    from mmalign.diffusion.models import Components
    from mmalign.models.lora_files import Encoders


def save_trained(
    policy: nn.Module, components: Components, folder: Path, config: RunConfig
) -> Saved:
    """Write what was trained, in the layouts of the programs that will use it.

    A LoRA: `pytorch_lora_weights.safetensors` for diffusers, whose factor B is multiplied by the
    scale alpha / rank, so that it acts alike where a program does not know the scale; and
    `mmalign_kohya.safetensors`, with alpha beside, or `mmalign_comfyui.safetensors` where kohya's
    own reader would lose a part. Whole weights: a folder unet/ or transformer/.

    Returns:
        What was written with who reads it, and what could not be written.
    """
    folder.mkdir(parents=True, exist_ok=True)
    if isinstance(policy, PeftModel):
        readers, notes = write_lora(policy, components, folder, config)
        return Saved(readers, tuple(notes))
    part = part_of(components.family)
    policy.save_pretrained(str(folder / part))  # pyright: ignore[reportCallIssue]
    notes: list[str] = []
    if config.export.dtype is not None:
        for file in weight_files(folder / part):
            write(read_tensors(file), file, getattr(torch, config.export.dtype), notes)
    kind = components.denoiser_config["_class_name"]
    return Saved({f"{part}/": f"diffusers (`{kind}.from_pretrained`), mmalign"}, tuple(notes))


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
        lora = _read_for(policy.get_base_model(), folder)
        if start_of(lora.settings):
            raise CheckpointError(
                f"{folder}: init_lora_weights is {start_of(lora.settings)}, so its factors belong "
                "to a changed base and not under the config's model.lora. Use model.adapter, or "
                "merge it (mmalign merge)"
            )
        _load_factors(policy, lora)
    else:
        _load_whole(policy, folder)
    return policy


def continue_lora(
    denoiser: nn.Module, path: Path, *, dropout: float = 0.0, encoders: Encoders = "stop"
) -> PeftModel:
    """The denoiser with a LoRA from a file, to go on training it.

    Args:
        denoiser: The base; its own parameters are frozen.
        path: File or folder in the layout of diffusers, kohya or peft.
        dropout: Of the LoRA's input.
        encoders: What happens to changes of text encoders in the file.

    Raises:
        CheckpointError: The file is of another model, or of a kind that is not known here.
    """
    lora = without_start(_read_for(denoiser, path, encoders), lambda name: _weight(denoiser, name))
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
    wide_norms(policy)
    _load_factors(policy, lora)
    return policy


def _weight(denoiser: nn.Module, name: str) -> Tensor:
    layer: Any = denoiser.get_submodule(name)
    return layer.weight.detach()


def _load_factors(policy: PeftModel, lora: LoraWeights) -> None:
    """Put the factors of a file under the policy's own scale."""
    own = lora_of(policy)
    odd = sorted(own.parts.keys() ^ lora.parts.keys())
    if odd:
        raise CheckpointError(
            f"{lora.path}: adapts other layers than the config's model.lora: {len(odd)} are in one "
            f"of them only, e.g. {odd[0]}"
        )
    state: dict[str, Tensor] = {}
    for name, parts in lora.parts.items():
        mine = own.parts[name]
        if len(parts["A"]) != len(mine["A"]):
            raise CheckpointError(
                f"{lora.path}: {name} has rank {len(parts['A'])}, but model.lora.rank is "
                f"{len(mine['A'])}"
            )
        if any(parts[part].shape != mine[part].shape for part in ("A", "B")):
            shapes = [[list(own["A"].shape), list(own["B"].shape)] for own in (parts, mine)]
            raise CheckpointError(
                f"{lora.path}: the factors of {name} are {shapes[0]} there and {shapes[1]} in the "
                "config's model; it belongs to another model"
            )
        if ("magnitude" in parts) != ("magnitude" in mine):
            raise CheckpointError(
                f"{lora.path}: one of it and the config's model.lora is a DoRA, the other is not"
            )
        key = f"base_model.model.{name}"
        state[f"{key}.lora_A.weight"] = parts["A"]
        state[f"{key}.lora_B.weight"] = times(parts["B"], lora.scale(name) / own.scale(name))
        if "magnitude" in parts:
            state[f"{key}.lora_magnitude_vector"] = parts["magnitude"]
    set_peft_model_state_dict(policy, state, adapter_name=TRAINED)


def _load_whole(policy: nn.Module, folder: Path) -> None:
    files = weight_files(denoiser_folder(folder))
    state = {name: tensor for file in files for name, tensor in read_tensors(file)[0].items()}
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


def _read_for(denoiser: nn.Module, path: Path, encoders: Encoders = "stop") -> LoraWeights:
    """The LoRA of a file, all of whose layers the denoiser has."""
    names = [name for name, _ in denoiser.named_modules() if ".lora_" not in name]
    known = {name.removesuffix(".base_layer") for name in names}
    lora = read_lora(path, known, encoders=encoders)
    for name, parts in lora.parts.items():
        if name not in known or not {"A", "B"} <= parts.keys():
            raise CheckpointError(f"{path}: {name} fits no layer of the config's model")
    return lora
