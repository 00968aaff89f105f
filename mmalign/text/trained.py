"""What a run's `final/` holds, put back into a policy: weights as transformers names them."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch

from mmalign.errors import CheckpointError
from mmalign.models.adapter_settings import differences, read_settings
from mmalign.models.files import ADAPTER_CONFIG, opened, weight_files
from mmalign.models.lora_load import (
    LIBRARY_ERRORS,
    TRAINED,
    adapter_tensors,
    one_line,
    put_tensors,
)

if TYPE_CHECKING:
    from collections.abc import Sequence
    from pathlib import Path

    from peft import PeftModel
    from torch import nn
    from transformers import PreTrainedModel


def load_trained(policy: nn.Module, folder: Path) -> nn.Module:
    """Load what a run's `final/` holds into the policy.

    Raises:
        CheckpointError: The folder holds other weights than the policy has, or not all of them.
    """
    from peft import PeftModel

    is_adapter = (folder / ADAPTER_CONFIG).is_file()
    if isinstance(policy, PeftModel) != is_adapter:
        has, lacks = ("a LoRA", "has none") if is_adapter else ("whole weights", "has a LoRA")
        raise CheckpointError(f"{folder}: holds {has}, but the config's model {lacks}")
    if isinstance(policy, PeftModel):
        _load_adapter(policy, folder)
    else:
        _load_whole(policy, folder)  # pyright: ignore[reportArgumentType]
    return policy


def _load_adapter(policy: PeftModel, folder: Path) -> None:
    """The tensors of an adapter whose settings are those of the policy's own."""
    odd = differences(policy.peft_config[TRAINED].to_dict(), read_settings(folder))
    if odd:
        raise CheckpointError(
            f"{folder}: is another adapter than the config's model has; {'; '.join(odd)}. Use the "
            "config that it was trained with"
        )
    put_tensors(policy, adapter_tensors(folder), folder)


def _load_whole(policy: PreTrainedModel, folder: Path) -> None:
    """Whole weights, read by the model's own class.

    Names in a file are those that the model had when it was published, and differ from those of
    its modules for many classes; experts are stored one by one and computed as one tensor.
    """
    weights = _read_as(policy, folder)
    with torch.no_grad():
        own = policy.state_dict()
        odd = sorted(own.keys() ^ weights.keys())
        if odd:
            raise _differs(folder, "tensors are in one of them only", odd)
        for name, tensor in own.items():
            tensor.copy_(weights[name])


def _read_as(policy: PreTrainedModel, folder: Path) -> dict[str, torch.Tensor]:
    """All tensors of a folder by the names of the policy's."""
    for file in weight_files(folder):
        opened(file)  # a damaged one is named before a library meets it
    model, found = _load_like(policy, folder)
    if found["missing_keys"]:
        raise _differs(folder, "tensors are missing from its files", sorted(found["missing_keys"]))
    if found["unexpected_keys"]:
        unknown = sorted(found["unexpected_keys"])
        raise _differs(folder, "tensors are not in the config's model", unknown)
    if found["mismatched_keys"]:
        name, theirs, ours = sorted(found["mismatched_keys"])[0]
        shapes = f"{name} is {list(theirs)} there and {list(ours)} in the config's model"
        raise CheckpointError(f"{folder}: holds another model than the config's: {shapes}")
    return model.state_dict()


def _load_like(policy: PreTrainedModel, folder: Path) -> tuple[PreTrainedModel, dict[str, Any]]:
    cls: Any = type(policy)
    try:
        return cls.from_pretrained(
            folder,
            config=policy.config,
            dtype=policy.dtype,
            ignore_mismatched_sizes=True,  # they are refused above, in words
            output_loading_info=True,
        )
    except LIBRARY_ERRORS as error:
        raise CheckpointError(
            f"{folder}: cannot be read as {cls.__name__}: {one_line(error)}"
        ) from error


def _differs(folder: Path, what: str, names: Sequence[str]) -> CheckpointError:
    return CheckpointError(
        f"{folder}: holds another model than the config's, or a part of one: {len(names)} {what}, "
        f"e.g. {names[0]}"
    )
