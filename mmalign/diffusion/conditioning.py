"""Prompts to embeddings, and one call for all denoisers that read them."""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any, Self

import torch

from mmalign.diffusion.pipeline import (
    NUM_TIME_IDS,
    Family,
    component,
    component_fingerprint,
    denoiser_config,
    family_of,
    has_component,
    load_part,
    model_index,
    read_json,
)
from mmalign.errors import ConfigError, NeedsError

if TYPE_CHECKING:
    from torch import Tensor, nn
    from transformers import PreTrainedModel


# One call for all denoisers: noisy latents, timesteps and a condition to the raw prediction.


@dataclass(frozen=True, slots=True)
class Condition:
    """What a denoiser is told of N pictures.

    Attributes:
        embeds: [N, S, D] the prompt, S places.
        pooled: [N, P] the whole prompt in one vector; SDXL and SD3.
        time_ids: [N, 6] height and width of the original, top and left of the crop, height and
            width of the target, in pixels; SDXL. Kept in float32: bfloat16 has no 1025.
    """

    embeds: Tensor
    pooled: Tensor | None = None
    time_ids: Tensor | None = None

    def __len__(self) -> int:
        return len(self.embeds)

    def rows(self, index: Tensor | slice) -> Self:
        """Some of the pictures, by number."""
        return self._each(lambda value: value[index])

    def repeat(self, times: int) -> Self:
        """Each picture `times` times in a row: a, a, b, b."""
        return self._each(lambda value: value.repeat_interleave(times, dim=0))

    def to(self, device: torch.device | str, dtype: torch.dtype | None = None) -> Self:
        """On another device; `dtype` changes all but the time ids."""
        told = self._each(lambda value: value.to(device))
        if dtype is None:
            return told
        pooled = None if told.pooled is None else told.pooled.to(dtype)
        return type(self)(told.embeds.to(dtype), pooled, told.time_ids)

    @classmethod
    def cat(cls, parts: Sequence[Condition]) -> Self:
        """All pictures of several conditions, which must have the same fields."""

        def join(name: str) -> Any:
            values = [getattr(part, name) for part in parts]
            given = [value for value in values if value is not None]
            if given and len(given) < len(values):
                raise NeedsError(f"conditions cannot be joined: only some of them have {name}")
            return torch.cat(given) if given else None

        return cls(join("embeds"), join("pooled"), join("time_ids"))

    def _each(self, change: Callable[[Tensor], Tensor]) -> Self:
        fields = (self.embeds, self.pooled, self.time_ids)
        return type(self)(*(None if value is None else change(value) for value in fields))  # pyright: ignore[reportArgumentType]


def predict(
    model: nn.Module, family: str, x_t: Tensor, t_input: Tensor, cond: Condition
) -> Tensor:  # [N, C, H, W]
    """The network's raw output, in its own dtype: noise, velocity or picture, as it was trained.

    Args:
        model: U-Net or transformer, perhaps in a peft wrapper.
        family: "sd", "sdxl" or "sd3".
        x_t: [N, C, H, W] noisy latents; cast to the network's dtype.
        t_input: [N] what the network is told of the noise level (`NoiseProcess.timestep_input`).
        cond: N conditions; cast likewise.

    Raises:
        NeedsError: The family needs a part of the condition that is not there.
        ConfigError: The condition is of another model.
    """
    dtype = next(model.parameters()).dtype
    return _CALLS[family](model, x_t.to(dtype), t_input, cond.to(x_t.device, dtype))


def _sd(model: nn.Module, x: Tensor, t: Tensor, cond: Condition) -> Tensor:
    _check_width(model, "cross_attention_dim", cond.embeds)
    return model(x, t, encoder_hidden_states=cond.embeds, return_dict=False)[0]


def _sdxl(model: nn.Module, x: Tensor, t: Tensor, cond: Condition) -> Tensor:
    _check_width(model, "cross_attention_dim", cond.embeds)
    pooled = _given(cond.pooled, "SDXL", "pooled embeddings (those of text_encoder_2)")
    time_ids = _given(cond.time_ids, "SDXL", "time ids (original size, crop, target size)")
    if time_ids.shape[-1] != NUM_TIME_IDS:
        raise NeedsError(
            f"SDXL needs {NUM_TIME_IDS} time ids a picture (height, width, top, left, target "
            f"height, target width); found {time_ids.shape[-1]}"
        )
    added = {"text_embeds": pooled, "time_ids": time_ids}
    told = {"encoder_hidden_states": cond.embeds, "added_cond_kwargs": added}
    return model(x, t, **told, return_dict=False)[0]


def _sd3(model: nn.Module, x: Tensor, t: Tensor, cond: Condition) -> Tensor:
    _check_width(model, "joint_attention_dim", cond.embeds)
    pooled = _given(cond.pooled, "SD3", "pooled embeddings (those of both CLIP encoders)")
    told = {"encoder_hidden_states": cond.embeds, "pooled_projections": pooled, "timestep": t}
    return model(hidden_states=x, **told, return_dict=False)[0]


_CALLS: dict[str, Callable[[nn.Module, Tensor, Tensor, Condition], Tensor]] = {
    "sd": _sd,
    "sdxl": _sdxl,
    "sd3": _sd3,
}


def _given(value: Tensor | None, family: str, what: str) -> Tensor:
    if value is None:
        raise NeedsError(f"a denoiser of {family} needs {what} in its condition; there are none")
    return value


def _check_width(model: nn.Module, name: str, embeds: Tensor) -> None:
    """Refuse prompt embeddings of another model, where the numbers alone can tell."""
    config: Any = model.config
    expected = config[name]
    if isinstance(expected, int) and embeds.shape[-1] != expected:
        raise ConfigError(
            f"the prompt embeddings have {embeds.shape[-1]} numbers a token, but the denoiser "
            f"reads {expected}: they are of another model's text encoders. Write the cache anew, "
            "or give the pipeline its own text encoders"
        )


# Prompts to embeddings, as each family's denoiser was trained to read them.

ENCODERS: dict[Family, tuple[str, ...]] = {
    "sd": ("text_encoder",),
    "sdxl": ("text_encoder", "text_encoder_2"),
    "sd3": ("text_encoder", "text_encoder_2", "text_encoder_3"),
}
_CLIPS = ("text_encoder", "text_encoder_2")
OPTIONAL = "text_encoder_3"  # SD3's T5: zeros stand for it where it was left out
T5_LIMIT = 256  # places that SD3's T5 fills; what diffusers takes by default

_CLASSES = ("CLIPTextModel", "CLIPTextModelWithProjection", "T5EncoderModel")


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
        name = encoder.replace("text_encoder", "tokenizer")
        folder = component(path, name, revision)
        try:
            found[encoder] = AutoTokenizer.from_pretrained(str(folder), local_files_only=True)
        except (OSError, ValueError, ImportError) as error:
            raise ConfigError(f"pipeline {path}: {name}/ cannot be loaded: {error}") from error
        limits[encoder] = T5_LIMIT
        if encoder != OPTIONAL:
            places = _encoder_config(path, encoder, revision).get("max_position_embeddings", 77)
            limits[encoder] = min(found[encoder].model_max_length, int(places))
    return Tokenizers(family, found, limits)


def encoders_of(path: str | Path, family: Family, revision: str | None = None) -> tuple[str, ...]:
    """The text encoders that a pipeline has, in the order of their embeddings.

    Raises:
        ConfigError: One that the family cannot be without is missing.
    """
    found = [name for name in ENCODERS[family] if has_component(path, name, revision)]
    lacking = [name for name in ENCODERS[family] if name not in found and name != OPTIONAL]
    if lacking:
        raise ConfigError(
            f"pipeline {path}: has no {lacking[0]}/ by its model_index.json, and prompts cannot "
            "be embedded without it"
        )
    return tuple(found)


class PromptEncoder:
    """Text encoders and tokenizers of a pipeline.

    sd: the last hidden states of the one encoder. sdxl: the last but one hidden states of both side
    by side, and the projected summary of the second. sd3: those of both CLIP encoders side by side,
    filled up with zeros to T5's width and followed by T5's states; both projected summaries.

    An empty prompt is embedded like any other, but for pipelines with
    `force_zeros_for_empty_prompt` (SDXL), where it is zeros: what the model takes for "no prompt".

    Departs: diffusers takes zeros where no negative prompt is given and embeds an empty positive
        one; here an empty prompt means the same everywhere, so that captions left out in training
        teach the branch that guidance uses.
    """

    def __init__(
        self,
        tokenizers: Tokenizers,
        models: Mapping[str, PreTrainedModel],
        *,
        zero_empty: bool,
        joint_width: int | None,
        path: str | Path,
        revision: str | None,
    ) -> None:
        self.tokenizers, self.family = tokenizers, tokenizers.family
        self._models = dict(models)
        self._zero_empty, self._joint_width = zero_empty, joint_width
        self._path, self._revision = path, revision

    @classmethod
    def load(
        cls,
        path: str | Path,
        family: str | None = None,
        dtype: torch.dtype = torch.float32,
        device: torch.device | str = "cpu",
        *,
        revision: str | None = None,
    ) -> Self:
        """The encoders of a pipeline, frozen and without dropout.

        Args:
            path: Pipeline folder or hub name.
            family: As its files say; None to look.
            dtype: Of the encoders and of what they return.
            device: Where they go.
            revision: Of a hub repository.

        Raises:
            ConfigError: A part is missing or of a class that is not supported.
        """
        tokenizers = load_tokenizers(path, revision)
        if family is not None and family != tokenizers.family:
            raise ConfigError(f"pipeline {path}: its family is {tokenizers.family}, not {family}")
        models = {
            name: _load_encoder(path, name, dtype, revision) for name in tokenizers.by_encoder
        }
        joint = None
        if tokenizers.family == "sd3":
            joint = int(denoiser_config(path, revision)["joint_attention_dim"])
        zeros = tokenizers.family == "sdxl" and bool(
            model_index(path, revision).get("force_zeros_for_empty_prompt", True)
        )
        encoder = cls(
            tokenizers, models, zero_empty=zeros, joint_width=joint, path=path, revision=revision
        )
        return encoder.to(device)

    @property
    def limit(self) -> int:
        """Tokens that the model reads of a prompt, start and end included."""
        return self.tokenizers.limit

    def num_tokens(self, prompt: str) -> int:
        """Tokens of the whole prompt, start and end included."""
        return self.tokenizers.num_tokens(prompt)

    def tokenize(self, prompts: Sequence[str]) -> dict[str, Tensor]:
        """Encoder to token ids [N, S], int64 on the CPU."""
        return self.tokenizers.tokenize(prompts)

    def to(self, device: torch.device | str) -> Self:
        """Move the encoders."""
        for model in self._models.values():
            model.to(device)  # pyright: ignore[reportArgumentType]
        return self

    def encode(self, prompts: Sequence[str]) -> Condition:
        """Prompts to embeddings, without time ids."""
        return self.embed(self.tokenize(prompts))

    @torch.no_grad()
    def embed(self, ids: Mapping[str, Tensor]) -> Condition:
        """Token ids of `tokenize`, on any device, to embeddings without time ids.

        Autocast is switched off, so that an embedding of a cache is that of a training step.
        """
        device = next(iter(self._models.values())).device
        ids = {name: value.to(device) for name, value in ids.items()}
        with torch.autocast(device.type, enabled=False):
            if self.family == "sd":
                (name,) = self._models
                return Condition(self._models[name](ids[name]).last_hidden_state)
            clips = [self._clip(name, ids[name]) for name in _CLIPS]
            embeds = torch.cat([states for states, _ in clips], dim=-1)
            if self.family == "sdxl":
                return self._zeroed(Condition(embeds, clips[1][1]), ids)
            pooled = torch.cat([summary for _, summary in clips], dim=-1)
            states = self._t5(ids.get(OPTIONAL), embeds)
        width = states.shape[-1] - embeds.shape[-1]
        embeds = torch.nn.functional.pad(embeds, (0, width))
        return Condition(torch.cat([embeds, states], dim=1), pooled)

    def _clip(self, name: str, ids: Tensor) -> tuple[Tensor, Tensor]:
        """The last but one hidden states, and the summary (projected, or as the encoder has it)."""
        output = self._models[name](ids, output_hidden_states=True)
        summary = getattr(output, "text_embeds", None)
        return output.hidden_states[-2], output.pooler_output if summary is None else summary

    def _t5(self, ids: Tensor | None, like: Tensor) -> Tensor:
        if ids is not None:
            return self._models[OPTIONAL](ids)[0]
        assert self._joint_width is not None
        return like.new_zeros(len(like), T5_LIMIT, self._joint_width)

    def _zeroed(self, told: Condition, ids: Mapping[str, Tensor]) -> Condition:
        """SDXL: zeros where the prompt is empty, if the pipeline says so."""
        if not self._zero_empty or told.pooled is None:
            return told
        (name, value), *_ = ids.items()
        keep = (value != self._empty_ids[name].to(value.device)).any(-1)
        keep = keep.to(told.embeds.dtype)
        return Condition(told.embeds * keep[:, None, None], told.pooled * keep[:, None])

    @cached_property
    def _empty_ids(self) -> dict[str, Tensor]:
        return self.tokenize([""])

    @cached_property
    def fingerprint(self) -> str:
        """Hash of the files of all encoders and tokenizers, their dtype, and the empty prompt."""
        digest = hashlib.sha256(f"{self.family} {self._zero_empty} {self._joint_width}".encode())
        for name, model in self._models.items():
            for part in (name, name.replace("text_encoder", "tokenizer")):
                digest.update(component_fingerprint(self._path, part, self._revision).encode())
            digest.update(str(model.dtype).encode())
        return digest.hexdigest()


def _load_encoder(
    path: str | Path, name: str, dtype: torch.dtype, revision: str | None
) -> PreTrainedModel:
    import transformers

    folder = component(path, name, revision)
    kind = (_encoder_config(path, name, revision).get("architectures") or ["none"])[0]
    if kind not in _CLASSES:
        raise ConfigError(
            f"pipeline {path}: {name}/ is a {kind}; supported are {', '.join(_CLASSES)}"
        )
    model = load_part(getattr(transformers, kind), folder, dtype)
    return model.requires_grad_(False)


def _encoder_config(path: str | Path, name: str, revision: str | None) -> dict[str, Any]:
    return read_json(component(path, name, revision, weights=False) / "config.json")
