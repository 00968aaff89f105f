"""Attention within segments of one packed row: each prompt, and each response after its prompt.

Registered with transformers as one more attention implementation. Called without segments, as in
generation, it is the model's usual scaled dot product attention.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

import torch
import torch.nn.functional as F

from mmalign.errors import ConfigError, MmalignError

if TYPE_CHECKING:
    from torch import Tensor, nn
    from transformers import PreTrainedModel

    from mmalign.config import ModelConfig

NAME = "mmalign_segments"
_PLAIN_LAYERS = {"full_attention", "sliding_attention"}
_HALF = (torch.bfloat16, torch.float16)
_UNKNOWN = ("softcap", "s_aux", "position_bias", "head_mask")  # change attention; not done here


class CannotPackError(MmalignError):
    """A model whose layers are not plain causal attention; the message is the reason."""


@dataclass(frozen=True, slots=True)
class Segments:
    """Lengths, in tokens, of the pieces of one row: prompt, its responses, next prompt, ..."""

    groups: tuple[tuple[int, tuple[int, ...]], ...]  # (prompt, responses)
    windows: set[int] = field(default_factory=set)  # sliding windows that layers asked for
    masks: dict[tuple[object, ...], Tensor] = field(default_factory=dict)  # of the first layer


def wanted(config: ModelConfig) -> str | None:
    """What transformers is asked for; None leaves it sdpa where a class has it, else eager.

    Raises:
        ConfigError: flex_attention without an accelerator.
    """
    if config.attention == "flex_attention" and not torch.accelerator.is_available():
        raise ConfigError(
            "model.attention is flex_attention, which has no backward pass on a CPU, and there is "
            "no accelerator; use auto"
        )
    return None if config.attention == "auto" else config.attention


def require_supported(config: ModelConfig, kind: type[PreTrainedModel] | None) -> None:
    """Refuse an attention that a class of models lacks.

    Raises:
        ConfigError: naming those that it has.
    """
    if kind is None or config.attention in ("auto", "eager"):
        return
    flags = {"sdpa": "_supports_sdpa", "flash_attention_2": "_supports_flash_attn"}
    flags |= {"flex_attention": "_supports_flex_attn"}
    if not getattr(kind, flags[config.attention], False):
        known = [name for name, flag in flags.items() if getattr(kind, flag, False)]
        raise ConfigError(
            f"model.attention is {config.attention}, which {kind.__name__} does not have; use auto "
            f"or {' or '.join(['eager', *known])}"
        )


def why_not(model: PreTrainedModel) -> str | None:
    """What in a model's class and config rules packing out; None where nothing does."""
    config: Any = model.config.get_text_config()
    if model.config._attn_implementation not in ("sdpa", NAME):
        return f"its attention is {model.config._attn_implementation}, and only sdpa can do it"
    if not model._supports_attention_backend:
        return f"{type(model).__name__} computes its attention by itself"
    other = set(getattr(config, "layer_types", None) or ()) - _PLAIN_LAYERS
    if other:
        return f"{type(model).__name__} has layers that are not plain attention: {sorted(other)}"
    for name in ("attention_chunk_size", "alibi"):
        if getattr(config, name, None):
            return f"{type(model).__name__} has {name} {getattr(config, name)}"
    return None


def install(model: PreTrainedModel) -> None:
    """Let `model` take `segments` as a keyword of its forward; nothing where it does already."""
    if model.config._attn_implementation == NAME:
        return
    from transformers import AttentionInterface, AttentionMaskInterface
    from transformers.masking_utils import sdpa_mask

    AttentionInterface.register(NAME, _attention)
    AttentionMaskInterface.register(NAME, sdpa_mask)
    model.set_attn_implementation(NAME)


def check_windows(model: PreTrainedModel, segments: Segments) -> None:
    """Refuse a model whose sliding windows did not reach the attention function.

    Raises:
        CannotPackError: Long rows would silently attend further than they may.
    """
    config: Any = model.config.get_text_config()
    window = getattr(config, "sliding_window", None)
    slides = "sliding_attention" in (getattr(config, "layer_types", None) or ("sliding_attention",))
    slides = slides and getattr(config, "use_sliding_window", True)
    if window and slides and window not in segments.windows:
        raise CannotPackError(f"its sliding window of {window} is known to its masks only")


def _attention(
    module: nn.Module,
    query: Tensor,  # [1, H, T, D]
    key: Tensor,  # [1, H', T, D]
    value: Tensor,  # [1, H', T, D]
    attention_mask: Tensor | None,
    segments: Segments | None = None,
    **kwargs: Any,
) -> tuple[Tensor, None]:
    """transformers' attention interface; the output is [1, T, H, D]."""
    if segments is None:
        from transformers.integrations.sdpa_attention import sdpa_attention_forward

        return sdpa_attention_forward(module, query, key, value, attention_mask, **kwargs)
    unknown = [name for name in _UNKNOWN if kwargs.get(name) is not None]
    if unknown:
        raise CannotPackError(f"its attention uses {', '.join(unknown)}")
    window = kwargs.get("sliding_window")
    if window is not None:
        segments.windows.add(window)
    options = {"scale": kwargs.get("scaling"), "dropout_p": kwargs.get("dropout", 0.0)}
    groups = query.shape[1] // key.shape[1]

    def attend(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        mask = _mask(q, k, window, segments.masks)
        shares = groups > 1
        if shares and q.is_cuda and (mask is not None or q.dtype not in _HALF):
            # Of the fast kernels flash alone shares heads: without a mask, in half precision.
            k, v = (x.repeat_interleave(groups, dim=1) for x in (k, v))
            shares = False
        return F.scaled_dot_product_attention(
            q, k, v, mask, is_causal=mask is None, enable_gqa=shares, **options
        )

    lengths = [n for prompt, responses in segments.groups for n in (prompt, *responses)]
    pieces = zip(*(tensor.split(lengths, dim=2) for tensor in (query, key, value)), strict=True)
    out: list[Tensor] = []
    for _, responses in segments.groups:
        q, k_prompt, v_prompt = next(pieces)
        out.append(attend(q, k_prompt, v_prompt))
        for _ in responses:
            q, k, v = next(pieces)
            out.append(attend(q, torch.cat([k_prompt, k], 2), torch.cat([v_prompt, v], 2)))
    return torch.cat(out, dim=2).transpose(1, 2).contiguous(), None


def _mask(
    q: Tensor, k: Tensor, window: int | None, made: dict[tuple[object, ...], Tensor]
) -> Tensor | None:
    """What the last positions of a sequence may not see, as numbers to add; None: plain causal."""
    rows, columns = q.shape[2], k.shape[2]
    visible = columns if window is None else min(window, columns)
    if rows == columns == visible:
        return None
    key = (rows, columns, visible, q.device)
    if key not in made:
        # Query i stands at column i + columns - rows; it sees `visible` columns, its own the last.
        seen = torch.ones(rows, columns, dtype=torch.bool, device=q.device).tril(columns - rows)
        seen = seen.triu(columns - rows - visible + 1)
        made[key] = torch.zeros_like(seen, dtype=q.dtype).masked_fill_(~seen, -torch.inf)
    return made[key]
