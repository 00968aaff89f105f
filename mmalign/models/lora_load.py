"""Saved adapters put on a model: on a live one, or into the weights of a base that is in memory."""

from __future__ import annotations

import logging
import re
import warnings
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from safetensors import SafetensorError
from torch import Tensor, nn

from mmalign.errors import CheckpointError
from mmalign.models.files import (
    ADAPTER_CONFIG,
    folder_tensors,
    opened,
    put_tensors,
    read_json,
    weight_files,
)
from mmalign.models.lora_settings import check_settings

if TYPE_CHECKING:
    from peft import PeftModel


log = logging.getLogger(__name__)

TRAINED = "default"  # peft's own name; saved adapters load elsewhere as they are

LIBRARY_ERRORS = (
    OSError,
    ValueError,
    TypeError,
    KeyError,
    AttributeError,
    RuntimeError,
    re.error,
    SafetensorError,
)
"""What peft and transformers raise for settings and tensors that do not fit a model."""


def load_adapter(model: nn.Module, folder: Path, *, trainable: bool) -> PeftModel:
    """The model with an adapter of any kind that peft knows: all of its tensors or none.

    peft itself loads what fits and passes over the rest, with at most a warning.

    Args:
        model: The base, of which some modules are exchanged.
        folder: adapter_config.json and adapter_model.safetensors.
        trainable: Whether its tensors are to be trained; else it is in evaluation mode. Dropout
            that the adapter was trained with is off in both.

    Raises:
        CheckpointError: It cannot be read, or does not fit the model to the last tensor.
    """
    from peft import PeftConfig, get_peft_model

    tensors = folder_tensors(folder)
    try:
        config: Any = PeftConfig.from_pretrained(str(folder))
        config.inference_mode = not trainable
        if getattr(config, "lora_dropout", 0.0):
            log.info(
                "%s: lora_dropout %g of its training is off here, since with it no two scores of "
                "a token are comparable",
                folder,
                config.lora_dropout,
            )
            config.lora_dropout = 0.0
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # what does not fit is found below, tensor by tensor
            policy: Any = get_peft_model(model, config)  # pyright: ignore[reportArgumentType]
    except LIBRARY_ERRORS as error:
        raise CheckpointError(
            f"{folder}: cannot be loaded on this model: {one_line(error)}"
        ) from error
    put_adapter(policy, tensors, folder)
    return policy if trainable else policy.eval()


def put_adapter(policy: PeftModel, tensors: Mapping[str, Tensor], where: Path) -> None:
    """Put the tensors of a file in the place of the adapter's own.

    Raises:
        CheckpointError: Some are missing, unknown to the model, or of another shape.
    """
    from peft import get_peft_model_state_dict

    own = get_peft_model_state_dict(policy, adapter_name=TRAINED, save_embedding_layers=False)
    if own.keys() == tensors.keys():
        put_tensors(own, tensors, where)  # they are views of the adapter's own
    else:  # names of an older class, or a misfit
        _convert(policy, tensors, where)


def _convert(policy: PeftModel, tensors: Mapping[str, Tensor], where: Path) -> None:
    """Put tensors by peft's own conversion of names, and see that nothing was passed over."""
    from peft import set_peft_model_state_dict

    _check_wrapped(policy, tensors, where)
    try:
        result = set_peft_model_state_dict(policy, dict(tensors), adapter_name=TRAINED)
    except LIBRARY_ERRORS as error:
        raise CheckpointError(f"{where}: does not fit the model: {one_line(error)}") from error
    own = _own_names(policy)
    missing = sorted(own.intersection(result.missing_keys))
    unknown = sorted(result.unexpected_keys)
    if missing or unknown:
        raise _misfit(where, missing, unknown, len(own))


def _misfit(
    where: Path, missing: Sequence[str], unknown: Sequence[str], total: int
) -> CheckpointError:
    faults = {f"of {total} tensors are missing": missing, "fit no module of the model": unknown}
    told = "; ".join(
        f"{len(names)} {what}, the first is {names[0].replace(f'.{TRAINED}', '')}"
        for what, names in faults.items()
        if names
    )
    hint = "it belongs to another model" if unknown else "copy it again"
    return CheckpointError(f"{where}: the adapter does not fit the model: {told}; {hint}")


def _own_names(policy: PeftModel) -> set[str]:
    """Names of the adapter's tensors in the model's state."""
    names = policy.state_dict().keys()
    own = {name for name in names if f".{TRAINED}." in f"{name}."}
    config: Any = policy.peft_config[TRAINED]
    bias = getattr(config, "bias", "none")
    biases = {name for name in names if name.endswith(".bias") and name not in own}
    if bias == "all":
        own |= biases
    elif bias.endswith("_only"):
        own |= {name for name in biases if name.endswith(".base_layer.bias")}
    return own


def _check_wrapped(policy: PeftModel, tensors: Mapping[str, Tensor], where: Path) -> None:
    """Modules and tokens saved whole: peft raises a bare KeyError where they are missing."""
    from peft.utils.other import AuxiliaryTrainingWrapper

    for name, module in policy.named_modules():
        if isinstance(module, AuxiliaryTrainingWrapper):
            wanted = [f"{name}.{key}" for key in module.adapter_state_dict_load_map(TRAINED)]
            missing = [key for key in wanted if key not in tensors]
            if missing:
                raise _misfit(where, missing, [], len(tensors) + len(missing))


def one_line(error: BaseException) -> str:
    """A library's message in one line, without the headline that torch puts first."""
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    if len(lines) > 1 and lines[0].startswith("Error(s) in loading state_dict"):
        more = f" (and {len(lines) - 2} more)" if len(lines) > 2 else ""
        return lines[1][:300] + more
    return " ".join(lines)[:300] or type(error).__name__


# The names in the files of many classes are not those of their modules: experts are stored one by
# one and computed as one tensor, published names were changed later. transformers converts them on
# loading and back on saving; peft adds an adapter to what was loaded.


def can_load(base: Path) -> bool:
    """Whether the config of a folder names a class of transformers that is no quantized model."""
    config = base / "config.json"
    if not config.is_file() or (base.parent / "model_index.json").is_file():
        return False
    settings = read_json(config)
    return bool(settings.get("architectures")) and "quantization_config" not in settings


def as_files_of(base: Path, added: Path, into: Path) -> Path:
    """A checkpoint or an adapter as a full checkpoint with the names of the base's files.

    Args:
        base: Folder of a model of transformers.
        added: Full checkpoint of the same model, or an adapter of any kind that peft merges.
        into: Folder to fill, with float32 weights (float64 where the base has them).

    Returns:
        `into`.

    Raises:
        CheckpointError: It does not fit the model, or cannot be merged.
    """
    log.info("%s: names differ from those in the base's files; merged through the model", added)
    model: Any = _load(base)
    tied = getattr(model.config.get_text_config(), "tie_word_embeddings", False)
    if (added / ADAPTER_CONFIG).is_file():
        model = _with_adapter(model, added, tied=tied)
    else:
        try:
            model.load_state_dict(_load(added).state_dict())
        except RuntimeError as error:
            raise CheckpointError(
                f"{added} and the base hold different tensors: {one_line(error)}. Merge "
                "checkpoints of one model"
            ) from error
    if tied:
        _refuse_untied(model, added)
    try:
        model.save_pretrained(into)
    except LIBRARY_ERRORS as error:
        raise CheckpointError(
            f"{added}: merged into {base}, it cannot be saved: {one_line(error)}"
        ) from error
    return into


def from_folder(kind: Any, folder: Path, **options: Any) -> tuple[Any, dict[str, Any]]:
    """A model of a class of transformers, and what of its weights was not as it should be.

    Raises:
        CheckpointError: The folder cannot be read as this class.
    """
    for file in weight_files(folder):
        opened(file)  # a damaged one is named before a library meets it
    try:
        return kind.from_pretrained(folder, output_loading_info=True, **options)
    except LIBRARY_ERRORS as error:
        raise CheckpointError(
            f"{folder}: cannot be loaded as {kind.__name__}: {one_line(error)}"
        ) from error


def _load(folder: Path) -> Any:
    import transformers

    name = str(read_json(folder / "config.json")["architectures"][0])
    kind = getattr(transformers, name, transformers.AutoModelForCausalLM)
    model, found = from_folder(kind, folder, dtype=_widest(folder))
    if found["missing_keys"]:
        missing = sorted(found["missing_keys"])
        raise CheckpointError(
            f"{folder}: {len(missing)} tensors of {name} are missing from its files, e.g. "
            f"{missing[0]}"
        )
    return model


def _widest(folder: Path) -> Any:
    """float64 where the files hold it, else float32: a sum in bfloat16 would be rounded twice."""
    for file in weight_files(folder):
        with opened(file) as handle:
            for name in handle.keys():  # noqa: SIM118  not a dict
                if handle.get_slice(name).get_dtype() == "F64":
                    return torch.float64
    return torch.float32


def _with_adapter(model: nn.Module, folder: Path, *, tied: bool) -> Any:
    from peft.tuners.lora import LoraLayer

    settings = read_json(folder / ADAPTER_CONFIG)
    kind = settings.get("peft_type")
    if kind == "LORA":
        check_settings(folder, settings)
    policy: Any = load_adapter(model, folder, trainable=False)
    if not hasattr(policy.base_model, "merge_and_unload"):
        raise CheckpointError(f"{folder} is a {kind} adapter, which is not a change of the weights")
    ends = (policy.get_input_embeddings(), policy.get_output_embeddings())
    if tied and any(isinstance(layer, LoraLayer) for layer in ends):  # peft would change both
        raise _untied(folder)
    _refuse_shared(policy, folder)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # that a tied weight is changed is refused below
            return policy.merge_and_unload()
    except LIBRARY_ERRORS as error:
        raise CheckpointError(f"{folder}: peft cannot merge it: {one_line(error)}") from error


def _refuse_shared(policy: nn.Module, folder: Path) -> None:
    """Refuse adapters on layers that are one weight in the base (Zamba 2): they would add up."""
    from peft.tuners.lora import LoraLayer

    names: dict[int, list[str]] = {}
    for name, layer in policy.named_modules():
        weight: Any = None
        if isinstance(layer, LoraLayer):
            weight = getattr(layer.get_base_layer(), "weight", None)
        if weight is not None:
            names.setdefault(weight.data_ptr(), []).append(name.removeprefix("base_model.model."))
    shared = [found for found in names.values() if len(found) > 1]
    if shared:
        raise CheckpointError(
            f"{folder}: changes layers that share one weight in the base ({len(shared)} weights, "
            f"e.g. of {shared[0][0]} and {shared[0][1]}), each in its own way; merged, the changes "
            "would add up. Use the adapter as it is"
        )


def _refuse_untied(model: Any, added: Path) -> None:
    """Refuse an embedding that was changed without the output head that shares its weight."""
    embedding, head = model.get_input_embeddings(), model.get_output_embeddings()
    if embedding is None or head is None or torch.equal(embedding.weight, head.weight):
        return
    raise _untied(added)


def _untied(added: Path) -> CheckpointError:
    return CheckpointError(
        f"{added}: changes one of the embedding and the output head, which share one weight in the "
        "base (tie_word_embeddings); merged, it would change both"
    )
