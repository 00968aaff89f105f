"""Checkpoints that fit a base in memory only, written as the base's files would hold them.

The names in the files of many classes are not those of their modules: experts are stored one by one
and computed as one tensor, published names were changed later. transformers converts them on
loading and back on saving; peft adds an adapter to what was loaded.
"""

from __future__ import annotations

import logging
import warnings
from typing import TYPE_CHECKING, Any

from mmalign.errors import CheckpointError
from mmalign.models.adapter_settings import check_settings
from mmalign.models.files import ADAPTER_CONFIG, opened, read_json, weight_files
from mmalign.models.lora_load import LIBRARY_ERRORS, load_adapter, one_line

if TYPE_CHECKING:
    from pathlib import Path

    from torch import nn

log = logging.getLogger(__name__)


def can_load(base: Path) -> bool:
    """Whether the config of a folder names a class of transformers that is no quantised model."""
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
        _take_over(model, _load(added), added)
    if tied:
        _refuse_untied(model, added)
    try:
        model.save_pretrained(into)
    except LIBRARY_ERRORS as error:
        raise CheckpointError(
            f"{added}: merged into {base}, it cannot be saved: {one_line(error)}"
        ) from error
    return into


def _load(folder: Path) -> Any:
    import transformers

    settings = read_json(folder / "config.json")
    name = str(settings["architectures"][0])
    loader: Any = getattr(transformers, name, None) or transformers.AutoModelForCausalLM
    for file in weight_files(folder):
        opened(file)  # a damaged one is named before a library meets it
    try:
        model, found = loader.from_pretrained(
            folder, dtype=_widest(folder), output_loading_info=True
        )
    except LIBRARY_ERRORS as error:
        raise CheckpointError(f"{folder}: cannot be loaded as {name}: {one_line(error)}") from error
    if found["missing_keys"]:
        missing = sorted(found["missing_keys"])
        raise CheckpointError(
            f"{folder}: {len(missing)} tensors of {name} are missing from its files, e.g. "
            f"{missing[0]}"
        )
    return model


def _widest(folder: Path) -> Any:
    """float64 where the files hold it, else float32: a sum in bfloat16 would be rounded twice."""
    import torch

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
        raise CheckpointError(f"{folder} is a {kind} adapter, which is no change of the weights")
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


def _take_over(model: Any, other: Any, added: Path) -> None:
    """Put all values of another model of the same kind into `model`."""
    state, own = other.state_dict(), model.state_dict()
    odd = sorted(state.keys() ^ own.keys()) or [
        name for name, tensor in state.items() if tensor.shape != own[name].shape
    ]
    if odd:
        raise CheckpointError(
            f"{added} and the base hold different tensors: {len(odd)} are only in one of them or "
            f"of other shapes, e.g. {odd[0]!r}. Merge checkpoints of one model"
        )
    model.load_state_dict(state)


def _refuse_untied(model: Any, added: Path) -> None:
    """Refuse an embedding that was changed without the output head that shares its weight."""
    import torch

    embedding, head = model.get_input_embeddings(), model.get_output_embeddings()
    if embedding is None or head is None or torch.equal(embedding.weight, head.weight):
        return
    raise _untied(added)


def _untied(added: Path) -> CheckpointError:
    return CheckpointError(
        f"{added}: changes one of the embedding and the output head, which share one weight in the "
        "base (tie_word_embeddings); merged, it would change both"
    )
