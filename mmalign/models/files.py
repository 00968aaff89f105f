"""Checkpoints as files: where they lie, which tensors they hold, what identifies them."""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from mmalign.errors import CheckpointError
from mmalign.safe import replacing

if TYPE_CHECKING:
    from numpy.typing import NDArray
    from torch import Tensor, nn

ADAPTER_CONFIG = "adapter_config.json"


class UnfitError(CheckpointError):
    """By its names alone, a checkpoint does not fit the tensors in another one's files."""


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
            f"{path} is not a folder, and cannot be fetched from the hub: {error}"
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
        CheckpointError: when there is none, or not all that the index names.
    """
    # Shortest name first: of a model and its fp16 variant the model.
    for index in sorted(folder.glob("*.safetensors.index.json"), key=lambda p: (len(p.name), p)):
        return _indexed(index)
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


def _indexed(index: Path) -> list[Path]:
    """The files that an index names, all of which are there."""
    places = read_json(index).get("weight_map")
    if not isinstance(places, dict) or not places:
        raise CheckpointError(f"{index}: has no weight_map; copy the checkpoint again")
    names = {str(name) for name in places.values()}
    outside = next((n for n in names if Path(n).is_absolute() or ".." in Path(n).parts), None)
    if outside is not None:
        raise CheckpointError(
            f"{index}: names {outside!r}, and only files beside it are read; copy the checkpoint "
            "again"
        )
    files = [index.parent / name for name in sorted(names)]
    lacking = [file.name for file in files if not file.is_file()]
    if lacking:
        raise CheckpointError(
            f"{index.parent}: {len(lacking)} of {len(files)} weight files that {index.name} names "
            f"are missing, e.g. {lacking[0]}; copy the checkpoint again"
        )
    return files


def read_json(file: Path) -> dict[str, Any]:
    """The object in a settings file.

    Raises:
        CheckpointError: The file cannot be read, or holds something else.
    """
    try:
        value = json.loads(file.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:  # a byte that is no UTF-8 is a ValueError too
        raise CheckpointError(f"{file} cannot be read as JSON: {error}") from error
    if not isinstance(value, dict):
        raise CheckpointError(f"{file}: must hold a JSON object, found {type(value).__name__}")
    return value


def read_tensors(file: Path) -> tuple[dict[str, Tensor], dict[str, str]]:
    """Tensors and metadata of a safetensors file.

    Raises:
        CheckpointError: The file is damaged, cut, or of another kind.
    """
    with opened(file) as handle:
        return {name: handle.get_tensor(name) for name in handle.keys()}, handle.metadata() or {}  # noqa: SIM118


def folder_tensors(folder: Path) -> dict[str, Tensor]:
    """All tensors of a checkpoint's folder, by the names in its files."""
    return {k: v for file in weight_files(folder) for k, v in read_tensors(file)[0].items()}


def put_tensors(own: Mapping[str, Tensor], found: Mapping[str, Tensor], where: Path) -> None:
    """Copy the tensors of a file into those of a model, in place.

    Raises:
        CheckpointError: Some are only in one of them, or of another shape.
    """
    import torch

    if odd := sorted(own.keys() ^ found.keys()):
        raise CheckpointError(
            f"{where}: its tensors are not those of the model; {len(odd)} are only in one of "
            f"them, e.g. {odd[0]}"
        )
    for name, tensor in own.items():
        if found[name].shape != tensor.shape:
            raise CheckpointError(
                f"{where}: {name} is {list(found[name].shape)} there and {list(tensor.shape)} in "
                "the model; it belongs to another model"
            )
    with torch.no_grad():
        for name, tensor in own.items():
            tensor.copy_(found[name])


def opened(file: Path) -> Any:
    """A safetensors file, whose names and size are checked; to be used in a `with`.

    Raises:
        CheckpointError: The file is damaged, cut, or of another kind.
    """
    from safetensors import SafetensorError, safe_open

    try:
        return safe_open(file, framework="pt")
    except (SafetensorError, OSError) as error:
        raise CheckpointError(f"{file} cannot be read as safetensors: {error}") from error


def save_tensors(
    tensors: Mapping[str, Tensor], file: Path, metadata: Mapping[str, str] | None = None
) -> None:
    """Write a safetensors file, whole or not at all, that others may read as the umask says."""
    from safetensors.torch import save_file

    ready = {name: tensor.detach().cpu().contiguous() for name, tensor in tensors.items()}
    with replacing(file) as unfinished:
        save_file(ready, unfinished, metadata=None if metadata is None else dict(metadata))
        usual_mode(unfinished)


def to_numpy(tensor: Tensor) -> NDArray[Any]:
    """A tensor as an array; bfloat16, which numpy lacks, as its bits (int16)."""
    import torch

    tensor = tensor.detach().cpu().contiguous()
    return (tensor.view(torch.int16) if tensor.dtype == torch.bfloat16 else tensor).numpy()


def from_numpy(array: NDArray[Any]) -> Tensor:
    """The reverse of `to_numpy`, in the memory of the array."""
    import torch

    tensor = torch.from_numpy(array)
    return tensor.view(torch.bfloat16) if tensor.dtype == torch.int16 else tensor


def usual_mode(path: Path) -> None:
    """Give a file, or all files below a folder, the mode of any new file.

    safetensors writes under a temporary name that its owner alone may read, and keeps that.
    """
    mask = os.umask(0o077)
    os.umask(mask)
    for file in [path] if path.is_file() else path.rglob("*"):
        if file.is_file() and not file.is_symlink():
            file.chmod(0o666 & ~mask)


def fingerprint(path: str | Path, revision: str | None = None) -> str:
    """Hash of a checkpoint's weights and settings, read from its files; the same on any machine."""
    folder = local_folder(path, revision)
    settings = [folder / name for name in ("config.json", ADAPTER_CONFIG)]
    return files_hash([*weight_files(folder), *(item for item in settings if item.is_file())])


def files_hash(files: Iterable[Path]) -> str:
    """Hash of files by name and content, in this order."""
    digest = hashlib.sha256()
    for file in files:
        with file.open("rb") as stream:
            digest.update(file.name.encode() + hashlib.file_digest(stream, "sha256").digest())
    return digest.hexdigest()


def state_fingerprint(model: nn.Module) -> str:
    """Hash of a model's parameters and buffers in memory: names, dtypes, shapes and values."""
    import torch

    digest = hashlib.sha256()
    for name, tensor in sorted(model.state_dict().items()):
        digest.update(f"{name} {tensor.dtype} {list(tensor.shape)}".encode())
        flat = tensor.detach().cpu().contiguous().flatten()
        digest.update(flat.view(torch.uint8).numpy().tobytes())
    return digest.hexdigest()
