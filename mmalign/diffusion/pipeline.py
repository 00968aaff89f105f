"""Pipelines of diffusers as files: where their parts lie, and the weights of those.

A pipeline is read by its component folders, so that the VAE and the text encoders are neither
loaded nor fetched before they are needed. Weights are read from safetensors only, and no code.
"""

from __future__ import annotations

import json
from functools import cache
from pathlib import Path
from typing import Any

import torch
from torch import nn

from mmalign.errors import CheckpointError, ConfigError
from mmalign.models.cpu import use_onednn, use_products
from mmalign.models.files import denoiser_folder, files_hash, fingerprint

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
    for module in model.modules():  # with dropout, no two errors can be compared
        if isinstance(module, nn.Dropout):
            module.p = 0.0
    return model.eval()


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


SINGLE_FILES = (".safetensors", ".ckpt", ".pt", ".pth", ".bin", ".gguf")
SETTINGS = ("model_index.json", "*/*.json", "*/*.txt", "*/*.model")  # of tokenizers too
_WITHOUT_WEIGHTS = ("tokenizer", "scheduler", "feature_extractor")


def component(
    path: str | Path, name: str, revision: str | None = None, *, weights: bool = True
) -> Path:
    """The folder of one part of a pipeline: local, or fetched from the hub.

    Args:
        path: Pipeline folder or hub name.
        name: "unet", "vae", "text_encoder", "tokenizer_2", "scheduler", ...
        revision: Of a hub repository.
        weights: Fetch its weights too.

    Raises:
        ConfigError: The pipeline does not have it, or cannot be read.
    """
    folder = pipeline_folder(path, revision) / name
    if not folder.is_dir() or not any(folder.glob("*.json")):
        raise ConfigError(
            f"pipeline {path}: the pipeline has no folder {name}/ with settings in it"
        )
    if weights and not Path(path).is_dir() and not name.startswith(_WITHOUT_WEIGHTS):
        _fetch(str(path), revision, plain_weights(name))
        if not list(folder.glob("*.safetensors")):
            _fetch(str(path), revision, (f"{name}/*.safetensors",))
    return folder


def pipeline_folder(path: str | Path, revision: str | None = None) -> Path:
    """The folder itself, or the local copy of a hub repository's settings and tokenizers.

    Raises:
        ConfigError: A single-file checkpoint, or neither a folder nor a hub repository.
    """
    if Path(path).is_dir():
        return Path(path)
    if Path(path).suffix in SINGLE_FILES:
        state = "is a single-file checkpoint" if Path(path).is_file() else "does not exist"
        raise ConfigError(
            f"pipeline {path}: {state}; a pipeline folder of diffusers is needed. To convert a "
            "single file: StableDiffusionPipeline.from_single_file(FILE).save_pretrained(FOLDER) "
            "(StableDiffusionXLPipeline, StableDiffusion3Pipeline for those)"
        )
    return _fetch(str(path), revision, SETTINGS)


def plain_weights(name: str) -> tuple[str, ...]:
    """Patterns of a part's weights in full precision; variants such as fp16 do not fit them."""
    return tuple(f"{name}/{stem}{end}.safetensors" for stem in STEMS for end in ("", "-*"))


@cache
def _fetch(repository: str, revision: str | None, patterns: tuple[str, ...]) -> Path:
    """The local copy of a hub repository with the files that fit the patterns."""
    from huggingface_hub import snapshot_download

    try:
        return Path(snapshot_download(repository, revision=revision, allow_patterns=list(patterns)))
    except (OSError, ValueError) as error:
        raise ConfigError(
            f"pipeline {repository}: no such folder, and no hub repository could be read"
            f"{f' at revision {revision}' if revision else ''}: {error}"
        ) from error


def model_index(path: str | Path, revision: str | None = None) -> dict[str, Any]:
    """The pipeline's model_index.json; empty where the folder has none."""
    return read_json(pipeline_folder(path, revision) / "model_index.json", missing={})


def has_component(path: str | Path, name: str, revision: str | None = None) -> bool:
    """Whether a pipeline has a part: by model_index.json, where nulls are none, else by folder."""
    index = model_index(path, revision)
    if not index:
        return (Path(path) / name).is_dir()
    entry = index.get(name)
    return bool(entry) and any(entry)


def denoiser_config(path: str | Path, revision: str | None = None) -> dict[str, Any]:
    """Settings of the U-Net or transformer of a pipeline, or of a folder that is one.

    Raises:
        ConfigError: There is none.
    """
    file = denoiser_folder(pipeline_folder(path, revision)) / "config.json"
    if not file.is_file():
        raise ConfigError(
            f"pipeline {path}: has neither unet/config.json nor transformer/config.json; a "
            "pipeline folder of diffusers is needed (the folder with model_index.json)"
        )
    return read_json(file)


def scheduler_config(path: str | Path, revision: str | None = None) -> dict[str, Any]:
    """The pipeline's scheduler_config.json.

    Raises:
        ConfigError: It is missing.
    """
    file = component(path, "scheduler", revision) / "scheduler_config.json"
    return read_json(file)


def component_fingerprint(path: str | Path, name: str, revision: str | None = None) -> str:
    """Hash of one part's files: weights and settings, or all files of a tokenizer.

    Raises:
        ConfigError: The pipeline does not have the part.
    """
    folder = component(path, name, revision)
    if not name.startswith(_WITHOUT_WEIGHTS):
        try:
            return fingerprint(folder)
        except CheckpointError as error:
            raise ConfigError(f"pipeline {path}: {error}") from error
    return files_hash(sorted(item for item in folder.iterdir() if item.is_file()))


def read_json(file: Path, *, missing: dict[str, Any] | None = None) -> dict[str, Any]:
    """A JSON object of a pipeline.

    Raises:
        ConfigError: The file is missing (unless `missing` is given for that), or is no JSON.
    """
    if missing is not None and not file.is_file():
        return missing
    try:
        return json.loads(file.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise ConfigError(f"pipeline: {file} cannot be read: {error}") from error
