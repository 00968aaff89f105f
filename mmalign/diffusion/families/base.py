"""A family of image models: all that its pipelines do in a way of their own, as one class.

What most families share is here. A family's file says what differs: how prompts are embedded, how
its denoiser is called, how its noise levels are shifted, and what other programs call its layers.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, fields, replace
from pathlib import Path
from typing import Any, ClassVar, Self

import torch
from torch import Tensor, nn

from mmalign.diffusion.process import NoiseProcess, process_from
from mmalign.errors import ConfigError, NeedsError
from mmalign.models.lora_files import Place

ATTENTION = (
    *("to_q", "to_k", "to_v", "to_out.0"),
    *("add_q_proj", "add_k_proj", "add_v_proj", "to_add_out"),  # of a flow transformer
)
"""The projections of every attention."""

_WIDE = ("time_ids", "guidance")  # bfloat16 has no 1025


@dataclass(frozen=True, slots=True)
class Condition:
    """The conditioning of a denoiser for N images.

    Attributes:
        embeds: [N, S, D] the prompt, S places.
        pooled: [N, P] the whole prompt in one vector; all families but SD.
        time_ids: [N, 6] height and width of the original, top and left of the crop, height and
            width of the target, in pixels; SDXL. Kept in float32.
        guidance: [N] the scale that a model distilled with guidance imitates. Kept in float32.
    """

    embeds: Tensor
    pooled: Tensor | None = None
    time_ids: Tensor | None = None
    guidance: Tensor | None = None

    def __len__(self) -> int:
        return len(self.embeds)

    def rows(self, index: Tensor | slice) -> Self:
        """Some of the images, by number."""
        return self._each(lambda _, value: value[index])

    def repeat(self, times: int) -> Self:
        """Each image `times` times in a row: a, a, b, b."""
        return self._each(lambda _, value: value.repeat_interleave(times, dim=0))

    def to(self, device: torch.device | str, dtype: torch.dtype | None = None) -> Self:
        """On another device; `dtype` changes the prompt alone."""
        return self._each(lambda name, v: v.to(device, None if name in _WIDE else dtype))

    def with_guidance(self, scale: float) -> Self:
        """For a distilled model: the same scale for every image."""
        return replace(self, guidance=torch.full((len(self),), scale, device=self.embeds.device))

    @classmethod
    def cat(cls, parts: Sequence[Condition]) -> Self:
        """All images of several conditions, which must have the same fields."""
        joined: dict[str, Any] = {}
        for name in (field.name for field in fields(cls)):
            values = [getattr(part, name) for part in parts]
            given = [value for value in values if value is not None]
            if given and len(given) < len(values):
                raise NeedsError(f"conditions cannot be joined: only some of them have {name}")
            joined[name] = torch.cat(given) if given else None
        return cls(**joined)

    def _each(self, change: Callable[[str, Tensor], Tensor]) -> Self:
        values: dict[str, Any] = {field.name: getattr(self, field.name) for field in fields(self)}
        changed = {k: None if v is None else change(k, v) for k, v in values.items()}
        return replace(self, **changed)


@dataclass(frozen=True, slots=True)
class KohyaNames:
    """What kohya's trainer and ComfyUI call a family and its layers in a LoRA file.

    Attributes:
        version: Of the base model, in kohya's header.
        architecture: Of the base model, in the header of `modelspec`.
        place: Layer, by diffusers' name, and the number of `layers` to its place in the file.
        is_known: Whether ComfyUI has a name for a layer.
        kohya_reads: Whether kohya's own reader applies it; others it passes over without a word.
        layers: Setting of the denoiser that its layers are numbered by; None: by no setting.
        loader: diffusers' class that reads such a file; None: none does.
        implementation: The code that the base model is of, in the header of `modelspec`.
        network: kohya's module for such a LoRA.
    """

    version: str
    architecture: str
    place: Callable[[str, int], Place]
    is_known: Callable[[str], bool]
    kohya_reads: Callable[[str], bool]
    layers: str | None = None
    loader: str | None = None
    implementation: str = "diffusers"
    network: str = "networks.lora"


class Family(ABC):
    """One architecture. An instance holds nothing: settings of a pipeline's files are handed in.

    Attributes:
        name: In messages and cache keys.
        title: As people write it.
        pipeline: diffusers' class of its pipelines.
        denoiser: diffusers' class of its denoiser.
        part: The denoiser's folder in a pipeline.
        encoders: Folders of the text encoders.
        optional: Those of them that a pipeline may be without.
        t5: The T5 among them, which reads `t5_limit` tokens; others read what their tokenizer and
            their number of positions allow.
        width: Setting of the denoiser with the width of prompt embeddings.
        has_time_ids: Whether the size of an image is part of the conditioning.
        lora_targets: What a LoRA with targets `auto` adapts.
        kohya: Names of its layers in files of kohya's trainer; None: there are none.
    """

    name: ClassVar[str]
    title: ClassVar[str]
    pipeline: ClassVar[str]
    denoiser: ClassVar[str]
    part: ClassVar[str] = "transformer"
    encoders: ClassVar[tuple[str, ...]]
    optional: ClassVar[tuple[str, ...]] = ()
    t5: ClassVar[str | None] = None
    t5_limit: ClassVar[int] = 256
    width: ClassVar[str] = "joint_attention_dim"
    has_time_ids: ClassVar[bool] = False
    lora_targets: ClassVar[tuple[str, ...]] = ATTENTION
    kohya: ClassVar[KohyaNames | None] = None

    def __str__(self) -> str:
        return self.name

    def fits(self, config: Mapping[str, Any]) -> bool:
        """Whether a denoiser of the class `denoiser` is of this family, by its config.json."""
        return True

    def check(  # noqa: B027  (most refuse nothing)
        self, path: str | Path, config: Mapping[str, Any], revision: str | None
    ) -> None:
        """Refuse a denoiser of this family that reads more than a prompt and an image.

        Raises:
            ConfigError: With the reason.
        """

    def latent_channels(self, config: Mapping[str, Any]) -> int:
        """C of the latents [N, C, h, w]."""
        return int(config.get("in_channels", 4))

    def patch_size(self, config: Mapping[str, Any]) -> int:
        """Latents a side that the denoiser reads as one token."""
        return int(config.get("patch_size", 1))

    def is_distilled(self, config: Mapping[str, Any]) -> bool:
        """Whether the denoiser was distilled with guidance, and is given the scale of it."""
        return False

    @abstractmethod
    def encode(self, pipe: Any, prompts: list[str], device: torch.device) -> Condition:
        """N prompts by diffusers' own `encode_prompt`, without time ids.

        Args:
            pipe: A pipeline of diffusers with text encoders and tokenizers.
            prompts: N prompts.
            device: Of the encoders.
        """

    def zeroes_empty(self, index: Mapping[str, Any]) -> bool:
        """Whether zeros stand for the empty prompt, by model_index.json."""
        return False

    def num_places(self, limits: Mapping[str, int]) -> int:
        """S of `Condition.embeds` without trailing zeros, from the tokens each encoder reads."""
        return limits["text_encoder"]

    def pooled_width(self, config: Mapping[str, Any]) -> int:
        """P of `Condition.pooled`; 0 where there is none."""
        return int(config["pooled_projection_dim"])

    def sized(self, cond: Condition, size: tuple[int, int]) -> Condition:
        """The conditioning of whole images to generate, `size` being height and width in pixels."""
        return cond

    def predict(
        self, model: nn.Module, x_t: Tensor, t_input: Tensor, cond: Condition
    ) -> Tensor:  # [N, C, h, w]
        """The network's raw output, in its own dtype: noise, velocity or image, as it was trained.

        Args:
            model: U-Net or transformer, perhaps in a peft wrapper.
            x_t: [N, C, h, w] noisy latents; cast to the network's dtype.
            t_input: [N] what the network is given for the noise level
                (`NoiseProcess.timestep_input`).
            cond: N conditions; cast likewise.

        Raises:
            NeedsError: The family needs a part of the condition that is not there.
            ConfigError: The condition is of another model.
        """
        dtype = next(model.parameters()).dtype
        cond = cond.to(x_t.device, dtype)
        settings: Any = model.config
        expected = settings[self.width]
        if isinstance(expected, int) and cond.embeds.shape[-1] != expected:
            raise ConfigError(
                f"the prompt embeddings have {cond.embeds.shape[-1]} numbers a token, but the "
                f"denoiser reads {expected}: they are of another model's text encoders. Write the "
                "cache again, or give the pipeline its own text encoders"
            )
        return self.call(model, x_t.to(dtype), t_input, cond)

    @abstractmethod
    def call(self, model: nn.Module, x: Tensor, t: Tensor, cond: Condition) -> Tensor:
        """`predict` with everything in the network's dtype: what the family's pipeline does."""

    def given(self, value: Tensor | None, what: str) -> Tensor:
        """A part of a condition that the denoiser cannot do without.

        Raises:
            NeedsError: It is not there.
        """
        if value is None:
            raise NeedsError(
                f"a denoiser of {self.title} needs {what} in its condition; there are none"
            )
        return value

    def process(
        self, scheduler: Mapping[str, Any], prediction: str = "auto", zero_snr: bool = False
    ) -> NoiseProcess:
        """The noise process that scheduler_config.json describes; see `process_from`.

        Raises:
            ConfigError: One that is not supported.
        """
        return process_from(scheduler, prediction, zero_snr)

    def set_timesteps(self, scheduler: Any, num_steps: int, size: tuple[int, int]) -> None:
        """Give a scheduler of diffusers its steps, as the family's pipeline does.

        Args:
            scheduler: To change.
            num_steps: How many.
            size: Height and width of the latents.
        """
        scheduler.set_timesteps(num_steps)

    def kohya_version(
        self, names: KohyaNames, config: Mapping[str, Any], prediction: str
    ) -> tuple[str, str]:
        """Version and architecture of the base model in the headers of a LoRA file."""
        return names.version, names.architecture
