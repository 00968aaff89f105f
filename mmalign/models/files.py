"""Checkpoints as files: where they lie, which tensors they hold, what identifies them."""

from __future__ import annotations

import hashlib
import json
from pathlib import Path
from typing import TYPE_CHECKING

from mmalign.errors import CheckpointError

if TYPE_CHECKING:
    from torch import Tensor, nn

ADAPTER_CONFIG = "adapter_config.json"


def local_folder(path: str | Path, revision: str | None = None) -> Path:
    """The folder itself, or the local copy of a hub repository's safetensors and settings.

    Raises:
        CheckpointError: when it is neither.
    """
    if Path(path).is_dir():
        return Path(path)
    from huggingface_hub import snapshot_download

    patterns = ["*.safetensors", "*.json", "*.txt", "*.model", "*.jinja"]
    try:
        return Path(snapshot_download(str(path), revision=revision, allow_patterns=patterns))
    except (OSError, ValueError) as error:
        raise CheckpointError(
            f"{path} is no folder, and cannot be had from the hub: {error}"
        ) from error


def denoiser_folder(folder: Path) -> Path:
    """The folder with the weights: unet/ or transformer/ of a diffusers pipeline, or the folder."""
    for name in ("unet", "transformer"):
        if (folder / name / "config.json").is_file():
            return folder / name
    return folder


def weight_files(folder: Path) -> list[Path]:
    """The safetensors files of one checkpoint: those of its index, else the usual name, else all.

    Raises:
        CheckpointError: when there is none.
    """
    # Shortest name first: of a model and its fp16 variant the model.
    for index in sorted(folder.glob("*.safetensors.index.json"), key=lambda p: (len(p.name), p)):
        named = set(json.loads(index.read_text(encoding="utf-8"))["weight_map"].values())
        return [folder / name for name in sorted(named)]
    names = ("model", "diffusion_pytorch_model", "adapter_model")
    for name in (f"{stem}.safetensors" for stem in names):
        if (folder / name).is_file():
            return [folder / name]
    files = sorted(folder.glob("*.safetensors"))
    if not files:
        raise CheckpointError(
            f"{folder} has no .safetensors file; save the model with safe_serialization (the "
            "default of transformers)"
        )
    return files


def fingerprint(path: str | Path, revision: str | None = None) -> str:
    """Hash of a checkpoint's weights and settings, read from its files; the same on any machine."""
    folder = local_folder(path, revision)
    digest = hashlib.sha256()
    settings = [folder / name for name in ("config.json", ADAPTER_CONFIG)]
    for file in [*weight_files(folder), *(item for item in settings if item.is_file())]:
        with file.open("rb") as stream:
            digest.update(file.name.encode() + hashlib.file_digest(stream, "sha256").digest())
    return digest.hexdigest()


def state_fingerprint(model: nn.Module) -> str:
    """Hash of a model's parameters and buffers in memory: names, dtypes, shapes and values."""
    digest = hashlib.sha256()
    for name, tensor in sorted(model.state_dict().items()):
        digest.update(f"{name} {tensor.dtype} {list(tensor.shape)}".encode())
        digest.update(_bytes(tensor))
    return digest.hexdigest()


def _bytes(tensor: Tensor) -> bytes:
    import torch

    return tensor.detach().cpu().contiguous().flatten().view(torch.uint8).numpy().tobytes()
