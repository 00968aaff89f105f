"""Weights of one part of a pipeline: safetensors only, complete, and never any code."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from torch import nn

from mmalign.errors import ConfigError
from mmalign.models.cpu import use_onednn, use_products

STEMS = ("diffusion_pytorch_model", "model")


def load_part(kind: Any, folder: Path, dtype: torch.dtype) -> Any:
    """A part in evaluation mode, without dropout, its matrix products fast on a CPU.

    Args:
        kind: The class, of diffusers or of transformers.
        folder: With config.json and safetensors.
        dtype: Of its weights.

    Raises:
        ConfigError: It cannot be loaded, or the file lacks weights, which both libraries would
            fill with random numbers.
    """
    try:
        model, report = kind.from_pretrained(
            str(folder),
            dtype=dtype,
            use_safetensors=True,
            variant=variant_of(folder),
            local_files_only=True,
            output_loading_info=True,
        )
    except (OSError, ValueError, RuntimeError, KeyError) as error:
        raise ConfigError(f"{folder}: cannot be loaded as {kind.__name__}: {error}") from error
    if report["missing_keys"]:
        missing = sorted(report["missing_keys"])
        raise ConfigError(
            f"{folder}: the weights are incomplete: {len(missing)} of {kind.__name__} are not in "
            f"the file, e.g. {missing[0]}"
        )
    use_onednn(model)
    use_products(model)
    return without_dropout(model).eval()


def without_dropout(model: nn.Module) -> nn.Module:
    """The model with every dropout set to 0: with it, no two errors can be compared."""
    for module in model.modules():
        if isinstance(module, nn.Dropout):
            module.p = 0.0
    return model


def variant_of(folder: Path) -> str | None:
    """`fp16` and the like where a part has only such weights; None where it has plain ones.

    Raises:
        ConfigError: No safetensors at all.
    """
    names = sorted(file.name for file in folder.glob("*.safetensors"))
    if not names:
        raise ConfigError(
            f"{folder}: has no .safetensors file; only those are read, since other formats can run "
            "code. Save the pipeline again with safe_serialization=True"
        )
    plain = tuple(f"{stem}{end}" for stem in STEMS for end in (".safetensors", "-0"))
    if any(name.startswith(plain) for name in names):
        return None
    return names[0].split(".")[1].split("-")[0] if names[0].count(".") > 1 else None
