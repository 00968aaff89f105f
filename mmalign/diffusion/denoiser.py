"""One call for all denoisers: noisy latents, timesteps and a condition to the raw prediction."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Self

import torch

from mmalign.diffusion.pipeline import NUM_TIME_IDS
from mmalign.errors import ConfigError, NeedsError

if TYPE_CHECKING:
    from torch import Tensor, nn


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
