"""Prompts to embeddings, as each family's denoiser was trained to read them."""

from __future__ import annotations

import inspect
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from types import SimpleNamespace
from typing import TYPE_CHECKING, Any, Self

import torch
from torch import Tensor

from mmalign.diffusion import pipeline
from mmalign.diffusion.families import Condition, Family, family_of
from mmalign.errors import ConfigError

if TYPE_CHECKING:
    from transformers import PreTrainedModel

ENCODER_CLASSES = ("CLIPTextModel", "CLIPTextModelWithProjection", "T5EncoderModel")


@dataclass(frozen=True)
class Tokenizers:
    """The tokenizers of a pipeline, without its text encoders.

    Attributes:
        family: Of the pipeline.
        by_encoder: Encoder to its tokenizer.
        limits: Encoder to the number of tokens it reads, start and end included.
    """

    family: Family
    by_encoder: Mapping[str, Any]
    limits: Mapping[str, int]

    @property
    def limit(self) -> int:
        """Tokens that the model reads of a prompt, start and end included: 77, SD3 with T5 256."""
        return self.limits[self._judge]

    def num_tokens(self, prompt: str) -> int:
        """Tokens of the whole prompt, start and end included, by the encoder that reads most."""
        return len(self.by_encoder[self._judge](prompt, verbose=False).input_ids)

    def tokenize(self, prompts: Sequence[str]) -> dict[str, Tensor]:
        """Encoder to token ids [N, its limit], int64 on the CPU, cut and padded to the limit."""
        return {
            name: tokenizer(
                list(prompts),
                padding="max_length",
                max_length=self.limits[name],
                truncation=True,
                return_tensors="pt",
            ).input_ids
            for name, tokenizer in self.by_encoder.items()
        }

    @property
    def _judge(self) -> str:
        return max(self.limits, key=lambda name: self.limits[name])


def load_tokenizers(path: str | Path, revision: str | None = None) -> Tokenizers:
    """The tokenizers of a pipeline.

    Raises:
        ConfigError: One is missing or cannot be loaded.
    """
    from transformers import AutoTokenizer

    family = family_of(path, revision)
    found: dict[str, Any] = {}
    limits: dict[str, int] = {}
    for encoder in encoders_of(path, family, revision):
        name = _tokenizer_of(encoder)
        folder = pipeline.component(path, name, revision)
        try:
            found[encoder] = AutoTokenizer.from_pretrained(str(folder), local_files_only=True)
        except (OSError, ValueError, ImportError) as error:
            raise ConfigError(f"pipeline {path}: {name}/ cannot be loaded: {error}") from error
        limits[encoder] = family.t5_limit
        if encoder != family.t5:
            places = _encoder_config(path, encoder, revision).get("max_position_embeddings", 77)
            limits[encoder] = min(found[encoder].model_max_length, int(places))
    return Tokenizers(family, found, limits)


def encoders_of(path: str | Path, family: Family, revision: str | None = None) -> tuple[str, ...]:
    """The text encoders that a pipeline has, in the order of their embeddings.

    Raises:
        ConfigError: One that the family cannot be without is missing.
    """
    found = [name for name in family.encoders if pipeline.has_component(path, name, revision)]
    lacking = [n for n in family.encoders if n not in found and n not in family.optional]
    if lacking:
        raise ConfigError(
            f"pipeline {path}: has no {lacking[0]}/ by its model_index.json, and prompts cannot "
            "be embedded without it"
        )
    return tuple(found)


class PromptEncoder:
    """Text encoders and tokenizers of a pipeline; prompts go through its own `encode_prompt`.

    An empty prompt is embedded like any other, but for pipelines with
    `force_zeros_for_empty_prompt` (SDXL), where it is zeros: what the model takes for "no prompt".

    Departs: diffusers takes zeros where no negative prompt is given and embeds an empty positive
        one; here an empty prompt means the same everywhere, so that captions left out in training
        teach the branch that guidance uses.
    """

    def __init__(
        self,
        path: str | Path,
        dtype: torch.dtype = torch.float32,
        device: torch.device | str = "cpu",
        *,
        revision: str | None = None,
    ) -> None:
        """The encoders of a pipeline, frozen and without dropout.

        Args:
            path: Pipeline folder or hub name.
            dtype: Of the encoders and of what they return.
            device: Where they go.
            revision: Of a hub repository.

        Raises:
            ConfigError: A part is missing or of a class that is not supported.
        """
        self.tokenizers = load_tokenizers(path, revision)
        self.family, limits = self.tokenizers.family, self.tokenizers.limits
        self._models = {name: _load_encoder(path, name, dtype, revision) for name in limits}
        self._zero_empty = self.family.zeroes_empty(pipeline.model_index(path, revision))
        self._given = {name: _GivenIds(limit) for name, limit in limits.items()}
        self._pipe = self._pipeline(pipeline.denoiser_config(path, revision))
        self.to(device)

    def to(self, device: torch.device | str) -> Self:
        """Move the encoders."""
        for model in self._models.values():
            model.to(device)  # pyright: ignore[reportArgumentType]
        return self

    def encode(self, prompts: Sequence[str]) -> Condition:
        """Prompts to embeddings, without time ids."""
        return self.embed(self.tokenizers.tokenize(prompts))

    @torch.no_grad()
    def embed(self, ids: Mapping[str, Tensor]) -> Condition:
        """Token ids of `Tokenizers.tokenize`, on any device, to embeddings without time ids.

        Autocast is switched off, so that an embedding of a cache is that of a training step.
        """
        device = next(iter(self._models.values())).device
        for name, given in self._given.items():
            given.ids = ids[name]
        prompts = [""] * len(next(iter(ids.values())))  # their ids are given
        with torch.autocast(device.type, enabled=False):
            cond = self.family.encode(self._pipe, prompts, device)
        if not self._zero_empty or cond.pooled is None:
            return cond
        (name, value), *_ = ids.items()
        keep = (value != self._empty_ids[name].to(value.device)).any(-1).to(cond.embeds)
        return Condition(cond.embeds * keep[:, None, None], cond.pooled * keep[:, None])

    @cached_property
    def _empty_ids(self) -> dict[str, Tensor]:
        return self.tokenizers.tokenize([""])

    def _pipeline(self, denoiser: dict[str, Any]) -> Any:
        """The pipeline with its text encoders and nothing else."""
        import diffusers

        kind = getattr(diffusers, self.family.pipeline)
        names = inspect.signature(kind.__init__).parameters
        parts: dict[str, Any] = {
            name: None for name, known in names.items() if known.default is known.empty
        }
        del parts["self"]
        if "requires_safety_checker" in names:
            parts["requires_safety_checker"] = False
        for name, model in self._models.items():
            parts |= {name: model, _tokenizer_of(name): self._given[name]}
        pipe = kind(**parts)
        # Where an encoder is left out, the denoiser's settings say how many zeros stand for it.
        settings = SimpleNamespace(config=SimpleNamespace(**denoiser))
        object.__setattr__(pipe, self.family.part, settings)
        return pipe


class _GivenIds:
    """Stands in for a tokenizer in `encode_prompt`: the prompts were tokenized in a data worker."""

    ids: Tensor

    def __init__(self, model_max_length: int) -> None:
        self.model_max_length = model_max_length

    def __call__(self, prompts: list[str], **_: Any) -> Any:
        return SimpleNamespace(input_ids=self.ids, attention_mask=torch.ones_like(self.ids))

    def tokenize(self, prompt: str) -> list[str]:
        """No tokens that stand for several: textual inversions are not loaded."""
        return []


def _load_encoder(
    path: str | Path, name: str, dtype: torch.dtype, revision: str | None
) -> PreTrainedModel:
    import transformers

    folder = pipeline.component(path, name, revision)
    kind = (_encoder_config(path, name, revision).get("architectures") or ["none"])[0]
    if kind not in ENCODER_CLASSES:
        raise ConfigError(
            f"pipeline {path}: {name}/ is a {kind}; supported are {', '.join(ENCODER_CLASSES)}"
        )
    model = pipeline.load_part(getattr(transformers, kind), folder, dtype)
    return model.requires_grad_(False)


def _encoder_config(path: str | Path, name: str, revision: str | None) -> dict[str, Any]:
    folder = pipeline.component(path, name, revision, weights=False)
    return pipeline.read_json(folder / "config.json")


def _tokenizer_of(encoder: str) -> str:
    return encoder.replace("text_encoder", "tokenizer")
