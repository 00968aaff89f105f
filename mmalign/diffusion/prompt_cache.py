"""Captions as embeddings, computed once."""

from __future__ import annotations

import hashlib
import json
from typing import TYPE_CHECKING, Any

import numpy as np
import torch

from mmalign.diffusion.conditioning import T5_LIMIT, encoders_of
from mmalign.diffusion.notes import cache_folder, fingerprint_of, lost, open_store, require
from mmalign.diffusion.pipeline import (
    denoiser_config,
    family_of,
    model_index,
)

if TYPE_CHECKING:
    from collections.abc import Iterable, Mapping, Sequence

    from torch import Tensor

    from mmalign.config import RunConfig
    from mmalign.diffusion.denoiser import Condition

    Array = np.ndarray[Any, np.dtype[Any]]


class PromptCache:
    """Per caption the embeddings, and for SDXL and SD3 the pooled ones, as the encoders gave them.

    They keep the dtype they were computed in (`model.dtype`), so that training from the cache and
    from live encoders agree exactly. Places at the end that hold nothing but zeros (SDXL's empty
    prompt, SD3 without T5) take no room.

    Args:
        config: The run; reads the files of its text encoders, but no weights into memory.
    """

    def __init__(self, config: RunConfig) -> None:
        self.store = open_store(
            cache_folder(config) / "prompts",
            {
                "holds": "prompts",
                "encoders": encoders_fingerprint(config),
                "dtype": config.model.dtype,
            },
        )

    def key(self, caption: str) -> str:
        """The entry of a caption."""
        return self.store.key(caption)

    def missing(self, captions: Iterable[str]) -> list[str]:
        """The captions without an entry, each once."""
        keys = {self.key(caption): caption for caption in captions}
        return [keys[key] for key in self.store.missing(keys)]

    def require(self, captions: Sequence[str]) -> None:
        """Refuse a cache that lacks captions.

        Raises:
            ConfigError: With the command that writes them.
        """
        captions = list(dict.fromkeys(captions))
        require(
            self.store, "the embeddings", len(self.missing(captions)), len(captions), "captions"
        )

    def put(self, captions: Sequence[str], told: Condition) -> None:
        """Store the embeddings of some captions."""
        for i, caption in enumerate(captions):
            embeds = told.embeds[i]
            used = embeds.any(dim=1).nonzero()  # [places with a number in them, 1]
            length = int(used[-1]) + 1 if len(used) else 0
            entry = {"embeds": _bits(embeds[:length]), "places": np.array([len(embeds)], np.int32)}
            if told.pooled is not None:
                entry["pooled"] = _bits(told.pooled[i])
            self.store.put(self.key(caption), entry)

    def get(self, captions: Sequence[str]) -> dict[str, Tensor]:
        """`embeds` [N, S, D] and, where the family has them, `pooled` [N, P].

        Raises:
            ConfigError: An entry is missing or damaged.
        """
        found: dict[str, dict[str, Tensor]] = {}
        for caption in dict.fromkeys(captions):
            entry = self.store.get(self.key(caption))
            if entry is None:
                raise lost(self.store, f"the embeddings of {caption!r}")
            found[caption] = self._tensors(entry)
        names = found[captions[0]]
        return {name: torch.stack([found[c][name] for c in captions]) for name in names}

    def _tensors(self, entry: Mapping[str, Array]) -> dict[str, Tensor]:
        """With the zeros that were left out."""
        embeds = _unbits(entry["embeds"])
        rest = int(entry["places"][0]) - len(embeds)
        tensors = {"embeds": torch.nn.functional.pad(embeds, (0, 0, 0, rest)) if rest else embeds}
        if "pooled" in entry:
            tensors["pooled"] = _unbits(entry["pooled"])
        return tensors


def encoders_fingerprint(config: RunConfig) -> str:
    """Hash of the files of the text encoders and tokenizers, and of what else embeds a prompt."""
    path, revision = config.model.path, config.model.revision
    family = family_of(path, revision)
    rest = [family, T5_LIMIT, model_index(path, revision).get("force_zeros_for_empty_prompt")]
    if family == "sd3":
        rest.append(denoiser_config(path, revision).get("joint_attention_dim"))
    parts = [
        [name, fingerprint_of(config, part)]
        for name in encoders_of(path, family, revision)
        for part in (name, name.replace("text_encoder", "tokenizer"))
    ]
    text = json.dumps([rest, parts], sort_keys=True)
    return hashlib.sha256(text.encode()).hexdigest()


def _bits(tensor: Tensor) -> Array:
    """As numpy; bfloat16, which numpy lacks, as its bits."""
    tensor = tensor.detach().cpu().contiguous()
    return (tensor.view(torch.int16) if tensor.dtype == torch.bfloat16 else tensor).numpy()


def _unbits(array: Array) -> Tensor:
    tensor = torch.from_numpy(array)
    return tensor.view(torch.bfloat16) if tensor.dtype == torch.int16 else tensor
