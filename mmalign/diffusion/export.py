"""Trained weights as files that other programs load, and back."""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping, Sequence
from datetime import UTC, datetime
from functools import partial
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import torch
from peft import LoraConfig, PeftModel, get_peft_model, set_peft_model_state_dict
from torch import Tensor, nn

from mmalign import __version__
from mmalign.config import RunConfig
from mmalign.data.jobs import first_few
from mmalign.diffusion.components import Components
from mmalign.diffusion.families.base import KohyaNames
from mmalign.errors import CheckpointError
from mmalign.models.adapter import Saved
from mmalign.models.files import (
    denoiser_folder,
    folder_tensors,
    read_tensors,
    save_tensors,
    weight_files,
)
from mmalign.models.lora import comfyui_scale, wide_norms
from mmalign.models.lora_files import (
    DIFFUSERS_LORA,
    Encoders,
    LoraWeights,
    Place,
    is_lora,
    read_lora,
)
from mmalign.models.lora_load import TRAINED, one_line
from mmalign.models.lora_settings import start_of
from mmalign.models.merge import without_start


def kohya_tensors(
    lora: LoraWeights, names: KohyaNames, layers: int, weight_of: Callable[[str], Tensor]
) -> dict[str, Tensor]:
    """The tensors of the file; `dora_scale` is ComfyUI's.

    Args:
        lora: By diffusers' name of a layer: A [r, in], B [out, r], alpha, and a DoRA's magnitude.
        names: Of the family's layers.
        layers: The setting that layers are numbered by, `names.layers`.
        weight_of: The weight of a layer of the base, for a DoRA.
    """
    places = dict.fromkeys(names.place(module, layers) for module in lora.parts)
    tensors: dict[str, Tensor] = {}
    for place in places:
        tensors |= _factors(lora, place)
        if any("magnitude" in lora.parts.get(layer, {}) for layer in place.layers):
            tensors[f"{place.name}.dora_scale"] = _dora_scale(lora, place, weight_of)
    return tensors


def _factors(lora: LoraWeights, place: Place) -> dict[str, Tensor]:
    """Layers that are one in the file share its input: A below each other, B along a diagonal."""
    adapted = [layer for layer in place.layers if layer in lora.parts]
    down = torch.cat([lora.parts[layer]["A"] for layer in adapted])
    scale, (outputs, _, *rest) = lora.scale(adapted[0]), lora.parts[adapted[0]]["B"].shape
    up = down.new_zeros(len(place.layers) * outputs, len(down), *rest)
    column = 0
    for row, layer in enumerate(place.layers):
        if layer in lora.parts:
            own = lora.parts[layer]["B"].double() * (lora.scale(layer) / scale)
            columns = slice(column, column + own.shape[1])
            up[row * outputs : (row + 1) * outputs, columns] = own.to(up.dtype)
            column = columns.stop
    return {
        f"{place.name}.lora_down.weight": down,
        f"{place.name}.lora_up.weight": place.turned(up),
        f"{place.name}.alpha": torch.tensor(scale * len(down), dtype=torch.float32),
    }


def _dora_scale(
    lora: LoraWeights, place: Place, weight_of: Callable[[str], Tensor]
) -> Tensor:  # [out, 1], or [out, 1, 1, 1] of a convolution
    found: list[Tensor] = []
    for layer in place.layers:
        weight, parts = weight_of(layer), lora.parts.get(layer)
        if parts is None:  # stays as it is
            found.append(weight.double().flatten(1).norm(dim=1)[:, None])
            continue
        product = parts["B"].double().flatten(1) @ parts["A"].double().flatten(1)
        found.append(comfyui_scale(weight, lora.scale(layer) * product, parts["magnitude"]))
    return place.turned(torch.cat(found)).float()


def kohya_metadata(
    config: RunConfig, components: Components, names: KohyaNames, spec: LoraConfig, for_kohya: bool
) -> dict[str, str]:
    """The header that programs show to who picks a file: all values are text.

    Args:
        config: The run.
        components: What the pipeline's files say.
        names: Of the family.
        spec: The LoRA's rank and alpha.
        for_kohya: Whether kohya's trainer reads all of it, and so is told with what.
    """
    prediction = components.process(config.diffusion).prediction
    version, architecture = components.family.kohya_version(
        names, components.denoiser_config, prediction
    )
    asked, resolution = config.objective, config.diffusion.resolution
    objective = asked.name or " + ".join(asked.mix or {})
    predicts = {"modelspec.prediction_type": "v" if prediction == "v_prediction" else "epsilon"}
    return {
        "format": "pt",
        "ss_base_model_version": version,
        "ss_v2": str(version.startswith("sd_v2")),
        **({"ss_network_module": names.network} if for_kohya else {}),
        "ss_network_dim": str(spec.r),
        "ss_network_alpha": f"{spec.lora_alpha:g}",
        "ss_sd_model_name": config.model.path,
        "ss_output_name": config.output.name,
        "ss_resolution": f"({resolution}, {resolution})",
        "ss_learning_rate": f"{config.train.lr:g}",
        "modelspec.sai_model_spec": "1.0.1",
        "modelspec.architecture": f"{architecture}/lora",
        "modelspec.implementation": names.implementation,
        "modelspec.title": f"{config.output.name} ({objective})",
        "modelspec.description": f"{objective} on {config.model.path}, mmalign {__version__}",
        "modelspec.date": datetime.now(UTC).isoformat(timespec="seconds"),
        "modelspec.resolution": f"{resolution}x{resolution}",
        **(predicts if prediction != "flow" else {}),
    }


def diffusers_reads(
    tensors: Mapping[str, Tensor], modules: Sequence[str], names: KohyaNames, layers_per_block: int
) -> bool:
    """Whether diffusers finds just these layers in a file of kohya's layout, and no DoRA in it."""
    if names.loader is None or any(name.endswith(".dora_scale") for name in tensors):
        return False
    from diffusers.loaders import lora_pipeline
    from diffusers.utils.state_dict_utils import convert_unet_state_dict_to_peft

    loader: Any = getattr(lora_pipeline, names.loader)
    config = SimpleNamespace(layers_per_block=layers_per_block)
    try:
        found = loader.lora_state_dict(dict(tensors), unet_config=config)[0]
    except (ValueError, KeyError, IndexError):
        return False
    own = {name.removeprefix("unet.") for name in convert_unet_state_dict_to_peft(found)}
    return own == {f"{m}.lora_{f}.weight" for m in modules for f in ("A", "B")}


KOHYA_LORA = "mmalign_kohya.safetensors"
"""The same LoRA as `pytorch_lora_weights.safetensors`, with the names of kohya and ComfyUI."""

COMFYUI_LORA = "mmalign_comfyui.safetensors"
"""The same in that layout where kohya's own reader would pass over a part of it."""

_WIDE = (".alpha", ".dora_scale", ".lora_magnitude_vector")  # half of a magnitude's digits are lost


def _save_lora(policy: PeftModel, components: Components, folder: Path, config: RunConfig) -> Saved:
    import diffusers

    lora = lora_of(policy)
    dtype: torch.dtype | None = getattr(torch, config.export.dtype or "", None)
    notes: list[str] = []
    write(_for_diffusers(policy, lora, components), folder / DIFFUSERS_LORA, dtype, notes)
    readers = {DIFFUSERS_LORA: "mmalign"}
    if hasattr(getattr(diffusers, components.family.pipeline), "load_lora_weights"):
        readers[DIFFUSERS_LORA] = "diffusers (`pipeline.load_lora_weights`), mmalign"
    names = components.family.kohya
    if names is None:
        return Saved(readers, tuple(notes))
    unknown = [module for module in lora.parts if not names.is_known(module)]
    layers = _layers(names, components.denoiser_config)
    if unknown or layers is None:
        some = ", ".join(first_few(unknown, 3))
        why = f"ComfyUI has no name for {some}" if unknown else "its blocks differ in size"
        notes.insert(0, f"{KOHYA_LORA} is not written: {why}; use {DIFFUSERS_LORA}")
        return Saved(readers, tuple(notes))
    lacks = _what_kohya_lacks(lora, names)
    file = COMFYUI_LORA if lacks else KOHYA_LORA
    if lacks:
        notes.append(f"{KOHYA_LORA} is not written: {lacks}; ComfyUI reads {COMFYUI_LORA}")
    tensors = kohya_tensors(lora, names, layers, partial(_weight_of, policy.get_base_model()))
    spec: Any = policy.peft_config[TRAINED]
    metadata = kohya_metadata(config, components, names, spec, not lacks)
    write((tensors, metadata), folder / file, dtype, notes)
    readers[file] = "ComfyUI" if lacks else "ComfyUI, kohya's sd-scripts"
    if diffusers_reads(tensors, list(lora.parts), names, layers):
        readers[file] += ", diffusers"
    return Saved(readers, tuple(notes))


def lora_of(policy: PeftModel) -> LoraWeights:
    """The trained factors, by name of the layer in the base; alpha beside them."""
    parts: dict[str, dict[str, Tensor]] = {}
    for name, module in policy.get_base_model().named_modules():
        layer: Any = module
        if TRAINED not in getattr(layer, "lora_A", {}):
            continue
        down, up = layer.lora_A[TRAINED].weight, layer.lora_B[TRAINED].weight
        alpha = torch.tensor(layer.scaling[TRAINED] * len(down), dtype=torch.float64)
        own = {"A": down, "B": up, "alpha": alpha}
        if TRAINED in (getattr(layer, "lora_magnitude_vector", None) or {}):
            own["magnitude"] = layer.lora_magnitude_vector[TRAINED].weight
        parts[name] = {part: tensor.detach() for part, tensor in own.items()}
    return LoraWeights(Path("the policy"), {}, parts)


def write(
    content: tuple[dict[str, Tensor], dict[str, str]],
    file: Path,
    dtype: torch.dtype | None,
    notes: list[str],
) -> None:
    """Write tensors and header in a dtype; as they are, with a note, where it is too small."""
    tensors, metadata = content
    ready = {name: _cast(name, tensor, dtype) for name, tensor in tensors.items()}
    if dtype and not all(bool(tensor.isfinite().all()) for tensor in ready.values()):
        notes.append(f"{file.name} keeps its dtype: its numbers are too large for {dtype}")
        ready = tensors
    save_tensors(ready, file, metadata)


def times(tensor: Tensor, factor: float) -> Tensor:
    """The product, rounded once, in the tensor's dtype."""
    return (tensor.double() * factor).to(tensor.dtype)


def _for_diffusers(
    policy: PeftModel, lora: LoraWeights, components: Components
) -> tuple[dict[str, Tensor], dict[str, str]]:
    """Tensors and header; B is multiplied by the scale, which some readers do not know."""
    tensors: dict[str, Tensor] = {}
    for name, parts in lora.parts.items():
        key = f"{components.family.part}.{name}"
        tensors[f"{key}.lora_A.weight"] = parts["A"]
        tensors[f"{key}.lora_B.weight"] = times(parts["B"], lora.scale(name))
        if "magnitude" in parts:
            tensors[f"{key}.lora_magnitude_vector"] = parts["magnitude"]
    spec: Any = policy.peft_config[TRAINED]
    record = {"rank": spec.r, "alpha": spec.lora_alpha, "scale_in_B": True}  # for people
    return tensors, {"format": "pt", "mmalign": json.dumps(record)}


def _what_kohya_lacks(lora: LoraWeights, names: KohyaNames) -> str | None:
    """What kohya's own reader would lose of a file, in words."""
    if any("magnitude" in parts for parts in lora.parts.values()):
        return "kohya's sd-scripts know no DoRA and would leave its magnitudes out"
    lost = [module for module in lora.parts if not names.kohya_reads(module)]
    if not lost:
        return None
    some = ", ".join(first_few(lost, 3))
    return f"kohya's reader passes over {len(lost)} of {len(lora.parts)} layers ({some})"


def _layers(names: KohyaNames, config: Mapping[str, Any]) -> int | None:
    """What the names of layers depend on; None where one number does not say it."""
    if names.layers is None:
        return 0
    found = config.get(names.layers, 2)
    same = {found} if isinstance(found, int) else {int(number) for number in found}
    return same.pop() if len(same) == 1 else None


def _weight_of(denoiser: nn.Module, name: str) -> Tensor:
    """A layer's own weight, adapted or not."""
    layer: Any = denoiser.get_submodule(name)
    return getattr(layer, "base_layer", layer).weight.detach()


def _cast(name: str, tensor: Tensor, dtype: torch.dtype | None) -> Tensor:
    if dtype is None:
        return tensor
    cast = tensor.to(dtype)
    loses = name.endswith(_WIDE) and not torch.equal(cast.to(tensor.dtype), tensor)
    return tensor if loses else cast


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
        return _save_lora(policy, components, folder, config)
    part = components.family.part
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


def continue_lora(denoiser: nn.Module, path: Path, encoders: Encoders = "stop") -> PeftModel:
    """The denoiser with a LoRA from a file, to go on training it.

    Args:
        denoiser: The base; its own parameters are frozen.
        path: File or folder in the layout of diffusers, kohya or peft.
        encoders: What happens to changes of text encoders in the file.

    Raises:
        CheckpointError: The file is of another model, or of a kind that is not known here.
    """
    lora = without_start(_read_for(denoiser, path, encoders), partial(_weight_of, denoiser))
    ranks = {module: len(parts["A"]) for module, parts in lora.parts.items()}
    rank = max(ranks.values(), key=list(ranks.values()).count)
    alphas = {module: lora.scale(module) * ranks[module] for module in ranks}
    alpha = max(alphas.values(), key=list(alphas.values()).count)
    config = LoraConfig(
        r=rank,
        lora_alpha=alpha,  # pyright: ignore[reportArgumentType]  peft takes any number
        target_modules=sorted(ranks),
        rank_pattern={f"^{m}": r for m, r in ranks.items() if r != rank},
        alpha_pattern={f"^{m}": a for m, a in alphas.items() if a != alpha},
        use_dora=any("magnitude" in parts for parts in lora.parts.values()),
    )
    policy: Any = get_peft_model(denoiser, config)  # pyright: ignore[reportArgumentType]
    wide_norms(policy)
    _load_factors(policy, lora)
    return policy


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
    try:
        policy.load_state_dict(folder_tensors(denoiser_folder(folder)))
    except RuntimeError as error:
        raise CheckpointError(
            f"{folder}: holds another model than the config's: {one_line(error)}"
        ) from error


def _read_for(denoiser: nn.Module, path: Path, encoders: Encoders = "stop") -> LoraWeights:
    """The LoRA of a file, all of whose layers the denoiser has."""
    names = [name for name, _ in denoiser.named_modules() if ".lora_" not in name]
    known = {name.removesuffix(".base_layer") for name in names}
    lora = read_lora(path, known, encoders=encoders)
    for name, parts in lora.parts.items():
        if name not in known or not {"A", "B"} <= parts.keys():
            raise CheckpointError(f"{path}: {name} fits no layer of the config's model")
    return lora
